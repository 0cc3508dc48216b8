"""Parallel hidden decoding (arXiv 2504.14992): R copies of a token that is read, the last of which is read.

Copy 1 is the original and lives as if there were no other; copies 2 .. R are hidden. All go through the same weights. A
copy sees the originals of earlier positions, and at its own position itself and the copies before it, so nothing that
is cached grows with R. With a window (PHD-CSWA) the users' newest C queries, the chunk, have hidden copies too, and a
hidden copy also sees the W hidden tokens before its position.
"""

from dataclasses import dataclass

import pydantic
import torch
from torch import Tensor, nn

from longer_rec.config import Config
from longer_rec.errors import ConfigError
from longer_rec.model.jagged import newest_rows, request_of, start_of
from longer_rec.model.sampling import Queries, Sampling


class PHDConfig(Config):
    """``window`` counts hidden tokens, R - 1 a position; ``chunk`` counts queries, of which only the newest matter."""

    copies: int = pydantic.Field(2, ge=1, le=64, description="R: the original and R - 1 hidden copies")
    window: int = pydantic.Field(0, ge=0, description="W; 0: hidden copies of candidates alone")
    chunk: int = pydantic.Field(0, ge=0, description="C: the newest queries, which have hidden copies too")
    copy_embedding: bool = pydantic.Field(True, description="a learned vector tells each hidden copy from its original")


@dataclass(frozen=True)
class Chunk:
    """Where the users' hidden tokens stand, packed over requests in order of (position, copy).

    ``length_B``: their number. ``cross_position_U``, ``self_position_U``: the last original each sees among the keys of
    the cross layer, and of the self layers. ``first_U``, ``last_U``: the hidden tokens each sees, first and last.
    ``window_row``: the newest W of each request, ``window_length_B`` many, which candidates see.
    """

    length_B: Tensor
    cross_position_U: Tensor
    self_position_U: Tensor
    first_U: Tensor
    last_U: Tensor
    window_row: Tensor
    window_length_B: Tensor

    def position_U(self, depth: int, is_last: bool) -> Tensor | None:
        """Of the layer at ``depth``; None for the last, whose outputs nobody reads."""
        return None if is_last else self.self_position_U if depth else self.cross_position_U


class HiddenCopies(nn.Module):
    """Makes hidden copies of tokens."""

    def __init__(self, config: PHDConfig, merged_width: int) -> None:
        super().__init__()
        self.config, self.num_hidden = config, config.copies - 1
        has_embedding = config.copy_embedding and self.num_hidden > 0
        self.embedding = nn.Parameter(torch.randn(self.num_hidden, merged_width) * 0.02) if has_embedding else None

    def forward(self, token: Tensor) -> Tensor:
        """... x X -> ... x (R - 1) x X."""
        hidden = token.unsqueeze(-2).expand(*token.shape[:-1], self.num_hidden, token.shape[-1])
        return hidden if self.embedding is None else hidden + self.embedding

    def of_candidates(self, token_CGX: Tensor) -> Tensor:
        """C x (R * G) x X: the originals, then each hidden copy of all of them."""
        if not self.num_hidden:
            return token_CGX
        return torch.cat([token_CGX, self.forward(token_CGX).transpose(1, 2).flatten(1, 2)], dim=1)

    def of_queries(self, token_SX: Tensor, length_B: Tensor, queries: Queries, num_globals: int
                   ) -> tuple[Tensor, Chunk | None]:
        """Hidden tokens of the newest queries (U x X) and where they stand; None without a window.

        Queries end with the user's globals, which have no copies.
        """
        if not self.config.window:
            return token_SX[:0], None
        P, W = self.num_hidden, self.config.window
        kept_B = queries.length_B - num_globals
        held_B = kept_B.clamp(max=self.config.chunk)
        window_B = (held_B * P).clamp(max=W)
        num_held, num_window = torch.stack([held_B.sum(), window_B.sum()]).tolist()  # host sync on GPU
        request_Q = request_of(held_B, num_held)
        index_Q = torch.arange(num_held, device=length_B.device) - start_of(held_B)[request_Q]
        rank_Q = index_Q + (kept_B - held_B)[request_Q]
        query_Q = start_of(queries.length_B)[request_Q] + rank_Q
        row_Q = query_Q if queries.row_Q is None else queries.row_Q[query_Q]
        position_Q = row_Q - start_of(length_B)[request_Q]
        copy_U = torch.arange(P, device=length_B.device).repeat(num_held)
        before_U = (index_Q * P).repeat_interleave(P)
        return self.forward(token_SX.index_select(0, row_Q)).flatten(0, 1), Chunk(
            held_B * P, position_Q.repeat_interleave(P), rank_Q.repeat_interleave(P), (before_U - W).clamp(min=0),
            before_U + copy_U, newest_rows(held_B * P, window_B, num_window), window_B)


def check_phd(config: PHDConfig, sampling: Sampling, num_queries: int, largest: int) -> None:
    """Refuse windows and chunks that cannot be; ``largest``: merged tokens of the longest history."""
    copies, window, chunk = config.copies, config.window, config.chunk
    if not window and not chunk:
        return
    if copies < 2:
        raise ConfigError(f"model.phd.copies={copies} has no hidden copies for window={window} and chunk={chunk}; use "
                          "copies of 2 or more, or leave window and chunk out")
    if not window or not chunk:
        raise ConfigError(f"model.phd.window={window} and chunk={chunk} go together: the copies of a chunk are seen "
                          "through the window alone; set both above 0, or leave both out")
    if sampling == "learnable":
        raise ConfigError("model.phd.window needs queries that stand for positions, and learned ones do not; choose "
                          "another model.sampling, or leave window and chunk out")
    bound, name = (largest, "merged tokens of a history") if sampling == "all" else (num_queries, "model.num_queries")
    if chunk > bound:
        raise ConfigError(f"model.phd.chunk={chunk} is more than the {bound} {name}; use at most that")
    if window > chunk * (copies - 1):
        raise ConfigError(f"model.phd.window={window} is more than the {chunk * (copies - 1)} hidden tokens of a chunk "
                          f"of {chunk} positions with {copies} copies; use at most that, or a larger chunk")
