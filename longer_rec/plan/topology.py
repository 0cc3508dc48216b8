"""Machines by name or by size: what ``--topology`` understands.

    8x80GB                                      8 GPUs of 80 GB on one host
    64x80GB:local=8,host=1TB,intra=300GB/s,inter=50GB/s
    8xH100:ssd=3TB,ssd_bw=4GB/s                 with SSDs of 3 TB in each host for tables
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
2024; "DGX H100/H200" and "DGX B200", 2024. FP32 / dense BF16 on tensor cores. Host memory 2 TB.)

No table lies on SSD unless ``ssd`` says how much there is for it in a host. Rows are read at random, 4 KiB at a time;
unless ``ssd_bw`` says otherwise each GPU has one U.2 drive, as in those systems, which reads 900,000 such blocks a
second (3.69 GB/s; Samsung's announcement of the PM9A3, May 2020).
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from longer_rec.errors import ConfigError
from longer_rec.runtime import machine
from longer_rec.sparse.doctor import probe_bandwidth
from longer_rec.sparse.options import Hardware

MAX_RANKS = 4096
_GIB = 1 << 30
# What a rate means where nothing was given for a CPU: one core of a 2024 server, and memory of which it has a share.
_CPU_FLOPS = {"fp32": 2.5e10, "bf16": 1e11}
_CPU_BW = 1e10
SSD_BW = 900_000 * 4096.0


def _gpu(name: str, memory: int, memory_bw: float, link_bw: float, network_bw: float, pcie_bw: float, fp32: float,
         bf16: float) -> Hardware:
    return Hardware(name, 8, 8, "cuda", memory * _GIB, 2048 * _GIB, link_bw, network_bw, memory_bw, pcie_bw,
                    {"fp32": fp32, "bf16": bf16})


PRESETS: Mapping[str, Hardware] = {
    "A100": _gpu("A100", 80, 2.04e12, 3e11, 2.5e10, 3.2e10, 19.5e12, 312e12),
    "H100": _gpu("H100", 80, 3.35e12, 4.5e11, 5e10, 6.4e10, 67e12, 989e12),
    "H200": _gpu("H200", 141, 4.8e12, 4.5e11, 5e10, 6.4e10, 67e12, 989e12),
    "B200": _gpu("B200", 180, 8e12, 9e11, 5e10, 6.4e10, 75e12, 2250e12),
}
_FORM = ("use RANKSxMEMORY or RANKSxPRESET with options, such as 8x80GB, 16xH100 or "
         "64x80GB:local=8,host=1TB,inter=50GB/s")
_OPTIONS = ("local", "host", "intra", "inter", "ssd", "ssd_bw", "device")


def parse_topology(text: str) -> Hardware:
    """The machine that a ``--topology`` describes; ``ConfigError`` names what cannot be understood."""
    where = f"--topology {text!r}"
    match = re.fullmatch(r"(?:(\d{1,99})x)?([\w.]+)(?::(.+))?", text.strip(), re.ASCII | re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{where} cannot be read; {_FORM}")
    options = _options(where, match[3] or "")
    hardware = replace(_base(where, match[2], options.get("device")), name=text)
    hardware = replace(hardware, world_size=int(match[1] or hardware.world_size))
    local = options.get("local")
    if local is not None:
        if not re.fullmatch(r"\d{1,9}", local, re.ASCII) or not 1 <= int(local) <= hardware.world_size:
            raise ConfigError(f"{where}: local={local} is no number of ranks a host; use 1 to {hardware.world_size}")
        hardware = replace(hardware, ranks_per_host=int(local))
    if "host" in options:
        if hardware.device == "cpu" and hardware.memory_bytes:
            raise ConfigError(f"{where}: ranks on a CPU have the host memory they are given; leave host= out")
        hardware = replace(hardware, host_bytes=parse_bytes(options["host"], f"{where}: host"))
    if "ssd" in options:
        if hardware.device == "cpu":
            raise ConfigError(f"{where}: FBGEMM keeps tables on SSD for GPUs alone; leave ssd={options['ssd']} out, or "
                              "plan for GPUs")
        hardware = replace(hardware, ssd_bytes=parse_bytes(options["ssd"], f"{where}: ssd"), ssd_bw=SSD_BW)
    if "ssd_bw" in options:
        if "ssd" not in options:
            raise ConfigError(f"{where}: ssd_bw={options['ssd_bw']} has no effect without ssd; add it, such as ssd=4TB")
        hardware = replace(hardware, ssd_bw=_rate(options["ssd_bw"], f"{where}: ssd_bw"))
    intra, inter = (_rate(options[name], f"{where}: {name}") if name in options else getattr(hardware, f"{name}_bw")
                    for name in ("intra", "inter"))
    return check_ranks(replace(hardware, intra_bw=intra, inter_bw=inter), where)


def check_ranks(hardware: Hardware, where: str) -> Hardware:
    """The same, if it is of whole hosts."""
    ranks, local = hardware.world_size, hardware.local_size
    if not 1 <= ranks <= MAX_RANKS:
        raise ConfigError(f"{where} has {ranks} ranks; 1 to {MAX_RANKS} can be planned for")
    if ranks % local:
        divisor = max(number for number in range(1, local) if ranks % number == 0)
        raise ConfigError(f"{where}: {ranks} ranks are not whole hosts of {local}; use {ranks - ranks % local} or "
                          f"{ranks - ranks % local + local} ranks, or :local={divisor} with the topology")
    return hardware


def _base(where: str, what: str, device: str | None) -> Hardware:
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"{where}: device={device} is unknown; use cpu or cuda")
    known = local_hardware() if what.lower() == "auto" else PRESETS.get(what.upper())
    if known is not None:
        if device not in (None, known.device):
            raise ConfigError(f"{where}: {what} is {known.device}; leave device={device} out, or give a size such as "
                              f"8x80GB:device={device}")
        return known
    if not what[0].isdigit():
        near = difflib.get_close_matches(what.upper(), PRESETS, n=1, cutoff=0.5)
        raise ConfigError(f"{where}: {what!r} is neither a size nor one of {', '.join(PRESETS)} and auto; "
                          + (f"did you mean {near[0]}?" if near else _FORM))
    size = parse_bytes(what, where)
    if device == "cpu":
        return Hardware("", 1, MAX_RANKS, "cpu", size, size, _CPU_BW, _CPU_BW / 10, _CPU_BW, _CPU_BW, _CPU_FLOPS)
    return replace(PRESETS["A100"], memory_bytes=size, world_size=1)


def _options(where: str, tail: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in tail.split(",") if tail else ():
        key, _, value = item.partition("=")
        if key not in _OPTIONS or not value:
            raise ConfigError(f"{where}: {item!r} is not an option; options are {', '.join(_OPTIONS)}, such as local=8")
        if key in options:
            raise ConfigError(f"{where}: {key} is given twice; keep one of them")
        options[key] = value
    return options


def parse_bytes(text: str, where: str) -> int:
    """"80GB" in bytes."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([MGT])i?B", text, re.ASCII | re.IGNORECASE)
    size = int(float(match[1]) * 1024 ** (2 + "MGT".index(match[2].upper()))) if match else 0
    if not 1 << 20 <= size <= 1 << 50:
        raise ConfigError(f"{where}: {text!r} is not a size from 1MB to 1024TB; use a number and MB, GB or TB, such as "
                          "80GB")
    return size


def _rate(text: str, where: str) -> float:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([MGT])(b|B)(?:/s|ps)?", text, re.ASCII)
    rate = float(match[1]) * 1e6 * 1000 ** "MGT".index(match[2]) / (8 if match[3] == "b" else 1) if match else 0
    if not 1e6 <= rate <= 1e15:
        raise ConfigError(f"{where}={text!r} is not a rate from 1MB/s to 1000TB/s; use a number and GB/s or Gb/s, such "
                          "as 50GB/s")
    return rate


@cache
def local_hardware() -> Hardware:
    """This machine: its GPUs, or its cores as ranks; the rate between two ranks is measured, once."""
    gpus = machine.gpus()
    if not gpus:
        ranks, rate = machine.num_cores(), probe_bandwidth("cpu", 2) or _CPU_BW / 10
        return Hardware("auto", ranks, MAX_RANKS, "cpu", 0, machine.memory_bytes(), rate, rate, _CPU_BW, _CPU_BW,
                        _CPU_FLOPS, cores=ranks)
    like = next((preset for name, preset in PRESETS.items() if name in gpus[0]["name"]), PRESETS["A100"])
    return replace(like, name="auto", world_size=len(gpus), ranks_per_host=len(gpus),
                   memory_bytes=gpus[0]["memory_bytes"], host_bytes=machine.memory_bytes(),
                   intra_bw=probe_bandwidth("cuda", len(gpus)) or like.intra_bw)
