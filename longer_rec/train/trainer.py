"""The training loop: one synchronous step updates dense and sparse parameters together."""

import datetime
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from longer_rec.batch import RequestBatch
from longer_rec.checkpoint.manager import CheckpointManager
from longer_rec.data.history import Dataset
from longer_rec.data.loader import TrainLoader
from longer_rec.elastic.assignment import assign_workers
from longer_rec.elastic.reduce import SubtreeStack, tree_all_reduce
from longer_rec.elastic.step import (
    backward_through_lookup,
    cut_lookup,
    flatten_gradients,
    keep_gradients,
    unflatten_gradients,
    worker_leaves,
)
from longer_rec.errors import CheckpointError, DataError, LongerRecError, Preempted
from longer_rec.job import Job, source_config
from longer_rec.report.terminal import TrainProgress
from longer_rec.runtime.determinism import derive_seed
from longer_rec.runtime.distributed import World, on_main
from longer_rec.runtime.machine import numerics
from longer_rec.runtime.preemption import StopSignal
from longer_rec.runtime.profiling import StepClock
from longer_rec.sparse.lookup import SentIds, spread
from longer_rec.sparse.optimizers import warmup_cosine
from longer_rec.train.digests import state_digests
from longer_rec.train.evaluate import Scores, gather_scores, metrics_of, profile_attention
from longer_rec.train.log import RunLog
from longer_rec.train.parallelize import ParallelRanker
from longer_rec.train.precision import LossScale, precision_context
from longer_rec.train.rates import Rates

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """Scalars of one step, equal on all ranks. A step that is not ``finite`` updated nothing.

    ``num_stopping`` counts the workers whose process was told to stop.
    """

    loss: float
    grad_norm: float
    sparse_grad_norm: float
    num_stopping: float = 0.0

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss + self.grad_norm + self.sparse_grad_norm)


class Trainer:
    """Owns the step counter; the model and the optimizers are ``parallel``'s."""

    def __init__(self, job: Job, dataset: Dataset, world: World, parallel: ParallelRanker, num_workers: int,
                 stop: StopSignal | None = None) -> None:
        self.job = job
        self.dataset = dataset
        self.world = world
        self.parallel = parallel
        self.num_workers = num_workers
        self.assignment = assign_workers(job.elastic.shares, world.size, num_workers)
        self.workers = self.assignment[world.rank]
        self.stop = stop or StopSignal()
        self.clock = StepClock()
        self.step = 0
        self.bad_steps = 0
        self.skipped_steps = 0
        self.always_strict = job.elastic.is_strict
        self.elapsed_s = 0.0
        self._saved: Mapping[str, Any] | None = None  # of the checkpoint that this start continues
        self._rates = Rates(job, dataset.schema, world.device)
        self.loss_scale = LossScale(job.train)
        self._sent: SentIds | None = None

    @property
    def num_steps(self) -> int:
        """Steps of the whole run: a function of the data, the batch and W, never of the number of processes."""
        requests = self.job.train.epochs * self.dataset.num_requests("train")
        return math.ceil(requests / (self.num_workers * self.job.data.batch_requests))

    def loader(self, num_steps: int) -> TrainLoader:
        """The batches of the own workers for the next steps."""
        source = source_config(self.job)
        return TrainLoader(self.dataset, self.job.data, seed=self.job.seed, num_workers=self.num_workers,
                           workers=self.workers, start_step=self.step, num_steps=num_steps,
                           user_order=source is not None and source.order == "user",
                           reverse_second_pass=source is not None and source.reverse_second_pass)

    def train_step(self, batches: list[RequestBatch], upcoming: list[RequestBatch] | None = None) -> StepResult:
        """One batch of every own logical worker; the ids of the ``upcoming`` step travel meanwhile.

        One sparse lookup for all of them; the tower forward and backward worker by worker; their dense gradients
        through the tree; then, if every number on every rank is finite, one backward through the lookup (one fused
        update of the tables) and one dense step. Rows of the upcoming step are read after that, in its own lookup.
        """
        ranker, optimizer = self.parallel.ranker, self.parallel.optimizer
        tower_parameters = self.parallel.tower_parameters
        optimizer.set_lr_factor(warmup_cosine(self.step, self.num_steps, self.job.schedule.warmup_steps,
                                              self.job.schedule.final_factor))
        optimizer.zero_grad()
        with self.clock.part("time_lookup_s"):
            sent, self._sent = self._sent or ranker.send(batches), None
            assert all(own is given for own, given in zip(sent.batches, batches, strict=True))
            rows, tables = cut_lookup(ranker.receive(sent))
            if upcoming is not None:
                self._sent = ranker.send(upcoming)
        tree = SubtreeStack()
        with self.clock.part("time_tower_s"):
            for worker, batch, leaves in zip(self.workers, batches, worker_leaves(rows, batches), strict=True):
                _, loss = self.worker_backward(worker, batch, leaves)
                # What all ranks must agree on travels behind the gradients.
                scalars = [loss, keep_gradients(leaves, self.loss_scale.value), loss.new_tensor(self.stop.received)]
                tree.push(worker, flatten_gradients(tower_parameters, scalars))
        with self.clock.part("time_reduce_s"):
            if self._sent is not None:
                self._sent.post()
            total = tree_all_reduce(tree, self.assignment)
            loss, sparse_norm, num_stopping = unflatten_gradients(total, tower_parameters)
            gradient = total[:-len(scalars)].div_(self.loss_scale.value)
            grad_norm = gradient.norm()
            # .tolist(): a host sync a step, the price of deciding on every rank alike before anything is updated.
            result = StepResult(*torch.stack([loss, grad_norm, sparse_norm.sqrt(), num_stopping]).tolist())
        if result.finite:
            with self.clock.part("time_sparse_s"):
                backward_through_lookup(tables, rows)
            with self.clock.part("time_dense_s"):
                gradient.mul_(min(1.0, self.job.train.clip_norm / (result.grad_norm + 1e-6)))
                optimizer.step()
        self.loss_scale.update(result.finite)
        return result

    def worker_backward(self, worker: int, batch: RequestBatch, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Leaves gradients in the leaves and the tower; logits (C x Y) and the worker's share of the global mean loss.

        Dropout draws from a generator that depends on (seed, step, worker) alone.
        """
        torch.manual_seed(derive_seed(self.job.seed, "dropout", self.step, worker))
        ranker = self.parallel.ranker
        with precision_context(self.job.train, ranker.tower, self.world.device):
            logit_CY = ranker.logits(batch, spread(batch, leaves, ranker.schema))
        loss = binary_cross_entropy_with_logits(logit_CY.float(), batch.label_CY) / self.num_workers
        if loss.requires_grad:
            (loss * self.loss_scale.value).backward()
        return logit_CY, loss

    def fit(self, checkpoints: CheckpointManager, log: RunLog | None) -> None:
        """Train from the current step to the last one; logs, evaluates and saves on the way.

        ``Preempted`` once a signal has stopped it and the step is saved, ``DataError`` when too many steps in a row
        were not finite; what reproduces them is in ``<run_dir>/failure`` then.
        """
        loader = self.loader(self.num_steps - self.step)
        if log is not None:
            self._rates.measure_peak()
        if self.step < self.num_steps:
            checkpoints.prepare(self.parallel.state_dict())
        try:
            with TrainProgress(self.job.name, self.num_steps, self.step, enabled=self.world.is_main) as progress:
                self.clock.take()
                steps = ([batch.to(self.world.device, non_blocking=True) for batch in own] for own in loader)
                for batches, upcoming in pairwise(chain(steps, [None])):
                    self.clock.add("time_data_s", loader.take_wait())
                    assert batches is not None
                    self._fit_step(batches, upcoming, checkpoints, log, progress)
                    self._note_pause(log)
        except LongerRecError:
            checkpoints.wait()  # not after an error of the process group: a lost rank's part would never come
            raise
        checkpoints.wait()
        self._note_pause(log)
        self.elapsed_s += self.clock.take()[1]

    def _fit_step(self, batches: list[RequestBatch], upcoming: list[RequestBatch] | None,
                  checkpoints: CheckpointManager, log: RunLog | None, progress: TrainProgress) -> None:
        cadence = self.job.train
        result = self.train_step(batches, upcoming)
        self.step += 1
        self._count_bad(result)
        if log is not None:
            self._rates.add(batches)
        self._write_digests(log)
        evaluates = self.step % cadence.eval_every == 0
        saves = self.step % cadence.checkpoint_every == 0 or self.step == self.num_steps
        # Before either, so that the time of an evaluation is in no step's rates.
        if self.step % cadence.log_every == 0 or evaluates or saves:
            self._log_step(log, progress, result)
        if evaluates:
            self._log_evaluation(log, progress)
        if saves or result.num_stopping:
            self.save(checkpoints)
        if result.num_stopping:
            raise Preempted(f"told to stop; step {self.step:,} of {self.num_steps:,} is saved, start again to continue")

    def _note_pause(self, log: RunLog | None) -> None:
        """After the first step of a start that continues, or when it has none left: seconds since the step saved."""
        if log is not None and self._saved is not None:
            passed = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(self._saved["saved"])
            log.write_continued(self._saved["step"], self._saved["world_size"], self.world.size, passed.total_seconds())
        self._saved = None

    def save(self, checkpoints: CheckpointManager) -> None:
        """Save weights, optimizer state and the position in the data while training goes on; a collective call."""
        with self.clock.part("time_save_s"):
            checkpoints.save_async(self.step, self.parallel.state_dict(), {
                "step": self.step, "samples": self.step * self.num_workers * self.job.data.batch_requests,
                "elapsed_s": self.elapsed_s, "bad_steps": self.bad_steps, "skipped_steps": self.skipped_steps,
                "num_workers": self.num_workers, "world_size": self.world.size, "name": self.job.name,
                "always_strict": self.always_strict,
                "loss_scale": self.loss_scale.value, "loss_scale_steps": self.loss_scale.good_steps,
                "data_fingerprint": self.dataset.fingerprint, "numerics": self._numerics(),
                "saved": datetime.datetime.now(datetime.UTC).isoformat()})

    def restore(self, checkpoints: CheckpointManager) -> bool:
        """Continue from the newest complete checkpoint, if there is one; a collective call."""
        extra = self.parallel.load_latest(checkpoints)
        if extra is None:
            return False
        if extra["data_fingerprint"] != self.dataset.fingerprint:
            raise CheckpointError(f"the checkpoint of step {extra['step']} was trained on data "
                                  f"{extra['data_fingerprint'][:12]}, not on {self.dataset.fingerprint[:12]}; "
                                  "choose another run_dir")
        self._check_numerics(extra["numerics"])
        if self.always_strict and not extra["always_strict"]:
            raise CheckpointError("elastic.strict promises bitwise the same model, but earlier steps were trained "
                                  "without it; set elastic.strict=false, or start anew in another run_dir")
        self.always_strict = self.always_strict and extra["always_strict"]
        self.step, self.elapsed_s = extra["step"], extra["elapsed_s"]
        self._saved = extra
        self.bad_steps, self.skipped_steps = extra["bad_steps"], extra["skipped_steps"]
        if self.loss_scale.dynamic:
            self.loss_scale.value, self.loss_scale.good_steps = extra["loss_scale"], extra["loss_scale_steps"]
        return True

    def _numerics(self) -> dict[str, Any]:
        return numerics(self.world.device, self.job.elastic.is_portable)

    def _check_numerics(self, saved: Mapping[str, object]) -> None:
        here = self._numerics()
        changed = "; ".join(f"{name} was {saved.get(name)}, is {value}" for name, value in here.items()
                            if saved.get(name) != value)
        if changed and self.job.elastic.is_strict:
            raise CheckpointError(f"elastic.strict promises bitwise the same model, but {changed}: continue as the run "
                                  "began, or set elastic.strict=false")
        if changed and self.world.is_main:
            _log.warning("%s: the last bits will differ from those of one machine", changed)

    def _count_bad(self, result: StepResult) -> None:
        if result.finite:
            self.bad_steps = 0
            return
        self.bad_steps += 1
        self.skipped_steps += 1
        if self.bad_steps >= self.job.train.max_bad_steps:
            # Nothing was updated since the first of them: this state and that step reproduce it.
            dump = CheckpointManager(self.job.run_dir / "failure", keep=1,
                                     timeout_s=self.job.train.checkpoint_timeout_s)
            self.step -= self.bad_steps
            self.save(dump)
            dump.wait()
            raise DataError(f"{self.bad_steps} steps in a row, from step {self.step + 1} on, had a loss or gradient "
                            f"that is not finite (loss {result.loss}); see with `longer-rec replay {self.job.run_dir}` "
                            "where it begins; lower dense.lr or sparse.lr in another run_dir")

    def _write_digests(self, log: RunLog | None) -> None:
        every = self.job.elastic.digest_every
        if every and self.step % every == 0:
            with self.clock.part("time_digest_s"):
                digests = state_digests(self.parallel.state_dict())
            if log is not None:
                log.write_digests(self.step, digests)

    def _log_step(self, log: RunLog | None, progress: TrainProgress, result: StepResult) -> None:
        parts, elapsed = self.clock.take()
        self.elapsed_s += elapsed
        if log is None:
            return
        rates = self._rates.take(elapsed, parts["time_tower_s"], len(self.workers) / self.num_workers)
        values = {"loss": result.loss, "grad_norm": result.grad_norm, "sparse_grad_norm": result.sparse_grad_norm,
                  **{f"{name}_lr": lr for name, lr in self.parallel.optimizer.learning_rates().items()}, **rates,
                  "skipped_steps": self.skipped_steps, "elapsed_s": self.elapsed_s, **parts}
        log.write("train", self.step, values)
        progress.update(self.step, values)

    def _log_evaluation(self, log: RunLog | None, progress: TrainProgress) -> None:
        metrics = self.evaluate("validation", self.job.train.eval_requests)
        _, elapsed = self.clock.take()
        self.elapsed_s += elapsed
        if log is not None:
            log.write("validation", self.step, {**metrics, "elapsed_s": self.elapsed_s})
            progress.update(self.step, {f"validation_{name}": value for name, value in metrics.items()})

    def evaluate(self, split: str, max_requests: int | None = None) -> dict[str, float]:
        """Metrics of a split with the current weights; a collective call."""
        scores = self.gather_scores(split, max_requests)
        return on_main(lambda: metrics_of(scores, self.dataset))

    def gather_scores(self, split: str, max_requests: int | None = None) -> Scores | None:
        """Scores of a split, on rank 0; a collective call.

        Of a whole split it ends with ``Preempted`` when a signal comes: nothing would be lost.
        """
        return gather_scores(self.parallel.ranker, self.dataset, split, self.job.data, self.world,
                             self.job.train, max_requests, self.stop if max_requests is None else None)

    def profile_attention(self, split: str) -> dict[str, Any] | None:
        """Where candidates look, on rank 0; a collective call."""
        return profile_attention(self.parallel.ranker, self.dataset, split, self.job.data, self.world,
                                 self.job.train)
