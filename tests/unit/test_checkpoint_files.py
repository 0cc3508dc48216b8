"""Torn, altered and foreign checkpoints: each is found, named, and never half-loaded."""

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longer_rec.checkpoint import manager
from longer_rec.checkpoint.inspect import (
    diff_checkpoints,
    difference_lines,
    find_checkpoint,
    inspect_checkpoint,
    summary_lines,
)
from longer_rec.checkpoint.manager import CheckpointManager
from longer_rec.checkpoint.manifest import hash_file, read_manifest, write_manifest
from longer_rec.checkpoint.tensors import Staging, flatten, read_tensors
from longer_rec.errors import CheckpointError


def make_state(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"model": {"table": torch.randn(200, 8, generator=generator), "bias": torch.randn(5, generator=generator)},
            "optimizer": {"table/momentum": torch.rand(200, generator=generator), "bias/step": torch.tensor(3.0 + seed),
                          "nothing": {}}}


def zeros_like(state: dict[str, Any]) -> dict[str, Any]:
    return {key: zeros_like(value) if isinstance(value, dict) else torch.zeros_like(value)
            for key, value in state.items()}


def leaves(state: dict[str, Any]) -> list[Tensor]:
    return [leaf for value in state.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


EXTRA = {"cursor": {"samples": 640}, "fingerprint": "abc", "num_workers": 4}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return CheckpointManager(tmp_path).save(7, make_state(), EXTRA)


def test_one_process_saves_and_loads_without_a_group(saved: Path) -> None:
    state = zeros_like(make_state())
    assert CheckpointManager(saved.parent).load(saved, state) == EXTRA
    assert same(state, make_state())
    assert (saved.parent / "LATEST").read_text() == "step-7\n"


def cut(directory: Path) -> None:
    """One of many damages: tests/integration/faults/test_damaged_checkpoints.py has them all, on two ranks."""
    path = directory / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])


def test_another_shape_or_type_is_refused(saved: Path) -> None:
    for value in (torch.zeros(201, 8), torch.zeros(200, 8, dtype=torch.float64)):
        state = zeros_like(make_state())
        state["model"]["table"] = value
        with pytest.raises(CheckpointError, match="'model/table' is float32"):
            CheckpointManager(saved.parent).load(saved, state)


def test_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (1, 2, 3):
        manager.save(step, make_state(step), {"cursor": step})
    cut(tmp_path / "step-3")
    (tmp_path / "step-2" / "manifest.json").write_text("{")
    state = zeros_like(make_state())
    with caplog.at_level(logging.WARNING):
        loaded = manager.load_latest(state)
    assert loaded == (tmp_path / "step-1", {"cursor": 1})
    assert same(state, make_state(1))
    assert "step-3 is passed over" in caplog.text
    assert "step-2 is passed over" in caplog.text
    manager.save(3, make_state(9), {"cursor": 9})
    assert manager.load_latest(state) == (tmp_path / "step-3", {"cursor": 9})
    assert same(state, make_state(9))


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_none(saved: Path, tmp_path: Path) -> None:
    assert CheckpointManager(tmp_path / "empty").load_latest(make_state()) is None
    cut(saved)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        CheckpointManager(saved.parent).load_latest(make_state())


def test_uncommitted_directories_are_not_checkpoints(saved: Path) -> None:
    saved.rename(saved.with_name("step-9.tmp"))
    manager = CheckpointManager(saved.parent)
    assert manager.load_latest(make_state()) is None
    (saved.parent / "step-8").mkdir()
    assert manager.steps() == []
    assert manager.latest() is None


def test_checkpoint_that_lost_its_manifest_does_not_make_a_run_start_afresh(saved: Path) -> None:
    (saved / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .* is whole: .*step-7/manifest\.json"):
        CheckpointManager(saved.parent).load_latest(make_state())


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    for step in (5, 10, 15, 100):
        manager.save(step, make_state(step), {})
    assert manager.steps() == [15, 100]
    assert manager.latest() == tmp_path / "step-100"
    for unusable in ({"keep": 0}, {"keep_every": 0}):
        with pytest.raises(CheckpointError, match="=0"):
            CheckpointManager(tmp_path, **unusable)


def test_multiples_of_keep_every_are_kept_for_ever(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=1, keep_every=10)
    for step in range(4, 32, 2):
        manager.save(step, make_state(step), {})
    manager.save(32, make_state(32), {})
    assert manager.steps() == [10, 20, 30, 32]


def test_damaged_newer_checkpoint_pushes_out_no_whole_one(tmp_path: Path) -> None:
    """After falling back from step 9 to step 6: what is saved next is older than the damaged one, and stays."""
    for step in (3, 6, 9):
        CheckpointManager(tmp_path, keep=2).save(step, make_state(step), {})
    cut(tmp_path / "step-9")
    state = zeros_like(make_state())
    manager = CheckpointManager(tmp_path, keep=1)
    manager.load_latest(state)
    manager.save(7, make_state(7), {})
    assert manager.steps() == [7, 9]
    loaded = manager.load_latest(state)
    assert loaded is not None
    assert loaded[0].name == "step-7"
    assert same(state, make_state(7))
    manager.save(10, make_state(10), {})
    assert manager.steps() == [10]


def test_checkpoint_half_deleted_is_none_and_is_cleared_by_the_next_save(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def delete_half(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            (path / ".metadata").unlink()
            raise OSError(5, "Input/output error")

    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(1, make_state(1), {})
    with monkeypatch.context() as patch:
        patch.setattr("longer_rec.checkpoint.manager.shutil.rmtree", delete_half)
        with pytest.raises(CheckpointError, match="Input/output error"):
            manager.save(2, make_state(2), {})
    assert (tmp_path / "step-1.tmp" / "manifest.json").exists()
    assert manager.steps() == [2]
    manager.save(3, make_state(3), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-3"]


def test_staging_memory_is_used_again() -> None:
    staging = Staging()
    first = staging.copy(flatten(make_state(1)))
    second = staging.copy(flatten(make_state(2)))
    assert [value.data_ptr() for value in first.values()] == [value.data_ptr() for value in second.values()]
    grown = staging.copy({**flatten(make_state(3)), "model/bias": torch.ones(9)})
    assert torch.equal(grown["model/bias"], torch.ones(9))
    assert torch.equal(grown["model/table"], make_state(3)["model"]["table"])


class Exploit:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch exploited",)


def test_code_in_a_pickle_is_not_run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when the attacker has written matching hashes."""
    monkeypatch.chdir(saved.parent)
    (saved / ".metadata").write_bytes(pickle.dumps(Exploit()))
    manifest = read_manifest(saved)
    files = {**manifest.files, ".metadata": hash_file(saved / ".metadata")}
    write_manifest(saved, manifest.model_copy(update={"files": files}))
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        CheckpointManager(saved.parent).load(saved, zeros_like(make_state()))
    assert not (saved.parent / "exploited").exists()


def test_a_value_that_changes_between_file_and_memory_is_found(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As resharding that goes wrong would, or memory that does not hold what is written to it."""
    def read_and_spoil(path: Path, tensors: dict[str, Tensor]) -> None:
        read_tensors(path, tensors)
        tensors["model/table"][3, 5].neg_()

    monkeypatch.setattr(manager, "read_tensors", read_and_spoil)
    with pytest.raises(CheckpointError, match=r"step-7: tensor 'model/table' was loaded with digest"):
        CheckpointManager(saved.parent).load(saved, zeros_like(make_state()))


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'model/epoch' is a int"):
        CheckpointManager(tmp_path).save(1, {"model": {"epoch": 3}}, {})


def test_inspect_lists_tensors_and_faults(saved: Path) -> None:
    summary = inspect_checkpoint(saved)
    assert summary.step == 7
    assert summary.extra == EXTRA
    assert summary.tensors["model/table"].shape == (200, 8)
    assert summary.tensors["model/table"].dtype == "float32"
    assert summary.num_bytes > 200 * 9 * 4
    assert summary.faults == []
    assert "  model/table               200 x 8  float32" in summary_lines(summary, detail=True)
    assert "  fingerprint  abc" in summary_lines(summary)
    cut(saved)
    assert len(inspect_checkpoint(saved).faults) == 1
    assert any(line.startswith("damaged: ") for line in summary_lines(inspect_checkpoint(saved)))


def ranker_like_state() -> dict[str, Any]:
    tower = {f"tower.layers.{i}.{name}": torch.ones(4, 4) for i in range(30) for name in ("up", "down")}
    model = {"sparse.ec.dim8.embeddings.item.weight": torch.ones(2000, 8),
             "sparse.ebc.embedding_bags.city.weight": torch.ones(30, 8), **tower, "tower.head.bias": torch.ones(1)}
    return {"model": model, "optimizer": {
        "sparse.ec.dim8.embeddings.item.weight/item.momentum1": torch.ones(2000),
        "sparse.ebc.embedding_bags.city.weight/city.momentum1": torch.ones(30),
        **{f"{name}/{moment}": value for name, value in tower.items() for moment in ("exp_avg", "step")}}}


def test_summary_reads_position_then_tables_then_parts_of_the_tower(tmp_path: Path) -> None:
    path = CheckpointManager(tmp_path).save(974, ranker_like_state(), {
        "world_size": 2, "samples": 31168, "name": "LONGER", "data_fingerprint": "d7dacfda7d12" + 52 * "7",
        "more": [1], "elapsed_s": 133.977283})
    summary = inspect_checkpoint(path)
    assert summary_lines(summary) == [
        f"step 974: 185 tensors, {summary.num_bytes / 1e6:.1f} MB",
        "  name              LONGER",
        "  samples           31,168",
        "  world_size        2",
        "  data_fingerprint  d7dacfda7d12...",
        f"  digest            {summary.digest}",
        "  elapsed_s         133.977",
        "  more              [1]",
        "2 tables",
        "  city  30 x 8  float32, momentum1 30",
        "  item  2,000 x 8  float32, momentum1 2,000",
        "61 other parameters",
        "  tower.head    1 tensors, 1 values",
        "  tower.layers  60 tensors, 960 values, exp_avg, step"]
    assert len(summary_lines(summary, detail=True)) == 8 + 185


def test_differences_of_a_parameter_and_its_optimizer_share_a_line_and_many_are_counted(tmp_path: Path) -> None:
    a = CheckpointManager(tmp_path / "a").save(1, ranker_like_state(), {})
    other = ranker_like_state()
    for value in leaves(other):
        value.add_(1)
    difference = diff_checkpoints(a, CheckpointManager(tmp_path / "b").save(1, other, {}))
    lines = difference_lines(difference)
    assert lines[0] == ("model/sparse.ebc.embedding_bags.city.weight: values, 240 of 240 values, by 1 at most; "
                        "also its momentum1")
    assert lines[3].endswith("; also its exp_avg, step")
    assert lines[20:] == ["and 43 more parameters"]
    assert len(difference_lines(difference, detail=True)) == 185


def test_diff_tells_what_differs_and_how(tmp_path: Path) -> None:
    other = make_state()
    other["model"]["table"][3, 4] += 0.5
    other["model"]["bias"] = torch.zeros(6)
    other["optimizer"]["new"] = torch.full((2,), torch.nan)
    del other["optimizer"]["bias/step"]
    a = CheckpointManager(tmp_path / "a").save(7, make_state(), EXTRA)
    b = CheckpointManager(tmp_path / "b").save(7, other, {**EXTRA, "num_workers": 2})
    difference = diff_checkpoints(a, b)
    assert [(entry.key, entry.kind) for entry in difference.tensors] == [
        ("model/bias", "shape"), ("model/table", "values"), ("optimizer/bias/step", "only in A"),
        ("optimizer/new", "only in B")]
    assert difference.extra == {"num_workers": (4, 2)}
    assert "num_workers: 4 and 2" in difference_lines(difference)
    assert "model/table: values, 1 of 1600 values, by 0.5 at most" in difference_lines(difference)
    assert "model/bias: shape, (5,) and (6,); also its step" in difference_lines(difference)
    same_as_b = diff_checkpoints(b, b)
    assert same_as_b.tensors == []  # NaN equals itself
    assert difference_lines(same_as_b) == []


def test_newest_checkpoint_of_a_run_directory_is_found(tmp_path: Path) -> None:
    for step in (9, 10):
        CheckpointManager(tmp_path / "checkpoints").save(step, make_state(), {})
    newest = tmp_path / "checkpoints" / "step-10"
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "checkpoints") == find_checkpoint(newest) == newest
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path / "other")
