"""Fetching instance tokens from a store: time of one request's newest T, p50 and p99, and the size on disk.

    python benchmarks/bench_instances.py --users 20000 --per-user 256 --tokens 64 256 1024

Fills a store of random vectors, then fetches for users drawn at random at times drawn within their span, and decodes
the vectors to fp32, as a batch of one request does. The file is in the page cache, as it is on a server that runs.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from longer_rec.data.instance_sources import InstancesConfig, StoredInstances
from longer_rec.data.instances import InstanceWriter, StoreManifest
from longer_rec.schema import Feature, Schema, Table

_SCHEMA = Schema(tables=(Table(name="item", num_rows=2),), item_features=(Feature(name="item", table="item"),),
                 tasks=("label",))
_WARM_UP = 200


def fill(path: Path, kind: StoreManifest, num_users: int, per_user: int) -> float:
    """Seconds that it took."""
    random, start = np.random.default_rng(0), time.perf_counter()
    total = num_users * per_user
    with InstanceWriter(path, kind) as writer:
        for first in range(0, num_users, 500):
            user = np.repeat(np.arange(first, min(first + 500, num_users), dtype=np.uint64), per_user)
            rows = np.zeros(len(user), kind.record)
            rows["time"] = np.tile(np.arange(per_user) * 3600, len(user) // per_user)
            rows["id"] = np.arange(len(user)) + first * per_user
            rows["vector"] = random.integers(0, 255, (len(user), kind.width))
            writer.append(user, rows, {"done": min(first + 500, num_users) * per_user, "total": total})
    return time.perf_counter() - start


def measure(path: Path, num_users: int, per_user: int, max_tokens: int, num_fetches: int) -> tuple[float, ...]:
    """Mean number of tokens of a fetch; p50 and p99 in ms of its time, and of the processor's, which other work on the
    machine does not lengthen."""
    source = StoredInstances(InstancesConfig(store=path, max_tokens=max_tokens), _SCHEMA, {})
    random, times, tokens = np.random.default_rng(1), [], 0
    clocks = (time.perf_counter, time.process_time)
    users = random.integers(0, num_users, num_fetches + _WARM_UP).tolist()
    ends = random.integers(per_user * 3600 * 9 // 10, per_user * 3600 + 1, len(users)).tolist()
    for user, end in zip(users, ends, strict=True):
        start = [clock() for clock in clocks]
        found = source.fetch([user], [end])
        times.append([1e3 * (clock() - began) for clock, began in zip(clocks, start, strict=True)])
        tokens += len(found["time"])
    return tokens / len(users), *np.percentile(times[_WARM_UP:], [50, 99], axis=0).T.flatten().tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--per-user", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--vectors", nargs="+", default=["float32", "float16", "int8"])
    parser.add_argument("--fetches", type=int, default=5000)
    given = parser.parse_args()
    print("| vectors | T | tokens | p50 ms | p99 ms | p50 ms CPU | p99 ms CPU | on disk | formula | fill |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for vectors in given.vectors:
        kind = StoreManifest(width=64, vectors=vectors, tasks=("label",), features={"item": "", "category": ""},
                             source={})
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "store"
            seconds = fill(path, kind, given.users, given.per_user)
            size, formula = (path / "data.mdb").stat().st_size, kind.store_bytes(given.users * given.per_user)
            for max_tokens in given.tokens:
                mean, *figures = measure(path, given.users, given.per_user, max_tokens, given.fetches)
                cells = " | ".join(f"{figure:.3f}" for figure in figures)
                print(f"| {vectors} | {max_tokens} | {mean:.0f} | {cells} | {size / 2**20:.0f} MiB | "
                      f"{formula / 2**20:.0f} MiB | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
