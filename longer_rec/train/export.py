"""A run becomes a bundle, if what it would serve is what was trained: `longer-rec export`."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from longer_rec.batch import RequestBatch
from longer_rec.bundle import Bundle, BundleManifest, EmbeddingKind, commit_bundle, load_bundle, write_bundle
from longer_rec.config import Config
from longer_rec.data.batches import make_batch
from longer_rec.data.history import Dataset
from longer_rec.data.loader import DataConfig
from longer_rec.errors import ConfigError, DataError, ServeError
from longer_rec.job import Job, TrainConfig, input_widths, source_config
from longer_rec.model.inputs import CandidateSide
from longer_rec.model.state import split_state
from longer_rec.ranker import Ranker
from longer_rec.runtime.distributed import World, joined_world
from longer_rec.train.evaluate import gather_scores, metrics_of
from longer_rec.train.run import load_run, only_read, open_data, prepare_process
from longer_rec.train.run_dir import load_job
from longer_rec.train.trainer import Trainer

TOLERANCE = 1e-5  # of fp32 logits, between any two ways of computing them
MAX_AUC_LOSS = 5e-4
_GATE_REQUESTS = 64


class ExportOptions(Config):
    """``max_auc_loss`` is what rounded embeddings may cost on the test split."""

    embeddings: EmbeddingKind = "float32"
    max_auc_loss: float = pydantic.Field(MAX_AUC_LOSS, ge=0)


def export_run(run_dir: Path, out: Path, options: ExportOptions) -> BundleManifest:
    """Write the newest checkpoint of a run as a bundle; nothing is left at ``out`` when it is refused.

    ``ServeError`` when logits of real requests differ between the sharded forward of training and the bundle, cached or
    uncached, or when rounded embeddings cost more AUC than allowed.
    """
    prepare_process()
    job = only_read(load_job(run_dir))
    if (source := source_config(job)) is not None and source.order == "user":
        raise ConfigError(f"{run_dir} compresses in user order, where a request's logits depend on others of its "
                          "batch; such a run fills a store (`longer-rec compress`) and is not served")
    if job.sparse.managed:
        raise ConfigError(f"{run_dir} has tables of open ids ({', '.join(job.sparse.managed)}), and a bundle has no "
                          "map from ids to rows; train with features of type id or hashed for what is to be served")
    if out.exists():
        raise ConfigError(f"{out} exists; choose another --out (a server changes over by a link to the newest bundle)")
    with joined_world(job.train.timeout_s) as world, _building(out) as directory:
        if world.size > 1:
            raise ConfigError(f"export is the work of one process, {world.size} were started; run it alone")
        dataset = open_data(job, world, ["test"])
        trainer = load_run(job, dataset, world)
        manifest = _manifest(job, dataset, trainer.step, options)
        return _write_checked(directory, manifest, trainer, world, options)


def _write_checked(directory: Path, manifest: BundleManifest, trainer: Trainer, world: World, options: ExportOptions
                   ) -> BundleManifest:
    """Write, read back as a server would, compare, measure."""
    ranker, dataset, config = trainer.parallel.ranker, trainer.dataset, trainer.job.data
    tower = {name: value.float().cpu() for name, value in ranker.tower.state_dict().items()}
    tables = _whole_tables(trainer)
    exact = manifest.model_copy(update={"embeddings": "float32"})
    write_bundle(directory, exact, dataset, tower, tables)
    commit_bundle(directory, exact)
    bundle = load_bundle(directory)
    measured: dict[str, Any] = check_parity(ranker, bundle, dataset, world.device)
    measured["auc"] = _test_auc(bundle, dataset, config, world)
    if options.embeddings != "float32":
        write_bundle(directory, manifest, dataset, tower, tables)
        commit_bundle(directory, manifest)
        rounded = load_bundle(directory)
        measured["rounding_max_logit_difference"] = _largest_difference(bundle, rounded, dataset)
        measured["rounded_auc"] = _test_auc(rounded, dataset, config, world)
        measured["auc_loss"] = measured["auc"] - measured["rounded_auc"]
        check_auc_loss(measured["auc_loss"], options)
    return commit_bundle(directory, manifest.model_copy(update={"measured": measured}))


def check_auc_loss(auc_loss: float, options: ExportOptions) -> None:
    """``ServeError`` when rounding costs more than it may."""
    if not auc_loss <= options.max_auc_loss:
        raise ServeError(f"embeddings as {options.embeddings} lose {auc_loss:.2g} of AUC on the test split, more than "
                         f"{options.max_auc_loss:g}; export others or raise --max-auc-loss")


def _test_auc(bundle: Bundle, dataset: Dataset, config: DataConfig, world: World) -> float:
    return metrics_of(gather_scores(bundle.ranker, dataset, "test", config, world, TrainConfig()), dataset)["auc"]


def _manifest(job: Job, dataset: Dataset, step: int, options: ExportOptions) -> BundleManifest:
    return BundleManifest(
        name=job.name, model=job.model, max_events=job.data.max_events, widths=input_widths(dataset.schema, job),
        pooling=job.sparse.pooling, embeddings=options.embeddings,
        user_name=dataset.config.users.name if dataset.config.users.id_feature else None,
        duplicates=dataset.config.duplicates,
        # As a server elsewhere on this machine finds it.
        instances=(given := job.data.instances) and given.model_copy(update={"store": given.store.resolve()}),
        instances_fingerprint=dataset.instances.fingerprint if dataset.instances is not None else None,
        source={"run": job.name, "step": step, "data": dataset.config.name, "data_fingerprint": dataset.fingerprint})


def _whole_tables(trainer: Trainer) -> dict[str, Tensor]:
    """Weights of each table the schema names, whole, on the CPU."""
    state = trainer.parallel.model.state_dict()
    found = {}
    for table in trainer.dataset.schema.num_rows:
        keys = [key for key in state if key.endswith(f".{table}.weight") and ".sparse." in f".{key}"]
        if keys:  # a table that no feature uses was never built
            found[table] = _whole_tensor(state[keys[0]])
    return found


def _whole_tensor(value: Any) -> Tensor:
    """A tensor, or the shards of one that this process holds all of, in CPU memory of its own."""
    if not hasattr(value, "local_shards"):
        return value.detach().float().cpu()
    whole = torch.empty(tuple(value.size()))
    for shard in value.local_shards():
        at = tuple(slice(start, start + size) for start, size in
                   zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True))
        whole[at] = shard.tensor.detach().float().cpu()
    return whole


def check_parity(trained: Ranker, bundle: Bundle, dataset: Dataset, device: torch.device) -> dict[str, float]:
    """Logits of test requests four ways; the largest difference of each from the sharded forward of training.

    ``uncached``: the bundle's tables and tower in one forward. ``cached``: each user encoded once, its candidates
    scored in two calls against that state. ``split``: users encoded together and taken apart, as a server does with
    those that arrive together.
    """
    batch = _gate_batch(bundle, dataset)
    trained.eval()
    with torch.no_grad():
        expected = trained(batch.to(device)).float().cpu()
        ways = {"uncached": bundle.ranker(batch), "cached": _score_alone(bundle, batch, dataset, split=False),
                "split": _score_alone(bundle, batch, dataset, split=True)}
    differences = {}
    for name, logit_CY in ways.items():
        difference_C = (logit_CY - expected).abs().amax(1)
        differences[f"{name}_max_logit_difference"] = float(difference_C.max())
        if not bool((difference_C <= TOLERANCE).all()):
            worst = int(difference_C.nan_to_num(torch.inf).argmax())
            request = int(torch.repeat_interleave(batch.request_row_B, batch.num_candidates_B)[worst])
            raise ServeError(f"{name} logits part from training's by {float(difference_C[worst]):.2g} at request "
                             f"{request} of the data, more than {TOLERANCE:g}; the bundle is not written")
    return differences


def _gate_batch(bundle: Bundle, dataset: Dataset) -> RequestBatch:
    rows = dataset.split_rows("test")
    chosen = rows[::max(1, len(rows) // _GATE_REQUESTS)][:_GATE_REQUESTS]
    return make_batch(dataset, chosen, max_events=bundle.manifest.max_events)


def _score_alone(bundle: Bundle, batch: RequestBatch, dataset: Dataset, split: bool) -> Tensor:
    """Logits C x Y, each request's candidates in two calls against its own state."""
    ranker, tables, max_events = bundle.ranker, bundle.tables, bundle.manifest.max_events
    alone = [make_batch(dataset, [row], max_events=max_events) for row in batch.request_row_B.tolist()]
    states = split_state(ranker.tower.encode(ranker.user_side(batch, tables.users(batch)))) if split else [
        ranker.tower.encode(ranker.user_side(one, tables.users(one))) for one in alone]
    logits = []
    for one, state in zip(alone, states, strict=True):
        side = ranker.candidate_side(one, tables.candidates(one.candidates))
        middle = one.num_candidates // 2
        for part in (slice(0, middle), slice(middle, one.num_candidates)):
            logits.append(ranker.tower.score(state, _slice(side, part)))
    return torch.cat(logits)


def _slice(side: CandidateSide, part: slice) -> CandidateSide:
    """Some of the candidates of one request."""
    return CandidateSide({name: value[part] for name, value in side.embedding.items()},
                         {name: value[part] for name, value in side.id.items()}, side.dense_CF[part],
                         torch.tensor([part.stop - part.start]))


@torch.no_grad()
def _largest_difference(bundle: Bundle, rounded: Bundle, dataset: Dataset) -> float:
    batch = _gate_batch(bundle, dataset)
    return float((bundle.ranker(batch) - rounded.ranker(batch)).abs().max())


@contextmanager
def _building(out: Path) -> Iterator[Path]:
    """``out.tmp``, which becomes ``out`` at the end and goes away on any fault."""
    directory = out.with_name(out.name + ".tmp")
    try:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        yield directory
        directory.rename(out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}; check space and permissions or choose another --out"
                        ) from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)
