"""The logs that come with the package, each a description, and the way to one's own."""

from collections.abc import Callable, Sequence
from pathlib import Path

from longer_rec.config import load_config
from longer_rec.data.datasets import completejourney, movielens, synthetic
from longer_rec.data.describe import LogConfig
from longer_rec.data.sources import LogSource
from longer_rec.errors import ConfigError

BUILT_IN: dict[str, Callable[[Sequence[str]], LogSource]] = {
    "completejourney": completejourney.load,
    "movielens": movielens.load,
    "synthetic": synthetic.load,
}


def load_source(source: str, overrides: Sequence[str]) -> LogSource:
    """The built-in log of that name, or the one a YAML file describes; ``ConfigError`` when it is neither."""
    if source in BUILT_IN:
        return BUILT_IN[source](overrides)
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"source {source!r} is unknown; use {', '.join(BUILT_IN)} or the path of a .yaml file")
    config = load_config(LogConfig, path, overrides)
    if config.events is None:
        raise ConfigError(f"{path}: 'events' is missing; name the log's files in events.files")
    return LogSource(config, path.resolve().parent)
