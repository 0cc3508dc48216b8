"""A few real steps of a job on this machine: seconds of each part, bytes held, bytes at the peak of the tower."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.profiler import ProfilerActivity, profile

from longer_rec.batch import RequestBatch
from longer_rec.errors import ConfigError
from longer_rec.job import Job
from longer_rec.runtime.distributed import gather
from longer_rec.runtime.profiling import Measured, quiet_profiler
from longer_rec.runtime.supervisor import supervise
from longer_rec.train.run import unsaved_run
from longer_rec.train.trainer import Trainer

_WARMUP_STEPS = 2
_PROFILED_STEPS = 2


def measure_job(job: Job, num_ranks: int, num_steps: int, folder: Path) -> Measured:
    """Train for a few steps on forked ranks; nothing of it is saved. Uses ``folder`` for the ranks' results."""
    path = folder / f"measured-{num_ranks}.json"
    code = supervise(lambda: _measure_rank(job, num_steps, path), num_ranks, max_restarts=0)
    if code:
        raise ConfigError(f"{num_ranks} ranks could not run {num_steps} steps here; give fewer in --calibrate, or see "
                          "above")
    return Measured(**json.loads(path.read_text(encoding="utf-8")))


def _measure_rank(job: Job, num_steps: int, path: Path) -> None:
    with unsaved_run(job) as trainer:
        steps = _WARMUP_STEPS + num_steps + _PROFILED_STEPS
        loader = trainer.loader(steps)
        batches = [[batch.to(trainer.world.device) for batch in loader.make_step(step)] for step in range(steps)]
        for step in range(_WARMUP_STEPS + num_steps):
            if step == _WARMUP_STEPS:
                dist.barrier()
                trainer.clock.take()
            trainer.train_step(batches[step])
            trainer.step += 1
        parts, _ = trainer.clock.take()
        profiled = batches[-_PROFILED_STEPS:]
        peaks = [peak_of_tower(trainer, own) for own in profiled]
        lengths = [[(batch.history_length_B.tolist(), batch.num_candidates_B.tolist()) for batch in own]
                   for own in profiled]
        own_bytes = _table_bytes(trainer.parallel.state_dict())
        seconds = {name.removeprefix("time_").removesuffix("_s"): value / num_steps for name, value in parts.items()}
        everyone = gather((seconds, *own_bytes))
        if trainer.world.is_main:
            measured = Measured({name: max(each[0][name] for each in everyone) for name in seconds},
                                [each[1] for each in everyone], [each[2] for each in everyone], lengths, peaks)
            path.write_text(json.dumps(asdict(measured)), encoding="utf-8")


def peak_of_tower(trainer: Trainer, own: list[RequestBatch]) -> int:
    """The most bytes that were allocated within the tower's part of a step and not yet freed."""
    on_gpu = trainer.world.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with quiet_profiler(), profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        trainer.train_step(own)
    events = profiler.profiler.kineto_results.events()
    start, end = next((event.start_ns(), event.start_ns() + event.duration_ns()) for event in events
                      if event.name() == "time_tower_s")
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
                     and event.device_type() == device and start <= event.start_ns() <= end)
    return int(torch.tensor([size for _, size in changes]).cumsum(0).max())


def _table_bytes(state: dict[str, Any]) -> tuple[int, int]:
    """Bytes of this rank's shards: weights, optimizer state."""
    held = {"model": 0, "optimizer": 0}
    for name, value in state.items():
        if isinstance(value, ShardedTensor):
            held[name.partition("/")[0]] += sum(shard.tensor.nbytes for shard in value.local_shards())
    return held["model"], held["optimizer"]
