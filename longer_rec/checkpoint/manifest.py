"""What a checkpoint holds, and the proof that it is what was written."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pydantic

from longer_rec.config import Config, build_config
from longer_rec.errors import CheckpointError, ConfigError

MANIFEST = "manifest.json"


class FileEntry(Config):
    """A file of the checkpoint."""

    num_bytes: int = pydantic.Field(ge=0)
    sha256: str


class TensorEntry(Config):
    """A whole tensor, however many ranks hold it."""

    dtype: str
    shape: tuple[int, ...]


class Manifest(Config):
    """Everything of a checkpoint but the values of its tensors.

    ``digests`` are those of the tensors in memory when they were saved (runtime/digest.py). ``extra`` is the
    caller's: data cursor and fingerprint, world size, and the like.
    """

    version: Literal[2] = 2
    step: int = pydantic.Field(ge=0)
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    digests: dict[str, str]
    extra: dict[str, Any]


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(num_bytes=file.tell(), sha256=digest)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write and fsync ``manifest.json``; it carries a digest of itself."""
    content = manifest.model_dump(mode="json")
    text = json.dumps({**content, "digest": _digest(content)}, indent=1) + "\n"
    write_durably(directory / MANIFEST, text)
    fsync_directory(directory)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint; ``CheckpointError`` when it is missing, damaged or of another version."""
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else repr(error)
        raise CheckpointError(f"{path} is no manifest of a checkpoint ({reason}); use another checkpoint") from None
    if digest != _digest(content):
        raise CheckpointError(f"{path} is damaged: it does not match its own digest; use another checkpoint")
    try:
        return build_config(Manifest, content, str(path))
    except ConfigError as error:
        raise CheckpointError(f"{error}; it was written by another version: use that one") from None


def damaged_files(directory: Path, files: Iterable[tuple[str, FileEntry]]) -> list[str]:
    """A sentence for each file that is missing, cut or altered."""
    faults = []
    for name, entry in files:
        path = directory / name
        try:
            found = hash_file(path)
        except OSError as error:
            faults.append(f"{path} cannot be read: {error.strerror}")
            continue
        if found.num_bytes != entry.num_bytes:
            faults.append(f"{path} has {found.num_bytes} bytes, {entry.num_bytes} were written")
        elif found.sha256 != entry.sha256:
            faults.append(f"{path} is damaged: its SHA-256 is not the one that was written")
    return faults


def write_durably(path: Path, text: str) -> None:
    """Write a small file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def fsync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
