"""A bundle: all that serving a trained ranker needs, as safetensors, Arrow and JSON; nothing in it can run code.

``tower.safetensors`` holds the tower, ``tables.safetensors`` the embedding tables and the encoded features of items and
users, ``encoders.json`` and ``vocabulary.*.arrow`` how raw values become rows, ``schema.json`` the schema,
``bundle.json`` the rest, with the hash of each file. The version is the hash of it all.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from longer_rec.batch import RequestBatch
from longer_rec.checkpoint.manifest import FileEntry, fsync_directory, hash_file, write_durably
from longer_rec.config import Config, build_config
from longer_rec.data.encode import Encoder, Vocabulary, load_encoders, save_encoders
from longer_rec.data.history import Dataset
from longer_rec.data.instance_sources import InstancesConfig, StoredInstances
from longer_rec.errors import ConfigError, LongerRecError, ServeError
from longer_rec.model.inputs import InputWidths
from longer_rec.model.jagged import request_of
from longer_rec.model.linear import lay_out_for_inference
from longer_rec.model.tower import AnyTowerConfig, build_tower
from longer_rec.ranker import Ranker
from longer_rec.schema import Schema, load_schema

MANIFEST = "bundle.json"
PROFILE = "profile"  # the encoder of raw user ids to the rows of their stored features
EmbeddingKind = Literal["float32", "float16", "int8"]


class BundleManifest(Config):
    """``user_name`` is the feature that is the user's id itself, ``source`` the run, step and data the bundle was made
    from, ``measured`` what the export found. ``instances`` says which store of instances the model reads, with which
    fingerprint; it is no part of the bundle."""

    format: Literal[1] = 1
    name: str
    model: AnyTowerConfig
    max_events: int
    widths: InputWidths
    pooling: Literal["sum", "mean"]
    embeddings: EmbeddingKind
    user_name: str | None
    duplicates: Literal["keep", "drop", "refuse"]
    instances: InstancesConfig | None = None
    instances_fingerprint: str | None = None
    source: dict[str, Any]
    measured: dict[str, Any] = {}
    files: dict[str, FileEntry] = {}

    @property
    def version(self) -> str:
        """Changes with every byte of the bundle."""
        return _hash(self.model_dump(mode="json"))


@dataclass(frozen=True)
class ProfileColumn:
    """A user feature of the users that the data knew; the ids of row r are ``ids[offsets[r]:offsets[r + 1]]``.

    Row 0 is any other user: unseen in a single-valued feature, no value in a multi-valued one.
    """

    ids: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory. ``items`` maps a feature to its ids by row of the item, ``item_dense_VF`` likewise."""

    manifest: BundleManifest
    version: str
    ranker: Ranker
    encoders: dict[str, Encoder]
    items: dict[str, Tensor]
    item_dense_VF: Tensor
    profiles: dict[str, ProfileColumn]
    instances: StoredInstances | None = None

    @property
    def schema(self) -> Schema:
        return self.ranker.schema

    @property
    def users(self) -> Vocabulary:
        """Raw ids of the users that the data knew."""
        vocabulary = self.encoders[PROFILE]
        assert isinstance(vocabulary, Vocabulary)
        return vocabulary

    @property
    def tables(self) -> "ServedTables":
        assert isinstance(self.ranker.sparse, ServedTables)
        return self.ranker.sparse


class ServedTables(nn.Module):
    """The tables of a bundle as plain tensors: a lookup is an index_select, 20 us where TorchRec's takes a millisecond.

    int8 rows come with a scale and a lowest value each, as ``quantise_rows`` made them.
    """

    def __init__(self, schema: Schema, pooling: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.schema, self.pooling = schema, pooling
        for key, value in tensors.items():
            self.register_buffer(key, value)

    def forward(self, batch: RequestBatch) -> dict[str, Tensor]:
        """What ``SparseTables.forward`` returns."""
        return {**self.users(batch), **self.candidates(batch.candidates)}

    def users(self, batch: RequestBatch) -> dict[str, Tensor]:
        """The part that ``encode`` reads."""
        embedded = {f"history.{feature.name}": self._rows(feature.table, batch.history[feature.name])
                    for feature in self.schema.history_features}
        for feature in self.schema.user_features:
            rows_TE = self._rows(feature.table, batch.users[feature.name])
            if feature.multi_valued:
                length_B = batch.user_length_B[feature.name]
                sum_BE = rows_TE.new_zeros(batch.num_requests, rows_TE.shape[1])
                rows_TE = sum_BE.index_add(0, request_of(length_B, rows_TE.shape[0]), rows_TE)
                if self.pooling == "mean":
                    rows_TE = rows_TE / length_B.clamp(min=1).unsqueeze(1)
            embedded[f"users.{feature.name}"] = rows_TE
        return embedded | {f"instances.{feature.name}": self._rows(feature.table, batch.instances[feature.name])
                           for feature in self.schema.instance_features}

    def candidates(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part that ``score`` reads."""
        return {f"candidates.{feature.name}": self._rows(feature.table, ids[feature.name])
                for feature in self.schema.item_features}

    def _rows(self, table: str, id_T: Tensor) -> Tensor:
        rows_TE = self.get_buffer(table).index_select(0, id_T)
        if rows_TE.dtype != torch.uint8:
            return rows_TE.float()
        span = self.get_buffer(f"{table}:range").index_select(0, id_T)
        return torch.addcmul(span[:, :1], rows_TE.float(), span[:, 1:])


def quantise_rows(weight_VE: Tensor) -> tuple[Tensor, Tensor]:
    """(uint8 V x E, V x 2 lowest value and step): 256 equal steps between the extremes of each row."""
    low_V, high_V = weight_VE.amin(1, keepdim=True), weight_VE.amax(1, keepdim=True)
    step_V = ((high_V - low_V) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    return ((weight_VE - low_V) / step_V).round_().to(torch.uint8), torch.cat([low_V, step_V], dim=1)


def write_bundle(directory: Path, manifest: BundleManifest, dataset: Dataset, tower: Mapping[str, Tensor],
                 tables: Mapping[str, Tensor]) -> None:
    """Fill an empty directory with the content of a bundle; ``commit_bundle`` makes it whole."""
    (directory / "schema.json").write_text(dataset.schema.model_dump_json(indent=1), encoding="utf-8")
    order = dataset.raw_users.arg_sort()
    save_encoders({**dataset.encoders, PROFILE: Vocabulary(dataset.raw_users.gather(order))}, directory)
    tensors = {f"item/{name}": torch.from_numpy(np.array(ids, np.int32)) for name, ids in dataset.items.items()}
    tensors["item_dense"] = torch.from_numpy(np.ascontiguousarray(dataset.item_dense))
    for name, ids, offsets in _profile_columns(dataset, order.to_numpy()):
        tensors |= {f"user/{name}": torch.from_numpy(ids), f"user_offsets/{name}": torch.from_numpy(offsets)}
    for name, weight_VE in tables.items():
        if manifest.embeddings == "int8":
            tensors[f"table/{name}"], tensors[f"table/{name}:range"] = quantise_rows(weight_VE)
        else:
            tensors[f"table/{name}"] = weight_VE.to(getattr(torch, manifest.embeddings)).contiguous()
    safetensors.torch.save_file(tensors, directory / "tables.safetensors")
    safetensors.torch.save_file({name: value.contiguous() for name, value in tower.items()},
                                directory / "tower.safetensors")


def _profile_columns(dataset: Dataset, order: Any) -> Any:
    """(name, ids, offsets) of each user feature, rows in the order of the sorted raw ids, after row 0."""
    for feature in dataset.schema.user_features:
        column = dataset.users[feature.name]
        if column.offsets is None:
            yield feature.name, np.append(0, column.ids[order]).astype(np.int32), np.arange(len(order) + 2)
        else:
            parts = [column.ids[column.offsets[user]:column.offsets[user + 1]] for user in order]
            ends = np.cumsum([0, 0, *map(len, parts)])
            yield feature.name, np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32), ends


def commit_bundle(directory: Path, manifest: BundleManifest) -> BundleManifest:
    """Hash and fsync every file, then write the manifest; the manifest as written."""
    files = {}
    for path in sorted(directory.iterdir()):
        if path.name != MANIFEST:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[path.name] = hash_file(path)
    manifest = manifest.model_copy(update={"files": files})
    content = {**manifest.model_dump(mode="json"), "version": manifest.version}
    write_durably(directory / MANIFEST, json.dumps(content, indent=1) + "\n")
    fsync_directory(directory)
    return manifest


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_bundle_manifest(path: Path) -> tuple[BundleManifest, str]:
    """The manifest of a bundle and its version; ``ServeError`` when there is none or a damaged one."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, found = content.pop("version"), _hash(content)
        manifest = build_config(BundleManifest, content, str(path / MANIFEST))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, LongerRecError) as error:
        raise ServeError(f"{path} is no bundle that this version reads ({MANIFEST}: {error}); make one with "
                         "`longer-rec export RUN --out BUNDLE`") from None
    if version != found:
        raise ServeError(f"{path / MANIFEST} is damaged: its version is not the hash of its content; export again")
    return manifest, version


def load_bundle(path: Path, device: torch.device | str = "cpu", store: Path | None = None,
                dtype: torch.dtype = torch.float32) -> Bundle:
    """Read a bundle, every byte held against its hash; ``ServeError`` names the file that is not what was written.

    ``store``: where the store of instances lies now, by default where it lay at the export. ``dtype``: of the operands
    of the tower's linear maps.
    """
    manifest, version = read_bundle_manifest(path)
    if dtype != torch.float32 and manifest.model.kind != "longer":
        raise ConfigError(f"{path} holds a {manifest.model.kind}, which is served in fp32 alone; leave precision out")
    content = {name: _verified(path / name, entry) for name, entry in manifest.files.items()}
    instances = _open_instances(path, manifest, store)
    try:
        tables = safetensors.torch.load(content.pop("tables.safetensors"))
        weights = safetensors.torch.load(content.pop("tower.safetensors"))
        schema, encoders = load_schema(path / "schema.json"), load_encoders(path)
        tower = build_tower(manifest.model, manifest.widths, len(schema.tasks), manifest.max_events)
        tower.load_state_dict(weights)
        lay_out_for_inference(tower, dtype)
        of = {kind: {key.partition("/")[2]: value for key, value in tables.items() if key.startswith(f"{kind}/")}
              for kind in ("table", "item", "user", "user_offsets")}
        ranker = Ranker(schema, ServedTables(schema, manifest.pooling, of["table"]), tower)
        return Bundle(manifest, version, ranker.to(device).eval().requires_grad_(False), encoders,
                      {name: ids.long() for name, ids in of["item"].items()}, tables["item_dense"],
                      {name: ProfileColumn(ids.long(), of["user_offsets"][name]) for name, ids in of["user"].items()},
                      instances)
    except (KeyError, ValueError, RuntimeError, safetensors.SafetensorError, LongerRecError) as error:
        raise ServeError(f"{path} does not hold what its manifest promises: {' '.join(str(error).split())[:200]}; "
                         "export it again with this version") from None


def _open_instances(path: Path, manifest: BundleManifest, store: Path | None) -> StoredInstances | None:
    """The store that the model reads; ``ServeError`` when it is another than the model was trained with."""
    if manifest.instances is None:
        if store is not None:
            raise ServeError(f"instances={store}: the model of {path} reads no store of instances; leave it out")
        return None
    config = manifest.instances if store is None else manifest.instances.model_copy(update={"store": store})
    source = StoredInstances(config, load_schema(path / "schema.json"), load_encoders(path))
    if source.fingerprint != manifest.instances_fingerprint:
        raise ServeError(f"{config.store} is not the store that the model of {path} was trained with (fingerprint "
                         f"{str(source.fingerprint)[:12]}, not {str(manifest.instances_fingerprint)[:12]}); name the "
                         "right one with instances=STORE")
    return source


def _verified(path: Path, entry: FileEntry) -> bytes:
    """The bytes of a file; small ones are read again by their own readers."""
    if path.name != os.path.basename(path):
        raise ServeError(f"{path} is no plain file name; export the bundle again")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ServeError(f"cannot read {path}: {error.strerror}; export the bundle again") from None
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ServeError(f"{path} is damaged: its SHA-256 is not the manifest's; export the bundle again")
    return content
