"""A source model fills a store with the vectors of all instances of its data: `longer-rec compress`."""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from longer_rec.batch import RequestBatch, validate_batch
from longer_rec.checkpoint.inspect import find_checkpoint
from longer_rec.checkpoint.manifest import MANIFEST
from longer_rec.config import Config
from longer_rec.data.batches import make_batch
from longer_rec.data.history import Dataset
from longer_rec.data.instance_sources import InstancesConfig, instance_records, read_instances, side_features
from longer_rec.data.instances import InstanceReader, InstanceWriter, StoreManifest, VectorKind, read_store_manifest
from longer_rec.data.loader import in_background
from longer_rec.errors import ConfigError, DataError
from longer_rec.job import add_instances, source_config
from longer_rec.model.compressor import CompressConfig, Compressor
from longer_rec.report.numbers import METRIC_TITLES, format_bytes, format_count, format_metric
from longer_rec.report.terminal import TrainProgress
from longer_rec.runtime.distributed import joined_world
from longer_rec.train.evaluate import gather_scores, metrics_of
from longer_rec.train.run import load_run, only_read, open_plain_data, prepare_process
from longer_rec.train.run_dir import load_job
from longer_rec.train.trainer import Trainer


class CompressOptions(Config):
    """``stored``: the vector before the source model's transformer, or what that makes of it, which needs the store of
    the former as ``past``."""

    vectors: VectorKind = "float16"
    stored: Literal["pre", "post"] = "pre"
    past: Path | None = None
    features: tuple[str, ...] | None = pydantic.Field(None, description="side features; None: all of an event")
    delay_s: int = pydantic.Field(0, ge=0, description="how long after an instance its labels are known")
    retention_days: float | None = pydantic.Field(None, gt=0, description="kept before the newest request; None: all")


@dataclass(frozen=True)
class Compressed:
    """What a store holds, and how its source model ranks the test split."""

    manifest: StoreManifest
    num_instances: int
    num_added: int
    metrics: dict[str, float]


def compress_run(run_dir: Path, out: Path, options: CompressOptions) -> Compressed:
    """Store a vector of every instance of the run's data: of all splits, for what is past changes with the request.

    A call that was interrupted goes on where its last whole commit ended, a finished one adds nothing.
    ``ConfigError`` for a run that is no source model, ``DataError`` when the store cannot be written or is another's.
    """
    prepare_process()
    job = only_read(load_job(run_dir))
    source = source_config(job)
    if source is None:
        raise ConfigError(f"{run_dir} is no source model: it was trained without model.compress; train one with "
                          "model.compress={order: user}, or temporal")
    _check_options(source, options, run_dir)
    with joined_world(job.train.timeout_s) as world:
        if world.size > 1:
            raise ConfigError(f"compress is the work of one process, {world.size} were started; run it alone")
        plain = open_plain_data(job, world)
        trainer = load_run(job, add_instances(job, plain), world)
        manifest = _manifest(trainer, plain, run_dir, options)
        dataset = plain if job.data.instances is None else trainer.dataset
        if options.past is not None:
            _check_past(options.past, manifest)
            dataset = read_instances(plain, InstancesConfig(store=options.past, max_tokens=source.max_tokens))
        num_added = _fill(trainer, dataset, out, manifest, reads_past=options.stored == "post")
        metrics = _evaluate(trainer, plain, out if options.past is None else options.past, source)
    return Compressed(manifest, InstanceReader(out).progress()["instances"], num_added, metrics)


def _check_options(source: CompressConfig, options: CompressOptions, run_dir: Path) -> None:
    if options.stored == "post" and source.order == "temporal":
        raise ConfigError(f"stored=post: {run_dir} compresses in temporal order, without a transformer; leave it out")
    if (options.stored == "post") != (options.past is not None):
        raise ConfigError("stored=post and past belong together: what the transformer makes of an instance depends "
                          "on the stored vectors before it; give both or neither")


def _manifest(trainer: Trainer, plain: Dataset, run_dir: Path, options: CompressOptions) -> StoreManifest:
    source = source_config(trainer.job)
    assert source is not None
    checkpoint = hashlib.sha256((find_checkpoint(run_dir) / MANIFEST).read_bytes()).hexdigest()
    retention_s = None if options.retention_days is None else round(options.retention_days * 86400)
    return StoreManifest(
        width=source.dim, vectors=options.vectors, tasks=plain.schema.tasks, delay_s=options.delay_s,
        features=side_features(plain, options.features), retention_s=retention_s,
        source={"run": trainer.job.name, "step": trainer.step, "checkpoint": checkpoint, "data": plain.config.name,
                "data_fingerprint": plain.fingerprint, "order": source.order, "stored": options.stored,
                "past": None if options.past is None else read_store_manifest(options.past).fingerprint})


def _check_past(past: Path, manifest: StoreManifest) -> None:
    found = read_store_manifest(past).source
    if any(found.get(name) != value for name, value in
           (("checkpoint", manifest.source["checkpoint"]), ("stored", "pre"))):
        raise DataError(f"past={past} was made by run {found.get('run')!r} at step {found.get('step')} "
                        f"({found.get('stored')}); give the store of this very run and step before its transformer")


@torch.no_grad()
def _fill(trainer: Trainer, dataset: Dataset, out: Path, manifest: StoreManifest, reads_past: bool) -> int:
    """Run the forward over all requests that the store lacks, in order of time for each user; instances added."""
    ranker, config = trainer.parallel.ranker, trainer.job.data
    compressor = next(module for module in ranker.tower.modules() if isinstance(module, Compressor))
    ranker.eval()
    compressor.reads_past = reads_past
    vectors: list[Tensor] = []
    handle = compressor.register_forward_hook(lambda _, __, output: vectors.append(output))
    oldest = _oldest(dataset, manifest)

    def make(first: int) -> list[RequestBatch]:
        rows = np.arange(first, min(first + config.eval_batch_requests, dataset.requests.num_rows))
        rows = rows[dataset.requests.take("time", rows) >= oldest]
        batch = make_batch(dataset, rows, max_events=config.max_events, drawn=False)
        validate_batch(batch, dataset.schema)
        return [batch]

    num_added, total = 0, dataset.requests.num_rows
    with InstanceWriter(out, manifest) as writer:
        start = writer.progress().get("done", 0)
        firsts = range(start, total, config.eval_batch_requests)
        with TrainProgress(f"compress {trainer.job.name}", total, start, unit="request") as progress:
            started = time.monotonic()
            for first, (batch,) in zip(firsts, in_background(make, firsts, config), strict=True):
                done = min(first + config.eval_batch_requests, total)
                vectors.clear()
                if batch.num_requests:
                    ranker(batch.to(trainer.world.device))
                    user, records = instance_records(dataset, manifest, batch, vectors[0].float().cpu().numpy())
                    num_added += writer.append(user, records, {"done": done, "total": total})
                progress.update(done, {"requests_per_s": (done - start) / (time.monotonic() - started)})
        if total == 0 or start < total:
            writer.finish(total, oldest)
    handle.remove()
    compressor.reads_past = True
    return num_added


def _oldest(dataset: Dataset, manifest: StoreManifest) -> int:
    """The time before which instances are not kept."""
    if manifest.retention_s is None:
        return -(1 << 62)
    return int(dataset.requests.take("time", np.arange(dataset.requests.num_rows)).max()) - manifest.retention_s


def _evaluate(trainer: Trainer, plain: Dataset, store: Path, source: CompressConfig) -> dict[str, float]:
    """Metrics of the source model on the test split; in user order with each request's whole past, from the store."""
    dataset = trainer.dataset
    if source.order == "user" and trainer.job.data.instances is None:
        dataset = read_instances(plain, InstancesConfig(store=store, max_tokens=source.max_tokens))
    return metrics_of(gather_scores(trainer.parallel.ranker, dataset, "test", trainer.job.data, trainer.world,
                                    trainer.job.train), dataset)


def summary_lines(out: Path, compressed: Compressed) -> list[str]:
    """For reading."""
    manifest, number = compressed.manifest, compressed.num_instances
    size = sum(path.stat().st_size for path in out.iterdir())
    figures = ", ".join(f"{METRIC_TITLES[name]} {format_metric(name, compressed.metrics[name])}"
                        for name in ("auc", "logloss", "gauc"))
    return [f"compressed into {out}, fingerprint {manifest.fingerprint[:12]}",
            f"{format_count(number)} instances, {format_count(compressed.num_added)} of them new, {manifest.width} "
            f"wide as {manifest.vectors}",
            f"{format_bytes(size)} on disk; {format_bytes(manifest.store_bytes(number))} in whole blocks",
            f"source model, test split: {figures}"]
