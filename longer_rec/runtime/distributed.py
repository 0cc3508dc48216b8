"""The processes of a run: who I am, on which device, and the process group that joins us."""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from longer_rec.errors import ConfigError, LongerRecError

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class World:
    """This process among ``size``; ``local_size`` of them share its host."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def joined_world(timeout_s: float = 120.0) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one; leave the group at the end.

    A group that the caller has joined already is used and left open. Every process group gets ``timeout_s``: gloo's own
    default of 30 minutes turns a dead rank into a hang.
    """
    rank, size = _environment("RANK", 0), _environment("WORLD_SIZE", 1)
    local_rank, local_size = _environment("LOCAL_RANK", 0), _environment("LOCAL_WORLD_SIZE", 1)
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, local_size, device)
        return
    store = None if "MASTER_ADDR" in os.environ else dist.HashStore()
    dist.init_process_group("cuda:nccl,cpu:gloo" if use_cuda else "gloo", rank=rank, world_size=size,
                            timeout=datetime.timedelta(seconds=timeout_s), store=store)
    try:
        yield World(rank, size, local_rank, local_size, device)
    finally:
        dist.destroy_process_group()


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}={text!r} is not a number; start ranks with torchrun") from None


def is_main_process() -> bool:
    """Whether this process prints for the run; usable before the group is joined."""
    return os.environ.get("RANK", "0") == "0"


def on_main(world: World, function: Callable[[], ResultT]) -> ResultT:
    """What ``function`` returns on rank 0, on every rank; a fault it raises there is raised on every rank.

    The result travels pickled between processes of one run, which trust each other.
    """
    message: list[object] = [None, None]
    if world.is_main:
        try:
            message[0] = function()
        except LongerRecError as error:
            message[1] = error
    dist.broadcast_object_list(message, src=0)
    result, fault = message
    if isinstance(fault, LongerRecError):
        raise fault
    return result  # type: ignore[return-value]


def on_all(world: World, function: Callable[[], ResultT]) -> ResultT:
    """What ``function`` returns here; when it raises a fault on any rank, every rank raises the first one.

    Without this a fault of one host, such as its damaged copy of the data, leaves the others waiting in vain.
    """
    fault: LongerRecError | None = None
    try:
        result = function()
    except LongerRecError as error:
        fault = error
    faults: list[LongerRecError | None] = [None] * world.size
    dist.all_gather_object(faults, fault)
    for raised in faults:
        if raised is not None:
            raise raised
    return result
