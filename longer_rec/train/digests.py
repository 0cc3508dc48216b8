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


def digest_lines(first: Path, second: Path) -> list[str]:
    """Where two run directories part, for reading; nothing when one of them has no digests.

    ``DataError`` when the two have no step in common.
    """
    if not all((run / DIGESTS).is_file() for run in (first, second)):
        return []
    a, b = _read_digests(first), _read_digests(second)
    common = sorted(a.keys() & b.keys())
    if not common:
        raise DataError(f"the digests of {first} and {second} have no step in common; set elastic.digest_every alike")
    for step in common:
        names = sorted(name for name in a[step].keys() | b[step].keys() if a[step].get(name) != b[step].get(name))
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            return [f"digests: first different at step {step}, in {', '.join(names[:_SHOWN])}{more}"]
    return [f"digests: equal at all {len(common)} steps that both logged, the last of them {common[-1]}"]


def _read_digests(run: Path) -> dict[int, dict[str, str]]:
    path = run / DIGESTS
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {line["step"]: line["digests"] for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error!r}; remove the damaged line, or resume the run, which drops "
                        "one that a crash has torn") from None
