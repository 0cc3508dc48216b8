"""The description printed in docs/data.md works, with every kind of feature in it."""

import re
from pathlib import Path

import numpy as np
import polars as pl

from longer_rec.batch import validate_batch
from longer_rec.data.batches import make_batch
from longer_rec.data.history import open_dataset
from longer_rec.data.prepare import prepare

PAGE = Path(__file__).parents[3] / "docs" / "data.md"


def _write_shop(folder: Path) -> None:
    random = np.random.default_rng(0)
    (folder / "log").mkdir()
    for month in range(2):
        count = 500
        pl.DataFrame({
            "visitor": [f"v{one}" for one in random.integers(0, 20, count)], "article": random.integers(0, 60, count),
            "at": pl.from_epoch(pl.Series(np.arange(count) // 3 * 3600 + month * 10**7), "s"),
            "action": random.choice(["buy", "view"], count), "quantity": random.integers(1, 9, count),
        }).write_parquet(folder / "log" / f"2026-{month + 1:02}.parquet")
    pl.DataFrame({
        "article": np.arange(50), "brand": [f"b{one % 7}" for one in range(50)], "seller": np.arange(50) % 11,
        "campaign": [f"spring {one % 9}" if one % 10 else None for one in range(50)],
        "price": random.uniform(1, 99, 50), "colours": ["red|blue", "red", "", "red|green|blue", None] * 10,
    }).write_parquet(folder / "articles.parquet")
    pl.DataFrame({
        "visitor": [f"v{one}" for one in range(15)], "interests": ["art,tea", "tea", None] * 5,
        "age": [30, None, 50] * 5, "country": ["NO", "PE", None] * 5}).write_csv(folder / "visitors.csv")


def test_the_documented_description_prepares_every_kind_of_feature(tmp_path: Path) -> None:
    _write_shop(tmp_path)
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "shop.yaml").write_text(blocks[0])
    dataset = open_dataset(prepare(str(tmp_path / "shop.yaml"), tmp_path / "out"))
    assert dataset.schema.open_tables == {"campaign"}
    assert {name: rows for name, rows in dataset.schema.num_rows.items() if name != "campaign"} == {
        "item": 61, "brand": 8, "seller": 10_001, "price": 11, "colours": 4, "quantity": 5, "user": 21, "interests": 3,
        "person": 5}
    assert [one.name for one in dataset.schema.item_features] == [
        "item", "brand", "seller", "campaign", "price", "colours.0", "colours.1"]
    assert [one.name for one in dataset.schema.user_features if one.multi_valued] == ["interests", "person"]
    batch = make_batch(dataset, dataset.split_rows("test"), max_events=50)
    validate_batch(batch, dataset.schema)
    assert batch.candidate_dense_CF.shape == (batch.num_candidates, 2)
    tokens = dataset.encoders["person"].values.to_list()  # type: ignore[union-attr]
    assert tokens == ["age=30", "age=50", "country=NO", "country=PE"]
    # v15 ... v19 are not in the file of users: no tokens, and no error.
    offsets = dataset.users["person"].offsets
    assert offsets is not None
    length = dict(zip(dataset.raw_users, np.diff(offsets).tolist(), strict=True))
    assert [length[f"v{one}"] for one in (0, 1, 2, 15, 19)] == [2, 1, 1, 0, 0]
    # Articles 50 ... 59 are not in the file of items: known ids, unknown brand.
    brand = dataset.items["brand"][1:]
    assert (brand[:50] > 0).all()
    assert (brand[50:] == 0).all()
    assert dataset.items["colours.1"][1:6].tolist() == [1, 0, 0, 2, 0]
