"""From a log of one's own to a ranker: describe it in YAML, prepare it, look at what a model sees, train one.

    python examples/02_your_own_log.py

The log here is a CSV file of 20,000 clicks and impressions that the example invents; yours has other columns, and
the first YAML below is where they are named. On the command line: `longer-rec prepare shop.yaml --out data/shop`, then
`longer-rec train train.yaml`.
"""

import csv
import random
import tempfile
from pathlib import Path

from longer_rec.config import load_config
from longer_rec.data.history import Dataset, open_dataset
from longer_rec.data.loader import DataConfig, TrainLoader
from longer_rec.data.prepare import prepare
from longer_rec.job import Job
from longer_rec.train.run import train

DESCRIPTION = """
name: shop
events:
  files: [shop.csv]
columns:
  user: visitor
  item: article
  time: at            # seconds; `time_unit: ms` for milliseconds, dates need none
  label: {column: action, positive: [click]}
items:
  source: {files: [articles.csv]}
  key: article
  features:
    - {name: brand}
    - {name: price, type: bucketed, quantiles: 5}
    - {name: colours, multi_valued: true, max_values: 2}
candidates: {kind: rows}        # what was shown is ranked, but only
history: positives              # clicks are remembered
split: {kind: global_time, fractions: [0.8, 0.1, 0.1]}
"""

TRAINING = """
name: shop
run_dir: runs/shop
data: {dir: data/shop, max_events: 50, batch_requests: 16}
model: {kind: longer, width: 16, num_queries: 20, interaction: {}}
sparse: {default_dim: 8}
baselines: {no_sequence: ["model={kind: no_sequence}"]}
"""


def invent_log(folder: Path) -> None:
    """shop.csv and articles.csv: 5 articles shown at a time, those clicked before are clicked again."""
    chance = random.Random(0)
    articles = [f"A{number:03d}" for number in range(300)]
    with (folder / "articles.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["article", "brand", "price", "colours"])
        for article in articles:
            colours = "|".join(chance.sample(["red", "green", "blue"], chance.randint(0, 2)))
            writer.writerow([article, f"brand {chance.randint(1, 20)}", round(chance.uniform(1, 99), 2), colours])
    liked: dict[str, set[str]] = {}
    with (folder / "shop.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["visitor", "article", "at", "action"])
        for visit in range(4000):
            visitor = f"v{chance.randint(1, 60)}"
            mine = liked.setdefault(visitor, set(chance.sample(articles, 20)))
            for article in sorted({*chance.sample(sorted(mine), 2), *chance.sample(articles, 3)}):
                writer.writerow([visitor, article, 1_700_000_000 + 60 * visit, "click" if article in mine else "view"])


def show_a_batch(dataset: Dataset) -> None:
    config = DataConfig(dir=dataset.path, max_events=100, batch_requests=4)
    loader = TrainLoader(dataset, config, seed=0, num_workers=1, workers=range(1), start_step=200, num_steps=1)
    for (batch,) in loader:
        print("events of each request:     ", batch.history_length_B.tolist())
        print("candidates of each request: ", batch.num_candidates_B.tolist())
        print("the first one's articles:   ", batch.candidates["item"][:batch.num_candidates_B[0]].tolist())
        print("the first one's labels:     ", batch.label_CY[:batch.num_candidates_B[0], 0].tolist())


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        invent_log(folder)
        (folder / "shop.yaml").write_text(DESCRIPTION)
        (folder / "train.yaml").write_text(TRAINING)
        dataset = open_dataset(prepare(str(folder / "shop.yaml"), folder / "prepared"))
        print("requests:", dataset.summary["requests"], " clicks per impression:", dataset.summary["label_mean"])
        show_a_batch(dataset)
        job = load_config(Job, folder / "train.yaml", [f"data.dir={dataset.path}", f"run_dir={folder / 'run'}"])
        for row in train(job) or []:  # rows on the first process, nothing on the others
            print(f"{row['name']:12} test AUC {row['auc']:.3f}  LogLoss {row['logloss']:.3f}")


if __name__ == "__main__":
    main()
