"""The load generator asks what was meant, when it was meant."""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice, repeat
from pathlib import Path

import pytest

from longer_rec.bench.load import Sample, Sender, closed_loop, open_loop
from longer_rec.bench.requests import Requests
from longer_rec.bench.serve import summary
from longer_rec.errors import ConfigError
from longer_rec.serve.request import Limits, encode_score
from tests.reference.bundles import MAX_EVENTS, random_bundle, shop_dataset


def test_users_come_back_as_often_as_asked_and_every_body_can_be_answered(tmp_path: Path) -> None:
    bundle = random_bundle(shop_dataset(tmp_path / "shop"), tmp_path / "b")
    requests = Requests(bundle, MAX_EVENTS, 3, num_users=4, zipf=1.0)
    bodies = [json.loads(body) for body in islice(requests.stream(hit_rate=0.75), 2000)]
    for body in bodies[:50]:
        batch = encode_score(bundle, body, None, Limits()).batch
        assert (batch.num_events, batch.num_candidates) == (MAX_EVENTS, 3)
        assert (batch.history["item"] > 0).all()
    times = Counter(body["user"] for body in bodies)
    regulars = [times.pop(requests.name(user)) for user in range(4)]
    assert sum(regulars) == pytest.approx(1500, abs=100)
    assert regulars[0] / regulars[3] == pytest.approx(4, rel=0.4)
    assert set(times.values()) == {1}, "strangers never come back"
    with pytest.raises(ConfigError, match=f"events=13: the bundle reads the newest {MAX_EVENTS} alone"):
        Requests(bundle, 13, 3, 4, 1.0)


def test_an_open_loop_sees_the_queue_that_a_closed_one_hides() -> None:
    """A server that takes 20 ms for each request, one at a time, asked 100 times a second: 50 too many."""
    slow, waiting = _ask(lambda sender: closed_loop(sender, _bodies(), 1, 0.6)), _ask(
        lambda sender: open_loop(sender, _bodies(), 100, 0.6))
    assert {sample.status for sample in [*slow, *waiting]} == {200}
    assert summary(slow, 0.6)["p50_ms"] < 60
    assert summary(waiting, 0.6)["max_ms"] > 250
    assert 40 < len(waiting) < 80


def _bodies() -> Iterator[bytes]:
    return repeat(b"{}")


def _ask(how: Callable[[Sender], Awaitable[list[Sample]]]) -> list[Sample]:
    async def run() -> list[Sample]:
        turn = asyncio.Lock()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.readline():
                while await reader.readline() != b"\r\n":
                    pass
                await reader.readexactly(2)
                async with turn:
                    await asyncio.sleep(0.02)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        sender = Sender(server.sockets[0].getsockname()[1])
        samples = await how(sender)
        sender.close()
        server.close()
        return samples

    return asyncio.run(run())
