"""Small inputs for towers, with the shapes that hurt, in fp64 so that parity bounds can be tight."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide
from longer_rec.model.tower import AnyTower

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


def matching_loss(tower: AnyTower) -> float:
    """Mean loss of the last 20 of 120 steps on random ids, where nothing but matching beats a coin's 0.69.

    The tower reads 21 events with one item feature, 32 wide.
    """
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(400, 32, generator=generator)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        user, candidates, label = _matching_batch(generator, table)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(tower.score(tower.encode(user), candidates), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def _matching_batch(generator: torch.Generator, table: Tensor) -> tuple[UserSide, CandidateSide, Tensor]:
    """32 requests of 21 events and 8 candidates, positive if and only if in the history."""
    num_ids, num_requests, length, count = len(table), 32, 21, 8
    event_id = torch.randint(1, num_ids, (num_requests, length), generator=generator)
    old = event_id[:, torch.randint(0, length, (count,), generator=generator)]
    fresh = torch.randint(1, num_ids, (num_requests, count), generator=generator)
    candidate_id = torch.where(torch.rand(num_requests, count, generator=generator) < 0.5, old, fresh)
    label = (candidate_id.unsqueeze(2) == event_id.unsqueeze(1)).any(2).float().reshape(-1, 1)
    age = torch.arange(length, 0, -1).repeat(num_requests) * DAY_S
    user = UserSide({"item": table[event_id.flatten()]}, {"item": event_id.flatten()}, age,
                    torch.full((num_requests,), length), {}, torch.zeros(num_requests, 0))
    candidates = CandidateSide({"item": table[candidate_id.flatten()]}, {"item": candidate_id.flatten()},
                               torch.zeros(num_requests * count, 0), torch.full((num_requests,), count))
    return user, candidates, label


def _embeddings(widths: dict[str, int], rows: int, generator: torch.Generator, dtype: torch.dtype
                ) -> dict[str, Tensor]:
    return {name: torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
            for name, width in widths.items()}
