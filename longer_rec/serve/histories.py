"""Users' own events, as they were sent: what a score request that brings no history is answered from."""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from longer_rec.bundle import Bundle
from longer_rec.data.encode import encode_values
from longer_rec.errors import ServeError
from longer_rec.serve.request import TIME, Columns, check_body, check_events, event_columns


class Histories:
    """Raw columns by (tenant, user), as JSON text, so that any bundle can encode them and every byte is counted.

    In memory alone: beyond ``limit_bytes`` the user that was idle longest is forgotten, as is one idle for ``ttl_s``.
    """

    def __init__(self, limit_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_bytes, self.ttl_s = limit_bytes, ttl_s
        self.num_bytes = self.num_forgotten = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._texts: OrderedDict[tuple[str, str], tuple[float, bytes]] = OrderedDict()

    def get(self, tenant: str, user: str) -> Columns | None:
        """The columns of a user's history; None for a user without one."""
        with self._lock:
            self._forget_old()
            if (tenant, user) not in self._texts:
                return None
            _, text = self._texts[tenant, user]
            self._texts[tenant, user] = self._clock() + self.ttl_s, text
            self._texts.move_to_end((tenant, user))
        columns: dict[str, Any] = json.loads(text)
        return columns

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
            old = json.loads(self._texts[tenant, user][1]) if (tenant, user) in self._texts else {}
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
            self._texts.clear()
            self.num_bytes = 0

    def _put(self, key: tuple[str, str], text: bytes) -> None:
        if len(text) > self.limit_bytes:
            raise ServeError(f"the history takes {len(text)} bytes, all histories may take history_bytes="
                             f"{self.limit_bytes}; send fewer events")
        self._drop(key)
        while self.num_bytes + len(text) > self.limit_bytes:
            self._drop(next(iter(self._texts)))
            self.num_forgotten += 1
        self._texts[key] = self._clock() + self.ttl_s, text
        self.num_bytes += len(text)

    def _drop(self, key: tuple[str, str]) -> bool:
        _, text = self._texts.pop(key, (0.0, b""))
        self.num_bytes -= len(text)
        return len(text) > 0

    def _forget_old(self) -> None:
        while self._texts and next(iter(self._texts.values()))[0] <= self._clock():
            self._drop(next(iter(self._texts)))
            self.num_forgotten += 1
