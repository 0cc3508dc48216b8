"""The manifest: what a prepared dataset was made from, what it holds, and the hash of every file of it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from longer_rec.data.files import hash_file
from longer_rec.data.sources import LogSource
from longer_rec.data.tables import Tables
from longer_rec.data.writer import StoreReport
from longer_rec.errors import DataError

MANIFEST = "manifest.json"
FORMAT = 1


def _hash_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def settings_hash(log: LogSource, inputs: dict[str, str]) -> str:
    """SHA-256 over the description, the input files' hashes and the format: equal if the result would be."""
    return _hash_json([FORMAT, log.config.model_dump(mode="json"), log.settings, inputs])


def make_manifest(log: LogSource, key: str, inputs: dict[str, str], tables: Tables, report: StoreReport
                  ) -> dict[str, Any]:
    """All of a manifest but what ``write_manifest`` reads off the files."""
    return {"format": FORMAT, "settings_hash": key, "name": log.config.name, "description": log.config.description,
            "inputs": inputs, "config": log.config.model_dump(mode="json"), "settings": log.settings,
            "summary": {**report.as_dict(), **tables.notes, "tables": tables.schema.num_rows}}


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Hash every file of ``directory`` and write the manifest beside them."""
    files = {path.name: hash_file(path) for path in sorted(directory.iterdir()) if path.is_file()}
    content = {**content, "files": files, "fingerprint": _hash_json([FORMAT, content["settings_hash"], files])}
    content = json.loads(json.dumps(content))
    content["manifest_sha256"] = _hash_json(content)
    (directory / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a prepared dataset; ``DataError`` when there is none, or a damaged one."""
    path = directory / MANIFEST
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("manifest_sha256")
    except FileNotFoundError:
        raise DataError(f"{directory} is no prepared dataset: it has no {MANIFEST}; "
                        "run `longer-rec prepare ... --out` for it") from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{directory} is no prepared dataset ({MANIFEST}: {type(error).__name__}: {error}); "
                        "run `longer-rec prepare ... --out` for it") from None
    if digest != _hash_json(content):
        raise DataError(f"{path} is damaged: it does not match its own hash; prepare the data again")
    if content["format"] != FORMAT:
        raise DataError(f"{directory} has format {content['format']}, this version reads {FORMAT}; prepare it again")
    return content


def verify_files(directory: Path, files: dict[str, str]) -> None:
    """``DataError`` names the first file that is missing or differs from its hash."""
    for name, digest in files.items():
        if hash_file(directory / name) != digest:
            raise DataError(f"{directory / name} is damaged: its SHA-256 differs from the manifest's; "
                            "remove the folder and prepare the data again")
