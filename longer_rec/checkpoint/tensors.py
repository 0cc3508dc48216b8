"""Tensors to and from torch.distributed.checkpoint, which stores nothing else here."""

import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorBase
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from longer_rec.checkpoint.manifest import TensorEntry
from longer_rec.errors import CheckpointError

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
# What the metadata of tensors alone consists of; anything else in a pickle is code from a stranger.
_ALLOWED = {
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "_MEM_FORMAT_ENCODING")),
    *(("torch", name) for name in _DTYPES),
}


def flatten(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Nested dictionaries of tensors as one, keys joined by "/"; empty dictionaries vanish.

    A rank that holds no shard of a table has no optimizer state for it, and DCP cannot load what is empty.
    """
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        elif hasattr(value, "dtype") and hasattr(value, "size"):
            flat[f"{prefix}{key}"] = value
        else:
            raise TypeError(f"state '{prefix}{key}' is a {type(value).__name__}; only tensors are stored, the rest "
                            "belongs into the manifest's extra")
    return flat


def describe(state: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Type and whole shape of each tensor."""
    return {key: TensorEntry(dtype=str(value.dtype).removeprefix("torch."), shape=tuple(value.size()))
            for key, value in state.items()}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of tensors needs")
        return super().find_class(module, name)


class _TensorReader(dcp.FileSystemReader):
    """DCP's reader, without the code that a pickled .metadata could run."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            try:
                metadata: Metadata = _MetadataUnpickler(file).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
                raise CheckpointError(f"{path} is not the metadata of a checkpoint: {error}; do not use it") from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TensorWriter(dcp.FileSystemWriter):
    """DCP's writer, with the true cause of a fault: on a full disk torch closes its archive and complains of that."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class Staging:
    """Memory on the CPU for one copy of a state, kept from save to save: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def copy(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state`` as it is now, in buffers that the next call overwrites."""
        staged = {key: self._copy_shards(key, value) if isinstance(value, ShardedTensor) else self._copy(key, 0, value)
                  for key, value in state.items()}
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return staged

    def _copy_shards(self, key: str, value: ShardedTensor) -> Tensor:
        shards = [Shard(self._copy(key, index, shard.tensor), shard.metadata)
                  for index, shard in enumerate(value.local_shards())]
        # The base class: ShardedTensor itself wants shards on the device of their metadata, and a group.
        return ShardedTensorBase._init_from_local_shards_and_global_metadata(shards, value.metadata())

    def _copy(self, key: str, index: int, value: Tensor) -> Tensor:
        buffer = self._buffers.get((key, index))
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[key, index] = buffer
        return buffer.copy_(value.detach(), non_blocking=True)


def write_tensors(directory: Path, state: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Each rank writes and fsyncs its shards; a collective call. ``CheckpointError`` on every rank if one fails."""
    writer = _TensorWriter(directory, single_file_per_rank=True, sync_files=True)
    try:
        dcp.save(dict(state), storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(f"cannot write {directory}: {_first_cause(error)}") from None


def read_tensors(directory: Path, state: Mapping[str, Tensor], alone: bool = False) -> None:
    """Fill the tensors of ``state`` in place, whatever shards they were written from; collective unless ``alone``."""
    no_dist = alone or not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            # DCP guesses aloud that one process is meant, although it was told so.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(dict(state), storage_reader=_TensorReader(directory), no_dist=no_dist)
    except CheckpointException as error:
        raise CheckpointError(f"cannot read {directory}: {_first_cause(error)}") from None


def iterate_tensors(directory: Path, entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor whole, one after the other, in one process."""
    for key, entry in entries.items():
        value = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        read_tensors(directory, {key: value}, alone=True)
        yield key, value


def _first_cause(error: CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
