"""Precision by part: which parts it reaches, what it is refused for, and the scale of fp16's loss."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longer_rec.errors import ConfigError
from longer_rec.job import TrainConfig
from longer_rec.model.longer import LongerTower
from longer_rec.model.precision import mixed_precision
from longer_rec.model.recompute import apply_recompute
from longer_rec.model.tower import TowerConfig, build_tower
from longer_rec.train.precision import LossScale, check_train_precision
from tests.reference.towers import WIDTHS, make_candidates, make_user, randomise

CPU = torch.device("cpu")
PARTS = ("input", "merge", "cross", "self", "head", "interaction")


def build(recomputed: tuple[str, ...] = (), keep_matmuls: bool = False) -> LongerTower:
    torch.manual_seed(0)
    config = TowerConfig.model_validate({"width": 8, "merge_size": 2, "num_queries": 3, "interaction": {},
                                         "inner_trans": {}, "num_cls_tokens": 1, "phd": {}})
    tower = build_tower(config, WIDTHS, num_tasks=2, max_events=16)
    assert isinstance(tower, LongerTower)
    randomise(tower)
    apply_recompute(tower, recomputed, keep_matmuls)
    return tower


def run(default: str, parts: dict[str, str], recomputed: tuple[str, ...] = (), keep_matmuls: bool = False
        ) -> list[torch.Tensor]:
    """Logits, then the gradient of each parameter."""
    tower = build(recomputed, keep_matmuls)
    user, candidates = make_user([7, 0, 16], dtype=torch.float32), make_candidates([2, 1, 3], dtype=torch.float32)
    with mixed_precision(tower, default, parts, CPU):  # type: ignore[arg-type]
        logit_CY = tower.score(tower.encode(user), candidates)
    logit_CY.float().square().sum().backward()
    return [logit_CY.detach(), *(each.grad for each in tower.parameters() if each.grad is not None)]


def far(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """The largest difference beside the largest value, over all tensors."""
    assert len(left) == len(right)
    return max(float((a.float() - b.float()).abs().max() / (b.float().abs().max() + 1e-3))
               for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("default", "other"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_each_part_alone_may_differ_from_the_rest(part: str, default: str, other: str) -> None:
    exact, uniform, mixed = run("fp32", {}), run(default, {}), run(default, {part: other})
    assert far(mixed, uniform) > 0, "the part's type changed nothing"
    assert far(mixed, exact) < 0.2
    assert all(bool(each.isfinite().all()) for each in mixed)
    if default == "fp32":
        assert mixed[0].dtype == torch.float32
        assert far(mixed, exact) <= far(run("bf16", {}), exact) * 2


@pytest.mark.parametrize("default", ["fp32", "bf16"])
@pytest.mark.parametrize("keep_matmuls", [False, True])
def test_recomputation_changes_no_bit_of_mixed_parts(default: str, keep_matmuls: bool) -> None:
    parts = {"merge": "bf16", "cross": "bf16", "self": "fp32"}
    assert far(run(default, parts, PARTS, keep_matmuls), run(default, parts)) == 0.0


def test_selective_recomputation_runs_no_linear_map_again() -> None:
    def count(recomputed: tuple[str, ...], keep_matmuls: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            run("fp32", {}, recomputed, keep_matmuls)
        flops = counter.get_flop_counts()["Global"]
        return sum(flops[op] for op in (torch.ops.aten.mm, torch.ops.aten.addmm) if op in flops)

    once = count((), False)
    assert count(PARTS, True) == once
    assert count(PARTS, False) > 1.2 * once


def test_naming_every_part_is_the_default_and_nothing_stays_behind() -> None:
    assert far(run("fp32", dict.fromkeys(PARTS, "fp32")), run("fp32", {})) == 0.0
    tower = build()
    with mixed_precision(tower, "fp32", {"merge": "bf16"}, CPU):
        assert "piece" in vars(tower.merge.inner)
    assert "piece" not in vars(tower.merge.inner)


@pytest.mark.parametrize(("settings", "words"), [
    ({"precision": {"tail": "bf16"}}, "'tail', which this model does not have; its parts are default, input, merge"),
    ({"precision": {"merge": "fp16"}}, "fp16 needs a GPU"), ({"precision": "fp16"}, "fp16 needs a GPU"),
    ({"tf32": True}, "tf32 needs a GPU")])
def test_what_the_model_or_the_device_lacks_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_train_precision(TrainConfig.model_validate(settings), build(), CPU)


def test_the_scale_halves_on_overflow_and_grows_back() -> None:
    fixed, scale = LossScale(TrainConfig(precision="bf16")), LossScale(TrainConfig(precision={"merge": "fp16"}))
    fixed.update(False)
    assert (fixed.value, scale.value) == (1.0, 2.0 ** 16)
    for finite in [False, False, *[True] * 1999]:
        scale.update(finite)
    assert scale.value == 2.0 ** 14
    scale.update(True)
    assert scale.value == 2.0 ** 15
    for _ in range(40):
        scale.update(False)
    assert scale.value == 1.0
