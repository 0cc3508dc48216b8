"""One run from its configuration to its results: what `longer-rec train` and `longer-rec eval` do."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from longer_rec.checkpoint.manager import CheckpointManager
from longer_rec.data.history import Dataset, open_dataset
from longer_rec.data.partition import SPLITS
from longer_rec.elastic.assignment import resolve_num_workers
from longer_rec.errors import CheckpointError, DataError
from longer_rec.job import Job, add_instances, baseline_jobs
from longer_rec.report.html import write_report
from longer_rec.report.terminal import plan_table
from longer_rec.runtime.determinism import make_deterministic
from longer_rec.runtime.distributed import World, joined_world, on_all, on_main
from longer_rec.runtime.logging import quiet_libraries
from longer_rec.runtime.memory import keep_freed_memory
from longer_rec.runtime.preemption import StopSignal, await_turn
from longer_rec.sparse.planfile import save_plan
from longer_rec.train.analysis import analyse_scores
from longer_rec.train.evaluate import metrics_of
from longer_rec.train.log import RunLog, rewind_logs
from longer_rec.train.parallelize import check_job, parallelize
from longer_rec.train.replay import replay_step
from longer_rec.train.run_dir import load_job, open_run_dir, read_run, write_atomically, writing
from longer_rec.train.trainer import Trainer

Row = dict[str, Any]


def train(job: Job) -> list[Row] | None:
    """Train the job and its baselines, write ``results.json`` and ``report.html``; the rows, on rank 0 only.

    Resumes each of them from its own newest checkpoint. Every fault of the configuration, the data or the run
    directory is raised on all ranks before a step is taken.
    """
    prepare_process()
    with StopSignal() as stop, joined_world(job.train.timeout_s) as world:
        plain = open_plain_data(job, world)
        jobs = [(each, on_all(partial(add_instances, each, plain))) for each in (job, *baseline_jobs(job).values())]
        for each, dataset in jobs:
            check_job(each, dataset, world)
        await_turn(stop)
        rows = [_train_one(each, dataset, world, stop, show_plan=each is job) for each, dataset in jobs]
        if not world.is_main:
            return None
        with writing(job.run_dir):
            write_atomically(job.run_dir / "results.json", json.dumps(rows, indent=2))
            write_report(job.run_dir)
        return rows


def _train_one(job: Job, dataset: Dataset, world: World, stop: StopSignal, show_plan: bool) -> Row:
    num_workers = resolve_num_workers(job.elastic, world.size)
    on_main(lambda: open_run_dir(job, dataset, num_workers))
    trainer, checkpoints = _restored_trainer(job, dataset, world, num_workers, stop)
    on_main(lambda: rewind_logs(job.run_dir, trainer.step))
    if world.is_main:
        if show_plan:
            plan_table(trainer.parallel.plan.model_dump()["tables"])
        with writing(job.run_dir):
            save_plan(trainer.parallel.plan, job.run_dir / "plan.json")
        if trainer.step:
            print(f"{job.name}: continues from step {trainer.step:,} of {trainer.num_steps:,} on {world.size} "
                  f"rank{'s' * (world.size > 1)}", flush=True)
    with RunLog(job.run_dir, trainer.step) if world.is_main else nullcontext() as log:
        trainer.fit(checkpoints, log)
        metrics = _test(trainer)
        if log is not None:
            log.write("test", trainer.step, {**metrics, "elapsed_s": trainer.elapsed_s})
    return {"name": job.name, "max_events": job.data.max_events, **metrics, "steps": trainer.step,
            "train_s": trainer.elapsed_s}


def evaluate_run(run_dir: Path, split: str) -> Row:
    """Metrics of a finished or interrupted run's newest checkpoint, on any number of ranks.

    Of the test split it writes ``analysis.json`` again.
    """
    prepare_process()
    job = only_read(load_job(run_dir))
    with joined_world(job.train.timeout_s) as world:
        dataset = open_data(job, world, [split])
        trainer = load_run(job, dataset, world)
        metrics = _test(trainer) if split == "test" else trainer.evaluate(split)
        return {"name": job.name, "step": trainer.step, "split": split, **metrics}


def _test(trainer: Trainer) -> dict[str, float]:
    """Metrics of the test split; what else its scores and the attention say goes to ``analysis.json``."""
    scores, attention = trainer.gather_scores("test"), trainer.profile_attention("test")

    def analyse() -> dict[str, float]:
        assert scores is not None
        metrics = metrics_of(scores, trainer.dataset)
        content = {"step": trainer.step, "max_events": trainer.job.data.max_events,
                   **analyse_scores(scores, trainer.dataset), "attention": attention}
        with writing(trainer.job.run_dir):
            write_atomically(trainer.job.run_dir / "analysis.json", json.dumps(content, allow_nan=False))
        return metrics

    return on_main(analyse)


def replay_run(run_dir: Path) -> list[str]:
    """Run the step again at which a run was given up, on one process; what is not finite in it, a line each."""
    prepare_process()
    job, num_workers = only_read(load_job(run_dir)), int(read_run(run_dir)["num_workers"])
    with joined_world(job.train.timeout_s) as world:
        dataset = open_data(job, world, ["train"])
        trainer = Trainer(job, dataset, world, parallelize(job, dataset, world), num_workers)
        if not trainer.restore(CheckpointManager(run_dir / "failure")):
            raise CheckpointError(f"{run_dir} holds no step that was given up; there is nothing to replay")
        return [f"step {trainer.step + 1}, not finite in it:", *replay_step(trainer)]


def only_read(job: Job) -> Job:
    """For a run that is not continued: any number of ranks, whatever plan and shares are for, any kind of machine."""
    return job.model_copy(update={"sparse": job.sparse.model_copy(update={"plan": "auto"}),
                                  "elastic": job.elastic.model_copy(update={"strict": False, "shares": None})})


def load_run(job: Job, dataset: Dataset, world: World) -> Trainer:
    """A run as its newest checkpoint left it; a collective call. ``CheckpointError`` when it has none yet."""
    trainer, _ = _restored_trainer(job, dataset, world, int(read_run(job.run_dir)["num_workers"]))
    if trainer.step == 0 < trainer.num_steps:
        raise CheckpointError(f"{job.run_dir} holds no checkpoint yet; run `longer-rec train` on to its first one")
    return trainer


def prepare_process() -> None:
    """What every process that trains, evaluates or measures begins with."""
    quiet_libraries()
    keep_freed_memory()
    make_deterministic()


@contextmanager
def unsaved_run(job: Job) -> Iterator[Trainer]:
    """A trainer at step 0 of which nothing is kept; a collective call."""
    prepare_process()
    with joined_world(job.train.timeout_s) as world:
        dataset = add_instances(job, open_dataset(job.data.dir, verify=False))
        num_workers = resolve_num_workers(job.elastic, world.size)
        yield Trainer(job, dataset, world, parallelize(job, dataset, world), num_workers)


def open_data(job: Job, world: World, splits: Sequence[str] = SPLITS) -> Dataset:
    """The job's data, with the past instances that its model reads; a collective call."""
    plain = open_plain_data(job, world, splits)
    return on_all(lambda: add_instances(job, plain))


def open_plain_data(job: Job, world: World, splits: Sequence[str] = SPLITS) -> Dataset:
    """One rank of each host verifies the hashes of its files; a fault anywhere ends the run everywhere."""
    def open_and_check() -> Dataset:
        dataset = open_dataset(job.data.dir, verify=world.local_rank == 0)
        for split in splits:
            if dataset.num_requests(split) == 0:
                raise DataError(f"the {split} split of {job.data.dir} is empty; prepare the data with a share for it "
                                "in split.fractions")
        return dataset

    return on_all(open_and_check)


def _restored_trainer(job: Job, dataset: Dataset, world: World, num_workers: int,
                      stop: StopSignal | None = None) -> tuple[Trainer, CheckpointManager]:
    """The trainer as the newest checkpoint left it, or at step 0, and the run's checkpoints."""
    trainer = Trainer(job, dataset, world, parallelize(job, dataset, world), num_workers, stop)
    checkpoints = CheckpointManager(job.run_dir / "checkpoints", job.train.keep_checkpoints, job.train.keep_every,
                                    job.train.checkpoint_timeout_s)
    trainer.restore(checkpoints)
    return trainer, checkpoints
