"""Torn, altered and foreign checkpoints: each is found, named, and never half-loaded."""

import json
import logging
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longer_rec.checkpoint.inspect import (
    diff_checkpoints,
    difference_lines,
    find_checkpoint,
    inspect_checkpoint,
    summary_lines,
)
from longer_rec.checkpoint.manager import CheckpointManager
from longer_rec.checkpoint.manifest import Manifest, hash_file, read_manifest, write_manifest
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


def damage(directory: Path, how: str, rng: random.Random) -> None:
    files = sorted(path for path in directory.iterdir() if path.name != "manifest.json")
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "page":
        start = rng.randrange(max(1, len(content) - 512))
        content[start:start + 512] = bytes(value ^ 255 for value in content[start:start + 512])
    elif how == "cut":
        del content[rng.randrange(len(content)):]
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["flip", "page", "cut", "missing"])
def test_every_damage_is_found_and_names_the_file(how: str, saved: Path) -> None:
    originals = {path: path.read_bytes() for path in saved.iterdir()}
    manager = CheckpointManager(saved.parent)
    for seed in range(40):
        damage(saved, how, random.Random(seed))
        state = zeros_like(make_state())
        with pytest.raises(CheckpointError, match=r"step-7/(__0_0\.distcp|\.metadata) (is|has|cannot)"):
            manager.load(saved, state)
        assert same(state, zeros_like(make_state()))
        for path, content in originals.items():
            path.write_bytes(content)
    manager.load(saved, zeros_like(make_state()))


def test_every_damage_to_the_manifest_is_found(saved: Path) -> None:
    path = saved / "manifest.json"
    original = path.read_bytes()
    meaning = json.loads(original)
    found = 0
    for seed in range(300):
        content = bytearray(original)
        content[random.Random(seed).randrange(len(content))] ^= 1 << random.Random(seed + 1000).randrange(8)
        path.write_bytes(content)
        try:
            same_meaning = json.loads(content) == meaning
        except ValueError:
            same_meaning = False
        if not same_meaning:  # a flipped space between two keys is no damage
            with pytest.raises(CheckpointError, match=r"manifest\.json"):
                CheckpointManager(saved.parent).load(saved, zeros_like(make_state()))
            found += 1
    assert found > 200


@pytest.mark.parametrize("key", ["model/table", "model/bias", "optimizer/table/momentum", "optimizer/bias/step"])
def test_dropping_any_key_is_refused_in_both_directions(key: str, tmp_path: Path) -> None:
    def without(state: dict[str, Any]) -> dict[str, Any]:
        part, name = key.split("/", 1)
        return {**state, part: {k: v for k, v in state[part].items() if k != name}}

    whole = CheckpointManager(tmp_path / "whole").save(1, make_state(), {})
    with pytest.raises(CheckpointError, match=f"does not have, the first '{key}'"):
        CheckpointManager(whole.parent).load(whole, without(zeros_like(make_state())))
    partial = CheckpointManager(tmp_path / "partial").save(1, without(make_state()), {})
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors that this model has, the first '{key}'"):
        CheckpointManager(partial.parent).load(partial, zeros_like(make_state()))


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
    damage(tmp_path / "step-3", "cut", random.Random(0))
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
    damage(saved, "flip", random.Random(1))
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        CheckpointManager(saved.parent).load_latest(make_state())


def test_uncommitted_directories_are_not_checkpoints(saved: Path) -> None:
    saved.rename(saved.with_name("step-9.tmp"))
    (saved.parent / "step-8").mkdir()
    manager = CheckpointManager(saved.parent)
    assert manager.steps() == []
    assert manager.latest() is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    for step in (5, 10, 15, 100):
        manager.save(step, make_state(step), {})
    assert manager.steps() == [15, 100]
    assert manager.latest() == tmp_path / "step-100"
    with pytest.raises(CheckpointError, match="keep=0"):
        CheckpointManager(tmp_path, keep=0)


class Exploit:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch exploited",)


def test_code_in_a_pickle_is_not_run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when the attacker has written matching hashes."""
    monkeypatch.chdir(saved.parent)
    (saved / ".metadata").write_bytes(pickle.dumps(Exploit()))
    manifest = read_manifest(saved)
    files = {**manifest.files, ".metadata": hash_file(saved / ".metadata")}
    write_manifest(saved, Manifest(step=7, files=files, tensors=manifest.tensors, extra={}))
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        CheckpointManager(saved.parent).load(saved, zeros_like(make_state()))
    assert not (saved.parent / "exploited").exists()


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
    assert "model/table               float32 200 x 8" in summary_lines(summary)
    assert 'fingerprint: "abc"' in summary_lines(summary)
    damage(saved, "cut", random.Random(3))
    assert len(inspect_checkpoint(saved).faults) == 1
    assert any(line.startswith("damaged: ") for line in summary_lines(inspect_checkpoint(saved)))


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
