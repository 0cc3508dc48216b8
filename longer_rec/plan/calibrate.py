"""Predicted beside measured on this machine, and the constants that bring the two together."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longer_rec.data.history import Dataset
from longer_rec.elastic.assignment import resolve_num_workers
from longer_rec.errors import ConfigError
from longer_rec.job import Job
from longer_rec.plan.scenario import Constants, Outcome, Scenario, solve
from longer_rec.plan.show import Grid, make_grid
from longer_rec.plan.topology import parse_topology
from longer_rec.report.numbers import format_bytes
from longer_rec.runtime import machine
from longer_rec.runtime.profiling import Measured
from longer_rec.sparse.planfile import save_plan

Measure = Callable[[Job, int, int, Path], Measured]


@dataclass(frozen=True)
class Compared:
    """One number of ranks: what was planned for it, and what was measured with that very plan."""

    outcome: Outcome
    measured: Measured

    def bytes_of_tables(self) -> list[tuple[int, int]]:
        """(predicted, measured) weights and optimizer state of each rank."""
        held = self.outcome.held
        return [(weights + optimizer, own_weights + own_optimizer) for weights, optimizer, own_weights, own_optimizer
                in zip(held["weights"], held["optimizer"], self.measured.weights, self.measured.optimizer, strict=True)]

    def bytes_of_activations(self) -> list[tuple[int, int]]:
        """(predicted, measured) peak of each profiled step."""
        predicted = [sum(self.outcome.scenario.largest_activations(own).values()) for own in self.measured.batches]
        return [pair for pair in zip(predicted, self.measured.peaks, strict=True) if pair[0]]


def calibrate(job: Job, dataset: Dataset, measure: Measure, ranks: Sequence[int], num_steps: int) -> list[Compared]:
    """Plan for each number of ranks on this machine, and run a few steps by that plan."""
    # Two ranks may share a core: bytes are measured as well there, seconds as two ranks on a core have them.
    most = len(machine.gpus()) or 2 * machine.num_cores()
    if not 1 <= min(ranks) <= max(ranks) <= most:
        raise ConfigError(f"--calibrate {max(ranks)}: this machine can measure 1 to {most} ranks, one on each GPU or "
                          "two on each core; use such numbers")
    scenarios = []
    for number in ranks:
        # Steps 2 and on, of all workers: those that are timed.
        num_workers = resolve_num_workers(job.elastic, number)
        batches = range(2 * num_workers, (2 + num_steps) * num_workers)
        scenarios.append(Scenario(job, dataset, parse_topology(f"{number}xauto"), batches=batches))
        scenarios[-1].check()
    compared = []
    with tempfile.TemporaryDirectory(prefix="longer_rec-") as name:
        folder = Path(name)
        for number, scenario in zip(ranks, scenarios, strict=True):
            outcome = solve(scenario)
            if outcome.found.plan is None:
                raise ConfigError(f"no plan fits {number} ranks of this machine; see what `longer-rec plan` says to "
                                  f"--topology {number}xauto")
            path = folder / f"plan-{number}.json"
            save_plan(outcome.found.plan, path)
            planned = job.model_copy(update={"sparse": job.sparse.model_copy(update={"plan": str(path)})})
            compared.append(Compared(outcome, measure(planned, number, num_steps, folder)))
    return compared


def fit(compared: Sequence[Compared]) -> Constants:
    """Constants with the least squared relative error of all parts' seconds.

    One that the measurements would make negative, for they cannot tell it from another, keeps its default.
    """
    names = [name for name in Constants.model_fields if name not in ("device", "activations")]
    rows = []
    for one in compared:
        for part, terms in one.outcome.terms.items():
            seconds = one.measured.seconds.get(part, 0.0)
            if seconds > 0:
                rows.append([terms.get(name, 0.0) / seconds for name in names])
    matrix, target = np.array(rows), np.ones(len(rows))
    free = list(range(len(names)))
    values = np.array([getattr(Constants(), name) for name in names])
    while free:
        kept = [column for column in range(len(names)) if column not in free]
        solved = np.linalg.lstsq(matrix[:, free], target - matrix[:, kept] @ values[kept], rcond=None)[0]
        if (solved >= 0).all():
            values[free] = solved
            break
        free = [column for column, value in zip(free, solved, strict=True) if value >= 0]
    sizes = [pair for one in compared for pair in one.bytes_of_activations()]
    factor = float(np.mean([measured / predicted for predicted, measured in sizes])) if sizes else 1.0
    device = compared[0].outcome.scenario.hardware.device
    return Constants(device=device, activations=factor,
                     **{name: float(value) for name, value in zip(names, values, strict=True)})


def bytes_compared(compared: Sequence[Compared]) -> Grid:
    """Predicted beside measured bytes; of the worst rank or step."""
    rows = []
    for one in compared:
        for what, pairs in (("weights + optimizer", one.bytes_of_tables()),
                            ("activations", one.bytes_of_activations())):
            if pairs:
                predicted, measured = max(pairs, key=lambda pair: abs(pair[0] / pair[1] - 1))
                rows.append([str(one.outcome.scenario.hardware.world_size), what, format_bytes(predicted),
                             format_bytes(measured), f"{predicted / measured - 1:+.1%}"])
    return make_grid("ranks|bytes|predicted|measured|off by", "ranks|predicted|measured|off by", rows)


def seconds_compared(compared: Sequence[Compared], constants: Constants) -> Grid:
    """Measured seconds of each part beside those of the default and of the fitted constants."""
    rows = []
    for one in compared:
        fitted, measured = constants.seconds(one.outcome.terms), one.measured.seconds
        rows += [[str(one.outcome.scenario.hardware.world_size), part,
                  *(f"{1000 * value:.1f}" for value in (one.outcome.step_s[part], fitted[part], measured[part]))]
                 for part in fitted if part in measured]
    return make_grid("ranks|part|default ms|fitted ms|measured ms", "ranks|default ms|fitted ms|measured ms", rows)
