"""What ``prepare`` starts from: a description, with the frames it describes read one way for files and generators."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from longer_rec.data.describe import EntityConfig, LogConfig
from longer_rec.data.files import count_rows, hash_inputs, read_frames, resolve_files
from longer_rec.errors import DataError


@dataclass(frozen=True)
class LogSource:
    """A described log: files below ``root``, or frames from ``generate`` (a function of the settings alone)."""

    config: LogConfig
    root: Path
    generate: Callable[[], Iterator[pl.DataFrame]] | None = None
    settings: str = ""
    generated_rows: int = 0

    def input_hashes(self) -> dict[str, str]:
        """SHA-256 of every input file by name."""
        sources = (self.config.events, self.config.items.source, self.config.users.source)
        hashes: dict[str, str] = {}
        for files in sources:
            hashes |= hash_inputs(files, self.root) if files else {}
        return hashes

    def estimated_rows(self) -> int:
        """About how many rows the log has: exact for Parquet, from the size of the files for CSV."""
        if self.config.events is None:
            return self.generated_rows
        return sum(count_rows(self.config.events, path) for path in resolve_files(self.config.events, self.root))

    def event_frames(self, columns: list[str]) -> Iterator[tuple[Path, pl.DataFrame]]:
        if self.generate is not None:
            for frame in self.generate():
                yield Path(self.config.name), frame.select(columns)
        elif self.config.events is not None:
            yield from read_frames(self.config.events, self.root, columns)

    def entity_frame(self, entity: EntityConfig) -> pl.DataFrame | None:
        """All rows of an entity's own files under the key's name; ``DataError`` for a key that comes twice."""
        if entity.source is None or entity.key is None:
            return None
        columns = [entity.key, *(column for feature in entity.features for column in feature.source_columns)]
        columns = list(dict.fromkeys(columns))
        frames = [frame for _, frame in read_frames(entity.source, self.root, columns)]
        frame = pl.concat(frames, how="vertical_relaxed") if frames else pl.DataFrame(schema=columns)
        frame = frame.filter(pl.col(entity.key).is_not_null())
        doubled = frame.filter(pl.col(entity.key).is_duplicated())[entity.key]
        if len(doubled):
            raise DataError(f"{entity.source.files[0]}: {entity.key}={doubled[0]!r} has "
                            f"{(doubled == doubled[0]).sum()} rows; keep one row per {entity.key}")
        return frame
