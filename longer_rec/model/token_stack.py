"""Causal layers over a user's tokens, and candidates that attend to them: what instance transformers are made of."""

from typing import cast

import torch
from torch import Tensor, nn

from longer_rec.model.layers import CausalLayer
from longer_rec.model.merge import TokenMerge
from longer_rec.model.norms import layer_norms
from longer_rec.model.own_attention import own_mask
from longer_rec.model.sampling import Queries, newest
from longer_rec.model.state import LayerCache


class TokenStack(nn.Module):
    """``encode`` a user's tokens once, ``score`` candidates' tokens against them; X = K * ``width``.

    Groups of K tokens are merged, the first layer's queries are the newest ``num_queries`` of them (None: all), and
    what nobody reads, the last layer's outputs at the tokens, is not computed.
    """

    def __init__(self, width: int, num_layers: int, num_heads: int, ffn_multiple: int, dropout: float = 0.0,
                 merge_size: int = 1, num_queries: int | None = None, matcher_gamma: float = 2.0) -> None:
        super().__init__()
        X = merge_size * width
        self.merge_size, self.num_queries = merge_size, num_queries
        self.merge = TokenMerge(width, merge_size, None)
        self.layers = nn.ModuleList(
            CausalLayer(X, num_heads, ffn_multiple, dropout, "layer", matcher_gamma, layer_norms("pre", depth))
            for depth in range(num_layers))
        self.norm = nn.LayerNorm(X)

    @property
    def causal_layers(self) -> list[CausalLayer]:
        return cast(list[CausalLayer], list(self.layers))

    def encode(self, token_ND: Tensor, length_B: Tensor) -> tuple[LayerCache, ...]:
        """Keys and values of each layer."""
        token_SX, length_B = self.merge(token_ND, length_B)
        caches = []
        for depth, layer in enumerate(self.causal_layers):
            queries = Queries(length_B)
            if depth + 1 == len(self.layers):
                queries = newest(length_B, torch.zeros_like(length_B))
            elif depth == 0 and self.num_queries is not None:
                queries = newest(length_B, length_B.clamp(max=self.num_queries))
            token_SX, cache = layer.encode(token_SX, length_B, queries)
            caches.append(cache)
            length_B = queries.length_B
        return tuple(caches)

    def score(self, token_CX: Tensor, caches: tuple[LayerCache, ...], num_candidates_B: Tensor) -> Tensor:
        """C x X: a candidate's token behind its user's, in none other's sight."""
        token_CGX = token_CX.unsqueeze(1)
        for layer, cache in zip(self.causal_layers, caches, strict=True):
            token_CGX = layer.score(token_CGX, cache, num_candidates_B, own_mask(1))
        return self.norm(token_CGX.squeeze(1))
