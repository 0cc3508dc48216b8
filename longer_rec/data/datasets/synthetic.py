"""A generated log whose labels only a long history explains.

Each user is a stream of random items. A request offers items of which the positives occur in the user's history at
positions ``plant_newest`` ... ``plant_oldest`` counted from the newest event and nowhere nearer, and the negatives
not at all. Items are exchangeable, and no (user, item) pair is offered twice, so neither popularity nor memory helps:
a model that sees fewer than ``plant_newest`` events stays at AUC 0.5, and one that sees all of them can reach 1.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl
import pydantic

from longer_rec.config import Config, apply_overrides, build_config, config_hash
from longer_rec.data.describe import LogConfig
from longer_rec.data.order import I64
from longer_rec.data.sources import LogSource
from longer_rec.errors import ConfigError

_EVENT_SECONDS = 600
_START = 1_600_000_000


class SyntheticConfig(Config):
    """Sizes of the generated log; the defaults prepare in about two seconds."""

    num_users: int = pydantic.Field(200, ge=1)
    events_per_user: int = pydantic.Field(1200, ge=2)
    requests_per_user: int = pydantic.Field(10, ge=3)
    candidates: int = pydantic.Field(8, ge=2, description="per request; half of them, rounded down, are positives")
    num_items: int = pydantic.Field(4000, ge=10)
    num_categories: int = pydantic.Field(40, ge=1)
    plant_newest: int = pydantic.Field(200, ge=1, description="positives never occur nearer than this")
    plant_oldest: int = pydantic.Field(1000, ge=2, description="each positive occurs at this position or nearer")
    seed: int = pydantic.Field(0, ge=0)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.plant_newest >= self.plant_oldest:
            raise ValueError(f"plant_newest={self.plant_newest} must be below plant_oldest={self.plant_oldest}")
        if self.events_per_user < self.plant_oldest + self.requests_per_user:
            raise ValueError(f"events_per_user={self.events_per_user} must be at least plant_oldest + "
                             f"requests_per_user = {self.plant_oldest + self.requests_per_user}")
        return self


_DESCRIPTION = {
    "name": "synthetic",
    "description": "Generated: positives occur in the history only beyond its newest events, negatives not at all.",
    "columns": {"user": "user", "item": "item", "time": "time", "label": {"column": "label"}},
    "items": {"features": [{"name": "category"}]},
    "event_features": [{"name": "action", "type": "bucketed", "boundaries": [1, 2]}],
    "users": {"features": [{"name": "region"}]},
    "candidates": {"kind": "rows"},
    "history": "unlabelled",
    "split": {"kind": "per_user", "fractions": [0.8, 0.1, 0.1]},
}


def load(overrides: Sequence[str] = ()) -> LogSource:
    """The generator with its sizes overridden."""
    sizes = build_config(SyntheticConfig, apply_overrides({}, overrides), "synthetic")
    config = build_config(LogConfig, _DESCRIPTION, "synthetic")
    rows_per_user = sizes.events_per_user + sizes.requests_per_user * sizes.candidates
    return LogSource(config, root=Path(), generate=lambda: generate(sizes), settings=config_hash(sizes),
                     generated_rows=sizes.num_users * rows_per_user)


def generate(sizes: SyntheticConfig) -> Iterator[pl.DataFrame]:
    """One frame per user; a function of the sizes."""
    category = np.random.default_rng([sizes.seed, 0]).integers(0, sizes.num_categories, sizes.num_items)
    for user in range(sizes.num_users):
        yield _generate_user(sizes, user, category)


def _generate_user(sizes: SyntheticConfig, user: int, category: I64) -> pl.DataFrame:
    random = np.random.default_rng([sizes.seed, 1, user])
    stream = random.integers(0, sizes.num_items, sizes.events_per_user)
    absent = random.permutation(np.setdiff1d(np.arange(sizes.num_items), stream))
    # Requests stand between events, the first where the history reaches plant_oldest, the last at its end.
    ends = np.linspace(sizes.plant_oldest, sizes.events_per_user, sizes.requests_per_user).astype(np.int64)
    num_positives = sizes.candidates // 2
    num_negatives = sizes.candidates - num_positives
    used = np.zeros(sizes.num_items, bool)
    items, times, labels = [stream], [_START + _EVENT_SECONDS * np.arange(len(stream))], [np.full(len(stream), np.nan)]
    for request, end in enumerate(ends):
        far = stream[end - sizes.plant_oldest:end - sizes.plant_newest]
        far = np.setdiff1d(far, stream[end - sizes.plant_newest:end])
        far = random.permutation(far[~used[far]])[:num_positives]
        decoys = absent[request * num_negatives:(request + 1) * num_negatives]
        if len(far) < num_positives or len(decoys) < num_negatives:
            raise ConfigError(f"synthetic: user {user} has not enough items for request {request}; raise num_items="
                              f"{sizes.num_items} or lower candidates={sizes.candidates}")
        used[far] = True
        items += [far, decoys]
        times.append(np.full(sizes.candidates, _START + _EVENT_SECONDS * (end - 1) + _EVENT_SECONDS // 2))
        labels += [np.ones(num_positives), np.zeros(num_negatives)]
    item = np.concatenate(items)
    return pl.DataFrame({
        "user": np.full(len(item), user), "item": item, "time": np.concatenate(times), "label": np.concatenate(labels),
        "category": category[item], "action": random.integers(0, 3, len(item)), "region": np.full(len(item), user % 5)})
