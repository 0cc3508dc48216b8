"""torchx components: ``torchx run -s SCHEDULER launch/components.py:train --config configs/first.yaml --nproc 8``.

Imports neither torch nor longer_rec: torchx may live in an environment of its own, on a login node.
"""

import shlex
from pathlib import Path
from typing import Dict, List, Optional  # noqa: UP035 - torchx knows these and no other generic types

from torchx import specs
from torchx.specs.finder import ComponentValidationException


def train(
    *overrides: str,
    config: str,
    nproc: int = 2,
    nodes: int = 1,
    run_dir: str = "",
    cpu: int = 0,
    gpu: int = 0,
    mem_mb: int = 8192,
    image: str = "longer-rec",
    max_restarts: int = 3,
    retries: int = 3,
    port: int = 29500,
    save_s: int = 100,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Train a ranker with torchrun on one or more nodes.

    Args:
        overrides: settings on top of the configuration, after a lone "--": train.epochs=1
        config: YAML file, a path that holds here and in the job
        nproc: ranks on each node; on GPUs one for each
        nodes: number of nodes
        run_dir: run directory, on storage that all nodes share; the configuration's by default
        cpu: cores of each node; by default two for each rank, itself and its loading process
        gpu: GPUs of each node
        mem_mb: memory of each node
        image: container image with the package installed and the repository as its working directory
        max_restarts: how often torchrun starts all ranks again after one is lost
        retries: how often the scheduler starts the whole job again
        port: where the first of several nodes takes the others' calls
        save_s: seconds that ranks told to stop have for the step under way and the checkpoint
        env: further environment variables: NCCL_SOCKET_IFNAME=eth0,NCCL_DEBUG=WARN
        mounts: mounts of the container: type=volume,src=CLAIM,dst=/storage
    """
    _check(config, nproc=nproc, nodes=nodes, gpu=gpu, cpu=cpu, mem_mb=mem_mb, port=port, max_restarts=max_restarts,
           retries=retries, save_s=save_s)
    settings = [*([f"run_dir={run_dir}"] if run_dir else []), *overrides]
    # The scheduler tells the first node's name by an environment variable of its own, which only a shell expands;
    # a dollar that is no macro of torchx is doubled.
    endpoint = f'"$${{{specs.macros.rank0_env}:-localhost}}:{port}"' if nodes > 1 else "localhost:0"
    line = (f"exec torchrun --nnodes {nodes} --nproc_per_node {nproc} --max_restarts {max_restarts} "
            f"--rdzv_backend c10d --rdzv_endpoint {endpoint} --rdzv_id {specs.macros.app_id} "
            f"-m longer_rec train {shlex.join([config, *settings]).replace('$', '$$')}")
    return specs.AppDef(name="longer-rec", roles=[specs.Role(
        name="train", image=image, entrypoint="bash", args=["-c", line], num_replicas=nodes, max_retries=retries,
        port_map={"c10d": port} if nodes > 1 else {},
        resource=specs.Resource(cpu=cpu or 2 * nproc, gpu=gpu, memMB=mem_mb),
        mounts=specs.parse_mounts(mounts) if mounts else [],
        env={
            "OMP_NUM_THREADS": "1",
            # A rank that is restarted would otherwise dial its dead peer's old port (pytorch#135712).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            # torchrun kills ranks this long after it has passed SIGTERM on; 30 by default.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(save_s),
            # torchx has Slurm give each rank a pseudo-terminal, on which a bar would fill the log.
            "TTY_COMPATIBLE": "0", "COLUMNS": "140",
            **(env or {}),
        })])


def plan(
    *overrides: str,
    config: str,
    topology: str,
    out: str = "plan",
    cpu: int = 2,
    mem_mb: int = 16384,
    image: str = "longer-rec",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Plan the sharding for machines that are not there, on one node without a GPU.

    Args:
        overrides: settings on top of the configuration, and further options of `longer-rec plan`, after a lone "--"
        config: YAML file, a path that holds here and in the job
        topology: machines to plan for: 8x80GB, 16xH100
        out: directory for plan.json and plan.html
        cpu: cores of the node
        mem_mb: memory of the node
        image: container image with the package installed and the repository as its working directory
        mounts: mounts of the container: type=volume,src=CLAIM,dst=/storage
    """
    _check(config, cpu=cpu, mem_mb=mem_mb)
    arguments = ["plan", config, "--topology", topology, "--out", out, *overrides]
    return specs.AppDef(name="longer-rec", roles=[specs.Role(
        name="plan", image=image, entrypoint="longer-rec", args=[part.replace("$", "$$") for part in arguments],
        resource=specs.Resource(cpu=cpu, gpu=0, memMB=mem_mb), mounts=specs.parse_mounts(mounts) if mounts else [],
        env={"OMP_NUM_THREADS": "1"})])


def serve(
    *settings: str,
    bundle: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    cpu: int = 2,
    mem_mb: int = 8192,
    image: str = "longer-rec",
    retries: int = 3,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Serve an exported bundle over HTTP, on one node without a GPU.

    Args:
        settings: settings of `longer-rec serve` after a lone "--": cache_bytes=8GB
        bundle: directory that `longer-rec export` wrote, a path that holds in the job
        host: address to listen on; another than 127.0.0.1 needs tokens in the environment (docs/security.md)
        port: port to listen on
        cpu: cores of the node
        mem_mb: memory of the node
        image: container image with the package installed
        retries: how often the scheduler starts the server again
        env: further environment variables
        mounts: mounts of the container: type=volume,src=CLAIM,dst=/storage
    """
    _check_counts(cpu=cpu, mem_mb=mem_mb, port=port, retries=retries)
    arguments = ["serve", bundle, f"host={host}", f"port={port}", *settings]
    return specs.AppDef(name="longer-rec", roles=[specs.Role(
        name="serve", image=image, entrypoint="longer-rec", args=[part.replace("$", "$$") for part in arguments],
        port_map={"http": port}, max_retries=retries, resource=specs.Resource(cpu=cpu, gpu=0, memMB=mem_mb),
        mounts=specs.parse_mounts(mounts) if mounts else [], env={"OMP_NUM_THREADS": "1", **(env or {})})])


def _check(config: str, *, nproc: int = 1, gpu: int = 0, **counts: int) -> None:
    """Refuse here what would fail on the cluster, after a wait in its queue."""
    if not Path(config).is_file():
        raise ComponentValidationException(f"--config {config} is no file here ({Path.cwd()}); give the path of a YAML "
                                           "file that the job sees under the same path")
    if nproc < 1:
        raise ComponentValidationException(f"--nproc {nproc}: a node needs 1 rank or more")
    if 0 < gpu < nproc:
        raise ComponentValidationException(f"--nproc {nproc} with --gpu {gpu}: each rank needs a GPU of its own; "
                                           f"use --nproc {gpu}")
    _check_counts(gpu=gpu, **counts)


def _check_counts(**counts: int) -> None:
    lowest = {"nodes": 1, "mem_mb": 1, "port": 1, "save_s": 1}
    for name, value in counts.items():
        if value < lowest.get(name, 0) or (name == "port" and value > 65535):
            bound = "1 to 65535" if name == "port" else f"{lowest.get(name, 0)} or more"
            raise ComponentValidationException(f"--{name} {value}: use {bound}")
