"""Where the time of a training step goes: real steps of a job, a table by part, and a Chrome trace.

Milliseconds are those of steps without the profiler, which slows small operations. Within the tower they are its time,
shared out as some profiled steps share it: forward by the calls of a part's modules, backward by the autograd nodes
that those calls made.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path

import pydantic
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from longer_rec.batch import RequestBatch
from longer_rec.config import Config
from longer_rec.errors import ConfigError
from longer_rec.job import Job
from longer_rec.model.longer import LongerTower
from longer_rec.model.precision import DTYPES
from longer_rec.model.profile import REST, named_parts, part_times
from longer_rec.report.numbers import MISSING, format_bytes
from longer_rec.report.terminal import make_console, make_table
from longer_rec.runtime.peak import measured_peak
from longer_rec.runtime.profiling import quiet_profiler
from longer_rec.runtime.supervisor import supervise
from longer_rec.sparse.tables import widths
from longer_rec.train.rates import FORWARD_AND_BACKWARD, batch_flops, part_flops
from longer_rec.train.run import unsaved_run
from longer_rec.train.trainer import Trainer

_TITLES = {"time_data_s": "waiting for data", "time_lookup_s": "lookup", "time_tower_s": "tower",
           "time_reduce_s": "reduction", "time_sparse_s": "table update", "time_dense_s": "dense update"}
_LOOKUP = ("all-to-all", "reading rows")
Batches = list[RequestBatch]


class ProfileOptions(Config):
    """On how many ranks, and how many steps: unmeasured, measured, and then again with the profiler."""

    nproc: int = pydantic.Field(1, ge=1)
    warmup: int = pydantic.Field(5, ge=1)
    steps: int = pydantic.Field(20, ge=1)
    traced: int = pydantic.Field(3, ge=1)


@dataclass(frozen=True)
class Row:
    """One part of a step of rank 0; None where it has no such figure. ``num_bytes`` leave the rank."""

    part: str
    ms: float
    share: float
    gflop: float | None = None
    gflops: float | None = None
    of_peak: float | None = None
    num_bytes: float | None = None


def profile_job(job: Job, options: ProfileOptions, out: Path) -> None:
    """Print the table; write it as ``profile.json`` and ``profile.md``, and ``trace.json``, into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    if supervise(lambda: _profile_rank(job, options, out), options.nproc, max_restarts=0):
        raise ConfigError(f"{options.nproc} ranks could not run {job.name} here; see above")
    found, console = json.loads((out / "profile.json").read_text(encoding="utf-8")), make_console()
    titles = ["part", "ms", "of step", "GFLOP", "GFLOP/s", "of peak", "sent"]
    cells = [_cells(Row(**row)) for row in found["rows"]]
    table = make_table(found["title"], titles, titles[1:])
    for each in cells:
        table.add_row(*each)
    console.print(table)
    lines = [found["title"], "", *(f"| {' | '.join(each)} |" for each in (titles, ["---"] * len(titles), *cells)), ""]
    (out / "profile.md").write_text("\n".join(lines), encoding="utf-8")
    console.print(f"trace: {out / 'trace.json'} (open it in https://ui.perfetto.dev)", soft_wrap=True)


def _cells(row: Row) -> list[str]:
    def figure(value: float | None, form: str) -> str:
        return MISSING if value is None else format(value, form)

    return [row.part, f"{row.ms:.2f}", f"{row.share:.1%}", figure(row.gflop, ".3g"), figure(row.gflops, ".1f"),
            figure(row.of_peak, ".1%"), MISSING if row.num_bytes is None else format_bytes(row.num_bytes)]


def _profile_rank(job: Job, options: ProfileOptions, out: Path) -> None:
    with unsaved_run(job) as trainer:
        _check_length(trainer, options)
        steps = _steps(trainer, options.warmup + options.steps + options.traced)
        for _ in range(options.warmup):
            next(steps)
        dist.barrier()
        trainer.clock.take()
        timed = [next(steps) for _ in range(options.steps)]
        seconds, elapsed = trainer.clock.take()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if trainer.world.device.type == "cuda" else [])]
        tower = trainer.parallel.ranker.tower
        with quiet_profiler(), named_parts(tower), profile(activities=kinds, acc_events=True) as traced:
            for _ in steps:
                pass
        if trainer.world.is_main:
            traced.export_chrome_trace(str(out / "trace.json"))
            per_step = {name: value / options.steps for name, value in seconds.items()}
            shares = {"time_lookup_s": _lookup_times(traced), "time_tower_s": part_times(traced, "time_tower_s")}
            rows = _rows(trainer, per_step, elapsed / options.steps, shares, timed)
            title = (f"{job.name}: a step of {1e3 * elapsed / options.steps:.1f} ms; {trainer.world.size} ranks of "
                     f"{torch.get_num_threads()} threads, {len(trainer.workers)} workers each, {job.train.precision}")
            (out / "profile.json").write_text(json.dumps({"title": title, "rows": [asdict(row) for row in rows]},
                                                         indent=2), encoding="utf-8")


def _check_length(trainer: Trainer, options: ProfileOptions) -> None:
    wanted = options.warmup + options.steps + options.traced
    if trainer.num_steps < wanted:
        raise ConfigError(f"{trainer.job.name} trains for {trainer.num_steps} steps, {wanted} are wanted; raise "
                          "train.epochs, or give a lower --steps")


def _steps(trainer: Trainer, count: int) -> Iterator[Batches]:
    """Train step by step as ``Trainer.fit`` does, without its log; the batches of each step that is done."""
    loader = trainer.loader(count)
    moved = ([batch.to(trainer.world.device, non_blocking=True) for batch in own] for own in loader)
    for batches, upcoming in pairwise(chain(moved, [None])):
        assert batches is not None
        trainer.clock.add("time_data_s", loader.take_wait())
        trainer.train_step(batches, upcoming)
        trainer.step += 1
        yield batches


def _lookup_times(traced: profile) -> dict[str, float]:
    """Microseconds of waiting for other ranks' ids and rows, and of the rest of the lookup."""
    spans = {name: [(event.time_range.start, event.time_range.end) for event in traced.events() or []
                    if event.name == name] for name in ("time_lookup_s", "exchange")}
    whole = sum(end - start for start, end in spans["time_lookup_s"])
    waited = sum(end - start for start, end in spans["exchange"]
                 if any(first <= start < last for first, last in spans["time_lookup_s"]))
    return dict(zip(_LOOKUP, (waited, whole - waited), strict=True))


def _rows(trainer: Trainer, seconds: Mapping[str, float], elapsed: float,
          shares: Mapping[str, Mapping[str, float]], steps: Sequence[Batches]) -> list[Row]:
    job, schema = trainer.job, trainer.dataset.schema
    flops: dict[str, float] = {}
    if isinstance(trainer.parallel.ranker.tower, LongerTower):
        lengths = [(batch.history_length_B, batch.num_candidates_B) for batches in steps for batch in batches]
        flops = {part: FORWARD_AND_BACKWARD * count / len(steps)
                 for part, count in part_flops(batch_flops(job, schema, lengths)).items()}
        flops["tower"] = sum(flops.values())
    sent = bytes_sent(trainer, steps) if trainer.world.size > 1 else (0.0, 0.0)

    def row(part: str, spent_s: float, key: str, num_bytes: float | None = None) -> Row:
        if key not in flops or not spent_s:
            return Row(part, 1e3 * spent_s, spent_s / elapsed, num_bytes=num_bytes)
        kind = job.train.part_precisions.get(key, job.train.default_precision)
        rate = flops[key] / spent_s
        return Row(part, 1e3 * spent_s, spent_s / elapsed, flops[key] / 1e9, rate / 1e9,
                   rate / measured_peak(trainer.world.device, DTYPES[kind]))

    rows = []
    for name, title in _TITLES.items():
        spent_s = seconds.get(name, 0.0)
        num_bytes = {"time_lookup_s": sent[0], "time_sparse_s": sent[1]}.get(name)
        rows.append(row(title, spent_s, title, num_bytes))
        inside = shares.get(name, {})
        whole = sum(inside.values())
        rows += [row(f"  {part}", spent_s * inside[part] / whole, part)
                 for part in (*_LOOKUP, *flops, REST) if part in inside and len(inside) > 1]
    rest_s = elapsed - sum(seconds.values())
    return [*rows, Row("everything else", 1e3 * rest_s, rest_s / elapsed),
            row("the whole step", elapsed, "tower")]


def bytes_sent(trainer: Trainer, steps: Sequence[Batches]) -> tuple[float, float]:
    """Bytes that a rank sends in a step's lookup (ids, then rows of others' ids) and in its update (gradients).

    Counted from the batches, with an equal share of all rows on each rank: what stays on the rank is not sent.
    """
    width, schema = widths(trainer.dataset.schema, trainer.job.sparse), trainer.dataset.schema
    away = (trainer.world.size - 1) / trainer.world.size / len(steps)
    ids = rows = 0.0
    for batches in steps:
        for batch in batches:
            for table, keys in schema.row_keys.items():
                ids += 8 * batch.distinct[table].numel()
                rows += 4 * batch.distinct[table].numel() * width[keys[0]]
            for keys in schema.pooled_keys.values():
                ids += 8 * sum(batch.ids(key).numel() for key in keys)
                rows += 4 * sum(batch.num_requests * width[key] for key in keys)
    return (ids + rows) * away, rows * away
