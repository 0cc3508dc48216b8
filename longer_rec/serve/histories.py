"""Users' own events, as they were sent: what a score request that brings no history is answered from."""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from longer_rec.bundle import Bundle
from longer_rec.data.encode import encode_values
from longer_rec.errors import ServeError
from longer_rec.serve.request import TIME, EncodedEvents, check_body, check_events, encode_events, event_columns


@dataclass
class _Stored:
    """``text``: raw columns as JSON. ``events``: what a bundle made of them when they were last asked for."""

    text: bytes
    expires: float
    events: EncodedEvents | None = None

    @property
    def num_bytes(self) -> int:
        return len(self.text) + (self.events.num_bytes if self.events is not None else 0)


class Histories:
    """Raw columns by (tenant, user), as JSON text, so that any bundle can encode them and every byte is counted.

    In memory alone: beyond ``limit_bytes`` the user that was idle longest is forgotten, as is one idle for ``ttl_s``.
    Encoded events are kept beside the text where there is room, so that asking again costs no encoding.
    """

    def __init__(self, limit_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_bytes, self.ttl_s = limit_bytes, ttl_s
        self.num_bytes = self.num_forgotten = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._stored: OrderedDict[tuple[str, str], _Stored] = OrderedDict()

    def get(self, bundle: Bundle, tenant: str, user: str) -> EncodedEvents | None:
        """A user's history as ``bundle`` reads it; None for a user without one."""
        with self._lock:
            self._forget_old()
            stored = self._stored.get((tenant, user))
            if stored is None:
                return None
            stored.expires = self._clock() + self.ttl_s
            self._stored.move_to_end((tenant, user))
            if stored.events is not None and stored.events.version == bundle.version:
                return stored.events
            columns: dict[str, Any] = json.loads(stored.text)
            times = np.asarray(columns.pop(TIME), np.int64)[-bundle.manifest.max_events:]
            events = encode_events(bundle, {name: values[-bundle.manifest.max_events:] for name, values in
                                            columns.items()}, times)
            self.num_bytes -= stored.num_bytes
            stored.events = events
            if self.num_bytes + stored.num_bytes > self.limit_bytes:
                stored.events = None
            self.num_bytes += stored.num_bytes
            return events

    def append(self, bundle: Bundle, tenant: str, user: str, body: Any, max_events: int) -> dict[str, Any]:
        """Add the events of a body; late ones find their place by time, after those of the same time.

        The oldest beyond the bundle's ``max_events`` are left out. Where the data was prepared without duplicates, an
        item that the history has at that time already is left out, so that a repeated call changes nothing.
        """
        body = check_body(body, ("events",), required=("events",))
        columns, times = check_events(bundle, body["events"], max_events)
        for feature in (bundle.schema.item_features[0], *bundle.schema.event_features):
            encode_values(bundle.encoders[feature.table], columns[feature.name], f"events.{feature.name}")
        new = {**{name: np.asarray(values).tolist() if isinstance(values, np.ndarray) else values
                  for name, values in columns.items()}, TIME: times.tolist()}
        with self._lock:
            self._forget_old()
            old = json.loads(self._stored[tenant, user].text) if (tenant, user) in self._stored else {}
            item = bundle.schema.item_features[0].name
            seen = set() if bundle.manifest.duplicates == "keep" else set(zip(old.get(item, ()), old.get(TIME, ()),
                                                                             strict=True))
            added = [at for at, event in enumerate(zip(new[item], new[TIME], strict=True)) if event not in seen]
            joined = {name: [*old.get(name, ()), *(new[name][at] for at in added)] for name in event_columns(bundle)}
            order = np.argsort(np.asarray(joined[TIME], np.int64), kind="stable")[-bundle.manifest.max_events:].tolist()
            kept = {name: [values[at] for at in order] for name, values in joined.items()}
            self._put((tenant, user), json.dumps(kept, separators=(",", ":")).encode())
        return {"num_events": len(order), "added": len(added), "duplicates": len(times) - len(added)}

    def delete(self, tenant: str, user: str) -> bool:
        """Forget a user; whether there was anything to forget."""
        with self._lock:
            return self._drop((tenant, user))

    def clear(self) -> None:
        """Forget everybody: a new bundle's events have other columns."""
        with self._lock:
            self._stored.clear()
            self.num_bytes = 0

    def _put(self, key: tuple[str, str], text: bytes) -> None:
        if len(text) > self.limit_bytes:
            raise ServeError(f"the history takes {len(text)} bytes, all histories may take history_bytes="
                             f"{self.limit_bytes}; send fewer events")
        self._drop(key)
        while self.num_bytes + len(text) > self.limit_bytes:
            self._drop(next(iter(self._stored)))
            self.num_forgotten += 1
        self._stored[key] = _Stored(text, self._clock() + self.ttl_s)
        self.num_bytes += len(text)

    def _drop(self, key: tuple[str, str]) -> bool:
        stored = self._stored.pop(key, None)
        self.num_bytes -= stored.num_bytes if stored is not None else 0
        return stored is not None

    def _forget_old(self) -> None:
        while self._stored and next(iter(self._stored.values())).expires <= self._clock():
            self._drop(next(iter(self._stored)))
            self.num_forgotten += 1
