"""The most floating-point operations a second that a process of this machine reaches: its matmuls, measured."""

import json
import os
import time
from pathlib import Path

import torch

from longer_rec.runtime.machine import numerics

# Side of the square matmul: beyond caches and launch times, and below 0.1 s a call. Halves are faster on both.
_SIDE = {"cpu": 1024, "cuda": 8192}
_REPEATS = 5


def measured_peak(device: torch.device, dtype: torch.dtype = torch.float32, again: bool = False) -> float:
    """FLOP/s of a large matmul in this process, with its threads and its TF32 switch.

    Takes 0.2 s the first time, and is remembered by machine, threads and type in ``peak_file()``; where that cannot be
    written it is measured each time. ``again``: measure, and keep the higher figure: others may have slowed the first.
    """
    facts = {**numerics(device), "dtype": str(dtype).removeprefix("torch."),
             "tf32": torch.backends.cuda.matmul.allow_tf32 if device.type == "cuda" else None}
    key = json.dumps(facts, sort_keys=True)
    known = _known()
    if again or key not in known:
        known[key] = max(measure_peak(device, dtype), known.get(key, 0.0))
        _remember(known)
    return known[key]


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best of a few repeats, in FLOP/s."""
    side = _SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best_s = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        float((left @ right)[0, 0])  # a GPU has finished when the value is here
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * side ** 3 / best_s


def peak_file() -> Path:
    """Of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longer_rec" / "peak.json"


def _known() -> dict[str, float]:
    try:
        return {str(key): float(value) for key, value in json.loads(peak_file().read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError, RuntimeError):
        return {}


def _remember(known: dict[str, float]) -> None:
    try:
        peak_file().parent.mkdir(parents=True, exist_ok=True)
        unfinished = peak_file().with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(known, indent=2), encoding="utf-8")
        unfinished.replace(peak_file())
    except (OSError, RuntimeError):
        pass  # measured again next time
