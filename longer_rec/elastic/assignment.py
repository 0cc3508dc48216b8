"""Which process hosts which logical workers (EasyScale, section 3: logical workers are fixed, processes are not)."""

from itertools import accumulate, pairwise
from typing import Literal, Self

import pydantic

from longer_rec.config import Config
from longer_rec.errors import ConfigError


class ElasticConfig(Config):
    """``num_workers`` is W, the degree of parallelism the batch size and learning rate were chosen for.

    ``strict`` refuses what would make the result depend on the number of processes; None: when num_workers is set.
    ``shares`` is how many of the W each process hosts, in the order of ranks: more for those on faster devices.
    ``level`` D1 is exact between processors of one model, D2 between all with AVX2 and FMA, and slower.
    """

    num_workers: int | None = pydantic.Field(None, ge=1, description="None: as many as there are processes")
    shares: tuple[int, ...] | None = pydantic.Field(None, description="None: as equal as can be")
    strict: bool | None = None
    level: Literal["D1", "D2"] = "D1"
    digest_every: int = pydantic.Field(0, ge=0, description="steps between digests of every tensor; 0: none")

    @pydantic.model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.shares is not None and min(self.shares, default=0) < 1:
            raise ValueError(f"shares={list(self.shares)}: every process needs 1 worker or more; start fewer processes")
        if self.shares is not None and sum(self.shares) != self.num_workers:
            raise ValueError(f"shares={list(self.shares)} add up to {sum(self.shares)}, not to num_workers="
                             f"{self.num_workers}; change one of them")
        if self.is_portable and not self.is_strict:
            raise ValueError("level=D2 is a promise that strict=false takes back, or a missing num_workers; set "
                             "num_workers and leave strict out, or use D1")
        return self

    @property
    def is_portable(self) -> bool:
        return self.level == "D2"

    @property
    def is_strict(self) -> bool:
        return self.num_workers is not None if self.strict is None else self.strict


def resolve_num_workers(config: ElasticConfig, num_processes: int) -> int:
    """W, which must be at least the number of processes: a process without a worker has nothing to do."""
    num_workers = config.num_workers or num_processes
    if num_workers < num_processes:
        raise ConfigError(f"elastic.num_workers={num_workers} is less than the {num_processes} processes; "
                          f"start at most {num_workers} processes or raise elastic.num_workers")
    if config.shares is not None and len(config.shares) != num_processes:
        raise ConfigError(f"elastic.shares={list(config.shares)} is for {len(config.shares)} processes, there are "
                          f"{num_processes}; start {len(config.shares)}, or give another elastic.shares or null")
    return num_workers


def assign_workers(shares: tuple[int, ...] | None, num_processes: int, num_workers: int) -> list[range]:
    """The contiguous logical workers of each process; without shares their numbers differ by at most one."""
    assert shares is None or len(shares) == num_processes
    ends = (accumulate(shares, initial=0) if shares is not None else
            (process * num_workers // num_processes for process in range(num_processes + 1)))
    return [range(*pair) for pair in pairwise(ends)]
