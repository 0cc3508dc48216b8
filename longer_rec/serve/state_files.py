"""The second tier of the cache of users' states: what is evicted from memory goes to files and comes back from them."""

import hashlib
import logging
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from longer_rec.errors import ServeError
from longer_rec.model.state import UserState, map_state, tensors_of
from longer_rec.serve.user_cache import CachedState, CacheKey

_log = logging.getLogger(__name__)
_SUFFIX = ".state"


@dataclass(frozen=True)
class _Filed:
    """What memory keeps of a state in a file: its tensors are on torch's ``meta`` device, which holds no bytes."""

    state: UserState
    time: int
    age_T: Tensor
    expires: float
    num_bytes: int
    checksum: int


class StateFiles:
    """One file a state, ``limit_bytes`` of them at most, the least recently written goes first.

    ``take`` moves a state back, so that it lies in one tier alone. What files hold is known to their process alone, so
    those that a killed one left are deleted. A file that cannot be written, or is not what was written, costs a prefill
    and a line in the log. Thread-safe.
    """

    def __init__(self, directory: Path, limit_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.directory, self.limit_bytes, self.num_bytes = directory, limit_bytes, 0
        self._clock = clock
        self._lock = threading.Lock()
        self._filed: OrderedDict[CacheKey, _Filed] = OrderedDict()
        self._keys_of: dict[tuple[str, str], set[CacheKey]] = {}
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in directory.glob(f"*{_SUFFIX}"):
                path.unlink()
        except OSError as error:
            raise ServeError(f"state_dir={directory} cannot be used: {error.strerror}; name a directory of "
                             "the server's own") from None

    def __len__(self) -> int:
        return len(self._filed)

    def put(self, entry: CachedState) -> None:
        """Write a state that memory has no room for."""
        with self._lock:
            self._drop(entry.key)
            tensors = enumerate(tensors_of((entry.state, entry.age_T)))
            content = safetensors.torch.save({str(at): tensor.contiguous() for at, tensor in tensors})
            if len(content) > self.limit_bytes:
                return
            while self.num_bytes + len(content) > self.limit_bytes:
                self._drop(next(iter(self._filed)))
            try:
                self._path(entry.key).touch(mode=0o600)
                self._path(entry.key).write_bytes(content)
            except OSError as error:
                _log.error("a state is not kept in %s: %s", self.directory, error.strerror)
                with suppress(OSError):
                    self._path(entry.key).unlink()
                return
            state, age_T = map_state((entry.state, entry.age_T), _outline)
            self._filed[entry.key] = _Filed(state, entry.time, age_T, entry.expires, len(content), zlib.crc32(content))
            self._keys_of.setdefault((entry.key.tenant, entry.key.user), set()).add(entry.key)
            self.num_bytes += len(content)

    def take(self, key: CacheKey) -> CachedState | None:
        """The state of ``key``, bitwise, which is no longer here then; None without one, or when it is too old."""
        with self._lock:
            filed = self._filed.get(key)
            if filed is None:
                return None
            try:
                content = self._path(key).read_bytes() if filed.expires > self._clock() else None
            except OSError as error:
                _log.error("a state in %s cannot be read: %s", self.directory, error.strerror)
                content = None
            self._drop(key)
        if content is None:
            return None
        if zlib.crc32(content) != filed.checksum:
            _log.error("a state in %s is not what was written; it is made anew", self.directory)
            return None
        read = safetensors.torch.load(content)
        at = iter(range(len(read)))
        state, age_T = map_state((filed.state, filed.age_T), lambda outline: torch.empty_strided(
            outline.shape, outline.stride(), dtype=outline.dtype).copy_(read[str(next(at))]))
        return CachedState(key, state, filed.time, age_T, expires=filed.expires)

    def drop_user(self, tenant: str, user: str) -> int:
        """Forget a user's states; how many there were."""
        with self._lock:
            keys = list(self._keys_of.get((tenant, user), ()))
            for key in keys:
                self._drop(key)
            return len(keys)

    def clear(self) -> None:
        """Delete all files: nothing else knows what they hold."""
        with self._lock:
            while self._filed:
                self._drop(next(iter(self._filed)))

    def _drop(self, key: CacheKey) -> None:
        filed = self._filed.pop(key, None)
        if filed is not None:
            self.num_bytes -= filed.num_bytes
            keys = self._keys_of[key.tenant, key.user]
            keys.discard(key)
            if not keys:
                del self._keys_of[key.tenant, key.user]
            with suppress(OSError):
                self._path(key).unlink()

    def _path(self, key: CacheKey) -> Path:
        """Names say nothing of users."""
        name = hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()
        return self.directory / f"{name}{_SUFFIX}"


def _outline(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
