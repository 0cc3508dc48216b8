"""EasyScale's planner of one job, and the simulator of a shared cluster under every policy."""

import itertools
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longer_rec.config import load_config
from longer_rec.errors import ConfigError
from longer_rec.report import charts
from longer_rec.report.numbers import format_duration
from longer_rec.schedule.command import measure, run_schedule, share_lines
from longer_rec.schedule.devices import MAX_WASTE, Share, best_share, growths, least_loss, throughput, trimmed
from longer_rec.schedule.jobs import Change, Cluster, ClusterJob, Simulation, Workload, all_jobs, draw_jobs
from longer_rec.schedule.simulate import Outcome, simulate

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "schedule").glob("*.yaml"))
POLICIES = ("gang", "backfill", "homogeneous", "easyscale")
PAUSE_S, SETTLE_S = 5.0, 20.0

# The machine may be busy: examples have no deadline.
given_some = settings(max_examples=100, deadline=None)

rates = st.integers(1, 40).map(lambda tenths: tenths / 10)
some_devices = st.lists(st.tuples(st.integers(1, 4), rates), min_size=1, max_size=3).map(lambda both: (
    tuple(count for count, _ in both), tuple(rate for _, rate in both)))


def test_the_papers_example() -> None:
    share = best_share((2, 1), (3.1, 2.4), 16)
    assert share.workers == (6, 4)
    assert share.by_device == [6, 6, 4]
    assert share.step_s == pytest.approx(1.935, abs=5e-4)
    assert share.waste == pytest.approx(0.039, abs=5e-4)
    assert share.throughput == pytest.approx(8.267, abs=5e-4)


@given_some
@given(some_devices, st.integers(1, 7))
def test_no_other_share_wastes_less(devices: tuple[tuple[int, ...], tuple[float, ...]], num_workers: int) -> None:
    counts, speed = devices
    best = best_share(counts, speed, num_workers)
    everyone = [Share(counts, speed, num_workers, workers)
                for workers in itertools.product(range(num_workers + 1), repeat=len(counts))
                if sum(n * a for n, a in zip(counts, workers, strict=True)) >= num_workers]
    assert best.waste <= min(share.waste for share in everyone) + 1e-12
    # What makes least waste, least f and most throughput one and the same.
    capacity = sum(n * c for n, c in zip(counts, speed, strict=True))
    for share in everyone:
        assert share.waste * capacity == pytest.approx(capacity - share.throughput)


def test_floor_and_ceil_at_one_time_would_miss_the_best_share() -> None:
    best = best_share((1, 5), (10.0, 1.0), 19)
    assert best.workers == (14, 1)
    assert best.step_s == pytest.approx(1.4)
    assert Share((1, 5), (10.0, 1.0), 19, (13, 2)).step_s == pytest.approx(2.0)


@given_some
@example(devices=((1, 3), (0.1, 0.2)), num_workers=12)  # both types are the slowest
@given(some_devices, st.integers(1, 12))
def test_every_worker_has_a_device_and_no_device_is_slower_than_f(
        devices: tuple[tuple[int, ...], tuple[float, ...]], num_workers: int) -> None:
    counts, speed = devices
    share = best_share(counts, speed, num_workers)
    each = [rate for count, rate in zip(counts, speed, strict=True) for _ in range(count)]
    assert sum(share.by_device) == num_workers
    assert min(share.by_device) >= 0
    seconds = [workers / rate for workers, rate in zip(share.by_device, each, strict=True)]
    assert max(seconds) == pytest.approx(share.step_s)
    assert sum(seconds) == pytest.approx(share.busy_s)


@given_some
@given(some_devices, st.integers(1, 12))
def test_devices_are_taken_away_until_each_one_counts(devices: tuple[tuple[int, ...], tuple[float, ...]],
                                                      num_workers: int) -> None:
    counts, speed = devices
    kept, goal = trimmed(counts, speed, num_workers), throughput(counts, speed, num_workers)
    assert all(after <= before for after, before in zip(kept, counts, strict=True))
    assert throughput(kept, speed, num_workers) == pytest.approx(goal)
    assert min(workers for workers in best_share(kept, speed, num_workers).by_device) >= 1
    loss = least_loss(kept, speed, num_workers, range(len(kept)))
    assert (loss is None) == (sum(kept) == 1)
    assert loss is None or loss[0] > 0


@given_some
@given(some_devices, st.integers(1, 12))
def test_growing_is_faster_wastes_little_and_at_most_doubles(devices: tuple[tuple[int, ...], tuple[float, ...]],
                                                             num_workers: int) -> None:
    counts, speed = devices
    counts = trimmed(counts, speed, num_workers)
    now = throughput(counts, speed, num_workers)
    for speedup, kind, more in growths(counts, speed, num_workers):
        grown = tuple(count + more * (i == kind) for i, count in enumerate(counts))
        assert more <= sum(counts)
        assert throughput(grown, speed, num_workers) == pytest.approx(now * (1 + speedup * more))
        assert speedup > 0
        assert best_share(trimmed(grown, speed, num_workers), speed, num_workers).waste <= MAX_WASTE


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Cluster, list[ClusterJob]]:
    """Small clusters that shrink and grow, never below what the widest job needs in the end."""
    count = {"fast": draw(st.integers(2, 6)), "slow": draw(st.integers(0, 5))}
    changes = [Change(at_s=draw(st.integers(1, 4000)), type=draw(st.sampled_from(list(count))),
                      count=draw(st.integers(0, 6))) for _ in range(draw(st.integers(0, 4)))]
    cluster = Cluster(devices=count, changes=(*changes, Change(at_s=5000, type="fast", count=4)))
    exchange_s = draw(st.sampled_from([0.0, 0.5]))
    return cluster, sorted((ClusterJob(
        name=f"{i}", num_workers=draw(st.integers(1, 4)), arrival_s=draw(st.integers(0, 2000)),
        mini_batches=draw(st.integers(1, 3000)), exchange_s=exchange_s,
        rates={"fast": draw(rates)} | ({"slow": draw(rates)} if draw(st.booleans()) else {}))
        for i in range(draw(st.integers(1, 8)))), key=lambda job: job.arrival_s)


def count_at(outcome: Outcome, kind: int, at_s: float) -> int:
    return [count for since, own, count in outcome.capacity if own == kind and since <= at_s][-1]


@pytest.mark.parametrize("policy", POLICIES)
@given_some
@given(clusters())
def test_invariants_of_a_schedule(policy: str, drawn: tuple[Cluster, list[ClusterJob]]) -> None:
    cluster, jobs = drawn
    outcome = simulate(cluster, jobs, policy, PAUSE_S, SETTLE_S)  # type: ignore[arg-type]
    held: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for segment in outcome.segments:
        assert len(set(segment.devices)) == len(segment.devices) >= 1
        for kind, number in segment.devices:
            held[kind, number].append((segment.start_s, segment.end_s))
            changes = [at for at, own, _ in outcome.capacity if own == kind and segment.start_s <= at < segment.end_s]
            for at in (segment.start_s, *changes):
                assert number < count_at(outcome, kind, at), "a device is there as long as it is held"
    for spans in held.values():
        for (_, end), (start, _) in itertools.pairwise(sorted(spans)):
            assert end <= start, "no device is used twice"
    for job in outcome.jobs:
        own = [segment for segment in outcome.segments if segment.job == job.index]
        assert job.end_s == own[-1].end_s
        assert sum(segment.steps for segment in own) == job.spec.num_steps, "work is conserved exactly"
        assert job.first_s is not None
        assert job.first_s >= job.spec.arrival_s
        for before, after in itertools.pairwise(own):
            assert before.end_s <= after.start_s
            assert len(after.devices) <= 2 * len(before.devices)
        for segment in own:
            assert len(segment.devices) <= job.spec.num_workers
            kinds = {kind for kind, _ in segment.devices}
            assert all(job.spec.rates_of(tuple(cluster.devices))[kind] for kind in kinds)
            if policy != "easyscale":
                assert len(kinds) == 1
            if policy in ("gang", "backfill"):
                assert len(segment.devices) == job.spec.num_workers
    again = simulate(cluster, jobs, policy, PAUSE_S, SETTLE_S)  # type: ignore[arg-type]
    assert again.segments == outcome.segments
    measured = measure(outcome)
    assert 0 < measured["busy"] <= measured["held"] <= 1 + 1e-9


def cluster_of(count: int, *changes: Change) -> Cluster:
    return Cluster(devices={"gpu": count}, changes=changes)


def job_of(name: str, num_workers: int, steps: int, arrival_s: float = 0.0, **more: float) -> ClusterJob:
    return ClusterJob(name=name, num_workers=num_workers, mini_batches=steps * num_workers, rates={"gpu": 1.0},
                      arrival_s=arrival_s, **more)


def sizes(outcome: Outcome, job: int) -> list[int]:
    return [len(segment.devices) for segment in outcome.segments if segment.job == job]


def test_a_job_alone_doubles_until_every_worker_has_a_device() -> None:
    outcome = simulate(cluster_of(8), [job_of("a", 8, 1000)], "easyscale", PAUSE_S, SETTLE_S)
    assert sizes(outcome, 0) == [1, 2, 4, 8]
    assert [segment.start_s for segment in outcome.segments] == [0, 25, 50, 75]


def test_a_growth_that_slows_a_job_down_is_undone_and_not_tried_again() -> None:
    """On n devices a step takes 8 / n + 1.5 (n - 1) s: 8, 5.5, 6.5 (with 4)."""
    outcome = simulate(cluster_of(8), [job_of("a", 8, 1000, exchange_s=1.5)], "easyscale", PAUSE_S, SETTLE_S)
    assert sizes(outcome, 0) == [1, 2, 4, 2]


def test_devices_that_vanish_cost_a_job_no_finished_step() -> None:
    change = Change(at_s=200.5, type="gpu", count=1)
    outcome = simulate(cluster_of(4, change), [job_of("a", 4, 300)], "easyscale", PAUSE_S, SETTLE_S)
    assert sizes(outcome, 0) == [1, 2, 4, 1]
    *_, before, after = outcome.segments
    # From 50 s on 4 devices, a step a second after the pause.
    assert before.steps == int(200.5 - 50 - PAUSE_S)
    assert after.end_s == 200.5 + PAUSE_S + 4 * after.steps
    assert sum(segment.steps for segment in outcome.segments) == 300


def test_a_job_that_waits_gets_the_device_that_is_missed_least() -> None:
    """One of six less makes 2 workers a device into 3, which need four devices; one of two less, 1 into 2."""
    jobs = [job_of("wide", 12, 9000), job_of("narrow", 2, 9000), job_of("late", 1, 10, arrival_s=900.0)]
    outcome = simulate(cluster_of(8), jobs, "easyscale", PAUSE_S, SETTLE_S)
    held = [len(segment.devices) for job in (0, 1, 2) for segment in outcome.segments
            if segment.job == job and segment.start_s <= 900 < segment.end_s]
    assert 6 in sizes(outcome, 0)
    assert outcome.jobs[2].first_s == 900.0
    assert held == [4, 2, 1]


def test_gang_scheduling_is_first_come_first_served_and_backfilling_is_not() -> None:
    jobs = [job_of("a", 3, 100), job_of("b", 4, 100, arrival_s=1.0), job_of("c", 1, 10, arrival_s=2.0)]
    ends = {policy: [job.end_s for job in simulate(cluster_of(4), jobs, policy, 0.0, 0.0).jobs]
            for policy in ("gang", "backfill")}
    assert ends == {"gang": [100, 200, 210], "backfill": [100, 200, 12]}


def test_jobs_are_drawn_from_the_seed_at_the_load_that_is_asked_for() -> None:
    cluster = Cluster(devices={"fast": 16, "slow": 16})
    for kind, load in itertools.product(("poisson", "trace"), (0.5, 2.0)):
        workload = Workload(kind=kind, num_jobs=300, load=load, speeds={"fast": 1.0, "slow": 0.5})
        jobs = draw_jobs(workload, cluster)
        assert jobs == draw_jobs(workload, cluster)
        assert jobs != draw_jobs(workload.model_copy(update={"seed": 1}), cluster)
        asked = sum(job.mini_batches / job.rates["fast"] for job in jobs)
        assert asked / (24 * max(job.arrival_s for job in jobs)) == pytest.approx(load, rel=0.25)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_file_runs_as_its_header_says_and_twice_the_same(path: Path, tmp_path: Path) -> None:
    header = path.read_text(encoding="utf-8")
    assert f"longer-rec schedule configs/schedule/{path.name}" in header
    less = ["workload.num_jobs=60"] if "workload:" in header else []
    for folder in ("one", "two"):
        run_schedule(path, less, tmp_path / folder)
    for name in ("schedule.json", "schedule.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    content = json.loads((tmp_path / "one" / "schedule.json").read_text())
    assert [each["policy"] for each in content["policies"]] == list(POLICIES)
    assert all(job["end_s"] for each in content["policies"] for job in each["jobs"])
    page = (tmp_path / "one" / "schedule.html").read_text()
    assert page.count("<svg") == len(POLICIES)
    assert "<script" not in page


def test_easyscale_is_fastest_and_gang_scheduling_slowest_at_high_load_whatever_is_drawn() -> None:
    path = next(path for path in CONFIGS if path.stem == "heterogeneous")
    ratios = []
    for seed in range(5):
        simulation = load_config(Simulation, path, [f"workload.seed={seed}"])
        means = {policy: measure(simulate(simulation.cluster, all_jobs(simulation), policy, simulation.pause_s,
                                          simulation.settle_s))["mean_s"] for policy in POLICIES}
        assert means["easyscale"] < 1.01 * min(means["homogeneous"], means["backfill"])
        assert max(means["homogeneous"], means["backfill"]) < means["gang"]
        ratios.append(means["gang"] / means["easyscale"])
    assert ratios[0] == pytest.approx(4.45, abs=0.01), "the header of the file"
    assert statistics.median(ratios) == pytest.approx(2.16, abs=0.01)


JOB = "{name: a, num_workers: 2, mini_batches: 10, rates: {gpu: 1.0}}"


@pytest.mark.parametrize(("jobs", "devices", "message"), [
    (f"[{JOB}, {JOB}]", "{gpu: 4}", r"jobs: name 'a' is given twice; rename one of them"),
    (f"[{JOB}]", "{tpu: 4}", r"job 'a': rates: device type 'gpu' is unknown; use one of tpu"),
    (f"[{JOB}]", "{gpu: 0}", r"cluster: devices=\{'gpu': 0\}: no count may be below 0 and one must be above; add"),
    (f"[{JOB}]", "{}", r"cluster\.devices: 0 entries are given, 1 is the least; add one$"),
    (f"[{JOB.replace('gpu: 1.0', '')}]", "{gpu: 4}", r"jobs\.0\.rates: 0 entries are given, 1 is the least; add one$"),
    (f"[{JOB.replace('1.0', '0.0')}]", "{gpu: 4}", r"gpu=0\.0 must be above 0 mini-batches a second; measure it"),
    (f"[{JOB.replace('10', '-10')}]", "{gpu: 4}", r"jobs\.0\.mini_batches=-10: .*greater than or equal to 1"),
    (f"[{JOB.replace('num_workers: 2', 'num_workers: 8')}]", "{gpu: 4}",
     r"gang: job 'a' of num_workers=8 can never start on 4 free devices; add devices .* or leave the policy out"),
    ("[]", "{gpu: 4}", r"either jobs or a workload is needed"),
])
def test_bad_files_are_refused_in_one_line(tmp_path: Path, jobs: str, devices: str, message: str) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(f"name: bad\ncluster: {{devices: {devices}}}\njobs: {jobs}\n")
    with pytest.raises(ConfigError) as caught:
        run_schedule(path, [], tmp_path / "out")
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(("setting", "message"), [
    ("workload.num_jobs=100000000", r"workload\.num_jobs=100000000: .*less than or equal to 20000"),
    ("cluster.devices={v100: 1000000000}",
     r"cluster: 1000000000 devices of a type are more than the 100000 to simulate; use fewer"),
    ("policies=[]", r"policies: 0 entries are given, 1 is the least; add one"),
    ("policies=[foo]", r"policies\.0='foo': input should be 'gang', 'backfill', 'homogeneous' or 'easyscale'"),
    ("policies=[gang, gang]", r"policies: 'gang' is given 2 times; give it once"),
])
def test_a_bad_setting_is_one_fault(setting: str, message: str) -> None:
    path = next(path for path in CONFIGS if path.stem == "heterogeneous")
    with pytest.raises(ConfigError, match=rf"^[^:]*: {message}$"):
        load_config(Simulation, path, [setting])


def test_a_directory_that_cannot_be_written_is_refused_before_simulating(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("longer_rec.schedule.command.simulate", lambda *_: pytest.fail("simulated"))
    with pytest.raises(ConfigError, match="cannot be written: .*Not a directory.*; give another directory"):
        run_schedule(CONFIGS[0], [], tmp_path / "file" / "s")


def test_the_table_fits_80_columns_and_keeps_every_figure(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run_schedule(next(path for path in CONFIGS if path.stem == "heterogeneous"), [], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    measures = json.loads((tmp_path / "schedule.json").read_text())["policies"]
    for name in ("mean", "p50", "p90", "waiting", "makespan"):
        line = next(line for line in lines if line.split()[0] == name)
        assert re.split(r" {2,}", line.strip())[1:] == [format_duration(each[f"{name}_s"]) for each in measures]


def test_a_bar_is_labelled_where_its_name_fits() -> None:
    bars = [(0, 2, 0.0, 5.0, 0), (0, 2, 5.0, 5.1, 1), (2, 3, 0.0, 9.0, 2)]
    svg = charts.gantt("g", bars, [("gpu", 3)], 10.0, [(*bar[:4], f"name-{bar[4]}") for bar in bars])
    assert re.findall(r"name-\d", re.sub(r"<!--.*?-->", "", svg)) == ["name-0", "name-2"]
    many = charts.gantt("g", bars, [("gpu", 128)], 10.0, [(*bar[:4], f"name-{bar[4]}") for bar in bars])
    assert re.findall(r"name-\d", re.sub(r"<!--.*?-->", "", many)) == ["name-0"], "a row of 128 is lower than a name"


def test_shares_of_one_job_are_told_as_settings() -> None:
    lines = share_lines(16, ["v100=2x3.1", "t4=1x2.4"])
    assert lines[0] == "elastic.num_workers=16 'elastic.shares=[6, 6, 4]'"
    assert lines[1] == "step 1.935 s, 8.267 mini-batches/s, waste 3.9%"
    assert any("add nothing" in line for line in share_lines(4, ["fast=1x10", "slow=3x1"]))


@pytest.mark.parametrize(("num_workers", "devices", "message"), [
    (4, [], r"--job 4: TYPE=COUNTxRATE of its devices is missing; give such as v100=2x3\.1"),
    (4, ["v100=8x3.1"], r"8 devices for --job 4, which can use at most 4, one for each worker; take .* away"),
    (4, ["v100=two"], r"'v100=two' is not TYPE=COUNTxRATE above 0; give such as"),
    (4, ["v100=2x0"], r"'v100=2x0' is not TYPE=COUNTxRATE above 0"),
    (4, ["v100=1x1", "v100=1x1"], r"type 'v100' is given 2 times; name it once"),
])
def test_shares_of_impossible_devices_are_refused(num_workers: int, devices: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        share_lines(num_workers, devices)
