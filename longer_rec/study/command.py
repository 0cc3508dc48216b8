"""A study from its file to its table: what `longer-rec study` does."""

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil
import torch

from longer_rec.config import apply_overrides, build_config, dump_config, load_config
from longer_rec.data.history import Dataset, open_dataset
from longer_rec.data.instances import read_store_manifest
from longer_rec.errors import ConfigError
from longer_rec.job import Job, build_ranker, changed_keys
from longer_rec.report.study_page import print_table, write_study
from longer_rec.runtime.machine import num_cores
from longer_rec.runtime.preemption import StopSignal
from longer_rec.study.progress import StudyProgress
from longer_rec.study.spec import StudyConfig, Variant, load_study, source_job, variants
from longer_rec.study.table import study_content
from longer_rec.study.tasks import Task, run_tasks
from longer_rec.study.trial import run_trial
from longer_rec.train.compress import CompressOptions, compress_run
from longer_rec.train.run import train
from longer_rec.train.run_dir import read_run, write_atomically

# How long the runs of a study that was killed may take to save: they are told to when it dies.
_ENDING_S: Final = 60.0


def run_study(path: Path, overrides: Sequence[str], command: str) -> bool:
    """Run what is missing of a study and write its table; False when a run failed, which the table then lacks.

    Every job is built before the first starts; ``ConfigError`` names the model and the point of one that cannot be.
    """
    study = load_study(path, overrides)
    grid = variants(study)
    datasets = _open_datasets(study, grid)
    parallel = study.parallel or num_cores()
    with _writing(study.directory), _only_here(study.directory), StopSignal() as stop:
        write_atomically(study.directory / "study.yaml", dump_config(study))
        spent = study.directory / "spent.json"
        sizes = {path: dataset.num_requests("train") for path, dataset in datasets.items()}
        with StudyProgress(study.name, spent, parallel, sizes) as progress:
            rounds = _Rounds(study, grid, datasets, parallel, stop, progress)
            failed = rounds.run()
        content = study_content(study, grid, rounds.runs, rounds.costs, rounds.choices, failed)
        content |= {"stores": rounds.stores, "command": command, "spent_s": StudyProgress.spent_s(spent)}
        page = write_study(study.directory, content)
    print_table(content)
    for name, metrics in content["stores"].items():
        print(f"store {name}: its source model has " + ", ".join(
            f"{metric} {metrics[metric]:.4f}" for metric in ("auc", "logloss", "gauc")) + " on the test split")
    for name, reason in failed.items():
        print(f"{name}: failed, {reason}")
    print(f"report: {page}")
    return not failed


@dataclass
class _Rounds:
    """The rounds of a study, each of which needs the results of the one before."""

    study: StudyConfig
    grid: list[Variant]
    datasets: Mapping[Path, Dataset]
    parallel: int
    stop: StopSignal
    progress: StudyProgress

    def run(self) -> dict[str, str]:
        """Fill the stores, measure each model, search its setting, run all seeds; the reason by name of what failed."""
        self.costs: dict[Path, dict[str, Any]] = {}
        self.choices: dict[Path, str] = {}
        self.runs: dict[Path, dict[int, Task]] = {}
        failed = self._fill_stores()
        probes = {variant.folder: self._trial(variant, "probe", self._probe_epochs(variant)) for variant in self.grid}
        failed |= self._round("measuring", list(probes.values()), fill=True)
        self.costs = {folder: json.loads(task.result.read_text()) for folder, task in probes.items() if task.done}
        measured = [variant for variant in self.grid if variant.folder in self.costs]
        searched = {variant.folder: {
            choice: self._trial(variant, f"search-{choice}", self._epochs(variant, self.study.search_budget_s),
                                *self.study.search[choice]) for choice in self.study.search}
            for variant in measured if self._is_trained(variant)}
        failed |= self._round("searching", [task for tasks in searched.values() for task in tasks.values()])
        for variant in measured:
            tasks = {choice: task for choice, task in searched.get(variant.folder, {}).items() if task.done}
            if tasks:
                self.choices[variant.folder] = self._best(tasks)
            if tasks or not searched.get(variant.folder):
                self.runs[variant.folder] = {seed: self._run_task(variant, seed) for seed in self.study.seeds}
        return failed | self._round("training", [task for tasks in self.runs.values() for task in tasks.values()])

    def _fill_stores(self) -> dict[str, str]:
        """Train the source models, then compress: store by store, for one may need another's."""
        self.stores: dict[str, dict[str, float]] = {}
        directory, stores = self.study.directory / "stores", self.study.stores
        jobs = {name: source_job(self.study, name) for name, store in stores.items() if store.run is None}
        sources = [Task(job.name, job, job.run_dir, job.run_dir / "results.json", partial(_train, job))
                   for job in jobs.values()]
        failed = self._round("training source models", sources)
        for name, store in stores.items():
            settings = [text.replace("$stores", str(directory)) for text in store.compress]
            options = build_config(CompressOptions, apply_overrides({}, settings), f"stores.{name}.compress")
            job, path = jobs[store.run or name], directory / name
            task = Task(f"store {name}", job, path, directory / f"{name}.json",
                        partial(_compress, job.run_dir, path, options))
            failed |= self._round("compressing", [task])
            if task.done:
                self.stores[name] = json.loads(task.result.read_text())
        return failed

    def _round(self, phase: str, tasks: list[Task], fill: bool = False) -> dict[str, str]:
        for task in tasks:
            _refuse_changed(task, self.datasets[task.job.data.dir], self.study.directory)
        # A speed that is measured beside idle cores would be none of those to come.
        num_idle = -sum(not task.done for task in tasks) % self.parallel if fill else 0
        fillers = [_filler(tasks[number % len(tasks)], number) for number in range(num_idle)]
        self.progress.begin(phase, tasks + fillers)
        failed = run_tasks(tasks + fillers, self.parallel, self.stop, self.progress)
        return {name: reason for name, reason in failed.items() if name not in {task.name for task in fillers}}

    def _trial(self, variant: Variant, name: str, epochs: float, *choice: str) -> Task:
        path = self.study.directory / "trials" / variant.folder / name
        job = variant.job(path, *choice, f"seed={self.study.seeds[0]}", f"train.epochs={epochs!r}")
        return Task(f"{variant.label} {name}", job, path, path.with_name(f"{name}.json"),
                    partial(run_trial, job, evaluates=name != "probe"))

    def _run_task(self, variant: Variant, seed: int) -> Task:
        path = self.study.directory / "runs" / variant.folder / f"seed-{seed}"
        choice = self.study.search.get(self.choices.get(variant.folder, ""), ())
        epochs = self._epochs(variant, self.study.budget_s)
        job = variant.job(path, *choice, f"seed={seed}", f"train.epochs={epochs!r}")
        return Task(f"{variant.label} seed {seed}", job, path, path / "results.json", partial(_train, job))

    def _is_trained(self, variant: Variant) -> bool:
        return variant.job(self.study.directory).train.epochs > 0

    def _probe_epochs(self, variant: Variant) -> float:
        job = variant.job(self.study.directory)
        requests = self.study.probe_steps * job.step_requests()
        return requests / self.datasets[job.data.dir].num_requests("train") if self._is_trained(variant) else 0.0

    def _epochs(self, variant: Variant, budget_s: float | None) -> float:
        """Passes over the training requests: a number of steps, fixed before the first, so that a run can be repeated
        and resumed bitwise. 0 stays 0."""
        job = variant.job(self.study.directory)
        if not self._is_trained(variant):
            return 0.0
        if budget_s is not None:
            rate = self.costs[variant.folder]["requests_per_s"]
            return equal_time_epochs(rate, budget_s, self.datasets[job.data.dir].num_requests("train"))
        return job.train.epochs

    def _best(self, tasks: Mapping[str, Task]) -> str:
        """The choice that is best on the validation requests; of equals the first. No metric is the worst."""
        sign = -1.0 if self.study.search_metric == "auc" else 1.0
        found = {choice: sign * json.loads(task.result.read_text())["validation"][self.study.search_metric]
                 for choice, task in tasks.items()}
        return min(found, key=lambda choice: math.inf if math.isnan(found[choice]) else found[choice])


def equal_time_epochs(requests_per_s: float, budget_s: float, num_requests: int) -> float:
    """Epochs that take ``budget_s`` at this speed; four digits, for a speed is not known better."""
    return float(f"{requests_per_s * budget_s / num_requests:.4g}")


def _train(job: Job) -> None:
    train(job)


def _compress(run_dir: Path, store: Path, options: CompressOptions) -> dict[str, float]:
    return compress_run(run_dir, store, options).metrics


def _filler(task: Task, number: int) -> Task:
    """A task over again, beside others whose speed is measured."""
    path = task.path.with_name(f"filler-{number}")
    path.with_suffix(".json").unlink(missing_ok=True)
    return Task(f"{task.name}, again {number}", task.job, path, path.with_suffix(".json"), task.action)


def _open_datasets(study: StudyConfig, grid: Sequence[Variant]) -> dict[Path, Dataset]:
    """The data of all variants, each of which is built once without memory; nothing is written."""
    datasets: dict[Path, Dataset] = {}
    jobs = {f"stores.{name}": source_job(study, name) for name, store in study.stores.items() if store.run is None}
    for label, job in {**jobs, **{f"models.{each.label}": each.job(study.directory) for each in grid}}.items():
        if job.data.dir not in datasets:
            datasets[job.data.dir] = open_dataset(job.data.dir, verify=False)
        if job.data.instances is not None:
            continue  # the store that says how wide a token is may have to be made yet
        try:
            with torch.device("meta"):
                build_ranker(job, datasets[job.data.dir].schema, torch.device("meta"))
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from None
    return datasets


def _refuse_changed(task: Task, dataset: Dataset, directory: Path) -> None:
    """``ConfigError`` when an earlier start gave this task other settings or data: it would be of another study."""
    before = task.file(".yaml")
    changed = changed_keys(load_config(Job, before), task.job) if before.exists() else []
    if (task.job.run_dir / "run.json").exists():
        fingerprint = read_run(task.job.run_dir)["data"]["fingerprint"]
        instances = task.job.data.instances
        store = read_store_manifest(instances.store).fingerprint if instances is not None else None
        changed += ["the data's fingerprint"] * (fingerprint != dataset.fingerprint_with(store))
    if changed:
        raise ConfigError(f"{before} was made for other settings (differs in {', '.join(changed)}"
                          f"{'; epochs follow from budget_s' * ('train.epochs' in changed)}); remove "
                          f"{before.parent} to run it anew, or give the study another out than {directory}")


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(f"cannot write into out={directory}: {error.strerror}; check space and permissions or choose "
                          "another out") from None


@contextmanager
def _only_here(directory: Path) -> Iterator[None]:
    """One study a directory. Runs inherit the lock: those of a study that was killed are waited for."""
    with (directory / "lock").open("a+", encoding="utf-8") as file:
        deadline, told = time.monotonic() + _ENDING_S, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip()
                if (holder.isdigit() and psutil.pid_exists(int(holder))) or time.monotonic() > deadline:
                    raise ConfigError(f"{directory} is in use by process {holder}; wait for it, or give the study "
                                      "another out") from None
                if not told:
                    print(f"waiting for the runs of an earlier study in {directory} to save and end", flush=True)
                told = True
                time.sleep(0.2)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
