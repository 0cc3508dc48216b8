"""Peak memory and time of `longer-rec prepare` on a generated log, beside reading and sorting the same log whole.

    python benchmarks/bench_prepare.py --rows 5000000 20000000

Each measurement is a process of its own: its peak resident memory (ru_maxrss) is what the operating system counted.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_CHUNK = 1 << 20
_YAML = """
name: generated
events: {files: [log.parquet]}
columns: {user: user, item: item, time: time}
items: {features: [{name: category}]}
event_features: [{name: price, type: bucketed, quantiles: 10}]
candidates: {kind: negatives, per_positive: 4}
"""
_MEASURE = """
import resource, sys, time
start = time.perf_counter()
{body}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"{{peak:.0f}} {{time.perf_counter() - start:.1f}}")
"""
_PREPARE = "from pathlib import Path\nfrom longer_rec.data.prepare import prepare\nprepare({yaml!r}, Path({out!r}))"
_WHOLE = "import polars as pl\npl.read_parquet({log!r}).sort('user', 'time')"
_IMPORT = "import longer_rec.data.prepare"


def write_log(path: Path, num_rows: int) -> None:
    """Baskets of 5 of users with 200 rows each, in order of time, items by a power law: 40 bytes a row in memory."""
    random = np.random.default_rng(0)
    num_users, num_items = max(num_rows // 200, 1), 200_000
    writer = None
    for start in range(0, num_rows, _CHUNK):
        count = min(_CHUNK, num_rows - start)
        basket = np.arange(start, start + count) // 5
        user = (basket * 2_654_435_761) % num_users
        item = (num_items * random.random(count) ** 3).astype(np.int64)
        table = pa.table({"user": user, "item": item, "time": 1_600_000_000 + basket, "category": item % 500,
                          "price": random.gamma(2.0, 3.0, count)})
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd", write_page_checksum=True)
        writer.write_table(table)
    if writer:
        writer.close()


def measure(body: str) -> tuple[float, float]:
    """(peak resident MiB, seconds) of a Python program in its own process."""
    command = [sys.executable, "-c", _MEASURE.format(body=body)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, seconds = result.stdout.split()
    return float(peak), float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000_000, 20_000_000])
    parser.add_argument("--whole-up-to", type=int, default=20_000_000, help="rows up to which the log is read whole")
    parser.add_argument("--dir", type=Path, default=None, help="where the logs are written (default: a temporary one)")
    arguments = parser.parse_args()
    base, _ = measure(_IMPORT)
    print(f"{platform.platform()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")
    print(f"imports alone: {base:.0f} MiB\n")
    print("| rows | log on disk MiB | log in memory MiB | read and sort whole: peak MiB | prepare: peak MiB "
          "| prepare s | prepared MiB |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.dir) as scratch:
        for rows in arguments.rows:
            directory = Path(scratch) / str(rows)
            directory.mkdir()
            write_log(directory / "log.parquet", rows)
            (directory / "log.yaml").write_text(_YAML)
            whole = "-"
            if rows <= arguments.whole_up_to:
                whole = f"{measure(_WHOLE.format(log=str(directory / 'log.parquet')))[0]:.0f}"
            peak, seconds = measure(_PREPARE.format(yaml=str(directory / "log.yaml"), out=str(directory / "out")))
            disk = (directory / "log.parquet").stat().st_size
            prepared = sum(path.stat().st_size for path in (directory / "out").iterdir())
            print(f"| {rows:,} | {disk >> 20} | {rows * 40 >> 20} | {whole} | {peak:.0f} | {seconds:.0f} "
                  f"| {prepared >> 20} |", flush=True)


if __name__ == "__main__":
    main()
