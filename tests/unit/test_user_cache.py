"""The cache of users' states keeps its account to the byte, and its limits."""

import os
import random

import pytest
import torch

from longer_rec.model.state import UserState
from longer_rec.serve.user_cache import CachedState, CacheKey, UserCache

OPERATIONS = 100_000 if os.environ.get("LONGER_REC_FAULTS") == "full" else 10_000


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def entry(user: int, digest: int = 0, size: int = 10, tenant: str = "a") -> CachedState:
    key = CacheKey("v", tenant, str(user), bytes([digest]))
    return CachedState(key, UserState(torch.zeros(1, size)), 0, torch.zeros(2, dtype=torch.int64))


def test_random_operations_never_exceed_a_limit_and_keep_the_account() -> None:
    chance, clock = random.Random(0), Clock()
    cache = UserCache(limit_bytes=2000, ttl_s=8, tenant_bytes=1200, clock=clock)
    pinned: list[CachedState] = []
    refused = 0
    for _ in range(OPERATIONS):
        clock.now += chance.random()
        made = entry(chance.randrange(30), chance.randrange(2), chance.randrange(1, 80), chance.choice("ab"))
        match chance.randrange(5):
            case 0 | 1:
                if cache.put(made):
                    pinned.append(made)
                else:
                    refused += 1
            case 2:
                found = cache.get(made.key)
                if found is not None:
                    assert found.key == made.key
                    pinned.append(found)
            case 3:
                cache.drop_user(made.key.tenant, made.key.user)
            case 4:
                while len(pinned) > chance.randrange(12):
                    cache.release(pinned.pop(chance.randrange(len(pinned))))
        assert cache.num_bytes <= 2000
        assert all(held <= 1200 for held in cache.counts.by_tenant.values())
        live = {id(one): one for one in (*cache._entries.values(), *pinned)}
        assert cache.num_bytes == sum(one.num_bytes for one in live.values()) == sum(cache.counts.by_tenant.values())
    assert min(refused, cache.counts.hits, cache.counts.evicted, cache.counts.expired) >= 20
    for one in pinned:
        cache.release(one)
    for one in range(30):
        cache.drop_user("a", str(one))
        cache.drop_user("b", str(one))
    assert (cache.num_bytes, len(cache), cache._doomed, cache._keys_of) == (0, 0, [], {})


def test_the_least_recently_used_goes_first_and_pinned_ones_stay() -> None:
    cache = UserCache(limit_bytes=3 * entry(0).num_bytes, ttl_s=10)
    for user in range(3):
        first = entry(user)
        assert cache.put(first)
        cache.release(first)
    held = cache.get(entry(0).key)
    assert held is not None
    assert cache.put(entry(3))
    assert cache.get(entry(1).key) is None
    assert cache.put(entry(4)), "user 2 is the only one that nobody holds"
    assert not cache.put(entry(5)), "users 0, 3 and 4 are in use"
    assert cache.counts.refused == 1


def test_a_tenant_over_its_quota_evicts_its_own() -> None:
    size = entry(0).num_bytes
    cache = UserCache(limit_bytes=10 * size, ttl_s=10, tenant_bytes=2 * size)
    for tenant in "ab":
        for user in range(3):
            one = entry(user, tenant=tenant)
            assert cache.put(one)
            cache.release(one)
    assert cache.counts.by_tenant == {"a": 2 * size, "b": 2 * size}
    assert cache.get(entry(0, tenant="a").key) is None
    assert cache.get(entry(2, tenant="a").key) is not None


@pytest.mark.parametrize("size", [0, 1])
def test_a_cache_too_small_for_anything_keeps_nothing(size: int) -> None:
    cache = UserCache(limit_bytes=size, ttl_s=10)
    assert not cache.put(entry(0))
    assert (cache.num_bytes, len(cache)) == (0, 0)
