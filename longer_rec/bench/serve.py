"""``longer-rec bench serve``: how fast a bundle answers over HTTP, and when it no longer does."""

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pydantic

from longer_rec.bench.load import Sample, Sender, closed_loop, open_loop
from longer_rec.bench.requests import Requests
from longer_rec.bundle import Bundle, load_bundle
from longer_rec.config import Config
from longer_rec.errors import ConfigError, ServeError
from longer_rec.report.terminal import make_console, make_table

_CAPACITY_CONNECTIONS = 16
_WORDS = ("L", "C", "hits", "hits found", "capacity/s", "sent/s", "answered/s", "p50 ms", "p95 ms", "p99 ms",
          "refused", "refused p99 ms", "CPU ms", "RSS MB")


class ServeLoad(Config):
    """What `longer-rec bench serve` asks; every combination of the first three is a row."""

    events: tuple[int, ...] = pydantic.Field((1000,), min_length=1, description="L, of each history")
    candidates: tuple[int, ...] = pydantic.Field((64,), min_length=1, description="C, of each request")
    hit_rates: tuple[float, ...] = pydantic.Field((0.0, 0.5, 0.9, 1.0), min_length=1)
    load: float = pydantic.Field(0.7, gt=0, description="requests sent, as a share of the measured capacity")
    rate: float | None = pydantic.Field(None, gt=0, description="requests a second, in place of load")
    seconds: float = pydantic.Field(10.0, gt=0, description="of each row; a third of it for the capacity")
    users: int = pydantic.Field(100, ge=1, description="who come back, their states warm")
    zipf: float = pydantic.Field(1.0, ge=0)
    stored: bool = pydantic.Field(False, description="users who come back send no history, the server has it")
    cores: int = pydantic.Field(0, ge=0, description="for the server, the rest for the sender; 0: any")
    server: dict[str, Any] = pydantic.Field({}, description="settings of `longer-rec serve`")

    @pydantic.model_validator(mode="after")
    def _check(self) -> "ServeLoad":
        for name, low, high in (("events", 0, 10**6), ("candidates", 1, 10**6), ("hit_rates", 0, 1)):
            for value in getattr(self, name):
                if not low <= value <= high:
                    raise ValueError(f"{name} has {value}, which is not in [{low}, {high}]")
        return self


@dataclass(frozen=True)
class Running:
    """A server of its own."""

    port: int
    process: psutil.Process


def bench_serve(path: Path, load: ServeLoad, out: Path | None) -> list[dict[str, Any]]:
    """Start a server, ask it row by row, print the table; ``serve.json`` and ``serve.md`` in ``out``."""
    bundle, rows = load_bundle(path), []
    combinations = list(product(load.events, load.candidates, load.hit_rates))
    for events, candidates, _ in combinations:
        Requests(bundle, events, candidates, 1, load.zipf)  # a fault in the last row is told before the first
    with serving(path, load.server, load.cores) as server:
        for combination in combinations:
            rows.append(asyncio.run(measure(server, bundle, load, *combination)))
            print(f"L {rows[-1]['L']}, C {rows[-1]['C']}, hits {rows[-1]['hits']:.0%}: done", file=sys.stderr)
    lines = [_cells(row) for row in rows]
    table = make_table(f"{bundle.manifest.name}, version {bundle.version}", _WORDS, _WORDS)
    for line in lines:
        table.add_row(*line)
    make_console().print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        content = {"version": bundle.version, "load": load.model_dump(mode="json"), "rows": rows}
        (out / "serve.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (out / "serve.md").write_text(markdown(_WORDS, lines), encoding="utf-8")
    return rows


@contextmanager
def serving(path: Path, settings: dict[str, Any], cores: int = 0) -> Iterator[Running]:
    """`longer-rec serve` as a process of its own on a free port; ``cores`` of this process are its alone."""
    usable = sorted(os.sched_getaffinity(0))
    if cores >= len(usable) > 1 or cores > len(usable):
        raise ConfigError(f"cores={cores} for the server leaves none of {len(usable)} for the sender; ask for fewer, "
                          "or for 0, which shares them")
    command = [sys.executable, "-m", "longer_rec", "serve", str(path), "port=0",
               *(f"{name}={value}" for name, value in settings.items())]
    # A child has its parent's. The last ones: the system's own work is mostly on the first.
    os.sched_setaffinity(0, usable[-cores:])
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    finally:
        os.sched_setaffinity(0, usable[:-cores] or usable)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("serving "):
            raise ServeError(f"the server did not start with {settings}; its own line above says why")
        yield Running(int(line.rpartition(":")[2]), psutil.Process(process.pid))
    finally:
        os.sched_setaffinity(0, usable)
        process.terminate()
        process.wait(60)


async def measure(server: Running, bundle: Bundle, load: ServeLoad, events: int, candidates: int, hit_rate: float
                  ) -> dict[str, Any]:
    """Warm up, find the capacity, then send at the asked rate."""
    sender = Sender(server.port)
    requests = Requests(bundle, events, candidates, load.users, load.zipf, load.stored)
    await warm(server, sender, requests, load.stored)
    capacity = None
    if load.rate is None:
        found = await closed_loop(sender, requests.stream(hit_rate), _CAPACITY_CONNECTIONS, load.seconds / 3)
        capacity = sum(sample.status == 200 for sample in found) / (load.seconds / 3)
        if not capacity:
            raise ServeError(f"none of {len(found)} requests was answered: {dict(Counter(s.status for s in found))}")
    rate = load.rate or load.load * (capacity or 0)
    before = server.process.cpu_times()
    samples = await open_loop(sender, requests.stream(hit_rate), rate, load.seconds)
    after = server.process.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    return {"L": events, "C": candidates, "hits": hit_rate, "capacity": capacity,
            **summary(samples, load.seconds), "cpu_ms": 1e3 * cpu_s / max(1, len(samples)),
            "rss_mb": server.process.memory_info().rss / 1e6}


async def warm(server: Running, sender: Sender, requests: Requests, stored: bool) -> None:
    """Let the server see every user who comes back."""
    for user in range(requests.num_users):
        if stored:
            path, body = requests.events(user)
            await Sender(server.port, path).post(body, 0.0)
        await sender.post(requests.known(user), 0.0)


def summary(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """Rates, percentiles in ms of what was answered and of what was refused, answers by status."""
    good = [sample for sample in samples if sample.status == 200]
    refused = [1e3 * sample.latency_s for sample in samples if sample.status in (429, 503)]
    at = np.percentile([1e3 * sample.latency_s for sample in good] or [np.nan], [50, 95, 99, 100])
    return {"sent": len(samples) / seconds, "answered": len(good) / seconds,
            "p50_ms": at[0], "p95_ms": at[1], "p99_ms": at[2], "max_ms": at[3],
            "hits_found": sum(sample.state != "prefill" for sample in good) / max(1, len(good)),
            "refused_p99_ms": float(np.percentile(refused, 99)) if refused else None,
            "errors": {str(status): count for status, count in Counter(s.status for s in samples).items()
                       if status != 200}}


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of a results page."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(row: dict[str, Any]) -> list[str]:
    errors = " ".join(f"{status}: {count}" for status, count in row["errors"].items())
    numbers = [row["capacity"], row["sent"], row["answered"], row["p50_ms"], row["p95_ms"], row["p99_ms"]]
    return [f"{row['L']:,}", f"{row['C']:,}", f"{row['hits']:.0%}", f"{row['hits_found']:.0%}",
            *("" if value is None else f"{value:,.1f}" for value in numbers), errors,
            "" if row["refused_p99_ms"] is None else f"{row['refused_p99_ms']:.1f}", f"{row['cpu_ms']:.2f}",
            f"{row['rss_mb']:,.0f}"]
