"""One training step against plain autograd on unsharded tables, and what a step does that is not finite."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from longer_rec.batch import RequestBatch
from longer_rec.checkpoint.manager import CheckpointManager
from longer_rec.config import load_config
from longer_rec.data.history import open_dataset
from longer_rec.data.loader import TrainLoader
from longer_rec.errors import DataError
from longer_rec.job import Job
from longer_rec.ranker import Ranker
from longer_rec.runtime.distributed import joined_world
from longer_rec.sparse.optimizers import warmup_cosine
from longer_rec.sparse.tables import build_tables
from longer_rec.train.parallelize import parallelize
from longer_rec.train.replay import replay_step
from longer_rec.train.trainer import Trainer
from tests.integration.conftest import CONFIG
from tests.reference.ranks import run_ranks

W, STEPS = 2, 3
# eps: AdamW divides by |gradient| + eps, and would make a difference of rounding, in a gradient near zero, a whole
# learning rate. clip_norm binds in some of the steps; the test asserts it.
JOB = ("elastic.num_workers=2", "data.batch_requests=4", "data.max_events=60", "model.num_queries=20",
       "sparse.optimizer=sgd", "sparse.lr=0.5", "sparse.plan=table_wise", "dense.eps=1e-3", "dense.weight_decay=0.1",
       "train.clip_norm=0.3", "train.epochs=0.2", "schedule.warmup_steps=2", "train.max_bad_steps=3",
       "data.loader_processes=0")


def build(data: Path, *overrides: str, run_dir: Path = Path("unused")) -> Trainer:
    """A trainer of W logical workers on this process, inside a process group."""
    job = load_config(Job, CONFIG, [f"data.dir={data}", f"run_dir={run_dir}", *JOB, *overrides])
    dataset = open_dataset(data)
    with joined_world() as world:
        return Trainer(job, dataset, world, parallelize(job, dataset, world), W)


def make_steps(trainer: Trainer) -> list[list[RequestBatch]]:
    loader = TrainLoader(trainer.dataset, trainer.job.data, seed=0, num_workers=W, workers=range(W), start_step=0,
                         num_steps=STEPS)
    return [loader.make_step(step) for step in range(STEPS)]


def whole(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor of the model and its optimizer, copied; on one process a shard is the whole table."""
    return {name: (value.local_tensor() if hasattr(value, "local_tensor") else value).detach().clone()
            for name, value in trainer.parallel.state_dict().items()}


def naive_loop(trainer: Trainer,
               steps: list[list[RequestBatch]]) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    """Weights after the steps, and (loss, gradient norm of the tower) of each, starting from the trainer's weights."""
    job, schema = trainer.job, trainer.dataset.schema
    tower_copy = copy.deepcopy(trainer.parallel.ranker.tower)
    ranker = Ranker(schema, build_tables(schema, job.sparse, device="cpu"), tower_copy)
    start = {name.removeprefix("model/"): value for name, value in whole(trainer).items() if name.startswith("model/")}
    ranker.load_state_dict(start)
    tower, tables = list(ranker.tower.parameters()), list(ranker.sparse.parameters())
    matrices, vectors = [p for p in tower if p.ndim > 1], [p for p in tower if p.ndim < 2]
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                              betas=job.dense.betas, eps=job.dense.eps)
    sgd = torch.optim.SGD(tables)
    told = []
    for step, batches in enumerate(steps):
        factor = warmup_cosine(step, trainer.num_steps, 2, job.schedule.final_factor)
        for optimizer, lr in ((adamw, job.dense.lr), (sgd, 0.5)):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        losses = [binary_cross_entropy_with_logits(ranker(batch), batch.label_CY) for batch in batches]
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(tower, 0.3)
        adamw.step()
        sgd.step()
        told.append((loss.item(), norm.item()))
    return {f"model/{name}": value for name, value in ranker.state_dict().items()}, told


def _compare_with_naive(rank: int, world_size: int, data: Path) -> None:
    trainer = build(data)
    steps = make_steps(trainer)
    before = whole(trainer)
    expected, told = naive_loop(trainer, steps)
    assert all(torch.equal(value, before[name]) for name, value in whole(trainer).items())
    for batches, (loss, norm) in zip(steps, told, strict=True):
        result = trainer.train_step(batches)
        assert math.isclose(result.loss, loss, rel_tol=1e-5)
        assert math.isclose(result.grad_norm, norm, rel_tol=1e-4)
        trainer.step += 1
    assert max(norm for _, norm in told) > 0.3, "the bound on the gradient never acted"
    after = {name: value for name, value in whole(trainer).items() if name.startswith("model/")}
    assert after.keys() == expected.keys()
    moved = 0
    for name, value in after.items():
        assert torch.allclose(value, expected[name], rtol=0, atol=1e-6), name
        moved += not torch.allclose(value, before[name], rtol=0, atol=1e-4)
    assert moved >= 0.9 * len(after), "hardly anything was trained"


def test_three_steps_of_two_workers_equal_a_naive_loop(synthetic: Path) -> None:
    run_ranks(_compare_with_naive, 1, synthetic)


def _ahead_and_scaled(rank: int, world_size: int, data: Path) -> None:
    """The rows of a step are those that the step before it left, although its ids travel during that step."""
    plain, ahead, scaled = (build(data) for _ in range(3))
    steps = make_steps(plain)
    shared = set(steps[0][0].distinct["item"].tolist()) & set(steps[1][0].distinct["item"].tolist())
    assert len(shared) > 3
    scaled.loss_scale.value = 2.0 ** 10  # as fp16 has it: a power of two rounds nothing
    for batches, upcoming in zip(steps, [*steps[1:], None], strict=True):
        results = [plain.train_step(batches), ahead.train_step(batches, upcoming), scaled.train_step(batches)]
        assert results == [results[0]] * 3
        for trainer in (plain, ahead, scaled):
            trainer.step += 1
    expected = whole(plain)
    for trainer in (ahead, scaled):
        assert all(torch.equal(value, expected[name]) for name, value in whole(trainer).items())


def test_ids_sent_ahead_and_a_scaled_loss_change_no_bit(synthetic: Path) -> None:
    run_ranks(_ahead_and_scaled, 1, synthetic)


def _poison_labels(trainer: Trainer, batches: list[RequestBatch]) -> list[RequestBatch]:
    label_CY = batches[1].label_CY.clone()
    label_CY[-1] = float("nan")
    return [batches[0], dataclasses.replace(batches[1], label_CY=label_CY)]


def _poison_table(trainer: Trainer, batches: list[RequestBatch]) -> list[RequestBatch]:
    table = next(value for name, value in trainer.parallel.model.state_dict().items() if name.endswith(".item.weight"))
    table.local_tensor()[batches[1].candidates["item"][0]] = float("inf")
    return batches


def _poison_tower(trainer: Trainer, batches: list[RequestBatch]) -> list[RequestBatch]:
    with torch.no_grad():
        trainer.parallel.tower_parameters[-1].fill_(float("nan"))
    return batches


def _step_with_poison(rank: int, world_size: int, data: Path, poison: Any) -> None:
    trainer = build(data, "sparse.optimizer=rowwise_adagrad")
    first, second, _ = make_steps(trainer)
    assert trainer.train_step(first).finite
    batches = poison(trainer, second)
    before = whole(trainer)
    for count in (1, 2):
        result = trainer.train_step(batches)
        assert not result.finite
        trainer._count_bad(result)
        assert trainer.bad_steps == count
    after = whole(trainer)
    assert any(name.startswith("optimizer/") for name in after)
    for name, value in after.items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    if poison is _poison_labels:
        result = trainer.train_step(second)
        assert result.finite
        trainer._count_bad(result)
        assert trainer.bad_steps == 0, "a good step in between ends the row"
        assert not torch.equal(whole(trainer)["model/tower.head.user.weight"], after["model/tower.head.user.weight"])


@pytest.mark.parametrize("poison", [_poison_labels, _poison_table, _poison_tower])
def test_a_step_that_is_not_finite_updates_nothing_and_is_counted(synthetic: Path, poison: Any) -> None:
    run_ranks(_step_with_poison, 1, synthetic, poison)


def _run_with_poison(rank: int, world_size: int, data: Path, run_dir: Path) -> None:
    trainer = build(data, run_dir=run_dir)
    trainer.train_step(make_steps(trainer)[0])
    trainer.step = 1
    _poison_tower(trainer, [])
    before = whole(trainer)
    with pytest.raises(DataError, match=r"3 steps in a row, from step 2 on,.*not finite \(loss nan\).*lower dense\.lr"):
        trainer.fit(CheckpointManager(run_dir / "checkpoints"), None)
    assert all(torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0))
               for name, value in whole(trainer).items())
    assert trainer.skipped_steps == 3
    # The dump is that state at the first of the three, and running it again finds the poison.
    found = build(data, run_dir=run_dir)
    assert found.restore(CheckpointManager(run_dir / "failure"))
    assert found.step == 1
    lines = replay_step(found)
    name = list(trainer.parallel.optimizer.tower)[-1]
    assert lines[0].startswith(f"weight {name}: ")
    assert sum("loss nan" in line for line in lines) == W
    assert any(line.startswith("worker 1: logits of ") for line in lines)


def test_bad_steps_in_a_row_end_the_run(synthetic: Path, tmp_path: Path) -> None:
    run_ranks(_run_with_poison, 1, synthetic, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["failure"]


def _evaluate_poisoned(rank: int, world_size: int, data: Path) -> None:
    trainer = build(data)
    _poison_tower(trainer, [])
    with pytest.raises(DataError, match=r"score of candidate \d+ is NaN .*lower the learning rate"):
        trainer.evaluate("validation", 20)


def test_a_score_that_is_nan_is_a_fault_of_every_rank(synthetic: Path) -> None:
    run_ranks(_evaluate_poisoned, 2, synthetic)
