"""`longer-rec bench serve` on a real server."""

import json
from pathlib import Path

from tests.integration.conftest import CommandServer
from tests.reference.bundles import shop_dataset, write_random_bundle


def test_rows_tell_hits_rates_and_refusals(commands: CommandServer, tmp_path: Path) -> None:
    bundle, out = write_random_bundle(shop_dataset(tmp_path / "shop"), tmp_path / "bundle"), tmp_path / "out"
    small = ("events=[10]", "candidates=[2]", "seconds=1", "users=3")
    done = commands.run("bench", "serve", bundle, *small, "hit_rates=[0,1]", "load=0.3", "stored=true", "--out", out)
    assert done.code == 0, done.err
    never, always = json.loads((out / "serve.json").read_text(encoding="utf-8"))["rows"]
    assert (never["hits_found"], always["hits_found"]) == (0, 1)
    for row in (never, always):
        assert row["errors"] == {}
        assert row["answered"] == row["sent"] > 0
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert f"{row['capacity']:,.1f}" in done.out
    assert (out / "serve.md").read_text(encoding="utf-8").count("\n") == 4
    done = commands.run("bench", "serve", bundle, *small, "hit_rates=[0]", "rate=2000", "server.max_waiting=1", "--out",
                        out)
    row = json.loads((out / "serve.json").read_text(encoding="utf-8"))["rows"][0]
    assert row["errors"]["429"] > 0
    assert row["answered"] > 0
    done = commands.run("bench", "serve", bundle, *small, "events=[5,13]")
    assert (done.code, done.out) == (2, "")
    assert "events=13: the bundle reads the newest 12 alone" in done.err
    done = commands.run("bench", "serve", bundle, *small, "server.max_waitin=1")
    assert done.code == 1 or done.code == 2
    assert "did you mean 'max_waiting'?" in done.err
