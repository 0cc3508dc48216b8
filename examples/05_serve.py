"""From a trained run to answers over HTTP: export, serve, ask, append, ask again.

    python examples/05_serve.py

Trains on generated data for some seconds first. On the command line: `longer-rec export RUN --out BUNDLE`, then
`longer-rec serve BUNDLE`. The server takes raw ids, as the log has them.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longer_rec.config import build_config
from longer_rec.data.history import open_dataset
from longer_rec.data.prepare import prepare
from longer_rec.data.raw import raw_request
from longer_rec.job import Job
from longer_rec.serve.client import Client, Refused
from longer_rec.train.export import ExportOptions, export_run
from longer_rec.train.run import train

TRAINING = {"name": "served", "data": {"max_events": 400, "batch_requests": 16},
            "model": {"kind": "longer", "width": 16, "num_queries": 20, "interaction": {}},
            "sparse": {"default_dim": 8}, "train": {"epochs": 0.5}}


@contextmanager
def serving(bundle: Path) -> Iterator[str]:
    """`longer-rec serve` on a free port; its address."""
    command = [sys.executable, "-m", "longer_rec", "serve", str(bundle), "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        print(line.rpartition(", on")[0])
        yield line.rpartition(" ")[2]
        process.terminate()


def ask(client: Client, what: str, request: dict[str, object]) -> list[float]:
    """Logits of the request's candidates, printed best first."""
    answer = client.score(request)
    logits = answer["logits"]["label"]
    candidates = request["candidates"]
    assert isinstance(candidates, list)
    best = sorted(zip(logits, candidates, strict=True), reverse=True)[:3]
    print(f"{what} ({answer['state']}):", ", ".join(f"{item} {logit:.2f}" for logit, item in best))
    return list(logits)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dataset = open_dataset(prepare("synthetic", folder / "data", overrides=[
            "num_users=60", "events_per_user=420", "plant_newest=100", "plant_oldest=400"]))
        data = {**TRAINING["data"], "dir": str(dataset.path)}  # type: ignore[dict-item]
        train(build_config(Job, {**TRAINING, "data": data, "run_dir": str(folder / "run")}, "the example"))
        manifest = export_run(folder / "run", folder / "bundle", ExportOptions(embeddings="int8"))
        print(f"int8 embeddings cost {manifest.measured['auc_loss']:.5f} of AUC {manifest.measured['auc']:.3f}")
        request = raw_request(dataset, dataset.split_rows("test")[0], max_events=400)
        with serving(folder / "bundle") as url, Client(url) as client:
            first = ask(client, "with its history", request)
            assert ask(client, "a second time", request) == first
            history = request.pop("history")
            try:
                client.score(request)
            except Refused as error:
                print(f"without its history: {error}")
            client.add_events(request["user"], history)
            assert ask(client, "with the stored history", request) == first
            late = {name: values[-1:] for name, values in history.items()} | {"item": [request["candidates"][-1]]}
            client.add_events(request["user"], late)
            ask(client, "after one more event", request)
            print("forgotten:", client.delete(request["user"]))


if __name__ == "__main__":
    main()
