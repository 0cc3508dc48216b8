"""Flipped bits in the Parquet files of a log: named, or without effect.

LONGER_REC_FAULTS=full writes benchmarks/results/reliability_inputs.md.
"""

import hashlib
import os
import random
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml

from longer_rec.data.prepare import prepare
from longer_rec.errors import DataError
from tests.reference.provenance import RESULTS, provenance

FULL = os.environ.get("LONGER_REC_FAULTS") == "full"
FLIPS = 200
RESULT = RESULTS / "reliability_inputs.md"


def describe(folder: Path, sha256: dict[str, str]) -> Path:
    path = folder / "log.yaml"
    path.write_text(yaml.safe_dump({
        "name": "log", "events": {"files": ["log.parquet"], "sha256": sha256},
        "columns": {"user": "user", "item": "item", "time": "time"}, "items": {"features": [{"name": "kind"}]},
        "candidates": {"kind": "negatives", "per_positive": 1}}))
    return path


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """A log of one row group, as a careful writer leaves it: zstd, a checksum for each page."""
    random_ = np.random.default_rng(0)
    frame = pl.DataFrame({"user": random_.integers(0, 50, 4000), "item": random_.integers(0, 300, 4000),
                          "time": random_.integers(10**9, 10**9 + 10**6, 4000), "kind": random_.integers(0, 9, 4000)})
    pa.parquet.write_table(frame.to_arrow(), tmp_path / "log.parquet", compression="zstd", write_page_checksum=True)
    return (tmp_path / "log.parquet").read_bytes()


def outcome(folder: Path, content: bytes, sha256: dict[str, str], expected: dict[str, bytes]) -> str:
    """"named", "no effect" or "silent"."""
    (folder / "log.parquet").write_bytes(content)
    out = folder / "damaged"
    fault = None
    try:
        prepare(str(describe(folder, sha256)), out)
    except DataError as error:
        fault = str(error)
    if fault is not None:
        assert "log.parquet" in fault
        assert not out.exists(), "something half-prepared was left"
        return "named"
    same = prepared(out) == expected
    shutil.rmtree(out)
    return "no effect" if same else "silent"


def prepared(out: Path) -> dict[str, bytes]:
    """All files but the manifest, which holds the hash of the log."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "manifest.json"}


@pytest.mark.parametrize("with_hash", [False, True])
def test_no_flipped_bit_changes_what_is_prepared_in_silence(tmp_path: Path, whole: bytes, with_hash: bool) -> None:
    """A page's checksum covers its data, not its header or the footer; a hash in the description covers the file."""
    expected = prepared(prepare(str(describe(tmp_path, {})), tmp_path / "whole"))
    sha256 = {"log.parquet": hashlib.sha256(whole).hexdigest()} if with_hash else {}
    seeded = random.Random(3)
    outcomes = []
    for _ in range(FLIPS):
        content = bytearray(whole)
        content[seeded.randrange(len(content))] ^= 1 << seeded.randrange(8)
        outcomes.append(outcome(tmp_path, bytes(content), sha256, expected))
    counts = {name: outcomes.count(name) for name in ("named", "no effect", "silent")}
    assert counts["silent"] == 0, counts
    assert counts["named"] >= (FLIPS if with_hash else FLIPS * 0.9), counts
    if FULL:
        write_result(with_hash, counts)


def write_result(with_hash: bool, counts: dict[str, int]) -> None:
    row = f"| {'sha256 in the description' if with_hash else 'page checksums alone'} | " + " | ".join(
        str(count) for count in counts.values()) + " |\n"
    if not with_hash:
        command = "LONGER_REC_FAULTS=full python -m pytest tests/integration/faults/test_damaged_inputs.py"
        RESULT.write_text(f"""# Damaged Parquet files

**Theme.** A flipped bit in a log must not change what is learned from it.

**Question.** {FLIPS} flips at seeded places of a zstd Parquet file with page checksums, through the whole of
`longer-rec prepare`: named, without effect on any prepared byte, or silent?

{provenance(command, "polars", "pyarrow")}
| guarded by | named | no effect | silent |
|---|---|---|---|
""")
    with RESULT.open("a") as file:
        file.write(row)
