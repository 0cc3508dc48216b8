"""The server through real sockets: what it answers, what it refuses and how, what it survives."""

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longer_rec.bundle import load_bundle
from longer_rec.data.prepare import prepare
from longer_rec.serve.client import Refused
from longer_rec.serve.request import Limits, encode_score
from tests.integration.conftest import CommandServer
from tests.reference.bundles import shop_dataset, write_random_bundle
from tests.reference.provenance import RESULTS, provenance
from tests.reference.servers import RunningServer, running_server

DOCS = Path(__file__).parents[3] / "docs"
FULL = os.environ.get("LONGER_REC_FAULTS") == "full"
ANSWERED: Counter[int] = Counter()
TOKENS = {"LONGER_REC_TOKEN": "a token for asking", "LONGER_REC_ADMIN_TOKEN": "a token for the admin"}
SCORE = {"user": "a visitor with number 3", "time": 2000,
         "history": {"item": [1, 2, 3], "time": [1000, 1000, 1900], "price": [1, 2.5, None],
                     "place": ["place 1", "x", None]},
         "candidates": [3, 4, 77]}
Reply = tuple[int, dict[str, Any], dict[str, str]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    return write_random_bundle(shop_dataset(folder / "shop"), folder / "bundle")


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[RunningServer]:
    with running_server(bundle, "max_events=50", "max_candidates=20", "max_body_bytes=1MB") as running:
        yield running


def call(server: RunningServer, body: Any, path: str = "/v1/score", method: str = "POST", **headers: str) -> Reply:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request(method, path, content, {"Content-Type": "application/json", **headers})
        reply = connection.getresponse()
        answer = reply.read()
    finally:
        connection.close()
    decode = msgpack.unpackb if reply.headers["Content-Type"] == "application/msgpack" else json.loads
    return reply.status, decode(answer), dict(reply.headers)


def history(**changes: Any) -> dict[str, Any]:
    return {**SCORE, "history": {**SCORE["history"], **changes}}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in SCORE.items() if name != key}


# Each row stands in docs/serving.md: the case, what is sent, the status, the beginning of the answer.
CASES: dict[str, tuple[Any, int, str]] = {
    "unknown user without a history": (without("history"), 404, "the user has no stored history"),
    "event not before the request": (history(time=[1000, 1000, 2000]), 422, "history: an event at time 2000 is not"),
    "events not sorted": (history(time=[1000, 1900, 1000]), 422, "history.time: 1000 stands after 1900"),
    "columns of different lengths": (history(item=[1, 2]), 422, "history: columns have different lengths"),
    "a column is missing": (history(place=None), 422, "history.place is missing"),
    "an unknown column": (history(pric=[1, 2, 3]), 422, "history has an unknown key 'pric'; did you mean 'price'?"),
    "an unknown key": ({**SCORE, "candidate": [1]}, 422, "the body has an unknown key 'candidate'; did you mean"),
    "an id of the wrong type": ({**SCORE, "candidates": ["three"]}, 422, "candidates: values are String"),
    "ids of mixed types": ({**SCORE, "candidates": [1, "three"]}, 422, "candidates: values of one type are needed"),
    "an id beyond 64 bits": ({**SCORE, "candidates": [2**63]}, 422, "candidates: "),
    "text where a number is needed": (history(price=["a", "b", "c"]), 422, "history.price: numbers are needed"),
    "a time that is no integer": ({**SCORE, "time": 1.5}, 422, "time=1.5: whole seconds since 1970"),
    "a negative time": (history(time=[-1, 0, 1]), 422, "history.time: times lie in [0, 2^40)"),
    "no candidates": ({**SCORE, "candidates": []}, 422, "candidates: 0 are given, 1 to 20 are taken"),
    "too many candidates": ({**SCORE, "candidates": [1] * 21}, 422, "candidates: 21 are given, 1 to 20 are taken"),
    "too many events": (history(**{name: [None] * 51 for name in ("item", "price", "place")}, time=[1] * 51), 422,
                        "history: 51 events are given, 50 at most are taken"),
    "an unknown user feature": ({**SCORE, "features": {"regoin": 1}}, 422, "features has an unknown key 'regoin'"),
    "a user feature of the wrong type": ({**SCORE, "features": {"region": "north"}}, 422, "features.region: values"),
    "a user that is no name": ({**SCORE, "user": 1.5}, 422, "user: '1.5' is no integer and no text"),
    "no object": ([1, 2], 422, "the body is no object"),
    "no JSON": (b"{", 400, "the body is not application/json"),
    "NaN": (b'{"time": NaN}', 400, "the body is not application/json"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_requests_get_the_documented_answer(server: RunningServer, case: str) -> None:
    body, status, message = CASES[case]
    got, answer, _ = call(server, body)
    assert (got, list(answer)) == (status, ["error"])
    assert answer["error"].startswith(message)
    assert "\n" not in answer["error"]
    row = re.search(rf"(?m)^\| {re.escape(case)} \| (\d+) \| `([^`]*)", (DOCS / "serving.md").read_text())
    assert row, f"docs/serving.md has no row for {case!r}"
    assert (int(row[1]), message.startswith(row[2].rstrip(" .…"))) == (status, True)


def test_good_requests_that_look_odd_are_answered(server: RunningServer, bundle: Path) -> None:
    loaded = load_bundle(bundle)
    for body in (SCORE, {**SCORE, "user": None}, {**SCORE, "history": {}}, {**SCORE, "candidates": [999]},
                 {**SCORE, "user": "nobody"}, {**SCORE, "features": {"region": 1, "likes": ["tea", "tea"]}},
                 {**SCORE, "features": {"region": None, "likes": []}}):
        status, answer, _ = call(server, body)
        assert status == 200
        with torch.no_grad():
            expected = loaded.ranker(encode_score(loaded, body, None, Limits()).batch)[:, 0]
        assert np.abs(np.asarray(answer["logits"]["label"]) - expected.numpy()).max() <= 1e-5
    assert answer["unknown"] == {"events": 0, "candidates": 1, "users": 0}


def test_messagepack_answers_as_json_does_bytes_for_columns_included(server: RunningServer) -> None:
    def columns(values: list[int]) -> bytes:
        return np.asarray(values, "<i8").tobytes()

    packed = {**history(item=columns([1, 2, 3]), time=columns([1000, 1000, 1900])), "candidates": columns([3, 4, 77])}
    status, answer, _ = call(server, msgpack.packb(packed), **{"Content-Type": "application/msgpack"})
    assert (status, answer["logits"]) == (200, call(server, SCORE)[1]["logits"])
    status, answer, _ = call(server, msgpack.packb(history(price=[1.0, float("nan"), 2.0])),
                             **{"Content-Type": "application/msgpack"})
    assert status == 200, "NaN is an unknown number, as in training"
    assert call(server, b"\xc1", **{"Content-Type": "application/msgpack"})[0] == 400
    assert call(server, b"{}", **{"Content-Type": "text/plain"})[0] == 415


def test_a_stored_history_is_scored_extended_and_deleted(server: RunningServer) -> None:
    with server.client() as client:
        name, columns = "a visitor:1".replace(" ", "_"), SCORE["history"]
        ask = {**without("history"), "user": name}
        assert client.add_events(name, columns) == {"num_events": 3, "added": 3, "duplicates": 0}
        assert client.score(ask)["logits"] == client.score({**SCORE, "user": name})["logits"]
        late = {key: values[:1] for key, values in columns.items()}
        client.add_events(name, late)
        grown = {key: [*values[:2], values[0], values[2]] for key, values in columns.items()}
        assert client.score(ask)["logits"] == client.score({**history(**grown), "user": name})["logits"]
        assert client.score({**ask, "time": 1900})["logits"] == client.score(
            {**history(**{key: values[:3] for key, values in grown.items()}), "user": name, "time": 1900})["logits"]
        assert client.delete(name)["history"] is True
        for gone in (lambda: client.score(ask), lambda: client.delete(name)):
            with pytest.raises(Refused) as refused:
                gone()
            assert refused.value.status == 404


def test_what_is_too_big_is_refused_before_it_is_read(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        start = time.monotonic()
        raw.sendall(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 100000000\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
        assert time.monotonic() - start < 2
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        try:
            while sent < 100_000_000:
                raw.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
                sent += 0x10000
        except OSError:
            pass
        assert sent < 20_000_000, "bytes are counted, whatever the header says"
    many = json.dumps({**SCORE, "candidates": [1] * 1_000_000}).encode()
    with contextlib.suppress(ConnectionError):  # it may hang up while we are sending
        assert call(server, many)[0] == 413
    assert call(server, msgpack.packb({**SCORE, "candidates": [1] * 900_000}),
                **{"Content-Type": "application/msgpack"})[:2] == (
        422, {"error": "candidates: 900000 are given, 1 to 20 are taken; split the request"})


def test_garbage_bytes_harm_nobody(server: RunningServer) -> None:
    chance = random.Random(0)
    for _ in range(100):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
            head = chance.choice([b"", b"POST /v1/score HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"])
            raw.sendall(head + chance.randbytes(chance.randrange(1, 3000)))
            raw.shutdown(socket.SHUT_WR)
            reply = raw.recv(4096)
            assert not reply.startswith(b"HTTP/1.1 5")
    assert call(server, SCORE)[0] == 200


JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=8)
COLUMN = st.lists(st.integers(-5, 3000) | st.none() | st.text(max_size=3), max_size=5) | JSON
BODY = st.fixed_dictionaries({}, optional={
    "user": st.sampled_from(["a visitor with number 3", "x"]) | JSON, "time": st.integers(-1, 2**41) | JSON,
    "features": st.dictionaries(st.sampled_from(["region", "likes", "user"]), JSON) | JSON,
    "candidates": COLUMN,
    "history": st.fixed_dictionaries({}, optional=dict.fromkeys(("item", "time", "price", "place"), COLUMN)) | JSON})


@settings(max_examples=2000 if FULL else 300, deadline=None, suppress_health_check=list(HealthCheck))
@given(BODY | JSON,
       st.sampled_from(["/v1/score", "/v1/users/u/events", "/v1/users/%00/events", "/v1/reload", "/nothing"]),
       st.sampled_from(["POST", "POST", "POST", "GET", "DELETE", "PUT"]), st.booleans())
def test_no_body_path_or_method_is_a_server_error(server: RunningServer, body: Any, path: str, method: str,
                                                  packed: bool) -> None:
    try:
        content = msgpack.packb(body) if packed else json.dumps(body).encode()
    except (OverflowError, ValueError, UnicodeEncodeError):
        content = b"\x91" * 2000
    kind = "application/msgpack" if packed else "application/json"
    for sent in (content, content if not isinstance(body, dict) else json.dumps({**SCORE, **body}).encode()):
        status, answer, _ = call(server, sent, path, method, **{"Content-Type": kind})
        ANSWERED[status] += 1
        assert status < 500, answer
        assert status == 200 or list(answer) == ["error"]
        assert "Traceback" not in str(answer)


@pytest.mark.skipif(not FULL, reason="writes the result of the full count")
def test_the_server_lives_after_them_all(server: RunningServer) -> None:
    assert call(server, SCORE)[0] == 200
    assert ANSWERED.total() >= 4000
    rows = "".join(f"| {status} | {count} |\n" for status, count in sorted(ANSWERED.items()))
    command = "LONGER_REC_FAULTS=full python -m pytest tests/integration/serving/test_server.py -k 'error or lives'"
    (RESULTS / "reliability_requests.md").write_text(f"""# Generated requests

**Theme.** No body, path or method makes the server fail or talk too much.

**Question.** What do 2,000 generated cases answer, each sent as it was generated and, where it is an object, with its
keys put over a request that is right? Bodies that are no JSON or MessagePack, wrong types, lengths, times and ids are
among them; every answer has one line of `error` and no stack trace.

{provenance(command, "hypothesis", "fastapi", "uvicorn")}
| status | answers |
|---|---|
{rows}""", encoding="utf-8")


def test_pages_and_probes_answer(server: RunningServer) -> None:
    assert call(server, b"", "/healthz", "GET")[0] == call(server, b"", "/readyz", "GET")[0] == 200
    model = call(server, b"", "/v1/model", "GET")[1]
    assert model["history_columns"] == ["item", "time", "price", "place"]
    assert set(call(server, b"", "/openapi.json", "GET")[1]["paths"]) >= {"/v1/score", "/v1/users/{user}/events"}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    assert 'longer_replies_total{path="/v1/score",status="200"}' in text
    assert "longer_prefill_seconds_bucket" in text
    connection.close()


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}])
def test_without_tokens_pages_of_a_browser_are_refused(server: RunningServer, headers: dict[str, str]) -> None:
    assert call(server, SCORE, **headers)[0] == 403


def test_other_addresses_need_tokens_and_tokens_are_checked(commands: CommandServer, bundle: Path) -> None:
    outcome = commands.run("serve", bundle, "host=0.0.0.0", "port=0")
    assert outcome.code == 2
    assert "host=0.0.0.0 can be reached from other machines; set LONGER_REC_TOKEN" in outcome.err
    with running_server(bundle, "host=0.0.0.0", **TOKENS) as server:
        ask, admin = ({"Authorization": f"Bearer {token}"} for token in TOKENS.values())
        assert call(server, b"", "/healthz", "GET")[0] == 200
        for wrong in ({}, {"Authorization": "Bearer a token for askinG"}, {"Authorization": "Basic x"}):
            for path in ("/v1/score", "/v1/model", "/metrics", "/docs", "/openapi.json", "/v1/reload"):
                assert call(server, SCORE, path, **wrong)[0] == 401
        assert call(server, SCORE, **ask)[0] == call(server, SCORE, **admin)[0] == 200
        assert call(server, b"", "/v1/reload", **ask)[0] == 401
        assert call(server, b"", "/v1/users/u", "DELETE", **ask)[0] == 401
        assert call(server, b"", "/v1/reload", **admin)[0] == 200
        assert call(server, b"", "/v1/users/u", "DELETE", **admin)[0] == 404


def test_a_new_bundle_is_served_without_losing_a_request_and_the_end_drains(bundle: Path, tmp_path: Path) -> None:
    other = write_random_bundle(shop_dataset(tmp_path / "shop"), tmp_path / "other", seed=1)
    link, log = tmp_path / "current", tmp_path / "log"
    link.symlink_to(bundle)
    with running_server(link, f"log_dir={log}") as server:
        answers: list[Reply] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                answers.append(call(server, SCORE))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        versions = [load_bundle(path).version for path in (bundle, other)]
        _until(lambda: len(answers) > 20)
        _point(link, other)
        os.kill(server.process.pid, signal.SIGHUP)
        _until(lambda: answers[-1][1]["version"] == versions[1])
        (tmp_path / "broken").mkdir()
        _point(link, tmp_path / "broken")
        status, answer, _ = call(server, b"", "/v1/reload")
        assert (status, "log says why" in answer["error"], str(tmp_path) in answer["error"]) == (409, True, False)
        _point(link, bundle)
        assert call(server, b"", "/v1/reload")[1] == {"version": versions[0], "changed": True}
        num = len(answers)
        _until(lambda: len(answers) > num + 20)
        stop.set()
        for thread in threads:
            thread.join()
        assert {status for status, _, _ in answers} == {200}
        assert {answer["version"] for _, answer, _ in answers} == set(versions)
        with server.client() as client:
            client.add_events("u", SCORE["history"])
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    candidates = pl.read_parquet(log / "candidates-*.parquet")
    assert len(candidates) == 3 * len(answers)
    assert set(candidates["version"]) == set(versions)


def test_the_log_of_requests_is_a_log_to_prepare_and_slow_clients_are_told_so(bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running_server(bundle, f"log_dir={log}", "deadline_ms=1500") as server, server.client() as client:
        for user in range(8):
            client.add_events(f"u{user}", {"item": [(7 * one + user) % 20 for one in range(20)], "price": [1, 2.5] * 10,
                                           "time": [1000 + 50 * one for one in range(20)], "place": ["place 1"] * 20})
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
            raw.sendall(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                        b"Content-Length: 100\r\n\r\n{")
            assert raw.recv(1000).startswith(b"HTTP/1.1 504")
        assert call(server, SCORE)[0] == 200
    (tmp_path / "log.yaml").write_text("""
name: served
events: {files: [log/events-*.parquet]}
columns: {user: user, item: item, time: time}
event_features: [{name: price, type: bucketed, boundaries: [2, 4]}, {name: place}]
candidates: {kind: negatives, per_positive: 1}
split: {kind: per_user, fractions: [0.8, 0.1, 0.1]}
""")
    prepared = prepare(str(tmp_path / "log.yaml"), tmp_path / "data")
    assert json.loads((prepared / "manifest.json").read_text())["summary"]["num_users"] == 8
    offered = pl.read_parquet(log / "candidates-*.parquet")
    assert offered["item"].to_list() == SCORE["candidates"]


def _point(link: Path, target: Path) -> None:
    (link.parent / "next").symlink_to(target)
    (link.parent / "next").replace(link)


def _until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
