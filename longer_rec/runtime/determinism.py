"""Everything that makes a run repeatable: deterministic kernels, and seeds that depend on no rank."""

import hashlib
import os

import torch

from longer_rec.errors import ConfigError


def make_deterministic() -> None:
    """Deterministic kernels, one intra-op thread a process: the thread count picks the order of additions."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling every torch.empty costs memory bandwidth and guards against reading it, which no kernel here does.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if not threads.isdigit() or int(threads) < 1:
        raise ConfigError(f"environment variable OMP_NUM_THREADS={threads!r} is no number of threads; use 1")
    torch.set_num_threads(int(threads))


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of its parts, such as (run seed, step, logical worker)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
