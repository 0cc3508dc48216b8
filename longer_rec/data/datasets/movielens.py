"""MovieLens, read from GroupLens' own folders (latest, latest-small, 20M, 25M, 1M) or from Parquet files of them.

A rating of 4 and more is a positive. Users rate in bursts of seconds and hardly come back, so the split is made user
by user; over global time only a sixth of the last tenth of ratings has a known user.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longer_rec.config import apply_overrides, build_config
from longer_rec.data.describe import LogConfig
from longer_rec.data.sources import LogSource
from longer_rec.errors import ConfigError

_PATH = "path"
_DESCRIPTION: dict[str, Any] = {
    "name": "movielens",
    "description": "MovieLens (GroupLens). Task: which of the movies rated at one moment get 4 stars or more.",
    "event_features": [{"name": "rating_bucket", "column": "rating", "type": "bucketed",
                        "boundaries": [1, 2, 3, 3.5, 4, 4.5, 5]}],
    "candidates": {"kind": "rows"},
    "split": {"kind": "per_user", "fractions": [0.8, 0.1, 0.1]},
}
_GENRES = {"name": "genre", "column": "genres", "multi_valued": True, "separator": "|", "max_values": 4}


def _columns(user: str, item: str) -> dict[str, Any]:
    return {"columns": {"user": user, "item": item, "time": "timestamp", "label": {"column": "rating", "at_least": 4}}}


def _describe(events: dict[str, Any], movies: dict[str, Any], user: str, item: str, key: str) -> dict[str, Any]:
    return {**_columns(user, item), "events": events, "items": {"source": movies, "key": key, "features": [_GENRES]}}


_LAYOUTS: dict[str, dict[str, Any]] = {
    "ratings.csv": _describe({"files": ["ratings.csv"]}, {"files": ["movies.csv"]}, "userId", "movieId", "movieId"),
    "ratings.dat": _describe(
        {"files": ["ratings.dat"], "format": "csv", "separator": "::",
         "header": ["user", "item", "rating", "timestamp"],
         "dtypes": {"user": "int", "item": "int", "rating": "float", "timestamp": "int"}},
        {"files": ["movies.dat"], "format": "csv", "separator": "::", "header": ["item", "title", "genres"],
         "dtypes": {"item": "int"}}, "user", "item", "item"),
    "mlsmall.parquet": _describe({"files": ["mlsmall.parquet"]}, {"files": ["mlsmall_items.parquet"]},
                                 "user_id", "item_id", "item_id"),
}


def load(overrides: Sequence[str] = ()) -> LogSource:
    """The description of the folder that ``path=...`` names, by the files found in it."""
    paths = [override.partition("=")[2] for override in overrides if override.partition("=")[0] == _PATH]
    if len(paths) != 1:
        raise ConfigError("movielens needs path=FOLDER, once: the folder of GroupLens' ratings and movies files")
    root = Path(paths[0]).expanduser()
    layout = next((layout for name, layout in _LAYOUTS.items() if (root / name).is_file()), None)
    if layout is None:
        raise ConfigError(f"{root} holds none of {', '.join(_LAYOUTS)}; give the unpacked folder of GroupLens' archive")
    others = [override for override in overrides if override.partition("=")[0] != _PATH]
    config = build_config(LogConfig, apply_overrides({**_DESCRIPTION, **layout}, others), "movielens")
    return LogSource(config, root.resolve())
