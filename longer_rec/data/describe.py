"""How a log is described: the YAML form that users write and every built-in data set turns itself into."""

from typing import Literal, Self

import pydantic

from longer_rec.config import Config

TimeUnit = Literal["s", "ms", "us", "ns"]


class FilesConfig(Config):
    """Parquet or CSV files; paths and globs count from the folder of the YAML file."""

    files: tuple[str, ...] = pydantic.Field(min_length=1)
    format: Literal["parquet", "csv"] | None = pydantic.Field(None, description="None: by the file names' ending")
    separator: str = ","
    header: tuple[str, ...] = pydantic.Field((), description="column names of a CSV file that has none")
    dtypes: dict[str, Literal["int", "float", "string"]] = {}
    sha256: dict[str, str] = pydantic.Field({}, description="file name -> hash; a file that differs is refused")


class LabelConfig(Config):
    """What makes a row a positive; without thresholds the column itself is the label, in [0, 1]."""

    column: str
    at_least: float | None = pydantic.Field(None, description="label 1 where the column reaches this")
    positive: tuple[str, ...] = pydantic.Field((), description="label 1 where the column is one of these actions")

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.at_least is not None and self.positive:
            raise ValueError("at_least and positive exclude each other; keep one")
        return self


class ColumnsConfig(Config):
    """Which column of the log is what."""

    user: str
    item: str
    time: str
    time_unit: TimeUnit = pydantic.Field("s", description="unit of a numeric time; dates carry their own")
    label: LabelConfig | None = None


class FeatureConfig(Config):
    """One feature: its raw column, and how its values become rows of a table.

    ``id``: a vocabulary of the training period. ``hashed``: a stable hash into ``num_buckets``. ``open``: a hash of 40
    bits, of which training gives rows to those that come often (``sparse.managed``). ``bucketed``: a
    number into the intervals between ``boundaries``, or between as many ``quantiles`` of the training period.
    ``multi_valued`` splits text at ``separator`` (or takes a list column): user features are pooled, item features
    become ``max_values`` slots that share one table. Several ``columns`` of a user make tokens ``column=value``.
    """

    name: str = pydantic.Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")
    type: Literal["id", "hashed", "open", "bucketed"] = "id"
    column: str | None = pydantic.Field(None, description="None: the feature's name")
    columns: tuple[str, ...] = ()
    num_buckets: int | None = pydantic.Field(None, ge=1)
    boundaries: tuple[float, ...] = ()
    quantiles: int | None = pydantic.Field(None, ge=2, le=1000)
    multi_valued: bool = False
    separator: str = "|"
    max_values: int | None = pydantic.Field(None, ge=1, le=64)
    min_count: int = pydantic.Field(1, ge=1, description="rarer values share row 0; only for type id")

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "hashed") != (self.num_buckets is not None):
            raise ValueError(f"feature {self.name!r}: num_buckets belongs to type hashed, which needs it")
        if (self.type == "bucketed") != (bool(self.boundaries) != (self.quantiles is not None)):
            raise ValueError(f"feature {self.name!r}: type bucketed, and no other, needs boundaries or quantiles")
        if any(a >= b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError(f"feature {self.name!r}: boundaries {self.boundaries} must rise")
        if self.multi_valued and self.type in ("bucketed", "open"):
            raise ValueError(f"feature {self.name!r}: a feature of type {self.type} has one value; drop multi_valued")
        if self.columns and (not self.multi_valued or self.column):
            raise ValueError(f"feature {self.name!r}: columns is for multi_valued features without column")
        return self

    @property
    def source_columns(self) -> tuple[str, ...]:
        return self.columns or (self.column or self.name,)


class EntityConfig(Config):
    """Features of items or of users: in files of their own with one row per ``key``, or in columns of the log.

    From the log, a feature that contradicts itself takes its smallest value of the training period.
    """

    source: FilesConfig | None = None
    key: str | None = pydantic.Field(None, description="the column of source that holds the item or user")
    features: tuple[FeatureConfig, ...] = ()

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if (self.source is None) != (self.key is None):
            raise ValueError("source and key go together; give both or none")
        return self


class ItemsConfig(EntityConfig):
    """Items: the id itself (rarer than ``min_count`` in the training period: row 0), then its features."""

    name: str = "item"
    min_count: int = pydantic.Field(1, ge=1)
    counts: tuple[str, ...] = pydantic.Field((), description="the item or single-valued features of it whose count in "
                                             "the training period becomes a dense feature, <name>_count")

    @pydantic.model_validator(mode="after")
    def _check_slots(self) -> Self:
        for feature in self.features:
            if feature.multi_valued != (feature.max_values is not None):
                raise ValueError(f"item feature {feature.name!r}: multi_valued and max_values go together")
        known = [self.name, *(feature.name for feature in self.features
                              if not feature.multi_valued and feature.type != "open")]
        for name in self.counts:
            if name not in known:
                raise ValueError(f"items.counts names {name!r}; known are {known}")
        for feature in self.features:
            if feature.columns:
                raise ValueError(f"item feature {feature.name!r}: columns is for user features; name one column")
        return self


class UsersConfig(EntityConfig):
    """Users: the id itself, unless ``id_feature`` is off, then their features."""

    name: str = "user"
    id_feature: bool = True

    @pydantic.model_validator(mode="after")
    def _check_pooled(self) -> Self:
        for feature in self.features:
            if feature.max_values is not None:
                raise ValueError(f"user feature {feature.name!r}: user features are pooled; drop max_values")
            if self.source is None and feature.multi_valued:
                raise ValueError(f"user feature {feature.name!r}: multi-valued features need users.source")
        return self


class CandidatesConfig(Config):
    """Where a request's candidates come from; rows of one user at one time form one request.

    ``rows``: each labelled row of the log is a candidate. ``negatives``: the rows (those with label 1, if there is a
    label) are positives, with ``per_positive`` items beside each, drawn by their count in the training period and
    not in the request.
    """

    kind: Literal["rows", "negatives"]
    per_positive: int | None = pydantic.Field(None, ge=1, le=10_000)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "negatives") != (self.per_positive is not None):
            raise ValueError("candidates: per_positive belongs to kind negatives, which needs it")
        return self


class SplitConfig(Config):
    """Shares of the requests for train, validation and test, in order of time: over all, or user by user."""

    kind: Literal["global_time", "per_user"] = "global_time"
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-9 or self.fractions[0] == 0:
            raise ValueError(f"split.fractions={self.fractions} must add up to 1, and train must not be empty")
        return self


class LogConfig(Config):
    """A log of interactions, and the ranking task made from it."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""
    events: FilesConfig | None = pydantic.Field(None, description="None only for logs that are generated")
    columns: ColumnsConfig
    items: ItemsConfig = ItemsConfig()
    event_features: tuple[FeatureConfig, ...] = ()
    users: UsersConfig = UsersConfig()
    candidates: CandidatesConfig
    history: Literal["all", "positives", "unlabelled"] = pydantic.Field(
        "all", description="which rows enter the history: clicks without impressions are `positives`")
    split: SplitConfig = SplitConfig()
    duplicates: Literal["keep", "drop", "refuse"] = pydantic.Field(
        "keep", description="rows of the same user, item and time")
    bad_rows: Literal["refuse", "drop"] = pydantic.Field(
        "refuse", description="rows without a user, item or valid time; dropped ones are counted")
    max_bad_fraction: float = pydantic.Field(0.01, ge=0, le=1)
    require_sorted: bool = pydantic.Field(False, description="refuse a log whose times go back within a file")
    tie_seed: int = pydantic.Field(1, ge=0)
    negatives_seed: int = pydantic.Field(2, ge=0, description="draws the negatives of validation and test")

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        features = (*self.items.features, *self.event_features, *self.users.features)
        names = [self.items.name, self.users.name, *(feature.name for feature in features)]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"feature {doubled[0]!r} is described twice; rename one")
        for feature in self.event_features:
            if feature.multi_valued:
                raise ValueError(f"event feature {feature.name!r} is multi-valued; only item and user features can be")
        if self.candidates.kind == "rows" and self.columns.label is None:
            raise ValueError("candidates.kind=rows needs columns.label; name it, or use kind negatives")
        if self.history != "all" and self.columns.label is None:
            raise ValueError(f"history={self.history} needs columns.label; name it, or use history all")
        return self
