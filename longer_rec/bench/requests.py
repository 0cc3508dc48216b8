"""Requests that a bundle understands, from known and unknown users: bodies of `POST /v1/score`."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from longer_rec.bundle import Bundle
from longer_rec.data.encode import Bucketed, Encoder, Vocabulary
from longer_rec.errors import ConfigError

TIME = 1_700_000_000
_DISTINCT = 8  # histories, and lists of candidates; users share them, their states are their own
_STRANGERS = 10**9


class Requests:
    """Users 0 ... ``num_users`` - 1 come back, user n with a frequency of 1 / (n + 1) ** ``zipf``; strangers never.

    With ``stored`` the former leave their history out, which the server must have been told.
    """

    def __init__(self, bundle: Bundle, num_events: int, num_candidates: int, num_users: int, zipf: float,
                 stored: bool = False, seed: int = 0) -> None:
        if num_events > bundle.manifest.max_events:
            raise ConfigError(f"events={num_events}: the bundle reads the newest {bundle.manifest.max_events} alone; "
                              "ask for fewer, or export a run with a larger data.max_events")
        self._draw = np.random.default_rng(seed)
        self._bundle, self.num_events, self.num_users, self._stored = bundle, num_events, num_users, stored
        share = 1 / np.arange(1, num_users + 1) ** zipf
        self._ends = (share / share.sum()).cumsum()
        item = bundle.schema.item_features[0].name
        features = {feature.name: feature.table for feature in bundle.schema.event_features}

        def history() -> bytes:
            columns = {"time": np.sort(self._draw.integers(TIME - 10**7, TIME, num_events)).tolist()}
            for name, table in {item: item, **features}.items():
                columns[name] = self._values(bundle.encoders[table], num_events)
            return json.dumps(columns, separators=(",", ":")).encode()

        self._histories = [history() for _ in range(_DISTINCT)]
        self._candidates = [json.dumps(self._values(bundle.encoders[item], num_candidates)).encode()
                            for _ in range(_DISTINCT)]

    def stream(self, hit_rate: float) -> Iterator[bytes]:
        """Bodies without end; a share ``hit_rate`` of users who come back."""
        strangers = int(self._draw.integers(1, _STRANGERS)) * _STRANGERS
        while True:
            if self._draw.random() < hit_rate:
                yield self.known(min(int(self._ends.searchsorted(self._draw.random())), self.num_users - 1))
            else:
                strangers += 1
                yield self._body(strangers, with_history=True)

    def known(self, user: int) -> bytes:
        """A body of a user who comes back."""
        return self._body(user, with_history=not self._stored)

    def events(self, user: int) -> tuple[str, bytes]:
        """The path and the body that tell the server a user's history."""
        return f"/v1/users/{self.name(user)}/events", b'{"events":%b}' % self._histories[user % _DISTINCT]

    def _body(self, user: int, with_history: bool) -> bytes:
        history = b'"history":%b,' % self._histories[user % _DISTINCT] if with_history else b""
        return b'{"user":%b,"time":%d,%b"candidates":%b}' % (
            json.dumps(self.name(user)).encode(), TIME, history, self._candidates[self._draw.integers(_DISTINCT)])

    def name(self, user: int) -> int | str:
        """As the data has users: a number or text."""
        return user if self._bundle.users.values.dtype.is_integer() else f"user-{user}"

    def _values(self, encoder: Encoder, count: int) -> list[Any]:
        if isinstance(encoder, Vocabulary) and not len(encoder.values):
            return [None] * count
        if isinstance(encoder, Vocabulary):
            return encoder.values.gather(self._draw.integers(0, len(encoder.values), count)).to_list()
        if isinstance(encoder, Bucketed):
            return self._draw.choice([0.0, *encoder.boundaries], count).tolist()
        return self._draw.integers(0, encoder.num_rows - 1, count).tolist()
