"""Raw requests into batches of one: checked column by column, encoded by the code that prepared the training data."""

import difflib
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from longer_rec.batch import RequestBatch, validate_batch
from longer_rec.bundle import Bundle
from longer_rec.data.encode import encode_values
from longer_rec.errors import ServeError

MAX_TIME = 1 << 40
TIME = "time"
_SCORE_KEYS = ("user", "time", "features", "history", "candidates")
Columns = Mapping[str, Any]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_events: int = 20_000
    max_candidates: int = 2_000


@dataclass(frozen=True)
class EncodedEvents:
    """A user's events as the bundle of ``version`` reads them: oldest first, its ``max_events`` newest at most."""

    version: str
    ids: dict[str, torch.Tensor]
    time_T: torch.Tensor
    is_unknown_T: torch.Tensor

    @cached_property
    def digest(self) -> bytes:
        return _digest((*(self.ids[name] for name in sorted(self.ids)), self.time_T))

    @cached_property
    def num_unknown(self) -> int:
        return int(self.is_unknown_T.sum())

    @property
    def num_bytes(self) -> int:
        return sum(values.untyped_storage().nbytes() for values in (*self.ids.values(), self.time_T, self.is_unknown_T))

    def before(self, time: int) -> "EncodedEvents":
        """Those strictly before ``time``."""
        end = int(torch.searchsorted(self.time_T, time))
        if end == len(self.time_T):
            return self
        return EncodedEvents(self.version, {name: ids[:end] for name, ids in self.ids.items()}, self.time_T[:end],
                             self.is_unknown_T[:end])


@dataclass(frozen=True)
class EncodedRequest:
    """``batch`` holds one request; ``digest`` is that of all that ``encode`` reads of it but the request's time.

    ``num_unknown``: events, candidates and users that fell to row 0, which training did not know.
    """

    user: str
    batch: RequestBatch
    digest: bytes
    num_unknown: dict[str, int]

    @property
    def time(self) -> int:
        return int(self.batch.request_time_B[0])


def event_columns(bundle: Bundle) -> list[str]:
    """Names of the columns of a history: the item, the time, the features of the action."""
    schema = bundle.schema
    return [schema.item_features[0].name, TIME, *(feature.name for feature in schema.event_features)]


def raw_user(bundle: Bundle, name: str) -> str | int:
    """A user's name in an address as the data has it: a number where its users are numbers."""
    return int(name) if name.isdecimal() and bundle.users.values.dtype.is_integer() else name


def encode_score(bundle: Bundle, body: Any, stored: EncodedEvents | None, limits: Limits, time_quantum_s: int = 0
                 ) -> EncodedRequest:
    """A body of `POST /v1/score` as a batch; ``stored`` is the user's history where the body brings none.

    A stored history is cut strictly before the request's time; one in the body must lie before it. With
    ``time_quantum_s`` the request counts as made at the next multiple of it, so that ages stay positive.
    Raises ``ServeError`` or ``DataError``, one line each.
    """
    body = check_body(body, _SCORE_KEYS, required=("time", "candidates"))
    time = _time(body["time"])
    if "history" in body:
        columns, times = check_events(bundle, body["history"], limits.max_events)
        if len(times) and times[-1] >= time:
            raise ServeError(f"history: an event at time {times[-1]} is not strictly before the request's time {time}; "
                             "leave it out")
        kept = slice(max(0, len(times) - bundle.manifest.max_events), None)
        events = encode_events(bundle, {name: values[kept] for name, values in columns.items()}, times[kept])
    elif stored is not None:
        events = stored.before(time)
    else:
        raise ServeError("'history' is missing and the user has no stored one; send its columns "
                         f"({', '.join(event_columns(bundle))}), empty for a new user")
    instances = {} if bundle.instances is None else {
        name: torch.from_numpy(values) for name, values in bundle.instances.of_user(body.get("user"), time).items()}
    if time_quantum_s:
        time = -(-time // time_quantum_s) * time_quantum_s
    return _encode(bundle, body, events, instances, time, limits)


def encode_events(bundle: Bundle, columns: Mapping[str, Any], times: I64) -> EncodedEvents:
    """Checked columns and times as the rows of tables that the ranker reads."""
    item = bundle.schema.item_features[0].name
    row_T = torch.from_numpy(encode_values(bundle.encoders[item], columns[item], f"history.{item}"))
    ids = {name: ids.index_select(0, row_T) for name, ids in bundle.items.items()}
    for feature in bundle.schema.event_features:
        rows = encode_values(bundle.encoders[feature.table], columns[feature.name], f"history.{feature.name}")
        ids[feature.name] = torch.from_numpy(rows)
    return EncodedEvents(bundle.version, ids, torch.from_numpy(times), row_T == 0)


def _encode(bundle: Bundle, body: Columns, events: EncodedEvents, instances: dict[str, torch.Tensor], time: int,
            limits: Limits) -> EncodedRequest:
    item = bundle.schema.item_features[0].name
    wanted = _column(body["candidates"], "candidates")
    if not 1 <= len(wanted) <= limits.max_candidates:
        raise ServeError(f"candidates: {len(wanted)} are given, 1 to {limits.max_candidates} are taken; "
                         "split the request")
    candidate_row = torch.from_numpy(encode_values(bundle.encoders[item], wanted, "candidates"))
    users, lengths, known = _encode_user(bundle, body)
    batch = RequestBatch(
        history=events.ids, history_time_T=events.time_T, history_length_B=torch.tensor([len(events.time_T)]),
        candidates={name: ids.index_select(0, candidate_row) for name, ids in bundle.items.items()},
        candidate_dense_CF=bundle.item_dense_VF.index_select(0, candidate_row),
        num_candidates_B=torch.tensor([len(candidate_row)]),
        label_CY=torch.zeros(len(candidate_row), len(bundle.schema.tasks)), users=users, user_length_B=lengths,
        user_dense_BF=torch.zeros(1, 0), request_time_B=torch.tensor([time]),
        request_row_B=torch.zeros(1, dtype=torch.int64), instances=instances)
    validate_batch(batch, bundle.schema)
    unknown = {"events": events.num_unknown, "candidates": int((candidate_row == 0).sum()), "users": int(not known)}
    digest = _digest((*users.values(), *instances.values())) + events.digest
    return EncodedRequest(str(body.get("user", "")), batch, digest, unknown)


def _digest(tensors: Iterable[torch.Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for values in tensors:
        digest.update(values.numel().to_bytes(8, "little"))
        digest.update(values.numpy().data)
    return digest.digest()


def _encode_user(bundle: Bundle, body: Columns) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], bool]:
    """Ids and lengths of the user's features: as the request gives them, else as the data knew the user."""
    raw, given = body.get("user"), body.get("features", {})
    schema = bundle.schema
    if not (raw is None or type(raw) is int or (isinstance(raw, str) and len(raw) <= 128)):
        raise ServeError(f"user: {str(raw)[:40]!r} is no integer and no text of at most 128 characters; send one")
    if not isinstance(given, Mapping):
        raise ServeError(f"features: a {type(given).__name__} is given, an object of feature: value is needed")
    _check_names(given, [feature.name for feature in schema.user_features
                         if feature.name != bundle.manifest.user_name], "features")
    row = int(encode_values(bundle.users, [raw], "user")[0])
    ids, lengths = {}, {}
    for feature in schema.user_features:
        if feature.name in given:
            value = given[feature.name]
            values = value if feature.multi_valued and isinstance(value, list) else [value]
            values = [each for each in values if each is not None] if feature.multi_valued else values
            encoded = encode_values(bundle.encoders[feature.table], values, f"features.{feature.name}")
            ids[feature.name] = torch.from_numpy(encoded)
        else:
            column = bundle.profiles[feature.name]
            ids[feature.name] = column.ids[int(column.offsets[row]):int(column.offsets[row + 1])]
        lengths[feature.name] = torch.tensor([ids[feature.name].numel()])
    return ids, lengths, row > 0


def check_body(body: Any, known: Collection[str], required: Collection[str]) -> dict[str, Any]:
    """The body of a request as an object with no key but ``known``, and all of ``required``."""
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body):
        raise ServeError("the body is no object with text keys; send one with the keys " + ", ".join(known))
    _check_names(body, known, "the body")
    for name in required:
        if name not in body:
            raise ServeError(f"the body has no {name!r}; add it")
    return body


def check_events(bundle: Bundle, columns: Any, max_events: int) -> tuple[dict[str, Any], I64]:
    """The columns of events by name, and their times; equal lengths, times rising."""
    names = event_columns(bundle)
    if not isinstance(columns, Mapping):
        raise ServeError(f"history: a {type(columns).__name__} is given, an object of columns is needed: "
                         f"{', '.join(names)}")
    if not columns:
        return {name: [] for name in names if name != TIME}, np.zeros(0, np.int64)
    _check_names(columns, names, "history")
    checked = {name: _column(columns.get(name), f"history.{name}") for name in names}
    lengths = {name: len(values) for name, values in checked.items()}
    if len(set(lengths.values())) > 1:
        raise ServeError(f"history: columns have different lengths {lengths}; one value for each event is needed")
    if lengths[TIME] > max_events:
        raise ServeError(f"history: {lengths[TIME]} events are given, {max_events} at most are taken; send the newest")
    times = _times(checked.pop(TIME))
    if len(times) > 1 and bool((np.diff(times) < 0).any()):
        at = int(np.argmax(np.diff(times) < 0))
        raise ServeError(f"history.time: {times[at + 1]} stands after {times[at]}; sort events from oldest to newest")
    if bundle.manifest.duplicates != "keep":
        item = list(checked[names[0]])
        if len(set(zip(item, times.tolist(), strict=True))) < len(item):
            raise ServeError("history: an item occurs twice at one time, which the training data was prepared without "
                             f"(duplicates={bundle.manifest.duplicates}); send it once")
    return checked, times


def _check_names(given: Collection[Any], known: Collection[str], where: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name)[:100], known, n=1, cutoff=0.5)
            raise ServeError(f"{where} has an unknown key {str(name)[:100]!r}; "
                             + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known) or 'none'}"))


def _column(values: Any, what: str) -> Sequence[Any] | npt.NDArray[Any]:
    """A list, or in MessagePack the bytes of little-endian int64."""
    if isinstance(values, bytes) and len(values) % 8 == 0:
        return np.frombuffer(values, "<i8")
    if not isinstance(values, list):
        raise ServeError(f"{what}: a {type(values).__name__} is given, a list is needed" if values is not None else
                         f"{what} is missing; add it")
    return values


def _times(values: Sequence[Any] | npt.NDArray[Any]) -> I64:
    array = np.asarray(values) if len(values) else np.zeros(0, np.int64)
    if array.dtype != np.int64 or array.ndim != 1:
        raise ServeError("history.time: whole seconds since 1970 are needed, as integers")
    if array.size and not (int(array.min()) >= 0 and int(array.max()) < MAX_TIME):
        raise ServeError(f"history.time: times lie in [0, 2^40) seconds, these in [{array.min()}, {array.max()}]")
    return np.array(array)


def _time(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MAX_TIME:
        raise ServeError(f"time={str(value)[:40]}: whole seconds since 1970 below 2^40 are needed, as an integer")
    return value
