"""The digest of every tensor of a run, step by step: what tells where two runs part."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longer_rec.errors import DataError
from longer_rec.runtime.digest import join_digests, local_digests
from longer_rec.runtime.distributed import gather

DIGESTS = "digests.jsonl"
_SHOWN = 5


def state_digests(state: Mapping[str, Any]) -> dict[str, str]:
    """The digest of each tensor, the same for every number of ranks and every plan; a collective call."""
    return join_digests(gather(local_digests(state)))


def first_difference(first: Path, second: Path) -> tuple[int, list[str]] | None:
    """The first step that both runs logged with other digests, and the names of those tensors; None when none differs.

    ``DataError`` when the two have no step in common.
    """
    return _first_difference(_common_steps(first, second))


def digest_lines(first: Path, second: Path) -> list[str]:
    """Where two run directories part, for reading; nothing when one of them has no digests."""
    if not all((run / DIGESTS).is_file() for run in (first, second)):
        return []
    common = _common_steps(first, second)
    found = _first_difference(common)
    if found is None:
        return [f"digests: equal at all {len(common)} steps that both logged, the last of them {max(common)}"]
    step, names = found
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"digests: first different at step {step}, in {', '.join(names[:_SHOWN])}{more}"]


def _common_steps(first: Path, second: Path) -> dict[int, tuple[dict[str, str], dict[str, str]]]:
    a, b = _read_digests(first), _read_digests(second)
    common = {step: (a[step], b[step]) for step in sorted(a.keys() & b.keys())}
    if not common:
        raise DataError(f"the digests of {first} and {second} have no step in common; set elastic.digest_every alike")
    return common


def _first_difference(common: Mapping[int, tuple[dict[str, str], dict[str, str]]]) -> tuple[int, list[str]] | None:
    for step, (a, b) in common.items():
        names = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
        if names:
            return step, names
    return None


def _read_digests(run: Path) -> dict[int, dict[str, str]]:
    path = run / DIGESTS
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {line["step"]: line["digests"] for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error!r}; remove the damaged line, or resume the run, which drops "
                        "one that a crash has torn") from None
