"""What commands write beside their tables: a directory for it, and pages made of this package's templates."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from longer_rec.errors import ConfigError, DataError

Section = dict[str, Any]


def make_directory(out: Path, stale: Iterable[Path] = ()) -> None:
    """Made before the work, which may take minutes, and without ``stale``, files of an earlier call."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in stale:
            path.unlink(missing_ok=True)
        fault = None if os.access(out, os.W_OK) else "no permission"
    except OSError as error:
        fault = str(error)
    if fault:
        raise ConfigError(f"--out {out} cannot be written: {fault}; give another directory")


def write_page(path: Path, template: str, **content: Any) -> None:
    """Fill a template of this package; the file is there whole or not at all."""
    pages = jinja2.Environment(loader=jinja2.PackageLoader("longer_rec.report", "."), autoescape=True,
                               undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = pages.get_template(template).render(**content)
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; free space or correct its permissions") from None
