"""What this machine can and cannot do, and the line to type when something is off.

Imports neither FBGEMM nor TorchRec: whether these load at all is one of the questions, asked in a subprocess.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from longer_rec.runtime import machine
from longer_rec.runtime.cluster_check import Check
from longer_rec.runtime.peak import measured_peak

_GIB = 1 << 30
_TRIALS_TIMEOUT_S = 80.0
_IMPORT_TIMEOUT_S = 180.0
_LOAD = ("import warnings; warnings.simplefilter('ignore'); import torch, fbgemm_gpu, torchrec; "
         "torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2])); print(torchrec.__version__)")
# FBGEMM's minor version must be the one built against torch's: one off, and its libraries do not load.
_FBGEMM_OF_TORCH = {"2.13": "1.8", "2.12": "1.7", "2.11": "1.6"}
# Complete sets that were run, by torch: (torch, fbgemm, torchrec). The first is the one to install.
_SETS = {"2.13": ("2.13.0", "1.8.0", "1.8.0"), "2.11": ("2.11.0", "1.6.0", "1.6.1")}
_TORCHREC_TRIED = ("1.6", "1.8", "1.9")
_TORCHMETRICS = "1.0.3"


def run_doctor(quick: bool = False) -> list[Check]:
    """Every check; ``quick`` leaves out the trials of kernels (half a minute on two cores)."""
    installed = installed_versions()
    cuda = torch.version.cuda is not None
    checks = check_versions(installed, cuda)
    load = _check_loading(installed, cuda)
    checks += [load, *_check_backends(), *check_machine(machine.machine_facts())]
    if not quick:
        checks.append(_check_matmuls())
    if not quick and load.status == "ok":
        checks += _check_trials()
    return checks


def installed_versions() -> dict[str, str]:
    """Version of each package of the set that is installed."""
    names = ("torch", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec", "torchmetrics", "tensordict")
    return {name: version for name in names if (version := machine.installed_version(name))}


def install_line(torch_version: str, cuda: bool) -> str:
    """The pip line for a set that was run, keeping the installed torch where there is a set for it."""
    torch_pin, fbgemm, torchrec = _SETS.get(_minor(torch_version), _SETS["2.13"])
    if cuda:
        return (f"pip install torch=={torch_pin} fbgemm-gpu=={fbgemm} torchrec=={torchrec} "
                f"torchmetrics=={_TORCHMETRICS}")
    # TorchRec requires "fbgemm-gpu", whose CUDA wheel would overwrite the CPU build in the same directory.
    return (f"pip install torch=={torch_pin} fbgemm-gpu-cpu=={fbgemm} torchmetrics=={_TORCHMETRICS} tensordict tqdm "
            f"pyre-extensions iopath && pip install --no-deps torchrec=={torchrec}")


def check_versions(installed: Mapping[str, str], cuda: bool) -> list[Check]:
    """The triple against the compatibility table, builds that overwrite each other, and the torchmetrics pin."""
    torch_version = installed.get("torch", "")
    remedy = install_line(torch_version, cuda)
    python = Check("python", *(("ok", sys.version.split()[0]) if (3, 11) <= sys.version_info < (3, 13) else (
        "warn", f"{sys.version.split()[0]}; 3.11 and 3.12 were run", "make venv PYTHON=python3.12")))
    return [python, _check_fbgemm(installed, torch_version, cuda, remedy), _check_torchrec(installed, remedy),
            _check_torchmetrics(installed)]


def _check_fbgemm(installed: Mapping[str, str], torch_version: str, cuda: bool, remedy: str) -> Check:
    gpu_build, cpu_build = installed.get("fbgemm-gpu", ""), installed.get("fbgemm-gpu-cpu", "")
    if gpu_build.endswith("+cpu"):  # the stand-in that asks for the CPU build, and holds nothing
        gpu_build = ""
    if gpu_build and cpu_build:
        return Check("torch + fbgemm", "fail", f"fbgemm-gpu {gpu_build} and fbgemm-gpu-cpu {cpu_build} are both "
                     "installed, in the same directory", f"pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && {remedy}")
    fbgemm = gpu_build or cpu_build
    if not fbgemm:
        return Check("torch + fbgemm", "fail", f"torch {torch_version}, no fbgemm", remedy)
    wanted = _FBGEMM_OF_TORCH.get(_minor(torch_version))
    found = f"torch {torch_version}, fbgemm {fbgemm}"
    if wanted is None:
        pairs = ", ".join(f"torch {minor} + fbgemm {its}" for minor, its in _FBGEMM_OF_TORCH.items())
        return Check("torch + fbgemm", "warn", f"{found}; known pairs: {pairs}", remedy)
    if _minor(fbgemm) != wanted:
        return Check("torch + fbgemm", "fail", f"{found}; torch {_minor(torch_version)} needs fbgemm {wanted}", remedy)
    if bool(gpu_build) != cuda:
        return Check("torch + fbgemm", "fail", f"{found}: one is the CUDA build, the other the CPU build",
                     f"pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && {remedy}")
    return Check("torch + fbgemm", "ok", found)


def _check_torchrec(installed: Mapping[str, str], remedy: str) -> Check:
    version = installed.get("torchrec", "")
    if not version:
        return Check("torchrec", "fail", "not installed", remedy)
    if _minor(version) not in _TORCHREC_TRIED:
        return Check("torchrec", "warn", f"{version}; tested are 1.6.1, 1.8.0 and 1.9.2", remedy)
    return Check("torchrec", "ok", version)


def _check_torchmetrics(installed: Mapping[str, str]) -> Check:
    version = installed.get("torchmetrics", "none")
    if version == _TORCHMETRICS:
        return Check("torchmetrics", "ok", version)
    return Check("torchmetrics", "warn", f"{version}; TorchRec pins {_TORCHMETRICS}",
                 f"pip install torchmetrics=={_TORCHMETRICS}")


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _check_loading(installed: Mapping[str, str], cuda: bool) -> Check:
    remedy = install_line(installed.get("torch", ""), cuda)
    try:
        done = subprocess.run([sys.executable, "-c", _LOAD], capture_output=True, text=True, check=False,
                              timeout=_IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Check("imports", "fail", f"importing took over {_IMPORT_TIMEOUT_S:.0f} s", remedy)
    if done.returncode == 0:
        return Check("imports", "ok", "torch, fbgemm and torchrec load, and an fbgemm operator runs")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Check("imports", "fail", last[:200], remedy)


def _check_backends() -> list[Check]:
    gpus = machine.gpus()
    if not gpus:
        return [Check("backends", "ok", "gloo; no GPU, so no NCCL" if dist.is_gloo_available() else "none")]
    listed = ", ".join(f"{gpu['name']} {gpu['memory_bytes'] / _GIB:.0f} GiB" for gpu in gpus)
    if not dist.is_nccl_available():
        return [Check("backends", "fail", f"{listed}, but this torch has no NCCL", install_line("", cuda=True))]
    return [Check("backends", "ok", f"gloo, NCCL; {listed}")]


def check_machine(facts: Mapping[str, Any]) -> list[Check]:
    """Cores, memory and limits that training runs into."""
    def check(name: str, enough: bool, detail: str, remedy: str = "") -> Check:
        return Check(name, "ok", detail) if enough else Check(name, "warn", detail, remedy)

    cores, files, threads = facts["cores"], facts["open_files_limit"], facts["omp_num_threads"]
    memory, shared = facts["memory_bytes"] / _GIB, facts["shared_memory_bytes"] / _GIB
    few = threads in (None, "1") or bool(facts["gpus"])
    return [
        check("cores", cores >= 2, f"{cores} usable"),
        check("memory", memory >= 4, f"{memory:.1f} GiB", "make train NPROC=1, and smaller sparse.dims"),
        check("shared memory", shared >= 0.5, f"{shared:.1f} GiB free",
              "docker run --shm-size=4g …, or data.loader_processes=0"),
        check("open files", files >= 1024, f"{files} at most", "ulimit -n 65536"),
        check("OMP_NUM_THREADS", few, threads or "not set; torchrun sets 1" if few else
              f"{threads}; more than one thread a rank is slower on CPU", "export OMP_NUM_THREADS=1")]


def _check_matmuls() -> Check:
    """What utilisation is told against, with the threads of a process that trains."""
    device, before = torch.device("cuda" if machine.gpus() else "cpu"), torch.get_num_threads()
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(threads) if threads.isdigit() and int(threads) else 1)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    reached = [f"{name} {measured_peak(device, dtype, again=True) / 1e9:,.0f}" for name, dtype in kinds.items()]
    found = f"{', '.join(reached)} GFLOP/s a rank, {torch.get_num_threads()} thread(s)"
    torch.set_num_threads(before)
    return Check("matmuls", "ok", found)


def _check_trials() -> list[Check]:
    """Every sharding type and kernel, really tried, and the bandwidth between two ranks."""
    num_gpus = len(machine.gpus())
    device, ranks = ("cuda", min(2, num_gpus)) if num_gpus else ("cpu", 2)
    results, ended = _run_trials(device, str(ranks))
    checks = judge_trials([result for result in results if "outcome" in result], device, ranks)
    bandwidth = next((result["bandwidth"] for result in results if "bandwidth" in result), None)
    if bandwidth is not None:
        checks.append(Check("all-to-all", "ok" if "GB/s" in bandwidth else "fail", f"{bandwidth}, {ranks} ranks, "
                            f"{'NCCL' if device == 'cuda' else 'gloo'}"))
    if ended:
        checks.append(Check("trials", "warn", f"not all were made: {ended}"))
    return checks


def _run_trials(*arguments: str) -> tuple[list[dict[str, Any]], str]:
    """What the trials printed, and how they ended if not well."""
    command = [sys.executable, "-W", "ignore", "-m", "longer_rec.sparse.trial", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TRIALS_TIMEOUT_S,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        output, ended = done.stdout, f"exit code {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        ended = f"stopped after {_TRIALS_TIMEOUT_S:.0f} s"
    return [json.loads(line) for line in output.splitlines() if line.startswith("{") and line.endswith("}")], ended


def probe_bandwidth(device: str, ranks: int) -> float | None:
    """Bytes a second that a rank sends through all-to-all here, measured; None when that fails or takes one rank."""
    if ranks < 2:
        return None
    results, _ = _run_trials(device, str(ranks), "bandwidth")
    words = next((str(result["bandwidth"]).split() for result in results if "bandwidth" in result), [])
    return float(words[0]) * 1e9 if words[1:2] == ["GB/s"] else None


def judge_trials(results: Iterable[Mapping[str, Any]], device: str, ranks: int) -> list[Check]:
    """One check for each kind of table and sharding type; what is offered must work, the rest is for information."""
    grouped: dict[tuple[bool, str], dict[str, str]] = {}
    for result in results:
        grouped.setdefault((result["pooled"], result["sharding_type"]), {})[result["kernel"]] = result["outcome"]
    checks = []
    for (pooled, sharding_type), outcomes in grouped.items():
        works = [kernel for kernel, outcome in outcomes.items() if outcome == "works"]
        broken = [f"{kernel} {outcome}" for kernel, outcome in outcomes.items() if outcome != "works"]
        detail = "; ".join([f"{', '.join(works)} on {ranks} {device} ranks", *broken] if works else broken)
        offered = pooled or sharding_type != "data_parallel"
        status, remedy = "ok", ""
        if broken and not offered:
            status, detail = "ok", f"not offered: {detail}"
        elif "fused" in outcomes and outcomes["fused"] != "works":
            status, remedy = "fail", f"sparse.plan: another type than {sharding_type}"
        elif broken:
            status, remedy = "warn", f"sparse.kernel={works[0]}" if works else "sparse.plan=table_wise"
        checks.append(Check(f"{'pooled' if pooled else 'sequence'} {sharding_type}", status, detail, remedy))
    return checks
