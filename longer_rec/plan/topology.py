"""Machines by name or by size: what ``--topology`` understands.

    8x80GB                                      8 GPUs of 80 GB on one host
    64x80GB:local=8,host=1TB,intra=300GB/s,inter=50GB/s
    16xH100                                     two DGX H100
    4x8GB:device=cpu                            4 CPU ranks with 8 GB each
    auto, 4xauto                                this machine, or 4 ranks on it

Memory is counted in powers of two, as vendors do (a GPU "of 80 GB" shows 80 GiB), rates in powers of ten; rates are of
one GPU in one direction. Presets, from the vendor's data sheets of the GPUs and of the DGX systems with 8 of them:

    A100  80 GB HBM2e at 2.04 TB/s; NVLink 600 GB/s both ways; 200 Gb/s network a GPU; PCIe 4; 19.5 / 312 TFLOPS
    H100  80 GB HBM3 at 3.35 TB/s; NVLink 900 GB/s; 400 Gb/s; PCIe 5; 67 / 989 TFLOPS
    H200  141 GB HBM3e at 4.8 TB/s; otherwise an H100
    B200  180 GB HBM3e at 8 TB/s; NVLink 1,800 GB/s; 400 Gb/s; PCIe 5; 75 / 2,250 TFLOPS

(NVIDIA: "A100 Tensor Core GPU" and "DGX A100" data sheets, 2021; "H100 Tensor Core GPU", 2023; "H200 Tensor Core GPU",
2024; "DGX H100/H200" and "DGX B200", 2024. FP32 / dense BF16 on tensor cores. Host memory 2 TB, local SSDs 30 TB.)
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, Literal

from longer_rec.errors import ConfigError
from longer_rec.runtime import machine
from longer_rec.sparse.doctor import probe_bandwidth
from longer_rec.sparse.options import Hardware

_GIB = 1 << 30
_TIB = 1 << 40
_MAX_RANKS = 4096
# What a rate means where nothing was given for a CPU: one core of a 2024 server, and memory of which it has a share.
_CPU_FLOPS = {"fp32": 2.5e10, "bf16": 1e11}
_CPU_BW = 1e10


def _gpu(name: str, memory: int, memory_bw: float, link_bw: float, network_bw: float, pcie_bw: float, fp32: float,
         bf16: float) -> Hardware:
    return Hardware(name, 8, 8, "cuda", memory * _GIB, 2 * _TIB, 30 * _TIB // 8, link_bw, network_bw, memory_bw,
                    pcie_bw, {"fp32": fp32, "bf16": bf16})


PRESETS: Mapping[str, Hardware] = {
    "A100": _gpu("A100", 80, 2.04e12, 3e11, 2.5e10, 3.2e10, 19.5e12, 312e12),
    "H100": _gpu("H100", 80, 3.35e12, 4.5e11, 5e10, 6.4e10, 67e12, 989e12),
    "H200": _gpu("H200", 141, 4.8e12, 4.5e11, 5e10, 6.4e10, 67e12, 989e12),
    "B200": _gpu("B200", 180, 8e12, 9e11, 5e10, 6.4e10, 75e12, 2250e12),
}
_FORM = ("use RANKSxMEMORY or RANKSxPRESET with options, such as 8x80GB, 16xH100 or "
         "64x80GB:local=8,host=1TB,inter=50GB/s")
_OPTIONS = ("local", "host", "ssd", "intra", "inter", "device")


def parse_topology(text: str) -> Hardware:
    """The machine that a ``--topology`` describes; ``ConfigError`` names what cannot be understood."""
    head, _, tail = text.partition(":")
    match = re.fullmatch(r"(?:(\d+)x)?([\w.]+)", head.strip())
    if match is None:
        raise ConfigError(f"--topology {text!r} cannot be read; {_FORM}")
    ranks = int(match[1]) if match[1] else None
    if ranks is not None and not 1 <= ranks <= _MAX_RANKS:
        raise ConfigError(f"--topology {text!r} has {ranks} ranks; 1 to {_MAX_RANKS} can be planned for")
    options = _options(text, tail)
    hardware = _base(text, match[2], options.pop("device", "cuda"))
    ranks = ranks or hardware.world_size
    local = int(options.pop("local", min(ranks, hardware.ranks_per_host)))
    if not 1 <= local <= ranks or ranks % local:
        raise ConfigError(f"--topology {text!r}: local={local} ranks a host do not divide {ranks} ranks; use a divisor")
    if hardware.name == "auto" and hardware.device == "cpu":
        hardware = replace(hardware, device_bytes=hardware.host_bytes // local)
    names = {"host": "host_bytes", "ssd": "ssd_bytes", "intra": "intra_bw", "inter": "inter_bw"}
    return replace(hardware, name=text, world_size=ranks, ranks_per_host=local,
                   **{names[key]: value for key, value in options.items()})


def _base(text: str, what: str, device: Literal["cpu", "cuda"]) -> Hardware:
    if what == "auto":
        return local_hardware()
    if what.upper() in PRESETS:
        return PRESETS[what.upper()]
    if not what[0].isascii() or not what[0].isdigit():
        near = difflib.get_close_matches(what.upper(), PRESETS, n=1, cutoff=0.5)
        raise ConfigError(f"--topology {text!r}: {what!r} is neither a size nor one of {', '.join(PRESETS)} and auto; "
                          + (f"did you mean {near[0]}?" if near else _FORM))
    size = parse_bytes(what, f"--topology {text!r}")
    if device == "cpu":
        return Hardware(text, 1, _MAX_RANKS, "cpu", size, size, 0, _CPU_BW, _CPU_BW / 10, _CPU_BW, _CPU_BW, _CPU_FLOPS)
    return replace(PRESETS["A100"], device_bytes=size)


def _options(text: str, tail: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in filter(None, tail.split(",")):
        key, separator, value = item.partition("=")
        if key not in _OPTIONS or not separator:
            raise ConfigError(f"--topology {text!r}: {item!r} is not an option; options are {', '.join(_OPTIONS)}, "
                              "such as local=8")
        where = f"--topology {text!r}: {key}"
        if key == "device":
            if value not in ("cpu", "cuda"):
                raise ConfigError(f"{where}={value} is unknown; use cpu or cuda")
            options[key] = value
        elif key == "local":
            if not value.isascii() or not value.isdigit():
                raise ConfigError(f"{where}={value} is not a number of ranks; use a divisor of them, such as 8")
            options[key] = int(value)
        elif key in ("host", "ssd"):
            options[key] = parse_bytes(value, where)
        else:
            options[key] = _rate(value, where)
    return options


def parse_bytes(text: str, where: str) -> int:
    """"80GB" in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])i?B", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{where}: {text!r} is not a size; use a number above 0 and MB, GB or TB, such as 80GB")
    return int(float(match[1]) * 1024 ** (1 + "KMGT".index(match[2].upper())))


def _rate(text: str, where: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])(b|B)(?:/s|ps)?", text)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{where}={text!r} is not a rate; use a number above 0 and GB/s or Gb/s, such as 50GB/s")
    return float(match[1]) * 1e6 * 1000 ** "MGT".index(match[2]) / (8 if match[3] == "b" else 1)


@cache
def local_hardware() -> Hardware:
    """This machine: its GPUs, or its cores as ranks; the rate between two ranks is measured, once."""
    gpus = machine.gpus()
    if not gpus:
        ranks, memory = machine.num_cores(), machine.memory_bytes()
        rate = probe_bandwidth("cpu", 2) or _CPU_BW / 10
        return Hardware("auto", ranks, _MAX_RANKS, "cpu", memory // ranks, memory, 0, rate, rate, _CPU_BW, _CPU_BW,
                        _CPU_FLOPS, cores=ranks)
    like = next((preset for name, preset in PRESETS.items() if name in gpus[0]["name"]), PRESETS["A100"])
    return replace(like, name="auto", world_size=len(gpus), ranks_per_host=len(gpus),
                   device_bytes=gpus[0]["memory_bytes"], host_bytes=machine.memory_bytes(),
                   intra_bw=probe_bandwidth("cuda", len(gpus)) or like.intra_bw)
