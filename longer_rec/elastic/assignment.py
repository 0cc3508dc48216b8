"""Which process hosts which logical workers (EasyScale, section 3: logical workers are fixed, processes are not)."""

import pydantic

from longer_rec.config import Config
from longer_rec.errors import ConfigError


class ElasticConfig(Config):
    """``num_workers`` is W, the degree of parallelism the batch size and learning rate were chosen for.

    ``strict`` refuses what would make the result depend on the number of processes; None: when num_workers is set.
    """

    num_workers: int | None = pydantic.Field(None, ge=1, description="None: as many as there are processes")
    strict: bool | None = None
    digest_every: int = pydantic.Field(0, ge=0, description="steps between digests of every tensor; 0: none")

    @property
    def is_strict(self) -> bool:
        return self.num_workers is not None if self.strict is None else self.strict


def resolve_num_workers(config: ElasticConfig, num_processes: int) -> int:
    """W, which must be at least the number of processes: a process without a worker has nothing to do."""
    num_workers = config.num_workers or num_processes
    if num_workers < num_processes:
        raise ConfigError(f"elastic.num_workers={num_workers} is less than the {num_processes} processes; "
                          f"start at most {num_workers} processes or raise elastic.num_workers")
    return num_workers


def owned_workers(process: int, num_processes: int, num_workers: int) -> range:
    """The contiguous logical workers of one process; sizes differ by at most one when P does not divide W."""
    return range(process * num_workers // num_processes, (process + 1) * num_workers // num_processes)
