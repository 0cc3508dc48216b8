"""The ``longer-rec`` command. A ``LongerRecError`` ends in one line and its exit code; bugs keep their traceback."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from longer_rec.errors import CheckpointError, ConfigError, LongerRecError
from longer_rec.runtime.kernels import choose_portable_kernels
from longer_rec.runtime.preemption import end_on_stop

if TYPE_CHECKING:
    from longer_rec.config import ConfigT
    from longer_rec.job import Job
    from longer_rec.runtime.cluster_check import Check

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False,
                  help="Train and serve rankers over ultra-long user histories.")
bench_app = typer.Typer(help="How fast a job or a bundle is on this machine.")
app.add_typer(bench_app, name="bench")


Overrides = Annotated[list[str] | None, typer.Argument(help="settings on top, such as data.max_events=200")]


# Commands import what they run: `longer-rec --help` must not wait five seconds for torch.
@app.command()
def prepare(
    dataset: Annotated[str, typer.Argument(help="completejourney, movielens, synthetic, or the path of a YAML file")],
    out: Annotated[Path, typer.Option(help="directory to write")],
    settings: Overrides = None,
) -> None:
    """Turn an interaction log into a history store and a request index."""
    from longer_rec.data.prepare import prepare as run
    from longer_rec.data.prepare import summary_lines

    path = run(dataset, out, overrides=settings or ())
    typer.echo("\n  ".join([f"prepared {path}", *summary_lines(path)]))


@app.command()
def train(config: Annotated[Path, typer.Argument(help="YAML file")], overrides: Overrides = None) -> None:
    """Train a ranker on this process, or as one rank under torchrun. Resumes by itself from its run directory."""
    end_on_stop()
    _train(_load_job(config, overrides))


@app.command()
def launch(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(help="ranks, all on this host; on GPUs one for each")] = 2,
    max_restarts: Annotated[int, typer.Option(help="how often to start again after a rank is lost")] = 3,
) -> None:
    """Train on many ranks of this host; starts again by itself when a rank dies or stops."""
    end_on_stop()
    _prepare_forking()
    from longer_rec.runtime.supervisor import supervise

    job = _load_job(config, overrides)
    import longer_rec.train.run  # noqa: F401 - once, here: the ranks and all that follow them are forked
    from longer_rec.train.resize import ResizeRequests

    raise typer.Exit(supervise(lambda: _train(job), nproc, max_restarts, resizes=ResizeRequests(job)))


@app.command()
def resize(
    run_dir: Annotated[Path, typer.Argument(help="run directory")],
    nproc: Annotated[int, typer.Option(help="processes to go on with, at most elastic.num_workers")],
) -> None:
    """Have a run under `longer-rec launch` go on with more or fewer processes; waits until it does."""
    from longer_rec.train.resize import resize_run

    typer.echo(resize_run(run_dir, nproc))


def _prepare_forking() -> None:
    """Before torch and FBGEMM are imported: processes forked afterwards have one thread, and may use CUDA."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # FBGEMM's import asks whether there is a GPU: without this, that would leave CUDA unusable in forked ranks.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def _settings(kind: "type[ConfigT]", settings: list[str] | None, where: str) -> "ConfigT":
    from longer_rec.config import apply_overrides, build_config

    return build_config(kind, apply_overrides({}, settings or ()), where)


def _load_job(config: Path, overrides: list[str] | None) -> "Job":
    from longer_rec.config import apply_overrides, build_config, read_yaml

    content = apply_overrides(read_yaml(config), overrides or ())
    elastic = content.get("elastic")
    if isinstance(elastic, dict) and elastic.get("level") == "D2":
        choose_portable_kernels()  # torch, which the next import brings, reads them once
    from longer_rec.job import Job

    return build_config(Job, content, str(config))


def _train(job: "Job") -> None:
    from longer_rec.report.terminal import results_table
    from longer_rec.train.run import train as run

    rows = run(job)
    if rows is not None:
        results_table(rows)
        typer.echo(f"report: {job.run_dir / 'report.html'}")


@app.command("eval")
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="run directory; with --server also prepared data")],
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    server: Annotated[str | None, typer.Option(help="let this server score, such as http://127.0.0.1:8000")] = None,
) -> None:
    """Metrics of a run's newest checkpoint, or of what a server answers to the requests of its data."""
    from longer_rec.report.terminal import results_table
    from longer_rec.runtime.distributed import is_main_process
    from longer_rec.train.run import evaluate_run

    row = evaluate_run(run_dir, split) if server is None else _evaluate_server(run_dir, split, server)
    if is_main_process():
        results_table([row])


def _evaluate_server(path: Path, split: str, server: str) -> dict[str, Any]:
    from longer_rec.data.history import open_dataset
    from longer_rec.serve.client import Client
    from longer_rec.train.evaluate import evaluate_scorer
    from longer_rec.train.run_dir import load_job

    dataset = open_dataset(load_job(path).data.dir if (path / "run.json").is_file() else path)
    with Client(server, os.environ.get("LONGER_REC_TOKEN")) as client:
        model = client.model()
        metrics = evaluate_scorer(dataset, split, client.score, model["max_events"])
    return {"name": f"{model['name']} {model['version']}", "split": split, **metrics}


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="run directory")],
    out: Annotated[Path, typer.Option(help="directory to write")],
    embeddings: Annotated[str, typer.Option(help="float32, float16 or int8")] = "float32",
    max_auc_loss: Annotated[float, typer.Option(help="what rounded embeddings may cost on the test split")] = 5e-4,
) -> None:
    """Make a bundle that `longer-rec serve` serves, of a run's newest checkpoint; refused unless logits agree."""
    from longer_rec.train.export import ExportOptions, export_run

    options = _settings(ExportOptions, [f"embeddings={embeddings}", f"max_auc_loss={max_auc_loss}"], "export")
    manifest = export_run(run_dir, out, options)
    typer.echo("\n  ".join([f"exported {out}, version {manifest.version}",
                            *(f"{name}: {value:.6g}" for name, value in manifest.measured.items())]))


@app.command()
def compress(
    run_dir: Annotated[Path, typer.Argument(help="run directory of a source model, trained with model.compress")],
    out: Annotated[Path, typer.Option(help="store to fill, or to go on filling")],
    settings: Annotated[list[str] | None, typer.Argument(
        help="such as vectors=int8 stored=post past=STORE features=[item] delay_s=3600 retention_days=90")] = None,
) -> None:
    """Store a vector of every instance of a run's data, for other models to read as tokens; docs/iat.md."""
    from longer_rec.train.compress import CompressOptions, compress_run, summary_lines

    compressed = compress_run(run_dir, out, _settings(CompressOptions, settings, "compress"))
    typer.echo("\n  ".join(summary_lines(out, compressed)))


@app.command()
def serve(
    bundle: Annotated[Path, typer.Argument(help="directory that `longer-rec export` wrote, or a link to one")],
    settings: Annotated[list[str] | None, typer.Argument(help="such as port=8080 cache_bytes=4GB")] = None,
) -> None:
    """Score candidates over HTTP, on this machine alone unless told otherwise; docs/serving.md."""
    from longer_rec.serve.app import ServeConfig
    from longer_rec.serve.app import serve as run

    run(bundle, _settings(ServeConfig, settings, "serve"), lambda line: print(line, flush=True))


@bench_app.command("serve")
def bench_serve(
    bundle: Annotated[Path, typer.Argument(help="directory that `longer-rec export` wrote")],
    settings: Annotated[list[str] | None, typer.Argument(
        help="such as events=[250,1000] candidates=[64] hit_rates=[0,0.9] load=3 server.max_waiting=64")] = None,
    out: Annotated[Path | None, typer.Option(help="directory for serve.json and serve.md")] = None,
) -> None:
    """Start a server of a bundle, send it requests at a given rate, tell how fast it answers; docs/serving.md."""
    from longer_rec.bench.serve import ServeLoad
    from longer_rec.bench.serve import bench_serve as run

    run(bundle, _settings(ServeLoad, settings, "bench serve"), out)


@bench_app.command("profile")
def bench_profile(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(help="ranks, all on this host")] = 1,
    steps: Annotated[int, typer.Option(help="that are timed, after five that are not")] = 20,
    out: Annotated[Path, typer.Option(help="directory for profile.json, profile.md and trace.json")] = Path("profile"),
) -> None:
    """Train for a few steps and tell where their time goes; nothing is saved of them. docs/performance.md."""
    _prepare_forking()
    from longer_rec.bench.profile import ProfileOptions, profile_job

    options = _settings(ProfileOptions, [f"nproc={nproc}", f"steps={steps}"], "bench profile")
    profile_job(_load_job(config, overrides), options, out)


@app.command()
def replay(run_dir: Annotated[Path, typer.Argument(help="run directory")]) -> None:
    """Run the step again at which a run was given up: what in it is not finite, and from where on."""
    from longer_rec.train.run import replay_run

    typer.echo("\n".join(replay_run(run_dir)))


Detail = Annotated[bool, typer.Option("--detail", help="every tensor, or table of prepared data")]


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint directory, run directory, or prepared data")],
    detail: Detail = False,
) -> None:
    """Position, tables and tower of a checkpoint, or what prepared data holds; files verified."""
    if (checkpoint / "requests.arrow").is_file():
        return _inspect_data(checkpoint, detail)
    from longer_rec.checkpoint.inspect import find_checkpoint, inspect_checkpoint, summary_lines

    summary = inspect_checkpoint(find_checkpoint(checkpoint))
    typer.echo("\n".join(summary_lines(summary, detail)))
    if summary.faults:
        raise CheckpointError(f"{'; '.join(summary.faults[:3])}; use another checkpoint")


def _inspect_data(path: Path, detail: bool) -> None:
    from longer_rec.data.history import open_dataset
    from longer_rec.data.prepare import summary_lines

    fingerprint = open_dataset(path).fingerprint
    typer.echo("\n  ".join([f"{path}: fingerprint {fingerprint[:12]}", *summary_lines(path, detail)]))


@app.command()
def diff(first: Path, second: Path, detail: Detail = False) -> None:
    """What differs between two runs or checkpoints, and from which step on; exit code 1 when a tensor does."""
    from longer_rec.checkpoint.inspect import diff_checkpoints, difference_lines, find_checkpoint
    from longer_rec.train.digests import digest_lines
    from longer_rec.train.run_dir import setting_lines

    difference = diff_checkpoints(find_checkpoint(first), find_checkpoint(second))
    for line in (*setting_lines(first, second), *digest_lines(first, second), *difference_lines(difference, detail)):
        typer.echo(line)
    if not difference.tensors:
        typer.echo("all tensors are bitwise equal")
    else:
        raise typer.Exit(1)


@app.command()
def plan(
    context: typer.Context,
    configs: Annotated[list[str], typer.Argument(
        metavar="CONFIG [KEY.SUB=VALUE]...", help="YAML file and settings on top; with --diff, two plan files")],
    topology: Annotated[list[str] | None, typer.Option(
        help="machines, such as 8x80GB, 16xH100, 64x80GB:local=8,host=1TB,ssd=4TB, or auto; repeatable")] = None,
    proposer: Annotated[str, typer.Option(help="greedy, uniform; with commas")] = "greedy,uniform",
    partitioner: Annotated[str, typer.Option(help="perf, memory; with commas")] = "perf,memory",
    sweep: Annotated[list[str] | None, typer.Option(
        help="what if: gpus=8,16, hbm=40GB,80GB, batch=, L=, rows=, kernels=, constraints=; at most two")] = None,
    constrain: Annotated[list[str] | None, typer.Option(help="item=row_wise+fused_uvm and its like")] = None,
    out: Annotated[Path, typer.Option(help="directory for plan.json and plan.html")] = Path("plan"),
    calibration: Annotated[Path | None, typer.Option(help="constants that --calibrate has fitted")] = None,
    calibrate: Annotated[str | None, typer.Option(
        metavar="RANKS", help="run a few steps here on, say, 1,2 ranks: predicted beside measured")] = None,
    diff: Annotated[bool, typer.Option("--diff", help="what differs between two plan files")] = False,
) -> None:
    """Sharding plans for machines that are not there; exit code 1 when one of them has no plan."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from longer_rec.plan.command import Request, calibrate_job, diff_plans, plan_job

    if diff or calibrate is not None:
        _refuse_beside(context, *(("diff",) if diff else ("calibrate", "out")))
    if diff:
        typer.echo("\n".join(diff_plans(configs)))
        return
    job = _load_job(Path(configs[0]), configs[1:])
    if calibrate is not None:
        from longer_rec.train.measure import measure_job

        calibrate_job(job, calibrate, out, measure_job)
    elif not plan_job(job, Request(topology or ["auto"], proposer, partitioner, sweep or (), constrain or (), out,
                                   calibration)):
        raise typer.Exit(1)


def _refuse_beside(context: typer.Context, mode: str, *allowed: str) -> None:
    given = [f"--{name}" for name in context.params if name not in ("configs", mode, *allowed)
             and (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"]
    if given:
        raise ConfigError(f"--{mode} goes without {', '.join(given)}; leave {'them' if given[1:] else 'it'} out, or "
                          f"leave --{mode} out")


@app.command()
def study(config: Annotated[Path, typer.Argument(help="YAML file of a study")], overrides: Overrides = None) -> None:
    """A grid of runs and one table of their results. Continues where it was stopped; exit code 1 when a run failed."""
    end_on_stop()
    os.environ["OMP_NUM_THREADS"] = "1"  # each run has a core
    _prepare_forking()
    from longer_rec.study.command import run_study

    command = shlex.join(["longer-rec", "study", str(config), *(overrides or ())])
    if not run_study(config, overrides or (), command):
        raise typer.Exit(1)


@app.command()
def schedule(
    jobs: Annotated[list[str] | None, typer.Argument(
        metavar="JOBS [KEY.SUB=VALUE]...", help="YAML file and settings on top; with --job, TYPE=COUNTxRATE of each "
                                                "device type, such as v100=2x3.1 (mini-batches a second)")] = None,
    job: Annotated[int | None, typer.Option(
        metavar="W", min=1, help="only share this many logical workers out to the devices of one job")] = None,
    out: Annotated[Path | None, typer.Option(
        help="directory for schedule.json and schedule.html; schedule where it is left out")] = None,
) -> None:
    """Who trains when on a shared cluster, simulated under several policies; or one job's shares of its devices."""
    from longer_rec.schedule.command import run_schedule, share_lines

    if job is not None:
        if out is not None:
            raise ConfigError(f"--out={out} is for a file of jobs, --job={job} writes nothing; leave one of them out")
        typer.echo("\n".join(share_lines(job, jobs or ())))
    elif jobs:
        run_schedule(Path(jobs[0]), jobs[1:], out or Path("schedule"))
    else:
        raise ConfigError("JOBS is missing; give a YAML file of jobs, or --job W and TYPE=COUNTxRATE of its devices")


@app.command()
def doctor(
    quick: Annotated[bool, typer.Option(help="skip trying the kernels")] = False,
    distributed: Annotated[bool, typer.Option(help="under torchrun or srun: compare the ranks, measure between "
                                              "them")] = False,
    data: Annotated[Path | None, typer.Option(help="with --distributed: data that all ranks must have")] = None,
) -> None:
    """Versions, backends and kernels: what this machine can do, and the line to type when something is off."""
    from longer_rec.report.terminal import doctor_table
    from longer_rec.runtime.distributed import is_main_process
    from longer_rec.sparse.doctor import run_doctor

    if data is not None and not distributed:
        raise ConfigError("--data is compared between ranks; add --distributed")
    checks = _check_ranks(data) if distributed else run_doctor(quick=quick)
    if is_main_process():
        doctor_table(checks)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


def _check_ranks(data: Path | None) -> "list[Check]":
    from longer_rec.data.manifest import read_manifest
    from longer_rec.runtime.cluster_check import check_cluster
    from longer_rec.runtime.distributed import joined_world

    with joined_world(timeout_s=60, remedy="see docs/clusters.md, and ask the doctor again") as world:
        return check_cluster(world, None if data is None else lambda: read_manifest(data)["fingerprint"][:12])


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run directories")],
    out: Annotated[Path | None, typer.Option(help="page of several runs; comparison.html beside the first one")] = None,
) -> None:
    """Write report.html of a run again, or one page that compares several."""
    from longer_rec.report.compare import write_comparison
    from longer_rec.report.html import write_report

    if out is not None and out.is_dir():
        raise ConfigError(f"--out={out} is a directory; name a file, such as {out / 'comparison.html'}")
    if len(run_dirs) > 1:
        typer.echo(write_comparison(run_dirs, out))
    elif out is not None:
        raise ConfigError(f"--out={out} is for several runs; the report of one is {run_dirs[0] / 'report.html'}")
    else:
        typer.echo(write_report(run_dirs[0]))


def main() -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Before the imports: an agent that is killed meanwhile would leave its ranks to train on their own.
        from longer_rec.runtime.supervisor import die_with_parent

        die_with_parent()
    try:
        # Not standalone: typer would print a usage error as a box of many lines. It makes 130 of Ctrl-C.
        code = app(sys.argv[1:] or ["--help"], prog_name="longer-rec", standalone_mode=False) or 0
    except LongerRecError as error:
        _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        _fail(f"{error.format_message().rstrip('.')} (see `longer-rec --help`)")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        print("longer-rec: interrupted; a run continues from its last checkpoint when started again", file=sys.stderr)
    sys.exit(code)


def _fail(fault: str, exit_code: int = LongerRecError.exit_code) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"rank {rank}: "
    print(f"longer-rec: {where}{fault}", file=sys.stderr)
    sys.exit(exit_code)
