"""Small bundles without a training run, and the raw requests that belong to them."""

from pathlib import Path
from typing import Any

import polars as pl
import torch

from longer_rec.bundle import Bundle, BundleManifest, commit_bundle, load_bundle, write_bundle
from longer_rec.config import Config, build_config
from longer_rec.data.history import Dataset
from longer_rec.model.inputs import InputWidths
from longer_rec.model.tower import AnyTowerConfig, build_tower
from tests.unit.data.logs import DESCRIPTION, prepared, random_log

MAX_EVENTS, DIM = 12, 8
LONGER = {"kind": "longer", "width": 8, "num_queries": 3, "interaction": {"unit_s": 20.0}}
_SHOP = {**DESCRIPTION, "event_features": [{"name": "price", "type": "bucketed", "boundaries": [2, 4]},
                                           {"name": "place"}],
         "users": {"source": {"files": ["people.parquet"]}, "key": "who",
                   "features": [{"name": "region"}, {"name": "likes", "multi_valued": True}]}}


class _Model(Config):
    model: AnyTowerConfig


def shop_dataset(directory: Path, duplicates: str = "keep") -> Dataset:
    """Text users with a single- and a multi-valued feature, items with one, events with two."""
    log = random_log()
    people = log["who"].unique(maintain_order=True)[:9]
    directory.mkdir(parents=True, exist_ok=True)
    pl.DataFrame({"who": people, "region": [len(name) % 3 for name in people],
                  "likes": [["tea", "art"], [], ["tea"]] * 3}).write_parquet(directory / "people.parquet")
    return prepared(directory, log, {**_SHOP, "duplicates": duplicates})


def write_random_bundle(dataset: Dataset, path: Path, seed: int = 0, model: dict[str, Any] | None = None,
                        embeddings: str = "float32") -> Path:
    """A bundle of a tower and tables that nobody trained."""
    schema = dataset.schema
    config = build_config(_Model, {"model": model or LONGER}, "test").model
    widths = InputWidths(*({feature.name: DIM for feature in features} for features in
                           (schema.item_features, schema.event_features, schema.user_features)),
                         num_dense=0, num_item_dense=len(schema.item_dense))
    torch.manual_seed(seed)
    tower = build_tower(config, widths, 1, MAX_EVENTS)
    manifest = BundleManifest(name="random", model=config, max_events=MAX_EVENTS, widths=widths, pooling="mean",
                              embeddings=embeddings, user_name=dataset.config.users.name,
                              duplicates=dataset.config.duplicates, source={"seed": seed})
    path.mkdir()
    write_bundle(path, manifest, dataset, tower.state_dict(),
                 {name: torch.randn(rows, DIM) for name, rows in schema.num_rows.items()})
    commit_bundle(path, manifest)
    return path


def random_bundle(dataset: Dataset, path: Path, **settings: Any) -> Bundle:
    return load_bundle(write_random_bundle(dataset, path, **settings))
