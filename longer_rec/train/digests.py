"""The digest of every tensor of a run, step by step: what tells where two runs part."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longer_rec.errors import DataError, RankLost
from longer_rec.runtime.digest import local_digest
from longer_rec.runtime.distributed import World

DIGESTS = "digests.jsonl"
_SHOWN = 5


class StateDigests:
    """Digests the tensors of a run; made once, because the ranks must first agree on the names. Both are collective.

    A rank that holds no shard of a table has no optimizer state of it.
    """

    def __init__(self, state: Mapping[str, Any], world: World) -> None:
        ranks: list[Any] = [None] * world.size
        dist.all_gather_object(ranks, {name: hasattr(value, "local_shards") for name, value in state.items()})
        self._world = world
        self._is_sharded = {name: value for rank in ranks for name, value in rank.items()}
        self._names = sorted(self._is_sharded)

    def __call__(self, state: Mapping[str, Any]) -> dict[str, int]:
        """A signed 64-bit digest of each tensor by name, the same for every number of ranks and every plan.

        Replicas are compared on the way: ``RankLost`` names the rank whose copy differs from rank 0's, which only
        broken hardware or a bug brings about.
        """
        world, names = self._world, self._names
        nothing = torch.zeros((), dtype=torch.int64, device=world.device)
        own = torch.stack([local_digest(state[name]).to(world.device) if name in state else nothing for name in names])
        gathered = own.new_empty(world.size * len(names))
        dist.all_gather_into_tensor(gathered, own)
        rank_digests = gathered.view(world.size, -1)
        sharded = torch.tensor([self._is_sharded[name] for name in names], device=world.device)
        drifted = ((rank_digests != rank_digests[0]) & ~sharded).nonzero().tolist()
        if drifted:
            rank, tensor = drifted[0]
            raise RankLost(f"rank {rank} holds other values of the replicated {names[tensor]!r} than rank 0: its "
                           "memory or processor is at fault; start again without that machine")
        return dict(zip(names, torch.where(sharded, rank_digests.sum(0), rank_digests[0]).tolist(), strict=True))


def combined_digest(digests: Mapping[str, int]) -> str:
    """All tensors' digests as one, for a manifest."""
    return f"{sum(digest * (2 * index + 1) for index, digest in enumerate(digests.values())) % (1 << 64):016x}"


def digest_line(step: int, digests: Mapping[str, int]) -> str:
    """A line of ``digests.jsonl``."""
    return json.dumps({"step": step, "digests": {name: f"{value % (1 << 64):016x}" for name, value in digests.items()}})


def first_difference(first: Path, second: Path) -> tuple[int, list[str]] | None:
    """The first step that both runs logged with other digests, and the names of those tensors; None when none differs.

    ``DataError`` when the two have no step in common.
    """
    a, b = _read_digests(first), _read_digests(second)
    common = sorted(a.keys() & b.keys())
    if not common:
        raise DataError(f"the digests of {first} and {second} have no step in common; set elastic.digest_every alike")
    for step in common:
        names = sorted(name for name in a[step].keys() | b[step].keys() if a[step].get(name) != b[step].get(name))
        if names:
            return step, names
    return None


def digest_lines(first: Path, second: Path) -> list[str]:
    """Where two run directories part, for reading; nothing when one of them has no digests."""
    if not all((run / DIGESTS).is_file() for run in (first, second)):
        return []
    found = first_difference(first, second)
    if found is None:
        return ["digests: equal at every step that both logged"]
    step, names = found
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"digests: first different at step {step}, in {', '.join(names[:_SHOWN])}{more}"]


def _read_digests(run: Path) -> dict[int, dict[str, str]]:
    path = run / DIGESTS
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {line["step"]: line["digests"] for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error!r}; set elastic.digest_every to write it") from None
