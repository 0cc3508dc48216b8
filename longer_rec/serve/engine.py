"""Encoded requests in, logits out, from two threads: one encodes users, one scores candidates. Knows nothing of HTTP.

A request whose user's state is in the cache goes straight to the scoring thread, so a long prefill never stands before
it (torch releases the interpreter lock inside its operations). Each thread takes all that waits for it as one batch.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pydantic
import torch
from torch import Tensor

from longer_rec.batch import RequestBatch, concat_batches
from longer_rec.bundle import Bundle
from longer_rec.config import Config
from longer_rec.errors import DeadlinePassed, Overloaded
from longer_rec.model.inputs import InstanceSide, UserSide, all_ages
from longer_rec.model.longer import LongerTower
from longer_rec.model.state import UserState, join_states, split_state
from longer_rec.serve.metrics import Metrics
from longer_rec.serve.request import EncodedRequest
from longer_rec.serve.rounding import CacheType, restore_layers, round_layers
from longer_rec.serve.state_files import StateFiles
from longer_rec.serve.user_cache import CachedState, CacheKey, UserCache

_NICE = 5
Source = Literal["hit", "retimed", "restored", "prefill"]


class EngineConfig(Config):
    """How users' states are kept and requests brought together."""

    threads: int = pydantic.Field(1, ge=1, description="of torch, for each of the two threads of the engine")
    cache_bytes: pydantic.ByteSize = pydantic.Field(pydantic.ByteSize(1 << 30), ge=0)
    tenant_bytes: pydantic.ByteSize | None = pydantic.Field(None, gt=0, description="of the cache, for each tenant")
    cache_ttl_s: float = pydantic.Field(3600.0, gt=0)
    cache_dtype: CacheType = pydantic.Field("float32", description="of cached keys and values")
    state_dir: Path | None = pydantic.Field(None, description="where states go that the cache has no room for")
    state_dir_bytes: pydantic.ByteSize = pydantic.Field(pydantic.ByteSize(10 << 30), ge=0)
    max_waiting: int = pydantic.Field(256, ge=1, description="requests accepted and not answered; more are refused")
    deadline_ms: float = pydantic.Field(2000.0, gt=0, description="of a request, its body's arrival included")
    batch_requests: int = pydantic.Field(16, ge=1, description="at most, in one prefill or one scoring")
    batch_wait_ms: float = pydantic.Field(0.0, ge=0, description="how long a batch waits to fill; 0: for nothing")


@dataclass(frozen=True)
class Answer:
    """Logits of a request's candidates, where its user's state came from, and the version that made them."""

    logit_CY: npt.NDArray[np.float32]
    source: Source
    version: str


@dataclass(frozen=True)
class Served:
    """A bundle and the states made with it; both go when the last request that holds them is answered."""

    bundle: Bundle
    cache: UserCache


@dataclass
class Job:
    """A request under way; ``entry`` is its user's state once there is one, ``pinned`` if the cache holds it."""

    served: Served
    request: EncodedRequest
    key: CacheKey
    deadline: float
    future: "Future[Answer]" = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)
    entry: CachedState | None = None
    pinned: bool = False
    source: Source = "hit"

    @property
    def is_over(self) -> bool:
        """Nobody waits for it any more; past its deadline it is answered so."""
        if time.monotonic() > self.deadline:
            self.fail(DeadlinePassed("the deadline passed while the request waited; ask for less at a time"))
        return self.future.done()

    def fail(self, fault: BaseException) -> None:
        with suppress(InvalidStateError):  # cancelled meanwhile, or answered
            self.future.set_exception(fault)

    def release(self) -> None:
        if self.entry is not None and self.pinned:
            self.served.cache.release(self.entry)
        self.entry, self.pinned = None, False


class Engine:
    """``submit`` from any thread; ``close`` answers what it has accepted and ends the threads."""

    def __init__(self, bundle: Bundle, config: EngineConfig, metrics: Metrics | None = None) -> None:
        self.config, self.metrics = config, metrics or Metrics()
        self.files = StateFiles(config.state_dir, config.state_dir_bytes) if config.state_dir else None
        self.served = self._serve(bundle)
        self._lock = threading.RLock()  # an answer given under it counts itself
        self._num_waiting = 0
        self._pace_s, self._num_paced = 0.0, 0  # seconds between answers while others wait: the mean of about 20
        self._answered = time.monotonic()
        self._is_closing = False
        self._followers: dict[CacheKey, list[Job]] = {}
        self._prefills: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._scorings: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, args=(waiting, work), name=name, daemon=True)
                         for name, waiting, work in (("prefill", self._prefills, self._prefill),
                                                     ("score", self._scorings, self._score))]
        for thread in self._threads:
            thread.start()
        self.metrics.gauge("waiting_requests", "accepted and not answered").set_function(lambda: self._num_waiting)
        self.metrics.gauge("cache_bytes", "of users' states").set_function(lambda: self.served.cache.num_bytes)
        self.metrics.gauge("cache_states", "users' states kept").set_function(lambda: len(self.served.cache))
        self.metrics.gauge("cache_evicted", "states evicted").set_function(lambda: self.served.cache.counts.evicted)
        self.metrics.gauge("state_dir_bytes", "of states in files").set_function(
            lambda: self.files.num_bytes if self.files else 0)

    def submit(self, request: EncodedRequest, tenant: str = "", served: Served | None = None) -> "Future[Answer]":
        """The answer to come; ``served`` is what the request was encoded for, by default what serves now.

        ``Overloaded`` as ``check_room`` has it; ``DeadlinePassed`` of a future that waited too long.
        """
        served = served or self.served
        with self._lock:
            self.check_room()
            if not self._num_waiting:
                self._answered = time.monotonic()
            self._num_waiting += 1
        job = Job(served, request, CacheKey(served.bundle.version, tenant, request.user, request.digest),
                  time.monotonic() + self.config.deadline_ms / 1e3)
        job.future.add_done_callback(self._count_answered)
        with self._lock:
            job.entry = served.cache.get(job.key)
            job.pinned = job.entry is not None
            if job.pinned:
                self._scorings.put(job)
            else:
                self._lead_or_follow(job)
        return job.future

    def check_room(self) -> None:
        """``Overloaded`` when ``max_waiting`` requests wait, or as many as take a third of a deadline.

        To be asked before any work is done for a request: what is accepted and then late has cost others their answer.
        """
        waiting, wait_s = self._num_waiting, self._num_waiting * self._pace_s
        if self._is_closing:
            raise Overloaded("the server is closing; ask another one")
        if waiting >= self.config.max_waiting:
            raise Overloaded(f"{waiting} requests are waiting, {self.config.max_waiting} at most; come back later")
        # Two always may wait: their answers are what a pace that was too slow is corrected by.
        if waiting >= 2 and wait_s > self.config.deadline_ms / 3e3:
            raise Overloaded(f"{waiting} requests are waiting, {wait_s:.1f} s of work, more than a third of "
                             f"deadline_ms={self.config.deadline_ms:g}; come back later")

    @property
    def is_alive(self) -> bool:
        """Whether both threads work."""
        return all(thread.is_alive() for thread in self._threads)

    def drop_user(self, tenant: str, user: str) -> int:
        """Forget a user's states; how many there were."""
        num_filed = self.files.drop_user(tenant, user) if self.files is not None else 0
        return self.served.cache.drop_user(tenant, user) + num_filed

    def swap(self, bundle: Bundle) -> None:
        """Requests encoded from now on meet the new bundle and an empty cache; those under way keep theirs."""
        self.served = self._serve(bundle)
        self.metrics.reloads.inc()

    def close(self, timeout_s: float = 30.0) -> None:
        """Accept nothing more, answer what was accepted, end the threads."""
        with self._lock:
            self._is_closing = True
        end = time.monotonic() + timeout_s
        while self._num_waiting and time.monotonic() < end:
            time.sleep(0.005)
        for waiting, thread in zip((self._prefills, self._scorings), self._threads, strict=True):
            waiting.put(None)
            thread.join(max(0.0, end - time.monotonic()))
        if self.files is not None:
            self.files.clear()

    def _serve(self, bundle: Bundle) -> Served:
        config = self.config
        return Served(bundle, UserCache(config.cache_bytes, config.cache_ttl_s, config.tenant_bytes,
                                        collects_evicted=self.files is not None))

    def _count_answered(self, _: object) -> None:
        with self._lock:
            self._num_waiting -= 1
            now = time.monotonic()
            if self._num_waiting:
                self._num_paced = min(20, self._num_paced + 1)
                self._pace_s += (now - self._answered - self._pace_s) / self._num_paced
            self._answered = now

    def _lead_or_follow(self, job: Job) -> None:
        """Under the lock: wait for the prefill of the same user that is under way, or begin one."""
        if job.key in self._followers:
            self._followers[job.key].append(job)
        else:
            self._followers[job.key] = []
            self._prefills.put(job)

    def _work(self, waiting: "queue.SimpleQueue[Job | None]", work: Callable[[list[Job]], None]) -> None:
        torch.set_num_threads(self.config.threads)
        _step_back()
        while (jobs := self._take(waiting)) is not None:
            for served in {id(job.served): job.served for job in jobs}.values():
                own = [job for job in jobs if job.served is served]
                try:
                    with torch.inference_mode():
                        work(own)
                except Exception as fault:
                    self._fail(own, fault)

    def _take(self, waiting: "queue.SimpleQueue[Job | None]") -> list[Job] | None:
        """All that waits, up to a batch; None at the end."""
        first = waiting.get()
        if first is None:
            return None
        jobs, end = [first], time.monotonic() + self.config.batch_wait_ms / 1e3
        while len(jobs) < self.config.batch_requests:
            try:
                job = waiting.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                waiting.put(None)
                break
            jobs.append(job)
        return jobs

    def _fail(self, jobs: Sequence[Job], fault: Exception) -> None:
        for job in jobs:
            with self._lock:
                followers = self._followers.pop(job.key, []) if job.entry is None else []
            for each in (job, *followers):
                each.release()
                each.fail(fault)

    def _prefill(self, jobs: list[Job]) -> None:
        """Encode users together; each then goes to the scoring thread with all who waited for the same state."""
        jobs = [job for job in jobs if not self._is_abandoned(job) and not self._restore(job)]
        if not jobs:
            return
        bundle = jobs[0].served.bundle
        start = time.monotonic()
        for job in jobs:
            self.metrics.queue_s.observe(start - job.submitted)
        batch = concat_batches([_without_candidates(job.request.batch) for job in jobs])
        side = bundle.ranker.user_side(batch, bundle.tables.users(batch))
        states = split_state(bundle.ranker.tower.encode(side))
        ages = all_ages(side)
        self.metrics.prefill_s.observe(time.monotonic() - start)
        self.metrics.prefill_users.observe(len(jobs))
        for job, state, age_T in zip(jobs, states, ages, strict=True):
            job.source = "prefill"
            self._hand_on(job, CachedState(job.key, round_layers(state, self.config.cache_dtype), job.request.time,
                                           age_T.clone()))

    def _restore(self, job: Job) -> bool:
        """Whether the state that ``job`` needs came back from a file; not one that was found to be of another time."""
        entry = self.files.take(job.key) if self.files is not None and job.source != "retimed" else None
        if entry is not None:
            job.source = "restored"
            self._hand_on(job, entry)
        return entry is not None

    def _hand_on(self, job: Job, entry: CachedState) -> None:
        """To the scoring thread, with all who waited for the same state; what it drives out of the cache into files."""
        cache = job.served.cache
        with self._lock:
            ready = [job, *self._followers.pop(job.key, [])]
            kept = cache.put(entry, pins=len(ready))
            for each in ready:
                each.entry, each.pinned = entry, kept
        for each in ready:
            self._scorings.put(each)
        if self.files is not None:
            for evicted in cache.take_evicted():
                self.files.put(evicted)

    def _is_abandoned(self, job: Job) -> bool:
        """Nobody waits for the state that ``job`` asked for."""
        if not job.is_over:
            return False
        with self._lock:
            if any(not follower.is_over for follower in self._followers.get(job.key, [])):
                return False
            self._followers.pop(job.key, None)
            return True

    def _score(self, jobs: list[Job]) -> None:
        """Score the candidates of many users, each against its own state, as one batch."""
        start = time.monotonic()
        ready: list[Job] = []
        states: list[UserState] = []
        for job in jobs:
            if job.is_over:
                job.release()
                continue
            state = self._fit(job)
            if state is None:
                job.release()
                with self._lock:
                    self._lead_or_follow(job)
                continue
            ready.append(job)
            states.append(state)
        if not ready:
            return
        ranker, tables = ready[0].served.bundle.ranker, ready[0].served.bundle.tables
        batch = concat_batches([_without_history(job.request.batch) for job in ready])
        side = ranker.candidate_side(batch, tables.candidates(batch.candidates))
        logit_CY = ranker.tower.score(join_states(states), side)
        self.metrics.score_s.observe(time.monotonic() - start)
        self.metrics.score_requests.observe(len(ready))
        for job, logits in zip(ready, logit_CY.cpu().split(batch.num_candidates_B.tolist()), strict=True):
            self._answer(job, logits, start)

    def _answer(self, job: Job, logit_CY: Tensor, start: float) -> None:
        if job.source in ("hit", "retimed"):
            self.metrics.queue_s.observe(start - job.submitted)
        self.metrics.states.labels(job.source).inc()
        job.release()
        with suppress(InvalidStateError):  # its client has gone
            job.future.set_result(Answer(logit_CY.numpy(), job.source, job.served.bundle.version))

    def _fit(self, job: Job) -> UserState | None:
        """The state at the time of ``job``; None when it has to be made for it."""
        entry, tower = job.entry, job.served.bundle.ranker.tower
        assert entry is not None
        state = entry.state if self.config.cache_dtype == "float32" else restore_layers(entry.state)
        if entry.time == job.request.time:
            return state
        job.source = "retimed"
        return tower.retime(state, entry.age_T, _ages(job.request.batch)) if isinstance(tower, LongerTower) else None


def _step_back() -> None:
    """Let the thread that reads and answers sockets go before this one, whenever both could run.

    On a busy core it would otherwise get a third of the time beside the engine's threads, and a full server's refusals
    would queue behind the work that they are to keep out.
    """
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICE)


def _without_candidates(batch: RequestBatch) -> RequestBatch:
    return replace(batch, candidates={}, candidate_dense_CF=batch.candidate_dense_CF[:0], label_CY=batch.label_CY[:0])


def _without_history(batch: RequestBatch) -> RequestBatch:
    return replace(batch, history={}, history_time_T=batch.history_time_T[:0], users={}, user_length_B={},
                   instances={})


def _ages(batch: RequestBatch) -> UserSide:
    """Ids and ages of one request, all that ``retime`` reads."""
    none, given = batch.user_dense_BF[:0], batch.instances
    instances = InstanceSide(given["length"], batch.request_time_B - given["time"], none, none, {}) if given else None
    return UserSide({}, batch.history, batch.request_time_B - batch.history_time_T, batch.history_length_B, {},
                    batch.user_dense_BF, instances)
