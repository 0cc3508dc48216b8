"""The Python API from a log to a score: prepare, configure, train, read the results, rank one request.

    python examples/01_first_run.py [DIRECTORY]

The log is the generated one, whose labels only a long history explains. The same on the command line:

    longer-rec prepare synthetic --out DIRECTORY/data
    longer-rec train configs/synthetic_debug.yaml data.dir=DIRECTORY/data run_dir=DIRECTORY/run
    longer-rec eval DIRECTORY/run
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from longer_rec.config import load_config
from longer_rec.data.history import Dataset, open_dataset
from longer_rec.data.loader import EvalLoader
from longer_rec.data.prepare import prepare
from longer_rec.job import Job
from longer_rec.runtime.distributed import joined_world
from longer_rec.train.run import load_run, train

CONFIG = Path(__file__).parents[1] / "configs" / "synthetic_debug.yaml"


def first_run(folder: Path) -> None:
    # 1. A log becomes a history store and a request index. Run again, it is left as it is.
    data = prepare("synthetic", folder / "data")
    dataset = open_dataset(data)
    print("tables:  ", dataset.schema.num_rows)
    print("requests:", dataset.summary["requests"])

    # 2. A configuration is a YAML file with settings on top; whatever it cannot mean is an error in one line.
    job = load_config(Job, CONFIG, [f"data.dir={data}", f"run_dir={folder / 'run'}", "train.epochs=0.5"])

    # 3. Train, evaluate, write the report. Under torchrun this same call trains on many processes.
    (result,) = train(job) or [{}]
    print(f"test AUC {result['auc']:.3f}, LogLoss {result['logloss']:.3f} after {result['train_s']:.0f} s")
    lines = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; more in {job.run_dir / 'report.html'}")

    # 4. Rank one request with the newest checkpoint.
    rank_one(job, dataset)


def rank_one(job: Job, dataset: Dataset) -> None:
    """The user is encoded once; any number of candidates is scored against that state."""
    _, batch = next(iter(EvalLoader(dataset, "test", job.data.model_copy(update={"eval_batch_requests": 1}))))
    with joined_world() as world:
        ranker = load_run(job, dataset, world).parallel.ranker.eval()
        with torch.no_grad():
            embeddings = ranker.lookup(batch)
            state = ranker.tower.encode(ranker.user_side(batch, embeddings))
            logit_CY = ranker.tower.score(state, ranker.candidate_side(batch, embeddings))
    print(f"one request with {batch.num_events} events and {batch.num_candidates} candidates, best first:")
    for candidate in logit_CY[:, 0].argsort(descending=True).tolist():
        item, label = int(batch.candidates["item"][candidate]), int(batch.label_CY[candidate, 0])
        print(f"  item {item:5d}  p = {logit_CY[candidate, 0].sigmoid():.3f}  label {label}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        first_run(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            first_run(Path(scratch))
