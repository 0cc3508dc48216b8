"""What serving long histories costs: the model alone, the server, overload, a long prefill, memory.

    longer-rec prepare synthetic --out data/long num_users=30 events_per_user=10200 num_items=60000
    python -m benchmarks.bench_serving data/long grid accuracy kept server overload stall soak

Each part prints tables of ``benchmarks/results/serving.md`` and takes less than five minutes. Weights are random, which
speed does not see. One thread; the sender has a core of its own.
"""

import argparse
import asyncio
import http.client
import itertools
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longer_rec.bench.load import Sender, closed_loop, open_loop
from longer_rec.bench.requests import Requests
from longer_rec.bench.serve import Running, markdown, serving, summary, warm
from longer_rec.bundle import Bundle, BundleManifest, commit_bundle, load_bundle, write_bundle
from longer_rec.config import build_config
from longer_rec.data.history import Dataset, open_dataset
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide
from longer_rec.model.linear import lay_out_for_inference
from longer_rec.model.longer import LongerTower, TowerConfig
from longer_rec.model.state import split_state, state_bytes
from longer_rec.runtime.memory import keep_freed_memory
from longer_rec.serve.rounding import restore_layers, round_layers
from longer_rec.serve.state_files import StateFiles
from longer_rec.serve.user_cache import CachedState, CacheKey

WIDTHS = InputWidths(item={"item": 32, "category": 8}, event={"action": 8}, user={"user": 8, "region": 8}, num_dense=0)
# The paper's own sizes; its compressed user x item interactions are one more token of a candidate here.
PAPER = {"width": 32, "merge_size": 8, "inner_trans": {"num_heads": 2}, "num_queries": 100, "num_self_layers": 1,
         "interaction": {"placement": "added"}}
_ROUNDS = 15


def build(num_queries: int, max_events: int, **settings: Any) -> LongerTower:
    torch.manual_seed(0)
    config = build_config(TowerConfig, {**PAPER, "num_queries": num_queries, **settings}, "the benchmark")
    tower = LongerTower(config, WIDTHS, 1, max_events).eval().requires_grad_(False)
    lay_out_for_inference(tower)
    return tower


def make_user(num_events: int) -> UserSide:
    age_T = torch.randint(1, 10**7, (num_events,)).sort(descending=True).values
    return UserSide({name: torch.randn(num_events, width) for name, width in {**WIDTHS.item, **WIDTHS.event}.items()},
                    {name: torch.randint(1, 4000, (num_events,)) for name in (*WIDTHS.item, *WIDTHS.event)}, age_T,
                    torch.tensor([num_events]), {name: torch.randn(1, width) for name, width in WIDTHS.user.items()},
                    torch.zeros(1, 0))


def make_candidates(count: int) -> CandidateSide:
    return CandidateSide({name: torch.randn(count, width) for name, width in WIDTHS.item.items()},
                         {name: torch.randint(1, 4000, (count,)) for name in WIDTHS.item}, torch.zeros(count, 0),
                         torch.tensor([count]))


def least_ms(*works: Callable[[], object]) -> list[float]:
    """Least processor time of each over rounds in which they alternate: what others on the machine disturb least."""
    least = [math.inf] * len(works)
    for _ in range(_ROUNDS):
        for at, work in enumerate(works):
            start = time.process_time()
            work()
            least[at] = min(least[at], 1e3 * (time.process_time() - start))
    return least


def grid(_: Path) -> None:
    """One thread, the model alone: what a request takes without and with its history, by L, k and C."""
    lines = []
    sizes = [*itertools.product((250, 2000, 10_000), (100,), (32, 64, 256, 1024)), (2000, 50, 64), (2000, 200, 64)]
    for num_events, num_queries, count in sorted(sizes):
        num_queries = min(num_queries, num_events // 8)
        tower, user, candidates = build(num_queries, num_events), make_user(num_events), make_candidates(count)
        none, hit, prefill, single = _times(tower, user, candidates)
        uncached, ninety = single * count, hit + 0.1 * prefill
        lines.append([f"{num_events:,}", str(num_queries), f"{count:,}", f"{none:.2f}", f"{hit:.2f}", f"{prefill:.1f}",
                      f"{uncached:,.0f}", *(f"{1 - none / each:.1%}" for each in (hit, hit + prefill, uncached)),
                      f"{uncached / hit:,.0f}", f"{(hit + prefill) / ninety:.1f}"])
    print(markdown(("L", "k", "C", "no history ms", "cached ms", "prefill ms", "no cache ms", "loss cached",
                    "loss prefill each", "loss no cache", "no cache / cached", "prefill each / 90 % hits"), lines))


def _times(tower: LongerTower, user: UserSide, candidates: CandidateSide) -> list[float]:
    """Scoring without a history, with a cached one, the prefill, a candidate without any cache."""
    (bare,), (state,) = (split_state(tower.encode(each)) for each in (make_user(0), user))
    one = make_candidates(1)
    return least_ms(lambda: tower.score(bare, candidates), lambda: tower.score(state, candidates),
                    lambda: tower.encode(user), lambda: tower.score(tower.encode(user), one))


def accuracy(_: Path) -> None:
    """How far cached answers lie from a forward of each candidate alone, and what fewer bits move."""
    tower, rounded, count = build(100, 2000), build(100, 2000), 64
    lay_out_for_inference(rounded, torch.bfloat16)
    found: dict[str, list[tuple[float, int]]] = {
        "keys and values cached in bf16": [], "in int8": [], "all matmuls but attention's in bf16": []}
    exact = 0.0
    for seed in range(20):
        torch.manual_seed(seed)
        user, candidates = make_user(2000), make_candidates(count)
        state = tower.encode(user)
        cached = tower.score(state, candidates)[:, 0]
        alone = torch.cat([tower.score(tower.encode(user), one) for one in _each(candidates)])[:, 0]
        exact = max(exact, float((cached - alone).abs().max()))
        others = [tower.score(restore_layers(round_layers(state, dtype)), candidates)[:, 0]
                  for dtype in ("bfloat16", "int8")]
        others.append(rounded.score(rounded.encode(user), candidates)[:, 0])
        for each, other in zip(found.values(), others, strict=True):
            top = set(cached.topk(10).indices.tolist()) & set(other.topk(10).indices.tolist())
            each.append((float((cached - other).abs().max() / cached.std()), len(top)))
    print(markdown(("", "largest difference of a logit", "top 10 of 64 that stay"), [
        ["cached - full, fp32", f"{exact:.1e}", ""],
        *([name, f"{max(error for error, _ in each):.1e} of their std", f"{statistics.mean(top for _, top in each):.1f}"
           " of 10"] for name, each in found.items())]))


def kept(_: Path) -> None:
    """What a kept state takes and costs by type, and in a file; what bf16 matmuls are worth."""
    user, lines = make_user(2000), []
    tower, rounded = build(100, 2000), build(100, 2000)
    lay_out_for_inference(rounded, torch.bfloat16)
    state, = split_state(tower.encode(user))
    for dtype in ("float32", "bfloat16", "int8"):
        small = round_layers(state, dtype)
        times = least_ms(partial(round_layers, state, dtype), partial(restore_layers, small))
        lines.append([dtype, f"{state_bytes(small) / 1e3:,.0f}", *(f"{each:.2f}" for each in times)])
    print(markdown(("cache_dtype", "kB a state", "ms to round", "ms to restore"), lines))
    with tempfile.TemporaryDirectory() as scratch:
        files, key = StateFiles(Path(scratch), 1 << 30), CacheKey("", "", "", b"")
        entry = CachedState(key, state, 0, user.age_T, expires=math.inf)
        print("in a file: {:.2f} ms to write, {:.2f} ms to write and take back\n".format(*least_ms(
            lambda: files.put(entry), lambda: (files.put(entry), files.take(key)))))
    lines = []
    for count in (64, 256, 1024):
        candidates, both = make_candidates(count), (tower, rounded)
        times = least_ms(*(partial(each.score, state, candidates) for each in both),
                         *(partial(each.encode, user) for each in both))
        lines.append([f"{count:,}", *(f"{each:.2f}" for each in times)])
    print(markdown(("C", "cached, fp32 ms", "bf16 ms", "prefill, fp32 ms", "bf16 ms"), lines))


def _each(candidates: CandidateSide) -> Iterator[CandidateSide]:
    for at in range(int(candidates.length_B)):
        row = slice(at, at + 1)
        yield replace(candidates, embedding={name: value[row] for name, value in candidates.embedding.items()},
                      id={name: value[row] for name, value in candidates.id.items()},
                      dense_CF=candidates.dense_CF[row], length_B=torch.tensor([1]))


def write_random(dataset: Dataset, path: Path, max_events: int) -> Bundle:
    """A bundle that nobody trained."""
    schema, torch_tower = dataset.schema, build(100, max_events)
    manifest = BundleManifest(
        name="untrained", model=torch_tower.config, max_events=max_events, widths=WIDTHS, pooling="mean",
        embeddings="float32", user_name=dataset.config.users.name, duplicates=dataset.config.duplicates, source={})
    path.mkdir()
    tables = {name: torch.randn(rows, {**WIDTHS.item, **WIDTHS.event, **WIDTHS.user}[name])
              for name, rows in schema.num_rows.items()}
    write_bundle(path, manifest, dataset, torch_tower.state_dict(), tables)
    commit_bundle(path, manifest)
    return load_bundle(path)


def metric_sums(port: int) -> dict[str, float]:
    """Seconds that the server counted so far, by name."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {name: float(value) for name, value in re.findall(r"longer_(\w+)_seconds_sum (\S+)", text)}


def server(path: Path) -> None:
    """One request after the other over HTTP: where its time goes, and LONGER's own metric with the server in it."""
    bundle, lines = load_bundle(path), []
    cases = [(0, 1.0, False), (0, 1.0, True), (1000, 1.0, False), (1000, 1.0, True), (2000, 1.0, True),
             (2000, 1.0, False), (2000, 0.0, False)]
    with serving(path, {}, cores=1) as running:
        for num_events, hits, stored in cases:
            asyncio.run(_one_by_one(running, Requests(bundle, num_events, 64, 10, 1.0, stored), hits, stored, lines))
    print(markdown(("L", "history", "state", "p50 ms", "CPU ms", "reading, encoding ms", "prefill ms",
                    "scoring ms", "rest ms", "outside the model ms"), lines))


async def _one_by_one(running: Running, requests: Requests, hits: float, stored: bool, lines: list[list[str]]) -> None:
    """Of ten times thirty requests those with the lowest time outside the model: what others disturb least."""
    sender, count, found = Sender(running.port), 30, []
    await warm(running, sender, requests, stored)
    for _ in range(10):
        bodies = list(itertools.islice(requests.stream(hits), count))
        before, cpu = metric_sums(running.port), running.process.cpu_times()
        samples = [await sender.post(body, time.perf_counter()) for body in bodies]
        cpu_ms = 1e3 * (sum(running.process.cpu_times()[:2]) - sum(cpu[:2])) / count
        spent = {name: 1e3 * (value - before[name]) / count for name, value in metric_sums(running.port).items()}
        outside = 1e3 * statistics.mean(sample.latency_s for sample in samples) - spent["prefill"] - spent["score"]
        found.append((outside, summary(samples, 1.0)["p50_ms"], cpu_ms, spent))
    outside, p50, cpu_ms, spent = min(found, key=lambda each: each[0])
    lines.append([f"{requests.num_events:,}", "stored" if stored else "sent", "cached" if hits else "prefill",
                  *(f"{each:.2f}" for each in (p50, cpu_ms, spent["encode"], spent["prefill"], spent["score"],
                                               outside - spent["encode"], outside))])


def overload(path: Path) -> None:
    """What the server can do, 70 % of it, three times it for a minute, and a third of it."""
    bundle = load_bundle(path)
    with serving(path, {}, cores=1) as running:
        requests = Requests(bundle, 1000, 64, 50, 1.0)
        sender = Sender(running.port)

        async def run() -> list[tuple[str, dict[str, Any]]]:
            await warm(running, sender, requests, False)
            found = await closed_loop(sender, requests.stream(0.9), 16, 20)
            capacity = len(found) / 20
            rows = [("capacity, 16 at a time", summary(found, 20), running.process.memory_info().rss)]
            for name, load, seconds in (("0.7 x for 30 s", 0.7, 30), ("3 x for 60 s", 3, 60), ("0.3 x, 5 s", 0.3, 5),
                                        ("0.3 x, 10 s", 0.3, 10)):
                samples = await open_loop(sender, requests.stream(0.9), load * capacity, seconds)
                rows.append((name, summary(samples, seconds), running.process.memory_info().rss))
            return rows

        print(markdown(("", "sent/s", "answered/s", "p50 ms", "p99 ms", "max ms", "others", "their p99 ms", "RSS MB"), [
            [name, *(f"{row[key]:.1f}" for key in ("sent", "answered", "p50_ms", "p99_ms", "max_ms")),
             str(row["errors"]), f"{row['refused_p99_ms'] or 0:.1f}", f"{rss / 1e6:,.0f}"]
            for name, row, rss in asyncio.run(run())]))


def stall(path: Path) -> None:
    """Cached requests beside prefills of 10,000 events: of three times ten seconds those with the lowest p99."""
    bundle, lines = load_bundle(path), []
    with serving(path, {}, cores=1) as running:
        short, long = Requests(bundle, 1000, 64, 50, 1.0), Requests(bundle, 10_000, 64, 1, 1.0)

        async def run() -> None:
            sender, other = Sender(running.port), Sender(running.port)
            await warm(running, sender, short, False)
            found: dict[int, list[tuple[dict[str, Any], dict[str, Any]]]] = {0: [], 2: [], 4: []}
            for rate in 3 * list(found):
                extra = open_loop(other, long.stream(0.0), rate, 10) if rate else asyncio.sleep(0)
                samples, beside = await asyncio.gather(open_loop(sender, short.stream(1.0), 30, 10), extra)
                found[rate].append((summary(samples, 10), summary(beside or [], 10)))
            for rate, rounds in found.items():
                row, slow = min(rounds, key=lambda each: each[0]["p99_ms"])
                lines.append([str(rate), *(f"{row[key]:.1f}" for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms")),
                              f"{slow['p50_ms']:.0f}", str(row["errors"])])

        asyncio.run(run())
    print(markdown(("prefills of 10,000 events a second", "cached: p50 ms", "p95 ms", "p99 ms", "max ms",
                    "the prefills' own p50 ms", "refused"), lines))


def soak(path: Path) -> None:
    """Half the users new, a cache that is soon full: memory every 20 s of four minutes."""
    bundle, lines = load_bundle(path), []
    with serving(path, {"cache_bytes": "64MB"}, cores=1) as running:
        requests, sender = Requests(bundle, 1000, 64, 50, 1.0), Sender(running.port)

        async def run() -> None:
            await warm(running, sender, requests, False)
            for at in range(12):
                row = summary(await open_loop(sender, requests.stream(0.5), 30, 20), 20)
                lines.append([str(20 * (at + 1)), f"{row['answered']:.1f}", f"{row['p50_ms']:.1f}",
                              f"{row['p99_ms']:.1f}", str(row["errors"]),
                              f"{running.process.memory_info().rss / 1e6:,.0f}"])

        asyncio.run(run())
    print(markdown(("second", "answered/s", "p50 ms", "p99 ms", "errors", "RSS MB"), lines))


OF_MODEL = {"grid": grid, "accuracy": accuracy, "kept": kept}
PARTS = {**OF_MODEL, "server": server, "overload": overload, "stall": stall, "soak": soak}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        path = Path(scratch) / "bundle"
        if not set(args.parts) <= set(OF_MODEL):
            write_random(open_dataset(args.data, verify=False), path, 10_000)
        for part in args.parts:
            print(f"{part}: {PARTS[part].__doc__}\n", flush=True)
            PARTS[part](path)


if __name__ == "__main__":
    main()
