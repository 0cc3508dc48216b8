"""What this machine has: cores, memory, GPUs, limits, packages."""

import os
import platform
import resource
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from longer_rec.errors import ConfigError
from longer_rec.runtime.kernels import KERNEL_SETTINGS, PORTABLE_KERNELS, wrong_kernels

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - nothing is written there


def num_cores() -> int:
    """Cores this process may use (affinity and cgroup quota, not what the host has)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def memory_bytes() -> int:
    """Memory this process may use: the smaller of the machine's and the cgroup's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read(Path("/sys/fs/cgroup/memory.max"))
    return min(total, int(limit)) if limit.isdigit() else total


def shared_memory_bytes() -> int:
    """Free bytes of /dev/shm, through which data workers hand batches over; 0 where there is none."""
    return shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else 0


def open_files_limit() -> int:
    """How many files this process may hold open (the soft limit)."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def gpus() -> list[dict[str, Any]]:
    """Name, memory and compute capability of each visible GPU."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"}
            for gpu in found]


def machine_facts() -> dict[str, Any]:
    """All of the above for ``run.json``; holds no host name and no path."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": num_cores(),
        "memory_bytes": memory_bytes(),
        "shared_memory_bytes": shared_memory_bytes(),
        "open_files_limit": open_files_limit(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus(),
    }


def installed_version(package: str) -> str | None:
    """None for a package that is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def numerics(device: torch.device, portable: bool = False) -> dict[str, Any]:
    """What the bits of a computation depend on beside its inputs: kernels, and how many threads share them.

    Libraries choose kernels by the processor's maker and model too; where the environment has chosen ``portable`` ones,
    by neither.
    """
    kind = {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
    if portable:
        return {**kind, "processor": "any with AVX2 and FMA", "kernels": "portable"}
    if device.type == "cuda":
        return {**kind, "processor": torch.cuda.get_device_name(device)}
    models = (line.partition(":")[2].strip() for line in _read(Path("/proc/cpuinfo")).splitlines()
              if line.startswith("model name"))
    model = next(models, platform.machine())
    chosen = " ".join(f"{name}={os.environ[name]}" for name in KERNEL_SETTINGS if name in os.environ)
    return {**kind, "processor": f"{model} ({torch.backends.cpu.get_cpu_capability()})", "kernels": chosen or "default"}


def check_portable_kernels(device: torch.device) -> None:
    """``ConfigError`` unless this process computes what every other processor with AVX2 and FMA does."""
    if device.type != "cpu":
        raise ConfigError(f"elastic.level=D2 is for CPUs, this is a {torch.cuda.get_device_name(device)}; use D1")
    if any(os.environ.get(name) != value for name, value in PORTABLE_KERNELS.items()):
        raise wrong_kernels()
    # Says what torch has chosen at its import: before that the environment was another, or the processor has no AVX2.
    if (chosen := torch.backends.cpu.get_cpu_capability()) != "AVX2":
        raise ConfigError(f"elastic.level=D2 needs torch's AVX2 kernels, this process has {chosen}; use "
                          "`longer-rec launch` or `train`, on a processor with AVX2 and FMA")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
