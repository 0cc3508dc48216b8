"""A study's file, and the grid of jobs that it describes."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, Self

import pydantic

from longer_rec.config import Config, apply_overrides, build_config, load_config, read_yaml
from longer_rec.errors import ConfigError
from longer_rec.job import Job

Overrides = tuple[str, ...]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_OWN_KEYS = {"seed": "list seeds", "name": "name the model", "run_dir": "set out", "baselines": "add them to models"}
Quantity = Literal["max_events", "dense_parameters", "gflops"]


class StoreSpec(Config):
    """A store of instance tokens that models of the study read: a source model, trained on the first seed, compresses.

    ``overrides`` of base and ``common`` make the source; ``run`` takes the source of another store instead.
    ``compress`` are the command's settings.
    """

    overrides: Overrides = ()
    run: str | None = None
    compress: Overrides = ()


class StudyConfig(Config):
    """``models`` crossed with ``data``, the axes of ``grid`` and ``seeds``; every name maps to overrides of ``base``.

    What each key means is told in docs/studies.md.
    """

    name: str
    base: Path = pydantic.Field(description="configuration of a run; relative to the study's file")
    out: Path | None = pydantic.Field(None, description="None: runs/studies/<name>")
    common: Overrides = ()
    data: dict[str, Overrides] = {}
    models: dict[str, Overrides]
    grid: dict[str, dict[str, Overrides]] = {}
    stores: dict[str, StoreSpec] = {}
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str | None = pydantic.Field(None, description="the model that differences are to")
    budget_s: float | None = pydantic.Field(None, gt=0, description="training seconds of each run")
    probe_steps: int = pydantic.Field(40, ge=1, description="steps from which a model's speed is measured")
    search: dict[str, Overrides] = {}
    search_budget_s: float | None = pydantic.Field(None, gt=0)
    search_metric: Literal["auc", "logloss"] = "auc"
    scaling: tuple[Quantity, ...] = pydantic.Field((), description="what curves of AUC and LogLoss are fitted against")
    parallel: int | None = pydantic.Field(None, ge=1, description="runs at a time; None: one for each core")

    @property
    def directory(self) -> Path:
        return self.out or Path("runs/studies") / self.name

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        names = [self.name, *self.data, *self.models, *self.grid, *self.search, *self.stores,
                 *(name for points in self.grid.values() for name in points)]
        for name in names:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} becomes a directory; use letters, digits and . _ + -")
        for key in ("models", "seeds"):
            if not getattr(self, key):
                raise ValueError(f"{key} is empty; name at least one")
        for name, store in self.stores.items():
            if store.run is not None and (store.overrides or store.run not in self.stores):
                raise ValueError(f"stores.{name}: run={store.run!r} takes the source of another store, and overrides "
                                 "would make one; name one of stores, and leave overrides out")
        overrides = [self.common, *self.data.values(), *self.models.values(), *self.search.values(),
                     *(store.overrides for store in self.stores.values()),
                     *(each for points in self.grid.values() for each in points.values())]
        for override in (text for texts in overrides for text in texts):
            if (key := re.split(r"[=.]", override)[0]) in _OWN_KEYS:
                raise ValueError(f"{override!r}: a study gives each run its {key} itself; {_OWN_KEYS[key]}")
        if empty := [axis for axis, points in self.grid.items() if not points]:
            raise ValueError(f"grid.{empty[0]} has no point; name one or remove it")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} holds a seed twice, and a run is a function of its seed; "
                             "give each once")
        if self.reference is not None and self.reference not in self.models:
            near = difflib.get_close_matches(self.reference, self.models, n=1)
            raise ValueError(f"reference={self.reference!r} is no model; " + (
                f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(self.models)}"))
        if bool(self.search) != (self.search_budget_s is not None):
            raise ValueError("search and search_budget_s belong together; set both or neither")
        return self


@dataclass(frozen=True)
class Variant:
    """What a line of the table is about: one model at one point of the grid, with what its runs are made of."""

    data: str | None
    model: str
    point: dict[str, str]
    folder: Path
    content: Mapping[str, Any]

    @property
    def label(self) -> str:
        where = [*([self.data] if self.data else []), *(f"{axis} {name}" for axis, name in self.point.items())]
        return f"{self.model} ({', '.join(where)})" if where else self.model

    def merged(self, overrides: Sequence[str]) -> dict[str, Any]:
        """Its content with overrides on top."""
        try:
            return apply_overrides(self.content, overrides)
        except ConfigError as error:
            raise ConfigError(f"models.{self.label}: {error}") from None

    def job(self, run_dir: Path, *overrides: str) -> Job:
        """The job of one of its runs; ``ConfigError`` names the model and the point."""
        content = self.merged(overrides) | {"name": self.label, "run_dir": str(run_dir)}
        return build_config(Job, content, f"models.{self.label}")


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study in a YAML file, its ``base`` made relative to where we are."""
    study = load_config(StudyConfig, path, overrides)
    return study.model_copy(update={"base": path.parent / study.base})


def source_job(study: StudyConfig, name: str) -> Job:
    """The job of the source model of a store."""
    store = study.stores[name]
    content = apply_overrides(read_yaml(study.base) | {"baselines": {}}, [*study.common, *store.overrides])
    run = {"name": f"source {name}", "run_dir": str(study.directory / "sources" / name), "seed": study.seeds[0]}
    return build_config(Job, content | run, f"stores.{name}")


def variants(study: StudyConfig) -> list[Variant]:
    """All lines of the table, in its order; ``ConfigError`` for overrides that no job can be built from.

    Later overrides win: those of ``common``, then the model's, the data set's, the axes' in their order. Baselines of
    ``base`` are not run: a study compares its own models.
    """
    base = read_yaml(study.base) | {"baselines": {}}
    return list(_variants(study, base))


def _variants(study: StudyConfig, base: Mapping[str, Any]) -> Iterator[Variant]:
    axes = [[(axis, name) for name in points] for axis, points in study.grid.items()]
    data: dict[str | None, Overrides] = dict(study.data.items()) or {None: ()}
    for data_name, point, (model, of_model) in product(data, product(*axes), study.models.items()):
        of_point = [override for axis, name in point for override in study.grid[axis][name]]
        folder = Path(*([data_name] if data_name else []), model, *(f"{axis}={name}" for axis, name in point))
        overrides = [text.replace("$stores", str(study.directory / "stores"))
                     for text in (*study.common, *of_model, *data[data_name], *of_point)]
        variant = Variant(data_name, model, dict(point), folder, base)
        variant = replace(variant, content=variant.merged(overrides))
        for choice in ((), *study.search.values()):
            variant.job(study.directory, *choice)
        if study.budget_s is not None:
            _check_epochs(variant, base)
        yield variant


def _check_epochs(variant: Variant, base: Mapping[str, Any]) -> None:
    """Epochs follow from the budget; others that are written would be ignored, unless they are 0."""
    epochs = variant.content.get("train", {}).get("epochs")
    if epochs not in (0, base.get("train", {}).get("epochs")):
        raise ConfigError(f"models.{variant.label}: train.epochs={epochs} has no effect beside budget_s; leave one of "
                          "them out, or set it to 0 for a model that is not trained")
