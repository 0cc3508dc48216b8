"""The engine: raw requests become training's batches, cached answers equal fresh ones, nobody waits for a stranger."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longer_rec.bundle import Bundle, load_bundle
from longer_rec.data.batches import make_batch
from longer_rec.data.history import Dataset
from longer_rec.data.raw import raw_request
from longer_rec.errors import ConfigError, DeadlinePassed, Overloaded, ServeError
from longer_rec.model.state import LayerCache, UserState, state_bytes
from longer_rec.serve.engine import Answer, Engine, EngineConfig
from longer_rec.serve.histories import Histories
from longer_rec.serve.request import EncodedRequest, Limits, encode_score
from longer_rec.serve.rounding import restore_layers, round_layers
from tests.reference.bundles import MAX_EVENTS, random_bundle, shop_dataset, write_random_bundle

TIME = 2000


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return shop_dataset(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def bundle(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(dataset, tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def engine(bundle: Bundle) -> Iterator[Engine]:
    engine = Engine(bundle, EngineConfig())
    yield engine
    engine.close()


def body(user: int = 0, length: int = 9, when: int = TIME, candidates: int = 5, first: int = 0) -> dict[str, Any]:
    events = range(first, first + length)
    return {"user": f"a visitor with number {user}", "time": when,
            "history": {"item": [(3 * one + user) % 40 for one in events], "time": [1000 + 7 * one for one in events],
                        "price": [one % 6 for one in events], "place": [f"place {one % 9}" for one in events]},
            "candidates": [(2 * one + user) % 40 for one in range(candidates)]}


def encoded(bundle: Bundle, raw: dict[str, Any]) -> EncodedRequest:
    return encode_score(bundle, raw, None, Limits())


def ask(engine: Engine, raw: dict[str, Any]) -> Answer:
    return engine.submit(encoded(engine.served.bundle, raw)).result(10)


def full(bundle: Bundle, raw: dict[str, Any]) -> np.ndarray:
    """The whole forward of the request by itself."""
    with torch.no_grad():
        return bundle.ranker(encoded(bundle, raw).batch).numpy()


def test_raw_values_encode_to_the_batches_of_training(bundle: Bundle, dataset: Dataset) -> None:
    rows = dataset.split_rows("train")[::10]
    for row in [*rows, *dataset.split_rows("test")]:
        ours = encode_score(bundle, raw_request(dataset, row, MAX_EVENTS), None, Limits()).batch
        theirs = make_batch(dataset, [row], max_events=MAX_EVENTS)
        for name in ("history", "candidates", "users", "user_length_B"):
            one, other = getattr(ours, name), getattr(theirs, name)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one), (row, name)
        assert torch.equal(ours.history_time_T, theirs.history_time_T)
        assert torch.equal(ours.candidate_dense_CF, theirs.candidate_dense_CF)


def test_hits_and_retimed_states_answer_like_a_whole_forward(engine: Engine, bundle: Bundle) -> None:
    sources = []
    for when in (TIME, TIME, TIME + 1, TIME + 500):
        for user, length in ((0, 9), (1, 0), (2, 30), (3, 1)):
            raw = body(user, length, when)
            answer = ask(engine, raw)
            sources.append(answer.source)
            assert np.abs(answer.logit_CY - full(bundle, raw)).max() <= 1e-5
    assert sources[:8] == ["prefill"] * 4 + ["hit"] * 4
    assert {"retimed", "prefill"} <= set(sources[8:])


def test_requests_scored_together_score_as_alone(bundle: Bundle) -> None:
    engine = Engine(bundle, EngineConfig(batch_wait_ms=1000, batch_requests=7, deadline_ms=10_000))
    bodies = [body(user, length=user * 3, candidates=1 + user) for user in range(7)]
    requests = [encoded(bundle, raw) for raw in bodies]
    answers = [engine.submit(request) for request in requests]
    for raw, answer in zip(bodies, answers, strict=True):
        assert np.abs(answer.result(10).logit_CY - full(bundle, raw)).max() <= 1e-5
    assert engine.metrics.registry.get_sample_value("longer_prefill_users_sum") == 7
    assert engine.metrics.registry.get_sample_value("longer_prefill_users_count") == 1
    engine.close()


def test_concurrent_misses_of_one_user_make_one_prefill(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = slow_down(engine, monkeypatch, 0.2)
    bundle = engine.served.bundle
    answers = [engine.submit(encoded(bundle, body(candidates=1 + one))) for one in range(12)]
    wait(answers, 10)
    assert len(calls) == 1
    assert [answer.result().source for answer in answers].count("prefill") == 1
    assert engine.served.cache.counts.misses == 12
    assert not any(held.pins for held in engine.served.cache._entries.values())


def test_a_long_prefill_does_not_stall_a_cached_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(engine, body(0))
    slow_down(engine, monkeypatch, 1.0)
    slow = engine.submit(encoded(engine.served.bundle, body(1)))
    start = time.monotonic()
    assert ask(engine, body(0)).source == "hit"
    assert time.monotonic() - start < 0.5
    assert not slow.done()
    assert slow.result(10).source == "prefill"


def test_too_many_waiting_are_refused_and_late_ones_told_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(bundle, EngineConfig(max_waiting=3, deadline_ms=150, batch_requests=1))
    slow_down(engine, monkeypatch, 0.3)
    waiting = [engine.submit(encoded(bundle, body(user))) for user in range(3)]
    with pytest.raises(Overloaded, match="3 requests are waiting, 3 at most"):
        engine.submit(encoded(bundle, body(4)))
    for answer in waiting:
        with pytest.raises(DeadlinePassed):
            answer.result(10)
    assert engine.submit(encoded(bundle, body(5))), "there is room again"
    engine.close()
    with pytest.raises(Overloaded, match="closing"):
        engine.submit(encoded(bundle, body(4)))


def test_what_would_wait_too_long_is_refused_at_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(bundle, EngineConfig(deadline_ms=3000, batch_requests=1))
    slow_down(engine, monkeypatch, 0.1)
    accepted, refused = [], 0
    for user in range(120):
        request = encoded(bundle, body(user))
        try:
            accepted.append(engine.submit(request))
        except Overloaded:
            with pytest.raises(Overloaded, match="s of work, more than a third of deadline_ms=3000"):
                engine.check_room()
            refused += 1
        time.sleep(0.02)
    late = sum(isinstance(answer.exception(10), DeadlinePassed) for answer in accepted)
    assert refused > 10
    assert late == 0
    assert engine.submit(encoded(bundle, body(200))).result(10), "there is room again"
    engine.close()


def test_a_fault_in_a_batch_fails_its_requests_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = engine.served.bundle.ranker.tower
    with monkeypatch.context() as patch:
        def fail(_: object) -> None:
            time.sleep(0.1)
            raise RuntimeError("out of memory")
        patch.setattr(tower, "encode", fail)
        answers = [engine.submit(encoded(engine.served.bundle, body())) for _ in range(3)]
        for answer in answers:
            with pytest.raises(RuntimeError, match="out of memory"):
                answer.result(10)
    assert ask(engine, body()).source == "prefill"
    assert engine.is_alive


def test_without_room_in_the_cache_requests_are_answered_uncached(bundle: Bundle) -> None:
    engine = Engine(bundle, EngineConfig(cache_bytes=0))
    for _ in range(2):
        assert ask(engine, body()).source == "prefill"
    assert engine.served.cache.num_bytes == 0
    engine.close()


def test_a_new_bundle_means_a_new_cache_and_old_requests_keep_theirs(engine: Engine, dataset: Dataset, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = engine.served, load_bundle(write_random_bundle(dataset, tmp_path / "new", seed=1))
    ask(engine, body())
    slow_down(engine, monkeypatch, 0.2)
    under_way = engine.submit(encoded(old.bundle, body(1)))
    engine.swap(new)
    assert under_way.result(10).version == old.bundle.version
    answer = ask(engine, body())
    assert (answer.version, answer.source) == (new.version, "prefill")
    assert np.abs(answer.logit_CY - full(new, body())).max() <= 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rounded_states_stay_within_their_bound(bundle: Bundle, dtype: str) -> None:
    engine = Engine(bundle, EngineConfig(cache_dtype=dtype))
    small = ask(engine, body())
    assert np.array_equal(small.logit_CY, ask(engine, body()).logit_CY), "a miss is answered from what is kept"
    assert 0 < np.abs(small.logit_CY - full(bundle, body())).max() <= 2e-2
    exact = Engine(bundle, EngineConfig())
    ask(exact, body())
    assert engine.served.cache.num_bytes < exact.served.cache.num_bytes
    engine.close()
    exact.close()


def test_bf16_matmuls_stay_within_their_bound_and_are_of_longer_alone(bundle: Bundle, dataset: Dataset, tmp_path: Path
                                                                      ) -> None:
    path = write_random_bundle(dataset, tmp_path / "longer")
    engine = Engine(load_bundle(path, dtype=torch.bfloat16), EngineConfig())
    assert engine.served.bundle.version == bundle.version
    answers = [ask(engine, body()).logit_CY for _ in range(2)]
    assert np.array_equal(*answers)
    assert 0 < np.abs(answers[0] - full(bundle, body())).max() <= 3 * 2 ** -8 * np.abs(full(bundle, body())).max()
    engine.close()
    other = write_random_bundle(dataset, tmp_path / "other", model={"kind": "din"})
    with pytest.raises(ConfigError, match="holds a din, which is served in fp32 alone; leave precision out"):
        load_bundle(other, dtype=torch.bfloat16)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_threads_that_compute_step_back_behind_the_one_that_answers(engine: Engine) -> None:
    ask(engine, body())
    assert {os.getpriority(os.PRIO_PROCESS, thread.native_id or 0) for thread in engine._threads} == {
        min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)}


def test_int8_keys_and_values_are_half_a_step_off_at_most() -> None:
    rows = (torch.randn(3, 7, 8) * torch.tensor([1e-3, 1.0, 50.0]).view(3, 1, 1)).transpose(0, 1)
    rows[0] = 0.0
    state = UserState(torch.randn(1, 3), (LayerCache(rows, -rows, torch.tensor([7])),))
    kept = round_layers(state, "int8")
    assert state_bytes(kept) == 2 * 7 * 3 * (8 + 4) + 8 + 3 * 4, "a byte a value, and four a row and head"
    back = restore_layers(kept)
    for one, other in zip((back.layers[0].key_SHE, back.layers[0].value_SHE), (rows, -rows), strict=True):
        assert (one.stride(), one.dtype) == (other.stride(), torch.float32)
        assert ((one - other).abs() <= other.abs().amax(-1, keepdim=True) / 127 * 0.5001).all()
    assert torch.equal(back.head_BF, state.head_BF)


def test_evicted_states_come_back_from_files_and_answer_alike(bundle: Bundle, dataset: Dataset, tmp_path: Path) -> None:
    engine = Engine(bundle, EngineConfig(cache_bytes=6000, state_dir=tmp_path / "states"))
    first = [ask(engine, body(user)) for user in range(8)]
    assert engine.files is not None
    end = time.monotonic() + 10
    while len(engine.served.cache) + len(engine.files) < 8:  # files are written after the answer
        assert time.monotonic() < end
    assert 1 <= len(engine.served.cache) <= 4
    for user, fresh in enumerate(first):
        again = ask(engine, body(user))
        assert (fresh.source, again.source) == ("prefill", "restored")
        assert np.array_equal(again.logit_CY, fresh.logit_CY)
    assert ask(engine, body(7)).source == "hit"
    later = ask(engine, body(0, when=TIME + 10**6))
    assert later.source == "prefill", "its ages have other buckets"
    assert np.abs(later.logit_CY - full(bundle, body(0, when=TIME + 10**6))).max() <= 1e-5
    assert engine.drop_user("", body(1)["user"]) == 1
    assert ask(engine, body(1)).source == "prefill"
    for path in (tmp_path / "states").iterdir():
        path.write_bytes(b"damaged")
    assert ask(engine, body(2)).source == "prefill"
    engine.swap(load_bundle(write_random_bundle(dataset, tmp_path / "new", seed=1)))
    assert ask(engine, body(3)).source == "prefill"
    assert len(engine.files) > 0
    engine.close()
    assert list((tmp_path / "states").iterdir()) == []


def test_within_a_time_quantum_requests_hit(engine: Engine) -> None:
    answers = [engine.submit(encode_score(engine.served.bundle, body(when=when), None, Limits(), time_quantum_s=60)
                             ).result(10) for when in (1981, 2000, 2040, 2041)]
    assert [answer.source for answer in answers[:3]] == ["prefill", "hit", "hit"]
    assert np.array_equal(answers[0].logit_CY, full(engine.served.bundle, body(when=2040)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 39), st.integers(1000, 1040)), max_size=20), st.data())
def test_appended_events_score_like_the_whole_history_at_once(bundle: Bundle, events: list[tuple[int, int]],
                                                              data: st.DataObject) -> None:
    """In any pieces and, between different times, any order: late events find their place."""
    columns = {"item": [one for one, _ in events], "time": [when for _, when in events],
               "price": [one % 7 for one, _ in events], "place": ["place 1" for _ in events]}
    histories, at = Histories(1 << 20, 100), 0
    while at < len(events) or at == 0:
        size = data.draw(st.integers(1, 6))
        piece = sorted(range(at, min(at + size, len(events))), key=lambda one: columns["time"][one])
        histories.append(bundle, "", "u", {"events": {name: [values[one] for one in piece]
                                                      for name, values in columns.items()}}, 100)
        at += size
    order = sorted(range(len(events)), key=lambda one: columns["time"][one])
    whole = {name: [values[one] for one in order] for name, values in columns.items()}
    when = data.draw(st.integers(1000, 1050))
    cut = {name: [value for value, then in zip(values, whole["time"], strict=True) if then < when]
           for name, values in whole.items()}
    # The store keeps the newest MAX_EVENTS of all, the request reads those before its time.
    kept = max(0, len(events) - MAX_EVENTS)
    cut = {name: values[kept:] if len(values) > kept else [] for name, values in cut.items()}
    ask_for = {"user": "u", "time": when, "candidates": [1, 2, 39]}
    stored = encode_score(bundle, ask_for, histories.get(bundle, "", "u"), Limits())
    given_whole = encode_score(bundle, {**ask_for, "history": cut}, None, Limits())
    assert stored.digest == given_whole.digest
    with torch.no_grad():
        assert torch.equal(bundle.ranker(stored.batch), bundle.ranker(given_whole.batch))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 39), st.integers(1000, 1040)), min_size=1, max_size=MAX_EVENTS + 3),
       st.sampled_from(["new", "late", "again", "trimmed"]), st.data())
def test_a_changed_history_is_never_answered_from_an_old_state(bundle: Bundle, events: list[tuple[int, int]], how: str,
                                                               data: st.DataObject) -> None:
    """An event at the end, before others, a second time, or one fewer: a fresh prefill, and what it gives."""
    events = sorted(events, key=lambda event: event[1])
    changed = list(events)
    if how == "trimmed":
        changed.pop(data.draw(st.integers(max(0, len(events) - MAX_EVENTS), len(events) - 1)))
    else:
        item, when = data.draw(st.sampled_from(events)) if how == "again" else (1, 1041 if how == "new" else 1000)
        at = sum(then <= when for _, then in events)
        changed.insert(at, (item, when))
    engine = Engine(bundle, EngineConfig())
    answers = []
    for one in (events, events, changed):
        raw = {"user": "u", "time": TIME, "candidates": [1, 2, 39], "history": {
            "item": [item for item, _ in one], "time": [when for _, when in one], "price": [1] * len(one),
            "place": ["place 1"] * len(one)}}
        answers.append(ask(engine, raw))
        assert np.abs(answers[-1].logit_CY - full(bundle, raw)).max() <= 1e-5
    engine.close()
    same = changed[-MAX_EVENTS:] == events[-MAX_EVENTS:]
    assert [answer.source for answer in answers] == ["prefill", "hit", "hit" if same else "prefill"]


def test_a_stored_history_is_encoded_once_and_anew_for_a_new_bundle(bundle: Bundle, dataset: Dataset, tmp_path: Path
                                                                    ) -> None:
    histories = Histories(1 << 20, 1e6)
    histories.append(bundle, "", "u", {"events": body()["history"]}, 100)
    first = histories.get(bundle, "", "u")
    assert first is not None
    assert histories.get(bundle, "", "u") is first
    other = random_bundle(dataset, tmp_path / "other", seed=1)
    again = histories.get(other, "", "u")
    assert again is not None
    assert (again.version, again.digest) == (other.version, first.digest)
    histories.append(bundle, "", "u", {"events": body(first=20, length=1)["history"]}, 100)
    longer = histories.get(bundle, "", "u")
    assert longer is not None
    assert len(longer.time_T) == 10
    cut = longer.before(1140)
    assert (len(cut.time_T), cut.digest, longer.digest != first.digest) == (9, first.digest, True)


def test_histories_stay_below_their_limit_and_forget_the_idle(bundle: Bundle) -> None:
    histories = Histories(1500, 1e6)
    for user in range(40):
        histories.append(bundle, "", str(user), {"events": body(0, 1 + user % 9)["history"]}, 100)
        histories.get(bundle, "", str(user // 2))
        assert histories.num_bytes == sum(stored.num_bytes for stored in histories._stored.values()) <= 1500
    assert histories.num_forgotten > 10
    assert histories.get(bundle, "", "0") is None
    assert histories.get(bundle, "", "39") is not None
    assert histories.delete("", "39")
    assert histories.get(bundle, "", "39") is None
    with pytest.raises(ServeError, match="all histories may take history_bytes=10"):
        Histories(10, 1e6).append(bundle, "", "u", {"events": body()["history"]}, 100)


def test_data_without_duplicates_takes_each_event_once(tmp_path: Path) -> None:
    bundle = random_bundle(shop_dataset(tmp_path, duplicates="drop"), tmp_path / "b")
    histories, events = Histories(1 << 20, 100), {"events": body()["history"]}
    assert histories.append(bundle, "", "u", events, 100)["added"] == 9
    assert histories.append(bundle, "", "u", events, 100) == {"num_events": 9, "added": 0, "duplicates": 9}
    twice = {name: [*values, values[-1]] for name, values in body()["history"].items()}
    with pytest.raises(ServeError, match="an item occurs twice at one time"):
        encode_score(bundle, {**body(), "history": twice}, None, Limits())


def slow_down(engine: Engine, monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[str]:
    """Make every prefill last; the list of them."""
    tower, calls = engine.served.bundle.ranker.tower, []
    encode = tower.encode

    def slow(user: Any) -> Any:
        calls.append(threading.current_thread().name)
        time.sleep(seconds)
        return encode(user)

    monkeypatch.setattr(tower, "encode", slow)
    return calls
