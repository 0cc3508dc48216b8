"""The layer that both sides go through: user tokens once, candidates against what the user left.

token + proj(attention(token)), then token + FFN(norm(token)); ``norms.py`` says what else is normalised.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longer_rec.model.attention import attend
from longer_rec.model.attention_plan import plan_attention
from longer_rec.model.norms import HeadNorm, LayerNorms, NormKind, build_norm, init_megatron
from longer_rec.model.own_attention import merge_own
from longer_rec.model.sampling import Queries
from longer_rec.model.state import LayerCache


class CausalLayer(nn.Module):
    """One layer of the tower; cross-causal or self-causal depending on how many queries it is asked for.

    A candidate's own values pass through ``own_gain``, which starts at 0 (the paper has plain values): its own key is a
    sink that reads as "nothing found". A matched event's value would else differ from its own in the type vector alone,
    and at K = 4 matching took twice as many steps to learn.

    ``megatron_layers``: start by ``init_megatron`` as one of so many layers; 0 is PyTorch's own start.
    """

    def __init__(self, merged_width: int, num_heads: int, ffn_multiple: int, dropout: float, norm_kind: NormKind,
                 matcher_gamma: float, norms: LayerNorms, megatron_layers: int = 0) -> None:
        super().__init__()
        self.num_heads, self.head_width = num_heads, merged_width // num_heads
        self.merged_width, self.dropout, self.norms = merged_width, dropout, norms
        self.attention_norm = build_norm(norm_kind, merged_width) if norms.input else nn.Identity()
        # Queries and keys of length gamma sqrt(E), as W = gamma I makes them of normalised tokens: the same logits.
        gains = (matcher_gamma or 1.0, matcher_gamma or 1.0, 1.0)
        self.query_norm, self.key_norm, self.value_norm = (
            HeadNorm(self.head_width, gain) if norms.heads else nn.Identity() for gain in gains)
        self.qkv = nn.Linear(merged_width, 3 * merged_width, bias=False)
        self.own_gain = nn.Parameter(torch.zeros(merged_width))
        self.proj = nn.Linear(merged_width, merged_width, bias=False)
        self.ffn_norm = build_norm(norm_kind, merged_width)
        self.up = nn.Linear(merged_width, ffn_multiple * merged_width)
        self.down = nn.Linear(ffn_multiple * merged_width, merged_width)
        self.output_norm = build_norm(norm_kind, merged_width) if norms.output else nn.Identity()
        if megatron_layers:
            init_megatron([self.qkv, self.up], [self.proj, self.down], merged_width, megatron_layers)
        if matcher_gamma:
            start_as_matcher(self.qkv.weight, matcher_gamma)

    def encode(self, token_SX: Tensor, length_B: Tensor, queries: Queries) -> tuple[Tensor, LayerCache]:
        """Outputs of the queries (Q x X) and the keys and values of all tokens, ``length_B`` of each request."""
        X = self.merged_width
        normed_SX = self.attention_norm(token_SX)
        key, value = F.linear(normed_SX[:queries.num_keys], self.qkv.weight[X:]).chunk(2, dim=-1)
        cache = LayerCache(self.key_norm(self._heads(key)), self.value_norm(self._heads(value)), length_B)
        if queries.row_Q is not None:
            if queries.row_Q.numel() == 0:
                return token_SX[:0], cache
            token_SX, normed_SX = (each.index_select(0, queries.row_Q) for each in (token_SX, normed_SX))
        query = self.query_norm(self._heads(F.linear(normed_SX, self.qkv.weight[:X])))
        plan = plan_attention(queries.length_B, length_B, self.num_heads, causal=True, position_Q=queries.position_Q)
        mixed, _ = attend(query, cache.key_SHE, cache.value_SHE, plan)
        return self._finish(token_SX, mixed.flatten(1)), cache

    def score(self, token_CGX: Tensor, cache: LayerCache, num_candidates_B: Tensor) -> Tensor:
        """Candidates' tokens, each attending to its request's cached keys and to its own tokens."""
        C, G, X = token_CGX.shape
        query_CGHE, key_CGHE, value_CGHE = self.own_heads(self.attention_norm(token_CGX))
        plan = plan_attention(num_candidates_B * G, cache.length_B, self.num_heads, causal=False)
        shared, log_sum = attend(query_CGHE.flatten(0, 1), cache.key_SHE, cache.value_SHE, plan)
        mixed_CGHE = merge_own(shared, log_sum, query_CGHE, key_CGHE, value_CGHE)
        return self._finish(token_CGX, mixed_CGHE.reshape(C, G, X))

    def own_heads(self, normed_CGX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and gated values of the candidates' tokens, each C x G x H x E."""
        weight = self.qkv.weight
        if not self.norms.heads:  # the gate in the weights, which costs no pass over the candidates
            query_key, value = weight.split([2 * self.merged_width, self.merged_width])
            weight = torch.cat([query_key, value * self.own_gain.unsqueeze(1)])
        query_CGHE, key_CGHE, value_CGHE = (self._heads(each) for each in F.linear(normed_CGX, weight).chunk(3, dim=-1))
        if not self.norms.heads:
            return query_CGHE, key_CGHE, value_CGHE
        gain_HE = self._heads(self.own_gain).to(value_CGHE.dtype)
        return self.query_norm(query_CGHE), self.key_norm(key_CGHE), self.value_norm(value_CGHE) * gain_HE

    def _finish(self, token: Tensor, mixed: Tensor) -> Tensor:
        token = token + self._drop(self.proj(mixed))
        normed = self.ffn_norm(token)
        stream = normed if self.norms.stream else token
        return self.output_norm(stream + self._drop(self.down(F.silu(self.up(normed)))))

    def _drop(self, value: Tensor) -> Tensor:
        return F.dropout(value, self.dropout, self.training) if self.dropout else value

    def _heads(self, value: Tensor) -> Tensor:
        return value.unflatten(-1, (self.num_heads, self.head_width))


def start_as_matcher(qkv_weight: Tensor, gamma: float) -> None:
    """W_q, W_k = gamma * I + small noise: head j reads the part of the token that it compares.

    With at least K heads each head compares one slot. A random start learned nothing in 20 s of training
    (test AUC 0.508 against 0.68 on completejourney, L = 200).
    """
    X = qkv_weight.shape[1]
    with torch.no_grad():
        for block in (qkv_weight[:X], qkv_weight[X:2 * X]):
            block.copy_(gamma * torch.eye(X) + 0.02 * torch.randn(X, X))
