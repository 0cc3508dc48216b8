"""The layer that both sides go through: user tokens once, candidates against what the user left.

token + proj(attention(token)), then token + FFN(norm(token)); ``norms.py`` says what else is normalised.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longer_rec.model.attention import attend, attend_all, join
from longer_rec.model.attention_plan import plan_attention
from longer_rec.model.linear import Linear, for_attention, linear
from longer_rec.model.norms import HeadNorm, LayerNorms, NormKind, build_norm, init_megatron
from longer_rec.model.own_attention import OwnMask, attend_and_merge, cat_or_one, log_matches, merge_own
from longer_rec.model.phd import Chunk
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
        self.qkv = Linear(merged_width, 3 * merged_width, bias=False)
        self.own_gain = nn.Parameter(torch.zeros(merged_width))
        self.proj = Linear(merged_width, merged_width, bias=False)
        self.ffn_norm = build_norm(norm_kind, merged_width)
        self.up = Linear(merged_width, ffn_multiple * merged_width)
        self.down = Linear(ffn_multiple * merged_width, merged_width)
        self.output_norm = build_norm(norm_kind, merged_width) if norms.output else nn.Identity()
        if megatron_layers:
            init_megatron([self.qkv, self.up], [self.proj, self.down], merged_width, megatron_layers)
        if matcher_gamma:
            start_as_matcher(self.qkv.weight, matcher_gamma)

    def encode(self, token_SX: Tensor, length_B: Tensor, queries: Queries) -> tuple[Tensor, LayerCache]:
        """Outputs of the queries (Q x X) and the keys and values of all tokens, ``length_B`` of each request."""
        X = self.merged_width
        normed_SX = self.attention_norm(token_SX)
        key, value = linear(normed_SX[:queries.num_keys], self.qkv.weight[X:]).chunk(2, dim=-1)
        cache = LayerCache(self.key_norm(self._heads(key)), self.value_norm(self._heads(value)), length_B)
        if queries.row_Q is not None:
            if queries.row_Q.numel() == 0:
                return token_SX[:0], cache
            token_SX, normed_SX = (each.index_select(0, queries.row_Q) for each in (token_SX, normed_SX))
        query = self.query_norm(self._heads(linear(normed_SX, self.qkv.weight[:X])))
        plan = plan_attention(queries.length_B, length_B, self.num_heads, causal=True, position_Q=queries.position_Q)
        mixed, _ = attend(query, cache.key_SHE, cache.value_SHE, plan)
        return self._finish(token_SX, mixed.flatten(1)), cache

    def encode_hidden(self, hidden_UX: Tensor, cache: LayerCache, chunk: Chunk, position_U: Tensor | None
                      ) -> tuple[Tensor, LayerCache]:
        """Outputs of the users' hidden tokens, and the keys and values of the window that candidates see.

        ``position_U``: the last original that each sees; None: nobody reads the outputs.
        """
        X = self.merged_width
        if position_U is None:
            hidden_UX = hidden_UX.index_select(0, chunk.window_row)
        normed_UX = self.attention_norm(hidden_UX)
        key, value = linear(normed_UX, self.qkv.weight[X:]).chunk(2, dim=-1)
        key, value = self.key_norm(self._heads(key)), self.value_norm(self._heads(value))
        if position_U is None:
            return hidden_UX[:0], LayerCache(key, value, chunk.window_length_B)
        query = self.query_norm(self._heads(linear(normed_UX, self.qkv.weight[:X])))
        originals = plan_attention(chunk.length_B, cache.length_B, self.num_heads, False, position_U)
        hidden = plan_attention(chunk.length_B, chunk.length_B, self.num_heads, False, chunk.last_U, chunk.first_U)
        mixed, _ = join(attend(query, cache.key_SHE, cache.value_SHE, originals), attend(query, key, value, hidden))
        window = LayerCache(key[chunk.window_row], value[chunk.window_row], chunk.window_length_B)
        return self._finish(hidden_UX, mixed.flatten(1)), window

    def score(self, token_CGX: Tensor, cache: LayerCache, num_candidates_B: Tensor, mask: OwnMask) -> Tensor:
        """Candidates' last tokens, the queries of ``mask``, attending to their request's cached keys and their own."""
        own = self.own_heads(self.attention_norm(token_CGX), len(mask.seen))
        mixed_CQX, _ = self._attend_own(own, cache, num_candidates_B, mask)
        return self._finish(token_CGX[:, -len(mask.seen):], mixed_CQX)

    def score_and_count(self, token_CGX: Tensor, cache: LayerCache, num_candidates_B: Tensor, mask: OwnMask
                        ) -> tuple[Tensor, Tensor]:
        """``score``, and ``log_matches`` of each candidate's last token, C x H."""
        own = self.own_heads(self.attention_norm(token_CGX), len(mask.seen))
        mixed_CQX, log_sum_CQH = self._attend_own(own, cache, num_candidates_B, mask)
        return (self._finish(token_CGX[:, -len(mask.seen):], mixed_CQX),
                log_matches(own[0][:, -1], own[1][:, mask.seen[-1][-1]], log_sum_CQH[:, -1]))

    def _attend_own(self, own: tuple[Tensor, Tensor, Tensor], cache: LayerCache, num_candidates_B: Tensor,
                    mask: OwnMask) -> tuple[Tensor, Tensor]:
        """Attention of the candidates' ``own`` queries, C x Q x X, and the log-sum-exp of the request's keys in it."""
        query_CQHE, key_CGHE, value_CGHE = own
        C, Q, H, _ = query_CQHE.shape
        if cache.window is None and query_CQHE.device.type == "cpu" and not torch.is_grad_enabled():
            counts, lengths = num_candidates_B.tolist(), cache.length_B.tolist()
            parts = [attend_and_merge(*one, mask) for one in zip(
                query_CQHE.split(counts), cache.key_SHE.split(lengths), cache.value_SHE.split(lengths),
                key_CGHE.split(counts), value_CGHE.split(counts), strict=True)]
            mixed, log_sums = zip(*parts or [(query_CQHE, query_CQHE[..., 0])], strict=True)
            return cat_or_one(mixed).flatten(2), cat_or_one(log_sums)
        shared, log_sum = attend_all(query_CQHE.flatten(0, 1), cache.key_SHE, cache.value_SHE, num_candidates_B * Q,
                                     cache.length_B)
        if cache.window is not None:
            shared, log_sum = self._add_window(shared, log_sum, query_CQHE, cache.window, num_candidates_B, mask)
        mixed_CQHE = merge_own(shared, log_sum, query_CQHE, key_CGHE, value_CGHE, mask)
        return mixed_CQHE.flatten(2), log_sum.view(C, Q, H)

    def _add_window(self, shared_QHE: Tensor, log_sum_QH: Tensor, query_CQHE: Tensor, window: LayerCache,
                    num_candidates_B: Tensor, mask: OwnMask) -> tuple[Tensor, Tensor]:
        """What the hidden copies among the queries see of the users' hidden tokens, on top."""
        C, Q, H, E = query_CQHE.shape
        parts = [Q - mask.num_hidden, mask.num_hidden]
        originals, hidden = shared_QHE.view(C, Q, H, E).split(parts, dim=1)
        original_sums, hidden_sums = log_sum_QH.view(C, Q, H).split(parts, dim=1)
        added = attend_all(query_CQHE[:, parts[0]:].flatten(0, 1), window.key_SHE, window.value_SHE,
                           num_candidates_B * mask.num_hidden, window.length_B)
        joined, sums = join((hidden.flatten(0, 1), hidden_sums.flatten(0, 1)), added)
        return (torch.cat([originals, joined.view(hidden.shape)], dim=1).flatten(0, 1),
                torch.cat([original_sums, sums.view(hidden_sums.shape)], dim=1).flatten(0, 1))

    def own_heads(self, normed_CGX: Tensor, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of candidates' tokens: the last ones' queries, C x Q x H x E, all keys and gated values, C x G x H x E."""
        X, weight = self.merged_width, self.qkv.weight
        gate_weight = not self.norms.heads and normed_CGX.shape[:2].numel() > X and weight.dtype == self.own_gain.dtype
        if gate_weight:  # one pass over the weights, not over the candidates
            query_key, value = weight.split([2 * X, X])
            weight = torch.cat([query_key, value * self.own_gain.unsqueeze(1)])
        if num_queries == normed_CGX.shape[1]:
            parts = linear(normed_CGX, weight).chunk(3, dim=-1)
        else:
            parts = (linear(normed_CGX[:, -num_queries:], weight[:X]),
                     *linear(normed_CGX, weight[X:]).chunk(2, dim=-1))
        query_CQHE, key_CGHE, value_CGHE = (self._heads(each) for each in parts)
        if gate_weight:
            return query_CQHE, key_CGHE, value_CGHE
        gain_HE = self._heads(self.own_gain).to(value_CGHE.dtype)
        return self.query_norm(query_CQHE), self.key_norm(key_CGHE), self.value_norm(value_CGHE) * gain_HE

    def _finish(self, token: Tensor, mixed: Tensor) -> Tensor:
        token = token + self._drop(self.proj(mixed))
        normed = self.ffn_norm(token)
        stream = normed if self.norms.stream else token
        return self.output_norm(stream + self._drop(self.down(F.silu(self.up(normed)))))

    def _drop(self, value: Tensor) -> Tensor:
        return F.dropout(value, self.dropout, self.training) if self.dropout else value

    def _heads(self, value: Tensor) -> Tensor:
        return for_attention(value).unflatten(-1, (self.num_heads, self.head_width))


def start_as_matcher(qkv_weight: Tensor, gamma: float) -> None:
    """W_q, W_k = gamma * I + small noise: head j reads the part of the token that it compares.

    With at least K heads each head compares one slot. A random start learned nothing in 20 s of training
    (test AUC 0.508 against 0.68 on completejourney, L = 200).
    """
    X = qkv_weight.shape[1]
    with torch.no_grad():
        for block in (qkv_weight[:X], qkv_weight[X:2 * X]):
            block.copy_(gamma * torch.eye(X) + 0.02 * torch.randn(X, X))
