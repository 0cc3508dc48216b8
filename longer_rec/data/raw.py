"""Requests of prepared data with the raw values they came from: what a client of a server would send."""

from typing import Any

import numpy as np

from longer_rec.data.batches import make_batch
from longer_rec.data.encode import Bucketed, Encoder, Vocabulary
from longer_rec.data.history import Dataset
from longer_rec.data.order import I64
from longer_rec.errors import DataError


def raw_request(dataset: Dataset, row: int, max_events: int) -> dict[str, Any]:
    """User, time, history columns and candidates of a request, as `POST /v1/score` takes them.

    Row 0, what training did not know, becomes null. ``DataError`` for hashed features, which cannot be turned back.
    """
    batch = make_batch(dataset, [row], max_events=max_events)
    item = dataset.schema.item_features[0].name
    events = {feature.name: batch.history[feature.name].numpy() for feature in dataset.schema.event_features}
    encoders = dataset.encoders
    return {
        "user": dataset.raw_users[int(dataset.requests.take("user", np.asarray([row]))[0])],
        "time": int(batch.request_time_B[0]),
        "history": {item: decode(encoders[item], batch.history[item].numpy(), item),
                    "time": batch.history_time_T.tolist(),
                    **{name: decode(encoders[name], rows, name) for name, rows in events.items()}},
        "candidates": decode(encoders[item], batch.candidates[item].numpy(), item)}


def decode(encoder: Encoder, row: I64, what: str) -> list[Any]:
    """A raw value that encodes to each row; null for row 0."""
    if isinstance(encoder, Vocabulary):
        known = encoder.values.gather(np.maximum(row, 1) - 1).to_list() if len(encoder.values) else [None] * len(row)
    elif isinstance(encoder, Bucketed):
        # The lower end of each interval, which belongs to it; anything below the first boundary.
        below = [float(np.nextafter(boundary, -np.inf)) for boundary in encoder.boundaries[:1]]
        ends = np.asarray([*below, *encoder.boundaries] or [0.0])
        known = ends[np.maximum(row, 1) - 1].tolist()
    else:
        raise DataError(f"{what}: hashed values cannot be turned back; send requests of the log itself")
    return [value if at else None for value, at in zip(known, row.tolist(), strict=True)]
