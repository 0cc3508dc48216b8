"""What the doctor says about ranks, on clusters that are not there and between real processes."""

import os
from typing import Any

import pytest

from longer_rec.errors import ConfigError, DataError
from longer_rec.runtime import cluster_check
from longer_rec.runtime.cluster_check import Check, check_clocks, check_cluster, compare_facts
from longer_rec.runtime.distributed import joined_world
from tests.reference.ranks import RankFailure, run_ranks

ALIKE = [{"host": f"n{rank // 2}", "torch": "2.13.0", "threads": "1"} for rank in range(4)]


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_ranks_that_are_alike_pass() -> None:
    checks = by_name(compare_facts(ALIKE))
    assert {check.status for check in checks.values()} == {"ok"}
    assert checks["hosts"].detail == "n0 (2 ranks), n1 (2 ranks)"
    assert checks["torch"].detail == "2.13.0 on every rank"


def test_the_rank_that_differs_from_most_is_named() -> None:
    """Also when it is rank 0, and a fact that only one lacks."""
    for odd in range(4):
        facts = [dict(of_rank) for of_rank in ALIKE]
        facts[odd]["torch"] = "2.12.0"
        checks = by_name(compare_facts(facts))
        assert checks["torch"].status == "fail"
        assert checks["torch"].detail == f"rank {odd} on n{odd // 2} has 2.12.0; the others 2.13.0"
        assert checks["threads"].status == "ok"


def test_hosts_of_unequal_size_are_pointed_out() -> None:
    hosts = by_name(compare_facts(ALIKE[:3]))["hosts"]
    assert (hosts.status, hosts.detail) == ("warn", "n0 (2 ranks), n1 (1 rank)")


def test_a_clock_that_is_off_is_named() -> None:
    assert check_clocks([5.0, 5.001]).status == "ok"
    off = check_clocks([5.0, 5.2, 5.1, 65.0])
    assert off.status == "warn"
    assert "rank 3 by +59.8 s" in off.detail
    assert "rank 0" not in off.detail


def test_one_rank_has_nothing_to_compare() -> None:
    with joined_world() as world, pytest.raises(ConfigError, match="start it with torchrun or srun"):
        check_cluster(world)


def _check(rank: int, _: int, data: list[str]) -> list[tuple[str, str, str]]:
    """``data`` by rank; "" for none."""
    cluster_check._SIZES = {"latency": 4, "1 MiB": 1 << 20}

    def own() -> str:
        if not data[rank]:
            raise DataError(f"nothing prepared for rank {rank}")
        return data[rank]

    with joined_world() as world:
        return [(check.name, check.status, check.detail) for check in check_cluster(world, own)]


def test_ranks_compare_and_measure_and_agree_on_what_they_found() -> None:
    found = run_ranks(_check, 3, ["d1", "d1", "d1"])
    assert found[0] == found[1] == found[2]
    assert {status for _, status, _ in found[0]} == {"ok"}
    detail = {name: text for name, _, text in found[0]}
    assert detail["pairs"] == "3 ranks all reach each other (gloo)"
    assert detail["data"] == "d1 on every rank"
    assert detail.keys() > {"torch", "torchrec", "fbgemm", "longer_rec", "processor", "threads", "clocks"}
    for name in ("all-reduce", "all-to-all"):
        assert detail[f"{name} latency"].endswith(" µs")
        assert detail[f"{name} 1 MiB"].endswith(" GB/s per rank")


def test_another_data_set_or_none_on_one_rank_is_a_failed_check() -> None:
    for odd in ("d2", ""):
        for checks in run_ranks(_check, 3, ["d1", odd, "d1"]):
            failed = {name: text for name, status, text in checks if status == "fail"}
            assert failed.keys() == ({"data"} if odd else {"data", "data of rank 1"})
            assert failed["data"].startswith(f"rank 1 on {os.uname().nodename} has ")


def test_data_that_no_rank_can_read_is_bad_input() -> None:
    with pytest.raises(RankFailure, match="DataError: nothing prepared for rank 0"):
        run_ranks(_check, 2, ["", ""])


def test_a_checkout_that_differs_in_a_byte_has_another_digest(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    for content in ("x = 1\n", "x = 2\n"):
        (tmp_path / "module.py").write_text(content)
        monkeypatch.setattr(cluster_check, "__file__", str(tmp_path / "runtime" / "cluster_check.py"))
        digests.add(cluster_check._source_digest())
    assert len(digests) == 2
