"""The one description of the data: features, the tables behind them, and the tasks.

``prepare`` writes it as ``schema.json`` beside the data; the sparse tables, the model's input widths and the
validation of a batch all derive from it, in training and in serving.

Row 0 of every table is the out-of-vocabulary row: ids unseen in the training period map to it, and are counted.
"""

import json
from pathlib import Path
from typing import Self

import pydantic

from longer_rec.config import Config, build_config
from longer_rec.errors import DataError

# Ids of an open id space: hashes of so many bits, 0 for none; as many as model/interaction.py has room for.
OPEN_ID_BITS = 40


class Table(Config):
    """One embedding table; several features may share it. One of open ids has 2^40 ``num_rows``, of which training
    holds those that it needs."""

    name: str
    num_rows: int = pydantic.Field(ge=1, description="rows, the out-of-vocabulary row 0 included")


class Feature(Config):
    """A column of encoded ids that looks up rows of ``table``."""

    name: str
    table: str
    multi_valued: bool = False


class InstanceSchema(Config):
    """What the tokens of past instances hold that a model reads from a store: vectors of ``width``, ``num_labels``
    labels, and features of the instance; at most ``max_tokens`` a request."""

    width: int = pydantic.Field(ge=1)
    num_labels: int = pydantic.Field(ge=1)
    max_tokens: int = pydantic.Field(ge=1)
    features: tuple[Feature, ...] = ()


class Schema(Config):
    """Columns of a prepared dataset.

    ``item_features`` describe an item, so events and candidates both carry them (the first is the item id itself);
    ``event_features`` describe the action and exist in the history alone; ``user_features`` may be multi-valued,
    which makes them pooled. ``item_dense`` and ``user_dense`` are numbers of an item (candidates carry them) and of a
    user. ``tasks`` names the label columns. ``instances`` is not the data's own: opening it with a store of instances
    adds it.
    """

    tables: tuple[Table, ...]
    item_features: tuple[Feature, ...] = pydantic.Field(min_length=1)
    event_features: tuple[Feature, ...] = ()
    user_features: tuple[Feature, ...] = ()
    item_dense: tuple[str, ...] = ()
    user_dense: tuple[str, ...] = ()
    tasks: tuple[str, ...] = pydantic.Field(min_length=1)
    instances: InstanceSchema | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        names = [table.name for table in self.tables]
        features = [*self.item_features, *self.event_features, *self.user_features]
        for kind, values in (("table", names), ("feature", [feature.name for feature in features])):
            doubled = sorted({value for value in values if values.count(value) > 1})
            if doubled:
                raise ValueError(f"{kind} {doubled[0]!r} is described twice")
        for feature in features:
            if feature.table not in names:
                raise ValueError(f"feature {feature.name!r} names table {feature.table!r}, known are {names}")
        for feature in (*self.item_features, *self.event_features):
            if feature.multi_valued:
                raise ValueError(f"feature {feature.name!r} is multi-valued; only user features can be")
        return self

    @property
    def num_rows(self) -> dict[str, int]:
        """Rows of each table by name."""
        return {table.name: table.num_rows for table in self.tables}

    @property
    def open_tables(self) -> frozenset[str]:
        """Tables whose ids are hashes of an open id space."""
        return frozenset(table.name for table in self.tables if table.num_rows == 1 << OPEN_ID_BITS)

    @property
    def history_features(self) -> tuple[Feature, ...]:
        """What an event carries: the item's features, then the action's."""
        return self.item_features + self.event_features

    @property
    def instance_features(self) -> tuple[Feature, ...]:
        """What an instance token looks up."""
        return self.instances.features if self.instances is not None else ()

    @property
    def row_keys(self) -> dict[str, list[str]]:
        """Keys such as "history.item" by the table in which they are looked up row by row."""
        roles = {"history": self.history_features, "candidates": self.item_features,
                 "users": tuple(feature for feature in self.user_features if not feature.multi_valued),
                 "instances": self.instance_features}
        keys: dict[str, list[str]] = {}
        for role, features in roles.items():
            for feature in features:
                keys.setdefault(feature.table, []).append(f"{role}.{feature.name}")
        return keys

    @property
    def pooled_keys(self) -> dict[str, list[str]]:
        """Keys such as "users.tags" by the table whose rows are summed for each request."""
        keys: dict[str, list[str]] = {}
        for feature in self.user_features:
            if feature.multi_valued:
                keys.setdefault(feature.table, []).append(f"users.{feature.name}")
        return keys


def load_schema(path: Path) -> Schema:
    """The schema in a JSON file; ``DataError`` when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the schema {path}: {error}; run `longer-rec prepare` again") from None
    return build_config(Schema, content, str(path))
