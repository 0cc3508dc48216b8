"""Multi-head target attention over a few events that each candidate chooses: the second stage of SIM and TWIN."""

import math
from collections.abc import Callable

import pydantic
import torch
from torch import Tensor, nn

from longer_rec.model.baselines.common import SequenceConfig, check_heads
from longer_rec.model.layers import start_as_matcher
from longer_rec.model.linear import Linear, batched, linear
from longer_rec.model.state import LayerCache

# (request, its scores H x C x L) -> the chosen events, C x L bool.
Choose = Callable[[int, Tensor], Tensor]


class TargetConfig(SequenceConfig):
    """``top_k``: at most so many events does a candidate attend to."""

    top_k: int = pydantic.Field(100, ge=1)
    num_heads: int = pydantic.Field(1, ge=1)
    matcher_gamma: float = pydantic.Field(2.0, ge=0.0, description="W_q, W_k start as this times I; 0: random start")


class TargetAttention(nn.Module):
    """softmax over the chosen events of q . k / sqrt(E) [+ what a key adds by itself], values, output projection.

    A candidate's own key joins the softmax with a value of 0, as in LONGER's layers (the papers have none): the mass
    on the events then reads n / (n + 1), and a candidate that chose no event gets 0. W_q and W_k start as a matcher.
    """

    def __init__(self, config: TargetConfig) -> None:
        super().__init__()
        check_heads(config.num_heads, config.width)
        width, self.num_heads = config.width, config.num_heads
        self.query_key = Linear(width, 2 * width, bias=False)
        self.value = Linear(width, width, bias=False)
        self.proj = Linear(width, width, bias=False)
        if config.matcher_gamma:
            start_as_matcher(self.query_key.weight, config.matcher_gamma)

    def memory(self, compared_TD: Tensor, token_TD: Tensor, bias_TH: Tensor | None, length_B: Tensor) -> LayerCache:
        """Keys T x H x (E + 1), the last column each event's own addition to its score, and values T x H x E."""
        _, key_weight = self.query_key.weight.chunk(2)
        key_THE = self._heads(linear(compared_TD, key_weight))
        bias = torch.zeros_like(key_THE[..., :1]) if bias_TH is None else bias_TH.unsqueeze(-1)
        return LayerCache(torch.cat([key_THE, bias.to(key_THE.dtype)], -1), self._heads(self.value(token_TD)), length_B)

    def forward(self, compared_CD: Tensor, memory: LayerCache, num_candidates_B: Tensor, choose: Choose) -> Tensor:
        """C x D."""
        query_CHE, key_CHE = (self._heads(each) for each in self.query_key(compared_CD).chunk(2, dim=-1))
        query_CHE = query_CHE / math.sqrt(query_CHE.shape[-1])
        own_CH = (query_CHE * key_CHE).sum(-1)
        query_CHE = torch.cat([query_CHE, torch.ones_like(query_CHE[..., :1])], dim=-1)
        counts, lengths = num_candidates_B.tolist(), memory.length_B.tolist()  # host sync on GPU
        mixed = [compared_CD[:0]]
        for request, (query, own, key, value) in enumerate(zip(
                query_CHE.split(counts), own_CH.split(counts), memory.key_SHE.split(lengths),
                memory.value_SHE.split(lengths), strict=True)):
            score_HCL = batched(query.transpose(0, 1), key.permute(1, 2, 0))
            chosen_CL = choose(request, score_HCL.detach())
            score_HCL = torch.cat([score_HCL.masked_fill(~chosen_CL, -math.inf), own.T.unsqueeze(-1)], dim=-1)
            weight_HCL = score_HCL.softmax(-1)[..., :-1].to(value.dtype)
            mixed.append(batched(weight_HCL, value.transpose(0, 1)).transpose(0, 1).flatten(1))
        return self.proj(torch.cat(mixed))

    def _heads(self, value: Tensor) -> Tensor:
        return value.unflatten(-1, (self.num_heads, -1))
