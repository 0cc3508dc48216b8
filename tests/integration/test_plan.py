"""``longer-rec plan``: what it writes, what it refuses, and that training keeps to it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longer_rec.config import dump_config, load_config
from longer_rec.data.history import open_dataset
from longer_rec.errors import ConfigError
from longer_rec.job import Job
from longer_rec.plan.calibrate import Compared, calibrate, fit
from longer_rec.plan.scenario import Constants, Scenario, solve
from longer_rec.plan.topology import parse_topology
from longer_rec.plan.whatif import remedies
from longer_rec.sparse.planfile import load_plan
from longer_rec.train.measure import measure_job
from tests.integration.conftest import CONFIG, TINY
from tests.reference.commands import CommandServer


@pytest.fixture
def job(synthetic: Path) -> Job:
    return load_config(Job, CONFIG, [f"data.dir={synthetic}"])


def test_training_accepts_the_plan_and_holds_what_it_says(commands: CommandServer, synthetic: Path, tmp_path: Path,
                                                          run: Callable[..., Path]) -> None:
    outcome = commands.run("plan", CONFIG, f"data.dir={synthetic}", *TINY[:-1], "--topology", "2x1GB:device=cpu",
                           "--out", tmp_path / "plan")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert "Searches" in outcome.out
    plan = load_plan(tmp_path / "plan" / "plan.json")
    assert {table.table for table in plan.tables} == set(open_dataset(synthetic).schema.num_rows)
    page = (tmp_path / "plan" / "plan.html").read_text()
    assert "rank 1" in page
    assert not re.search(r"(?:src|href)=\"https?:", page), "the page is self-contained"
    trained = run("planned", *TINY[:-1], f"sparse.plan={tmp_path / 'plan' / 'plan.json'}", "train.epochs=0.02")
    assert load_plan(trained / "plan.json") == plan
    same = commands.run("plan", "--diff", tmp_path / "plan" / "plan.json", trained / "plan.json")
    assert (same.code, len(same.out.splitlines())) == (0, 1)
    alone = commands.run("plan", "--diff", trained / "plan.json")
    assert (alone.code, alone.out) == (2, "")
    assert "--diff compares two plan files, not 1; give two, such as" in alone.err


def test_a_plan_for_another_model_is_refused_by_training(commands: CommandServer, synthetic: Path, tmp_path: Path
                                                         ) -> None:
    commands.run("plan", CONFIG, f"data.dir={synthetic}", "sparse.default_dim=16", "--topology", "1x1GB:device=cpu",
                 "--out", tmp_path)
    outcome = commands.run("train", CONFIG, f"data.dir={synthetic}", f"run_dir={tmp_path / 'run'}",
                           f"sparse.plan={tmp_path / 'plan.json'}")
    assert outcome.code == 2
    assert re.fullmatch(r"longer-rec: .*the plan has table '\w+' with \d+ rows of 16 .*, the model \d+ rows of 8 .*; "
                        r"plan again.*\n", outcome.err), outcome


def test_what_does_not_fit_is_explained_and_every_remedy_fits(commands: CommandServer, synthetic: Path, job: Job,
                                                              tmp_path: Path) -> None:
    outcome = commands.run("plan", CONFIG, f"data.dir={synthetic}", "--topology", "2x30MB:device=cpu", "--sweep",
                           "batch=1,16", "--out", tmp_path)
    assert (outcome.code, outcome.err) == (1, "")
    for words in ("No plan fits: of 30 MiB a rank", "What each table needs at least", "instead of",
                  "on each device instead of 30 MiB", "requests/s"):
        assert words in " ".join(outcome.out.split())  # a narrow terminal folds it
    assert not (tmp_path / "plan.json").exists()
    assert "Any one of these makes it fit" in (tmp_path / "plan.html").read_text()
    found = remedies(Scenario(job, open_dataset(job.data.dir), parse_topology("2x30MB:device=cpu")))
    assert found
    # The shortest history that the tower can be built for is the last one tried.
    [larger] = remedies(Scenario(job, open_dataset(job.data.dir), parse_topology("2x1MB:device=cpu")))
    assert re.fullmatch(r"[\d.]+ MiB on each device instead of 1 MiB", larger.text)
    for remedy in found:
        asked = remedy.outcome.scenario
        assert remedy.outcome.found.plan is not None
        assert remedy.outcome.fullest <= asked.hardware.device_bytes
        assert (asked.job.data.batch_requests, asked.job.data.max_events, asked.hardware.device_bytes) != (
            job.data.batch_requests, job.data.max_events, 30 << 20)


def test_tables_that_do_not_fit_need_more_ranks_or_host_memory(job: Job) -> None:
    large = Scenario(job, open_dataset(job.data.dir), parse_topology("2x16GB:host=500GB")).change(row_factor=300_000.0)
    found = remedies(large)
    device, ranks, offloaded = found
    assert re.fullmatch(r"\d+ GiB on each device instead of 16 GiB", device.text)
    assert re.fullmatch(r"\d+ ranks instead of 2", ranks.text)
    assert "in host memory (fused_uvm" in offloaded.text
    for remedy in found:
        assert remedy.outcome.fullest <= remedy.outcome.scenario.hardware.device_bytes
    assert not solve(large.change(world_size=ranks.outcome.scenario.hardware.world_size // 2)).fits
    assert sum(shard.size.host for shard in offloaded.outcome.found.placed) > 16 << 30


def test_tables_behind_too_little_host_memory_are_told_so(commands: CommandServer, synthetic: Path, tmp_path: Path
                                                          ) -> None:
    outcome = commands.run("plan", CONFIG, f"data.dir={synthetic}", "sparse.kernel=fused_uvm",
                           "sparse.default_dim=1024", "--topology", "2x80GB:host=1MB", "--out", tmp_path)
    assert outcome.code == 1
    assert re.search(r"tables need [\d.]+ \w+ of host memory, of which each of 2 ranks has 512 KiB",
                     " ".join(outcome.out.split()))
    assert "MiB on each host instead of 1 MiB" in outcome.out
    assert "on the device (fused)" in outcome.out


def test_placement_goes_by_the_topology_and_is_told_with_its_hit_rates(commands: CommandServer, synthetic: Path,
                                                                       tmp_path: Path) -> None:
    small = "2x1GB:host=1MB,ssd=1TB"
    outcome = commands.run("plan", CONFIG, f"data.dir={synthetic}", "sparse.placement=auto", "sparse.default_dim=128",
                           "sparse.device_memory=100KB", "--topology", small, "--out", tmp_path)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert "on SSD" in outcome.out
    assert "can be planned, not trained" in " ".join(outcome.out.split())
    assert "on SSD" in (tmp_path / "plan.html").read_text()
    plan = load_plan(tmp_path / "plan.json")
    on_ssd = [table for table in plan.tables if table.kernel == "key_value"]
    assert on_ssd
    for table in on_ssd:
        assert table.cache_load_factor is not None
        assert table.expected_hit_rate is not None
        assert 0 < table.expected_hit_rate["lru"] <= 1
    refused = commands.run("train", CONFIG, f"data.dir={synthetic}", f"run_dir={tmp_path / 'run'}",
                           "sparse.default_dim=128", f"sparse.plan={tmp_path / 'plan.json'}")
    assert refused.code == 2
    # Without its SSD the same machine has no plan; the SSD is the way out that is offered.
    without = commands.run("plan", CONFIG, f"data.dir={synthetic}", "sparse.placement=auto", "sparse.default_dim=128",
                           "sparse.device_memory=100KB", "--topology", "2x1GB:host=1MB", "--out", tmp_path)
    assert without.code == 1, without
    told = " ".join(without.out.split())
    assert re.search(r"need \d+ bytes of host memory on a rank, there are 524288", told)
    # The table of remedies folds in a narrow terminal; the page has the words in one piece.
    page = (tmp_path / "plan.html").read_text()
    assert "ssd=1TB on each host (tables on SSD are not trained by this package)" in page


def test_a_table_that_fits_nowhere_else_is_offered_ssd(synthetic: Path) -> None:
    wide = load_config(Job, CONFIG, [f"data.dir={synthetic}", "sparse.default_dim=64"])
    large = Scenario(wide, open_dataset(synthetic), parse_topology("2x6GB:host=1GB")).change(row_factor=15_000.0)
    [found] = [remedy for remedy in remedies(large) if "SSD" in remedy.text]
    assert found.text == "ssd=1TB, and item on SSD (key_value, not trained by this package)"
    assert sum(found.outcome.behind["ssd"]) > 12 << 30
    assert max(found.outcome.behind["ssd"]) <= 512 << 30


@pytest.mark.parametrize(("options", "message"), [
    (["--topology", "8x80GB", "--sweep", "gpu=3"], "--sweep 'gpu=3' cannot be read; use one of gpus, batch"),
    (["--topology", "8x80GB", "--sweep", "gpus=12"], "gpus=12: 12 ranks are not whole hosts of 8"),
    (["--topology", "8x80GB", "--sweep", "batch=none"], "batch=none cannot be planned for; use a whole number"),
    (["--topology", "8x80GB", *["--sweep", "L=9"] * 2], "--sweep L=9 --sweep L=9: use one or two different axes"),
    (["--topology", "8x80GB", "--sweep", "gpus=8,1000000000"], "gpus=1000000000 cannot be planned for; .* to 4096"),
    (["--topology", "8x80GB", "--sweep", "gpus=3.5"], "gpus=3.5 cannot be planned for; use a whole number from 1 to"),
    (["--topology", "8x80GB", "--sweep", "rows=0"], "rows=0 cannot be planned for; use a number above 0"),
    (["--calibrate", "1", "--topology", "8x80GB", "--sweep", "nonsense", "--proposer", "greedy"],
     "--calibrate goes without --topology, --sweep, --proposer; leave them out, or leave --calibrate out"),
    (["--diff", "--constrain", "item=fused"], "--diff goes without --constrain, --out; leave them out"),
    (["--topology", "8x80GB", "--sweep", "kernels=fused,ssd"], "--sweep kernels=ssd: .* cannot use kernel 'ssd'"),
    (["--topology", "8x80GB", "--topology", "8x80gb"], "give each machine once"),
    (["--topology", "8x80GB", "--constrain", "item=fused_uvm", "sparse.plan=row_wise"], "both say what tables may be"),
    (["--topology", "8x80GB", "sparse.plan={itm: row_wise}"], "sparse.plan names table 'itm'"),
    (["--topology", "8x80GB", "sparse.plan=plan.json"], "sparse.plan='plan.json' would be a finished plan"),
    (["--topology", "8x80GB", "--constrain", "itm=row_wise"], "names table 'itm'"),
    (["--topology", "8x80GB", "--proposer", "greed"], "--proposer 'greed': 'greed' is unknown; use greedy or"),
    (["--topology", "8x80GB", "--calibration", "none.yaml"], "--calibration none.yaml .*cannot read none.yaml"),
    (["--topology", "8x80GB", "sparse.placement=auto", "--sweep", "rows=2"], "rows=2: .* says nothing of other rows"),
    (["--topology", "8x80GB", "sparse.placement=auto", "--constrain", "item=fused_uvm"], "decides the kernel of table"),
    (["--topology", "8x80GB", "sparse.kernel=key_value"], "there is no SSD on the hosts of these 8 ranks; add what"),
    (["--calibrate", "1", "sparse.placement=auto"], "placement=auto would choose again; add sparse.placement=null"),
    (["--calibrate", "two"], "two is not a list of numbers"),
    (["--calibrate", "1,9999"], "--calibrate 9999: this machine can measure 1 to [0-9]+ ranks")])
def test_bad_words_end_in_one_line(commands: CommandServer, synthetic: Path, tmp_path: Path, options: list[str],
                                   message: str) -> None:
    outcome = commands.run("plan", CONFIG, f"data.dir={synthetic}", *options, "--out", tmp_path)
    assert outcome.code == 2
    assert re.fullmatch(rf"longer-rec: [^\n]*{message}[^\n]*\n", outcome.err), outcome
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_of_another_kind_of_device_is_refused(job: Job) -> None:
    dataset, constants = open_dataset(job.data.dir), Constants(device="cpu")
    Scenario(job, dataset, parse_topology("2x1GB:device=cpu"), constants).check()
    with pytest.raises(ConfigError, match="--calibration was measured on cpu, 8x80GB is cuda; leave it out, or"):
        Scenario(job, dataset, parse_topology("8x80GB"), constants).check()


def test_an_output_that_cannot_be_written_is_named_before_the_search(commands: CommandServer, synthetic: Path,
                                                                      tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "plan.json").mkdir()
    for out in (tmp_path / "file", tmp_path):
        outcome = commands.run("plan", CONFIG, f"data.dir={synthetic}", "--topology", "8x80GB", "--out", out)
        assert (outcome.code, outcome.out) == (2, "")
        assert re.fullmatch(rf"longer-rec: --out {out} cannot be written: [^\n]*\n", outcome.err), outcome


def test_predicted_bytes_are_those_of_a_real_run(job: Job, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    compared = calibrate(job, open_dataset(job.data.dir), measure_job, [1, 2], 2)
    assert [one.outcome.scenario.hardware.world_size for one in compared] == [1, 2]
    for one in compared:
        for predicted, measured in one.bytes_of_tables():
            assert predicted == pytest.approx(measured, rel=0.05)
        pairs = one.bytes_of_activations()
        assert len(pairs) == 2
        for predicted, measured in pairs:
            assert predicted == pytest.approx(measured, rel=0.15)
        assert set(one.outcome.step_s) == set(one.measured.seconds)
    constants = fit(compared)
    # The fit is nearer to what was measured than the constants it began with.
    assert squared_error(compared, constants) <= squared_error(compared, Constants())
    (tmp_path / "calibration.yaml").write_text(dump_config(constants))
    assert load_config(Constants, tmp_path / "calibration.yaml") == constants


def squared_error(compared: list[Compared], constants: Constants) -> float:
    return sum((constants.seconds(one.outcome.terms)[part] / seconds - 1) ** 2 for one in compared
               for part, seconds in one.measured.seconds.items())


def test_more_of_anything_takes_more_bytes_and_recomputing_fewer(job: Job) -> None:
    base = Scenario(job, open_dataset(job.data.dir), parse_topology("8x80GB"))
    fullest = solve(base).fullest
    assert solve(base.change(batch_requests=32)).fullest > fullest
    assert solve(base.change(max_events=100)).fullest < fullest
    grown = solve(base.change(row_factor=50.0))
    assert sum(grown.held["weights"]) == pytest.approx(50 * sum(solve(base).held["weights"]), rel=0.01)
    less = job.model_copy(update={"train": job.train.model_copy(update={"recompute": ("cross", "self")})})
    recomputed = solve(Scenario(less, base.dataset, base.hardware))
    assert recomputed.fullest < fullest
    assert recomputed.step_s["tower"] > solve(base).step_s["tower"]
