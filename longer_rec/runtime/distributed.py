"""The processes of a run: who I am, on which device, and the process group that joins us."""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from longer_rec.errors import ConfigError, LongerRecError, RankLost
from longer_rec.runtime.preemption import is_supervised
from longer_rec.runtime.roll_call import RollCall
from longer_rec.runtime.supervisor import die_with_parent

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
def joined_world(timeout_s: float = 120.0, remedy: str | None = None) -> Iterator[World]:
    """Join the processes that `longer-rec launch` or torchrun started, or be the only one; leave the group at the end.

    A group that the caller has joined already is used and left open. Every process group gets ``timeout_s``: gloo's own
    default of 30 minutes turns a dead rank into a hang. An operation of the group that fails, here or in the body,
    raises ``RankLost``, which names the ranks that do not answer, and ``remedy`` where this is no training.
    """
    rank, size = _environment("RANK", 0), _environment("WORLD_SIZE", 1)
    local_rank, local_size = _environment("LOCAL_RANK", 0), _environment("LOCAL_WORLD_SIZE", 1)
    device = _own_device(local_rank)
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, local_size, device)
        return
    if dist.is_torchelastic_launched():
        die_with_parent()  # a killed agent would leave its ranks training
    roll_call = None
    try:
        timeout = datetime.timedelta(seconds=timeout_s)
        store = _rendezvous(size, timeout)
        roll_call = RollCall(store, rank, size) if size > 1 else None
        dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo", rank=rank, world_size=size,
                                timeout=timeout, store=store)
        yield World(rank, size, local_rank, local_size, device)
    except BaseException as error:  # also torch's CheckpointException, which is no Exception
        if _is_from_group(error):
            # The group stays as it is: to leave it NCCL may wait for the lost rank, and this process ends anyway.
            raise _rank_lost(roll_call, size, timeout_s, error, remedy) from error
        _leave(roll_call)
        if (killed := _killed_helper(error)) is not None:
            raise RankLost(f"a process that loads data ended, for want of memory perhaps ({killed}); start again to "
                           "continue from the last checkpoint") from None
        raise
    _leave(roll_call)


def _leave(roll_call: RollCall | None) -> None:
    if roll_call is not None:
        roll_call.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def _own_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"local rank {local_rank} has no GPU, {torch.cuda.device_count()} are visible; start at most "
                          "as many ranks a host as it has GPUs, or hide them with CUDA_VISIBLE_DEVICES=''")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _rendezvous(size: int, timeout: datetime.timedelta) -> dist.Store:
    """Where the ranks find each other: a file of the supervisor, else what MASTER_ADDR says, else nobody to find."""
    store: dist.Store
    if is_supervised():
        store = dist.FileStore(os.environ["LONGER_REC_FOLDER"] + "/rendezvous", size)
    elif "MASTER_ADDR" in os.environ:
        store = next(dist.rendezvous("env://", timeout=timeout))[0]
    elif size == 1:
        store = dist.HashStore()
    else:
        raise ConfigError(f"WORLD_SIZE={size} without MASTER_ADDR; start ranks with `longer-rec launch` or torchrun")
    store.set_timeout(timeout)
    return store


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_from_group(error: BaseException) -> bool:
    """Whether an operation of the group failed, or did before this happened.

    gloo raises plain RuntimeErrors, which its callers may wrap; nearly all begin with the path of a file of gloo.
    """
    return any(isinstance(each, dist.DistError) or "/gloo/" in str(each) or "caused pair closure" in str(each)
               for each in _with_causes(error))


def _killed_helper(error: BaseException) -> str | None:
    """What torch says of a loading process that was killed, wherever the signal of its end has interrupted us."""
    return next((" ".join(str(each).split()) for each in _with_causes(error)
                 if isinstance(each, RuntimeError) and str(each).startswith("DataLoader worker")), None)


def _rank_lost(roll_call: RollCall | None, size: int, timeout_s: float, error: BaseException,
               remedy: str | None) -> RankLost:
    again = remedy or "start again to continue from the last checkpoint"
    heard = roll_call.ask() if roll_call is not None else {0: ""}
    if heard is None:
        return RankLost(f"rank 0 of {size}, which holds the rendezvous, does not answer: ended, stopped or out of "
                        f"reach; {again}")
    missing = [str(rank) for rank in range(size) if rank not in heard]
    if missing:
        return RankLost(f"{'ranks' if missing[1:] else 'rank'} {', '.join(missing)} of {size} "
                        f"{'do' if missing[1:] else 'does'} not answer: ended, stopped or out of reach; {again}")
    late = [f"rank {rank} is in {position}" for rank, position in sorted(heard.items()) if position]
    if late:
        longer = "" if remedy else f"raise train.timeout_s={timeout_s:g} if that may take so long, and "
        return RankLost(f"all {size} ranks answer, but not all came to an operation: {'; '.join(late)}; "
                        f"{longer}{again}")
    return RankLost(f"all {size} ranks answer, but their connections broke ({' '.join(str(error).split())[:200]}); "
                    f"{again}")


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}={text!r} is not a number; start ranks with "
                          "`longer-rec launch` or torchrun") from None


def is_main_process() -> bool:
    """Whether this process prints for the run; usable before the group is joined."""
    return os.environ.get("RANK", "0") == "0"


def own_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: ResultT, group: dist.ProcessGroup | None = None) -> list[ResultT]:
    """``value`` of every rank. Travels pickled between the processes of one run, which trust each other."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value, group)
    return values


def on_all(function: Callable[[], ResultT], group: dist.ProcessGroup | None = None) -> ResultT:
    """What ``function`` returns here; when it raises a fault on any rank, every rank raises the first one.

    Without this a fault of one host, such as its damaged copy of the data, leaves the others waiting in vain.
    """
    fault: LongerRecError | None = None
    try:
        result = function()
    except LongerRecError as error:
        fault = error
    for raised in gather(fault, group):
        if raised is not None:
            raise raised
    return result


def on_main(function: Callable[[], ResultT], group: dist.ProcessGroup | None = None) -> ResultT:
    """What ``function`` returns on rank 0, on every rank; a fault it raises there is raised on every rank."""
    result = on_all(lambda: function() if own_rank() == 0 else None, group)
    return cast(ResultT, gather(result, group)[0])
