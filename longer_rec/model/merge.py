"""Token merge: K adjacent events become one token of width X = K * D (paper, section on token merge and InnerTrans).

Groups are aligned to the newest event, so only the oldest group of a history can be incomplete; it is zero-padded
at its old end. Five events and K = 2 give

    [0 e0 | e1 e2 | e3 e4]
"""

import math

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longer_rec.config import Config
from longer_rec.model.jagged import position_from_newest
from longer_rec.model.linear import Linear, batched

# Slots that InnerTrans takes at once: recomputation holds the activations of one such piece alone, 35 MB at D = 32.
PIECE_SLOTS = 1 << 14


class InnerTransConfig(Config):
    """A small transformer inside each group, of the token width D."""

    num_layers: int = pydantic.Field(1, ge=1)
    num_heads: int = pydantic.Field(1, ge=1)
    ffn_multiple: int = pydantic.Field(4, ge=1)


def merged_lengths(length_B: Tensor, merge_size: int) -> Tensor:
    """Groups of each request."""
    return (length_B + merge_size - 1) // merge_size


def group_rows(length_B: Tensor, num_events: int, merge_size: int) -> Tensor:
    """Row of each event in the packed M * K slots of all groups."""
    slot_end_B = merged_lengths(length_B, merge_size).cumsum(0) * merge_size
    end_T = torch.repeat_interleave(slot_end_B, length_B, output_size=num_events)
    return end_T - 1 - position_from_newest(length_B, num_events)


class TokenMerge(nn.Module):
    """event_TD, length_B -> merged_MX, merged lengths; with InnerTrans merged = concat(x) + concat(InnerTrans(x))."""

    def __init__(self, width: int, merge_size: int, inner: InnerTransConfig | None) -> None:
        super().__init__()
        self.width, self.merge_size = width, merge_size
        self.inner = InnerTrans(width, inner) if inner is not None and merge_size > 1 else None

    def forward(self, event_TD: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
        K = self.merge_size
        merged_length_B = merged_lengths(length_B, K)
        if K == 1:
            return event_TD, merged_length_B
        num_merged = int(merged_length_B.sum())
        row_T = group_rows(length_B, event_TD.shape[0], K)
        group_MKD = event_TD.new_zeros(num_merged * K, self.width).index_copy(0, row_T, event_TD)
        group_MKD = group_MKD.view(num_merged, K, self.width)
        if self.inner is not None:
            valid_MK = torch.zeros(num_merged * K, dtype=torch.bool, device=event_TD.device)
            valid_MK = valid_MK.index_fill(0, row_T, True).view(num_merged, K)
            group_MKD = group_MKD + self.inner(group_MKD, valid_MK)
        return group_MKD.flatten(1), merged_length_B


class InnerTrans(nn.Module):
    """Pre-norm transformer layers over the slots of a group, then a projection that starts at zero."""

    def __init__(self, width: int, config: InnerTransConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(InnerLayer(width, config) for _ in range(config.num_layers))
        self.out = Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, group_MKD: Tensor, valid_MK: Tensor) -> Tensor:
        """Padded slots (``valid`` false) are seen by nobody and come out as 0."""
        pieces = [each.split(max(PIECE_SLOTS // group_MKD.shape[1], 1)) for each in (group_MKD, valid_MK)]
        outputs = [self.piece(*each) for each in zip(*pieces, strict=True)]
        return torch.cat(outputs) if outputs[1:] else outputs[0]

    def piece(self, group_MKD: Tensor, valid_MK: Tensor) -> Tensor:
        """``forward`` of some groups."""
        token_MKD = group_MKD
        for layer in self.layers:
            token_MKD = layer(token_MKD, valid_MK)
        return self.out(token_MKD) * valid_MK.unsqueeze(-1)


class InnerLayer(nn.Module):
    """Bidirectional attention among the K slots, then the FFN."""

    def __init__(self, width: int, config: InnerTransConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.up = Linear(width, config.ffn_multiple * width)
        self.down = Linear(config.ffn_multiple * width, width)

    def forward(self, token_MKD: Tensor, valid_MK: Tensor) -> Tensor:
        M, K, D = token_MKD.shape
        H = self.num_heads
        qkv = self.qkv(self.attention_norm(token_MKD)).view(M, K, 3, H, D // H)
        query_MHKE, key_MHKE, value_MHKE = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        score = batched(query_MHKE, key_MHKE.transpose(-1, -2)) / math.sqrt(D // H)
        # Finite, so that a padded slot's own row stays free of NaN; its output is dropped.
        score = score.masked_fill(~valid_MK[:, None, None, :], torch.finfo(score.dtype).min)
        mixed_MKD = batched(score.softmax(-1), value_MHKE).transpose(1, 2).reshape(M, K, D)
        token_MKD = token_MKD + self.proj(mixed_MKD)
        return token_MKD + self.down(F.silu(self.up(self.ffn_norm(token_MKD))))
