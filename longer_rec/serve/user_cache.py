"""Users' states by what they were made from, in a bounded number of bytes."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from longer_rec.model.state import UserState, state_bytes


@dataclass(frozen=True)
class CacheKey:
    """``digest`` covers the events and the user's features; a state made for another time may still be found by it."""

    version: str
    tenant: str
    user: str
    digest: bytes


@dataclass(eq=False)
class CachedState:
    """A state, the request time it was made for and the ages (T) that its events had then."""

    key: CacheKey
    state: UserState
    time: int
    age_T: Tensor
    num_bytes: int = 0
    expires: float = 0.0
    pins: int = 0

    def __post_init__(self) -> None:
        self.num_bytes = state_bytes(self.state) + self.age_T.untyped_storage().nbytes()


@dataclass
class CacheCounts:
    """What happened since the start."""

    hits: int = 0
    misses: int = 0
    evicted: int = 0
    expired: int = 0
    refused: int = 0
    by_tenant: dict[str, int] = field(default_factory=dict)


class UserCache:
    """Least recently used goes first, a tenant above its quota before all others; never more than ``limit_bytes``.

    ``get`` pins what it returns until ``release``: a pinned state is neither evicted nor dropped from the account, for
    its memory is in use. What finds no room beside pinned states is refused, and serves its request uncached.
    Thread-safe.
    """

    def __init__(self, limit_bytes: int, ttl_s: float, tenant_bytes: int | None = None,
                 clock: Callable[[], float] = time.monotonic, collects_evicted: bool = False) -> None:
        self.limit_bytes, self.ttl_s, self.tenant_bytes = limit_bytes, ttl_s, tenant_bytes or limit_bytes
        self.num_bytes = 0
        self.counts = CacheCounts()
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[CacheKey, CachedState] = OrderedDict()
        self._keys_of: dict[tuple[str, str], set[CacheKey]] = {}
        self._doomed: list[CachedState] = []
        self._collects_evicted, self._evicted = collects_evicted, list[CachedState]()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: CacheKey) -> CachedState | None:
        """The state of ``key``, pinned; None without one, or when it is too old."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.expires <= self._clock():
                self.counts.expired += 1
                self._remove(entry)
                entry = None
            if entry is None:
                self.counts.misses += 1
                return None
            self._entries.move_to_end(key)
            entry.pins += 1
            self.counts.hits += 1
            return entry

    def put(self, entry: CachedState, pins: int = 1) -> bool:
        """Keep ``entry``, pinned by as many, in place of what its key had; False where there is no room for it."""
        with self._lock:
            old = self._entries.get(entry.key)
            if old is not None:
                self._remove(old)
            entry.expires = entry.expires or self._clock() + self.ttl_s
            if not self._make_room(entry):
                self.counts.refused += 1
                return False
            entry.pins += pins
            self._entries[entry.key] = entry
            self._keys_of.setdefault((entry.key.tenant, entry.key.user), set()).add(entry.key)
            self._account(entry, entry.num_bytes)
            return True

    def take_evicted(self) -> list[CachedState]:
        """What was evicted since the last call, for a second tier, with ``collects_evicted``."""
        with self._lock:
            evicted, self._evicted = self._evicted, []
            return evicted

    def release(self, entry: CachedState) -> None:
        """The caller has done with ``entry``."""
        with self._lock:
            entry.pins -= 1
            if entry.pins == 0 and entry in self._doomed:
                self._doomed.remove(entry)
                self._account(entry, -entry.num_bytes)

    def drop_user(self, tenant: str, user: str) -> int:
        """Forget a user's states; how many there were."""
        with self._lock:
            keys = list(self._keys_of.get((tenant, user), ()))
            for key in keys:
                self._remove(self._entries[key])
            self._evicted = [entry for entry in self._evicted if (entry.key.tenant, entry.key.user) != (tenant, user)]
            return len(keys)

    def _make_room(self, entry: CachedState) -> bool:
        tenant = entry.key.tenant
        if entry.num_bytes > min(self.limit_bytes, self.tenant_bytes):
            return False
        own = self.counts.by_tenant
        while own.get(tenant, 0) + entry.num_bytes > self.tenant_bytes:
            if not self._evict(lambda other: other.key.tenant == tenant):
                return False
        while self.num_bytes + entry.num_bytes > self.limit_bytes:
            if not self._evict(lambda other: True):
                return False
        return True

    def _evict(self, chosen: Callable[[CachedState], bool]) -> bool:
        victim = next((entry for entry in self._entries.values() if entry.pins == 0 and chosen(entry)), None)
        if victim is None:
            return False
        self.counts.evicted += 1
        self._remove(victim)
        if self._collects_evicted:
            self._evicted.append(victim)
        return True

    def _remove(self, entry: CachedState) -> None:
        """Nobody finds it any more; its bytes count until nobody holds it either."""
        del self._entries[entry.key]
        keys = self._keys_of[entry.key.tenant, entry.key.user]
        keys.discard(entry.key)
        if not keys:
            del self._keys_of[entry.key.tenant, entry.key.user]
        if entry.pins:
            self._doomed.append(entry)
        else:
            self._account(entry, -entry.num_bytes)

    def _account(self, entry: CachedState, num_bytes: int) -> None:
        own = self.counts.by_tenant
        self.num_bytes += num_bytes
        own[entry.key.tenant] = own.get(entry.key.tenant, 0) + num_bytes
        if own[entry.key.tenant] == 0:
            del own[entry.key.tenant]
