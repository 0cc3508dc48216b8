"""States in files come back as they were, within a limit, or not at all."""

import logging
import random
from pathlib import Path

import pytest
import torch

from longer_rec.errors import ServeError
from longer_rec.model.state import LayerCache, UserState, tensors_of
from longer_rec.serve.state_files import StateFiles
from longer_rec.serve.user_cache import CachedState, CacheKey


def entry(user: int, length: int = 5, expires: float = 10.0) -> CachedState:
    rows = torch.randn(2, length, 4).transpose(0, 1)  # as states lie in memory: head by head
    cache = LayerCache(rows, rows.to(torch.bfloat16), torch.tensor([length]))
    return CachedState(CacheKey("v", "a", f"user {user}", b"\xff"), UserState(torch.randn(1, 3), (cache,)), 7,
                       torch.arange(length), expires=expires)


def parts(entry: CachedState) -> list[torch.Tensor]:
    return tensors_of((entry.state, entry.age_T))


def on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


@pytest.mark.parametrize("length", [0, 1, 5])
def test_a_state_comes_back_bitwise_once(tmp_path: Path, length: int) -> None:
    files, put = StateFiles(tmp_path / "a" / "b", 10_000, clock=lambda: 9.0), entry(1, length)
    files.put(put)
    path, = (tmp_path / "a" / "b").iterdir()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777, "user" in path.name) == (
        0o600, 0o700, False)
    found = files.take(put.key)
    assert found is not None
    assert (found.key, found.time, found.expires, found.num_bytes) == (put.key, 7, 10.0, put.num_bytes)
    for one, other in zip(parts(found), parts(put), strict=True):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert torch.equal(one, other)
    assert files.take(put.key) is None
    assert (files.num_bytes, len(files), on_disk(path.parent), files._keys_of) == (0, 0, 0, {})


def test_random_operations_keep_the_limit_and_the_account_to_the_byte(tmp_path: Path) -> None:
    chance, now = random.Random(0), [0.0]
    files = StateFiles(tmp_path, 6000, clock=lambda: now[0])
    found = expired = 0
    for _ in range(1000):
        now[0] += 0.1
        one = entry(chance.randrange(12), chance.randrange(40), now[0] + chance.choice((0.3, 2.0)))
        match chance.randrange(4):
            case 0 | 1:
                files.put(one)
            case 2:
                before = one.key in files._filed
                taken = files.take(one.key)
                found += taken is not None
                expired += before and taken is None
            case 3:
                if chance.random() < 0.2:
                    files.drop_user("a", one.key.user)
        assert files.num_bytes == on_disk(tmp_path) == sum(filed.num_bytes for filed in files._filed.values()) <= 6000
    assert min(found, expired) >= 20
    files.put(entry(1, 2000))
    assert entry(1).key not in files._filed, "larger than all files may be"


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_a_miss_and_a_line_in_the_log(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
                                                        ) -> None:
    files, put = StateFiles(tmp_path, 10_000, clock=lambda: 0.0), entry(1)
    files.put(put)
    path, = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    match damage:
        case "flip":
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[:-3])
        case "gone":
            path.unlink()
    with caplog.at_level(logging.ERROR):
        assert files.take(put.key) is None
    assert len(caplog.messages) == 1
    assert files.num_bytes == on_disk(tmp_path) == 0


def test_what_cannot_be_written_is_told_and_not_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files, put = StateFiles(tmp_path / "states", 10_000), entry(1)
    (tmp_path / "states").rmdir()
    with caplog.at_level(logging.ERROR):
        files.put(put)
    assert "a state is not kept in" in caplog.text
    assert (files.num_bytes, files.take(put.key)) == (0, None)
    (tmp_path / "file").touch()
    with pytest.raises(ServeError, match="file cannot be used: File exists; name a directory"):
        StateFiles(tmp_path / "file", 1)


def test_files_of_an_earlier_process_are_deleted(tmp_path: Path) -> None:
    StateFiles(tmp_path, 10_000).put(entry(1))
    (tmp_path / "other").touch()
    files = StateFiles(tmp_path, 10_000)
    assert (files.num_bytes, [path.name for path in tmp_path.iterdir()]) == (0, ["other"])
