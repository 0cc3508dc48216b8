"""Instance tokens: a model that remembers what it once scored, beside one that has the history alone.

    python examples/04_instance_tokens.py

A source model squeezes every past (request, article) into a vector, `longer-rec compress RUN --out STORE` keeps them by
reader and time with their labels, and the next model reads the newest ones before its request. In this invented log
the history is what a reader was shown, and what he liked of it is in the labels alone: only the tokens know.
"""

import csv
import random
import tempfile
from pathlib import Path

from longer_rec.config import build_config
from longer_rec.data.history import open_dataset
from longer_rec.data.instance_sources import InstancesConfig, read_instances
from longer_rec.data.prepare import prepare
from longer_rec.job import Job
from longer_rec.train.compress import CompressOptions, compress_run
from longer_rec.train.run import train

DESCRIPTION = """
name: news
events: {files: [news.csv]}
columns: {user: reader, item: article, time: at, label: {column: liked, at_least: 1}}
items:
  source: {files: [articles.csv]}
  key: article
  features: [{name: topic}]
users: {id_feature: false}
candidates: {kind: rows}
history: all
split: {kind: global_time, fractions: [0.8, 0.1, 0.1]}
"""
JOB = {"data": {"max_events": 30, "batch_requests": 16}, "sparse": {"default_dim": 8, "lr": 0.03},
       "model": {"kind": "longer", "width": 16, "merge_size": 1, "num_queries": 10}, "train": {"epochs": 1}}


def invent_log(folder: Path) -> None:
    """4 articles at a time; each of 100 readers likes three of ten topics, whatever the article."""
    chance = random.Random(0)
    topic = {f"A{number:03d}": number % 10 for number in range(200)}
    with (folder / "articles.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("article", "topic"), *((name, f"topic {of}") for name, of in topic.items())])
    likes = {f"r{number}": chance.sample(range(10), 3) for number in range(100)}
    with (folder / "news.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("reader", "article", "at", "liked"))
        for visit in range(3000):
            reader = chance.choice(sorted(likes))
            for article in sorted(chance.sample(sorted(topic), 4)):
                writer.writerow((reader, article, 1_700_000_000 + 60 * visit, int(topic[article] in likes[reader])))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        invent_log(folder)
        (folder / "news.yaml").write_text(DESCRIPTION)
        data = {**JOB["data"], "dir": str(prepare(str(folder / "news.yaml"), folder / "data"))}

        def run(name: str, model: dict[str, object], **more: object) -> float:
            content = JOB | {"name": name, "run_dir": str(folder / name), "model": {**JOB["model"], **model},
                             "data": data | more}
            (row,) = train(build_config(Job, content, "the example")) or []
            return float(row["auc"])

        print(f"source: test AUC {run('source', {'compress': {'order': 'user', 'dim': 16}}):.3f}")
        done = compress_run(folder / "source", folder / "store", CompressOptions(vectors="float16"))
        print(f"store: {done.num_instances} instances, AUC with each request's whole past {done.metrics['auc']:.3f}")
        reads = InstancesConfig(store=folder / "store", max_tokens=64, features=("topic",))
        dataset = read_instances(open_dataset(folder / "data"), reads)
        tokens = dataset.instances
        assert tokens is not None
        newest = tokens.of_requests(dataset, dataset.split_rows("test")[:1], [4])
        print("labels of a test request's newest tokens:", newest["label"][-4:, 0].astype(int).tolist())
        print(f"base: test AUC {run('base', {}):.3f}")
        with_tokens = run("tokens", {"instances": {"width": 32}}, instances=reads.model_dump(mode="json"))
        print(f"tokens: test AUC {with_tokens:.3f}")


if __name__ == "__main__":
    main()
