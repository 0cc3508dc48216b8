"""Small inputs for towers, with the shapes that hurt, in fp64 so that parity bounds can be tight."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide

WIDTHS = InputWidths(item={"item": 5, "category": 3}, event={"quantity": 2}, user={"user": 4}, num_dense=2,
                     num_item_dense=3)
NUM_IDS = 6
DAY_S = 86400


def make_user(lengths: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> UserSide:
    """Histories of the given lengths; ids from a handful, 0 among them, ages with ties (baskets)."""
    generator = torch.Generator().manual_seed(seed)
    num_requests, num_events = len(lengths), sum(lengths)
    ages = [torch.randint(1, 12, (n,), generator=generator).sort(descending=True).values * 3 * DAY_S for n in lengths]
    return UserSide(
        _embeddings({**WIDTHS.item, **WIDTHS.event}, num_events, generator, dtype),
        {name: torch.randint(0, NUM_IDS, (num_events,), generator=generator) for name in (*WIDTHS.item, *WIDTHS.event)},
        torch.cat(ages) if ages else torch.zeros(0, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64),
        _embeddings(WIDTHS.user, num_requests, generator, dtype),
        torch.randn(num_requests, WIDTHS.num_dense, generator=generator, dtype=dtype))


def make_candidates(lengths: Sequence[int], seed: int = 1, dtype: torch.dtype = torch.float64) -> CandidateSide:
    """Candidates per request, their ids from the same handful as the events'."""
    generator = torch.Generator().manual_seed(seed)
    return CandidateSide(
        _embeddings(WIDTHS.item, sum(lengths), generator, dtype),
        {name: torch.randint(0, NUM_IDS, (sum(lengths),), generator=generator) for name in WIDTHS.item},
        torch.randn(sum(lengths), WIDTHS.num_item_dense, generator=generator, dtype=dtype),
        torch.tensor(lengths, dtype=torch.int64))


def leaves(user: UserSide, candidates: CandidateSide) -> list[Tensor]:
    """Every embedding that a gradient reaches."""
    return [*user.event_embedding.values(), *user.user_embedding.values(), *candidates.embedding.values()]


def replace_candidate(candidates: CandidateSide, row: int, seed: int = 9) -> CandidateSide:
    """Another candidate in place of ``row``."""
    other = make_candidates([1], seed, next(iter(candidates.embedding.values())).dtype)
    embedding = {name: value.detach().clone() for name, value in candidates.embedding.items()}
    ids = {name: value.clone() for name, value in candidates.id.items()}
    dense_CF = candidates.dense_CF.clone()
    dense_CF[row] = other.dense_CF[0]
    for name in ids:
        embedding[name][row] = other.embedding[name][0].detach()
        ids[name][row] = other.id[name][0]
    return replace(candidates, embedding=embedding, id=ids, dense_CF=dense_CF)


def randomise(module: torch.nn.Module, seed: int = 3, std: float = 0.2) -> None:
    """Move every parameter away from its special start: zeros would hide a wrong gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def _embeddings(widths: dict[str, int], rows: int, generator: torch.Generator, dtype: torch.dtype
                ) -> dict[str, Tensor]:
    return {name: torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
            for name, width in widths.items()}
