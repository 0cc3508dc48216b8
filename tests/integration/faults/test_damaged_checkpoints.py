"""Damage to files, a full disk, keys that are missing: two ranks find it together and use the checkpoint before.

A seeded sample; LONGER_REC_FAULTS=full takes the full counts and writes benchmarks/results/reliability_checkpoints.md.
"""

import fcntl
import json
import logging
import os
import random
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, init_from_local_shards

from longer_rec.checkpoint.manager import CheckpointManager
from longer_rec.checkpoint.manifest import read_manifest
from longer_rec.errors import CheckpointError
from tests.distributed.test_checkpoint_resharding import ROW_WISE, build, local_tensors, state, train
from tests.reference.provenance import RESULTS, commit, provenance
from tests.reference.ranks import run_ranks

FULL = os.environ.get("LONGER_REC_FAULTS") == "full"
DAMAGES = ("file cut at a random length", "one bit flipped", "a page of 4 KiB zeroed")
COUNTS = dict(zip(DAMAGES, (100, 200, 50) if FULL else (12, 24, 8), strict=True))
_PAGE = 4096


class Run:
    """A small ranker with TorchRec's sharded tables on one rank of two, and 2 MB beside it to be damaged."""

    def __init__(self, rank: int, world_size: int, directory: Path) -> None:
        self.rank = rank
        self.manager = CheckpointManager(directory)
        self._model, self._optimizer = build(rank, world_size, ROW_WISE, "rowwise_adagrad")
        own = torch.randn(16_000, 16, generator=torch.Generator().manual_seed(rank))
        self._large = init_from_local_shards([Shard.from_tensor_and_offsets(own, [16_000 * rank, 0], rank)],
                                             [16_000 * world_size, 16])
        self.messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.messages.append(record.getMessage())
        logging.getLogger("longer_rec.checkpoint").addHandler(handler)

    def train(self, steps: range) -> None:
        train(self._model, self._optimizer, steps, self.rank)
        self._large.local_shards()[0].tensor.mul_(1.5)

    def state(self) -> dict[str, Any]:
        state_ = state(self._model, self._optimizer)
        return {**state_, "model": {**state_["model"], "large.weight": self._large}}

    def values(self) -> dict[str, Tensor]:
        """Copies of what this rank holds."""
        return local_tensors(self.state())

    @torch.no_grad()
    def forget(self) -> None:
        for tensors in self.state().values():
            for value in tensors.values():
                for own in [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) \
                        else [value]:
                    own.fill_(7)

    def loads(self, values: dict[str, Tensor]) -> str:
        """The checkpoint that load_latest chooses; "" unless it brings back exactly ``values``."""
        self.forget()
        self.messages.clear()
        assert not equal(self.values(), values)
        loaded = self.manager.load_latest(self.state())
        assert loaded is not None
        return loaded[0].name if equal(self.values(), values) else ""


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def two_checkpoints(rank: int, world_size: int, directory: Path) -> tuple[Run, dict[str, Tensor], dict[str, Tensor]]:
    """step-3 and step-6, and this rank's values of both."""
    run, values = Run(rank, world_size, directory), []
    for steps in (range(3), range(3, 6)):
        run.train(steps)
        run.manager.save(steps.stop, run.state(), {"step": steps.stop, "elapsed_s": 12.5})
        values.append(run.values())
    return run, values[0], values[1]


def damaged(path: Path, content: bytes, kind: str, rng: random.Random) -> bytes:
    """``content`` with one random damage that is one: a page of zeros is not hurt by zeroing it."""
    while True:
        changed = bytearray(content)
        if kind == DAMAGES[0]:
            del changed[rng.randrange(len(changed)):]
        elif kind == DAMAGES[1]:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        else:
            start = rng.randrange(0, len(changed), _PAGE)
            changed[start:start + _PAGE] = bytes(len(changed[start:start + _PAGE]))
        if changed != content and not (path.suffix == ".json" and same_json(changed, content)):
            return bytes(changed)


def same_json(a: bytes, b: bytes) -> bool:
    """A flipped bit can make 1e-05 of 1E-05."""
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


@contextmanager
def hurt(rank: int, path: Path, content: bytes | None) -> Iterator[None]:
    """While it lasts, on all ranks, the file holds ``content``, or is missing."""
    original = path.read_bytes()
    dist.barrier()
    if rank == 0 and content is None:
        path.unlink()
    elif rank == 0 and content is not None:
        path.write_bytes(content)
    dist.barrier()
    yield
    dist.barrier()
    if rank == 0:
        path.write_bytes(original)
    dist.barrier()


def damage_and_load(rank: int, world_size: int, directory: Path) -> list[tuple[str, str, str, str]]:
    """For each damage to step-6: what it was, to which file, which checkpoint was loaded bitwise, what was said."""
    run, older, newer = two_checkpoints(rank, world_size, directory)
    files = sorted(path for path in (directory / "step-6").iterdir())
    outcomes = []
    damages = [(kind, files[i % len(files)], i) for kind, count in COUNTS.items() for i in range(count)]
    for kind, path, i in [*damages, *(("file missing", path, 0) for path in files)]:
        content = None if kind == "file missing" else damaged(path, path.read_bytes(), kind, random.Random(i))
        with hurt(rank, path, content):
            outcomes.append((kind, path.name, run.loads(older), " ".join(run.messages)))
    assert run.loads(newer) == "step-6"  # all is mended: it was the damage
    return outcomes


def test_every_damage_is_found_by_all_ranks_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    first, other = run_ranks(damage_and_load, 2, tmp_path, timeout_s=240.0)
    assert len(first) == len(other) == sum(COUNTS.values()) + 4
    assert {name for _, name, _, _ in first} == {"manifest.json", ".metadata", "__0_0.distcp", "__1_0.distcp"}
    for kind, name, loaded, said in first:
        assert loaded == "step-3", (kind, name)
        assert re.search(rf"step-6 is passed over for step-3: .*step-6/{re.escape(name)} ", said), (kind, name, said)
    assert [(kind, loaded) for kind, _, loaded, _ in other] == [(kind, "step-3") for kind, *_ in first]
    for kind in (*DAMAGES, "file missing"):
        record(kind, sum(kind == each for each, *_ in first), "found, named, the checkpoint before loaded bitwise")


def stale_temporary(rank: int, world_size: int, directory: Path) -> tuple[str, list[str]]:
    run, _, newer = two_checkpoints(rank, world_size, directory)
    if rank == 0:
        shutil.copytree(directory / "step-3", directory / "step-9.tmp")
        (directory / "step-9.tmp" / "__1_0.distcp").write_bytes(b"torn")
    dist.barrier()
    loaded = run.loads(newer)
    run.manager.save(9, run.state(), {})
    return loaded, sorted(path.name for path in directory.iterdir())


def test_stale_temporary_directory_is_neither_loaded_nor_left(tmp_path: Path) -> None:
    assert run_ranks(stale_temporary, 2, tmp_path) == [("step-6", ["LATEST", "step-3", "step-6", "step-9"])] * 2
    record("stale step-N.tmp", 1, "the whole one loaded bitwise, the stale one cleared by the next save")


def drop_each_key(rank: int, world_size: int, directory: Path) -> list[tuple[str, str, str]]:
    """(key, fault when the checkpoint lacks it, fault when the model lacks it)."""
    run, older, _ = two_checkpoints(rank, world_size, directory)
    outcomes = []
    for key in sorted(read_manifest(directory / "step-3").tensors)[::1 if FULL else 6]:
        part, name = key.split("/", 1)
        whole = run.state()
        without = {**whole, part: {each: value for each, value in whole[part].items() if each != name}}
        partial = CheckpointManager(directory / "partial", keep=1)
        partial.save(1, without, {})
        run.forget()
        forgotten = run.values()
        faults = [fault_of_load(partial, whole), fault_of_load(run.manager, without)]
        assert equal(run.values(), forgotten)
        outcomes.append((key, *faults))
    assert run.manager.load(directory / "step-3", run.state()) == {"step": 3, "elapsed_s": 12.5}
    assert equal(run.values(), older)  # the model and the checkpoint were not at fault
    return outcomes


def fault_of_load(manager: CheckpointManager, state_: dict[str, Any]) -> str:
    try:
        manager.load_latest(state_)
    except CheckpointError as error:
        return str(error)
    return ""


def test_checkpoint_or_model_that_lacks_a_key_is_refused_by_its_name(tmp_path: Path) -> None:
    first, other = run_ranks(drop_each_key, 2, tmp_path, timeout_s=120.0)
    assert first == other
    assert len(first) > (20 if FULL else 3)
    for key, lacking, unread in first:
        assert f"lacks 1 tensors that this model has, the first {key!r}" in lacking
        assert f"holds 1 tensors that this model does not have, the first {key!r}" in unread
    record("a key dropped, from the checkpoint and from the model", 2 * len(first),
           "refused by its name, nothing changed in the model")


_LIMITS = (0, 5_000, 300_000)


def save_over_the_limit(rank: int, world_size: int, directory: Path, limited: int) -> tuple[list[str], str]:
    """A real refusal of the kernel (EFBIG) within one rank's file, at several places."""
    run, _, newer = two_checkpoints(rank, world_size, directory)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    messages = []
    for limit in _LIMITS:
        if rank == limited:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            run.manager.save_async(9, run.state(), {})
            run.manager.wait()
        except CheckpointError as error:
            messages.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        dist.barrier()
        assert sorted(path.name for path in directory.iterdir()) == ["LATEST", "step-3", "step-6"]
    loaded = run.loads(newer)
    run.manager.save(9, run.state(), {})
    return messages, f"{loaded} {run.loads(newer)}"


@pytest.mark.parametrize("limited", [0, 1])
def test_file_that_cannot_grow_fails_the_save_on_every_rank_and_the_one_before_stays(
        limited: int, tmp_path: Path) -> None:
    for messages, loaded in run_ranks(save_over_the_limit, 2, tmp_path, limited):
        assert len(messages) == len(_LIMITS)
        assert all(f"rank {limited}: OSError: [Errno 27] File too large" in message for message in messages), messages
        assert loaded == "step-6 step-9"  # and with room again, saving goes on
    record(f"file size limit of rank {limited} while saving", len(_LIMITS),
           "both ranks told, the checkpoint before loaded bitwise")


def save_on_full_disk(rank: int, world_size: int, directory: Path) -> list[str]:
    """Outcomes with no room at all, too little for a shard, for .metadata, the manifest, LATEST; and with enough."""
    run, _, newer = two_checkpoints(rank, world_size, directory)
    size = sum(path.stat().st_size for path in (directory / "step-6").iterdir())
    outcomes = []
    for free in (0, _PAGE, size // 4, size // 2, *(size + n * _PAGE for n in range(-4, 9, 1 if FULL else 2)), 2 * size):
        ballast = directory / "ballast"
        if rank == 0:
            free_now = shutil.disk_usage(directory).free
            ballast.write_bytes(bytes(max(0, free_now - free)))
        dist.barrier()
        try:
            run.manager.save(9, run.state(), {})
            outcomes.append("saved")
        except CheckpointError as error:
            outcomes.append(str(error))
        dist.barrier()
        if rank == 0:
            ballast.unlink()
        assert run.loads(newer) == ("step-9" if outcomes[-1] == "saved" else "step-6")
        dist.barrier()
        if rank == 0 and outcomes[-1] == "saved":
            shutil.rmtree(directory / "step-9")
        dist.barrier()
    return outcomes


def test_full_disk_fails_the_save_and_the_one_before_stays(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", tmp_path], check=False,
                             capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        first, other = run_ranks(save_on_full_disk, 2, tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert first == other
    failed = [outcome for outcome in first if outcome != "saved"]
    assert first[-1] == "saved"
    assert len(failed) >= 6
    assert any(outcome.startswith("saving step 9: rank 0: ") for outcome in failed)  # not in DCP, but at the commit
    assert all("No space left on device" in outcome for outcome in failed), failed
    record("disk full while saving (tmpfs)", len(failed), "both ranks told, the checkpoint before loaded bitwise")


_RESULT = RESULTS / "reliability_checkpoints.md"
_COMMAND = "LONGER_REC_FAULTS=full python -m pytest tests/integration/faults/test_damaged_checkpoints.py"
_HEAD = """# Damaged checkpoints

**Theme.** Damage to the files of a checkpoint, or a save that fails, must be found and named, and must cost no more
than the steps since the checkpoint before.

**Answer.** {total} faults, each met by two ranks together: 0 silent. "Bitwise" is what both ranks hold afterwards.

| fault | number | outcome | commit |
|---|---|---|---|
"""
_TAIL = """
Damage falls on all files in turn (`.metadata`, `manifest.json`, both ranks' `.distcp`), at seeded places; a zeroed page
that held zeros is drawn again. The tables and optimizer state are TorchRec's, row-wise over two ranks, 4 MB in all.

"""


def record(fault: str, number: int, outcome: str) -> None:
    """Put a line of a full run into the file of results; the others stay."""
    if not FULL:
        return
    with _RESULT.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        rows = dict(re.findall(r"(?m)^\| ([^|]+) \| (\d+ \| [^|]+ \| [^|]+) \|$", file.read()))
        rows[fault] = f"{number} | {outcome} | {commit()}"
        total = sum(int(row.split(" ", 1)[0]) for row in rows.values())
        file.truncate(0)
        file.write(_HEAD.format(total=total) + "".join(f"| {name} | {row} |\n" for name, row in rows.items()) + _TAIL
                   + provenance(_COMMAND, "torch"))
