"""Requests sent over real sockets: at a given rate, whatever the answers take, or one after the other."""

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_STATE = re.compile(rb'"state":"(\w+)"')
_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Sample:
    """An answer: seconds from when the request was due, status (0: none came), where the user's state came from."""

    latency_s: float
    status: int
    state: str


class Sender:
    """Posts bodies to one address over connections that are kept open."""

    def __init__(self, port: int, path: str = "/v1/score") -> None:
        self._port = port
        self._head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
        self._idle: list[_Connection] = []

    async def post(self, body: bytes, due: float) -> Sample:
        status, content = 0, b""
        reader, writer = await self._connect()
        try:
            writer.write(f"{self._head}{len(body)}\r\n\r\n".encode() + body)
            head = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            content = await reader.readexactly(int(length[1]) if length else 0)
            status = int(head[9:12])
            self._idle.append((reader, writer))
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
        state = _STATE.search(content)
        return Sample(time.perf_counter() - due, status, state[1].decode() if state else "")

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()

    async def _connect(self) -> _Connection:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)


async def closed_loop(sender: Sender, bodies: Iterator[bytes], connections: int, seconds: float) -> list[Sample]:
    """Each connection asks again as soon as it has its answer: what the server can do at most."""
    samples: list[Sample] = []
    end = time.perf_counter() + seconds

    async def ask() -> None:
        while time.perf_counter() < end:
            samples.append(await sender.post(next(bodies), time.perf_counter()))

    await asyncio.gather(*(ask() for _ in range(connections)))
    return samples


async def open_loop(sender: Sender, bodies: Iterator[bytes], rate: float, seconds: float, seed: int = 0
                    ) -> list[Sample]:
    """Requests at random times, ``rate`` a second; a late answer delays none, and waiting counts from when it was due.

    A loop that waited for answers would ask less just when the server is slow, and never see its queue.
    """
    draw = np.random.default_rng(seed)
    start = due = time.perf_counter()
    tasks: list[asyncio.Task[Sample]] = []
    while (due := due + draw.exponential(1 / rate)) < start + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(sender.post(next(bodies), due)))
    return await asyncio.gather(*tasks)
