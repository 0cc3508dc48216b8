"""The frozen base of every configuration, and its way in and out of YAML.

Each part of the package keeps its own ``Config`` subclass beside the code that reads it; ``job.py`` joins them
into the root. Unknown keys, wrong types and impossible values end in one ``ConfigError`` line.
"""

import difflib
import hashlib
import json
import re
import types
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeGuard, TypeVar, Union, get_args, get_origin

import pydantic
import yaml

from longer_rec.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")

_SHOWN_FAULTS = 4


class Config(pydantic.BaseModel):
    """Frozen, strict about keys, validated once at construction."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, refusing a key that is written twice."""


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    doubled = sorted({str(key) for key in keys if keys.count(key) > 1})
    if doubled:
        raise ConfigError(f"{node.start_mark.name} line {node.start_mark.line + 1}: key {doubled[0]!r} is given twice; "
                          "keep one of them")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


# YAML 1.1 reads 1e-3 as text for want of a dot; people write it as a number.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ``ConfigError`` when there is no file, no YAML or no mapping in it."""
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _UniqueKeyLoader)  # noqa: S506 - a SafeLoader subclass
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, a mapping of keys to values is needed")
    return content


def apply_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``content`` with each ``key.sub=value`` set; values are read as YAML, so ``a=1e-3`` and ``b=[1, 2]`` work."""
    merged: dict[str, Any] = json.loads(json.dumps(content, default=str))
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise ConfigError(f"override {override!r} is not of the form key.sub=value")
        *parents, leaf = path.split(".")
        node = merged
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"override {override!r}: {parent!r} is {child!r}, not a group of keys")
            node = child
        try:
            node[leaf] = yaml.load(text, _UniqueKeyLoader)  # noqa: S506
        except yaml.YAMLError:
            raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None
        if isinstance(node[leaf], dict) and (
                tight := [key for key, value in node[leaf].items() if value is None and ":" in str(key)]):
            key, _, value = str(tight[0]).partition(":")
            raise ConfigError(f"override {override!r}: {tight[0]!r} has no value; write {{{key}: {value or '...'}}}, "
                              "with a space behind the colon")
    return merged


def build_config(config_type: type[ConfigT], content: Mapping[str, Any], source: str) -> ConfigT:
    """Validate ``content``; ``ConfigError`` names ``source``, the key and the value, and offers the nearest key.

    Values travel as JSON, so that YAML's lists become tuples and ``"3"`` is no integer.
    """
    try:
        return config_type.model_validate_json(json.dumps(content, default=str), strict=True)
    except pydantic.ValidationError as error:
        faults = list(_explain(config_type, content, error))
        more = [f"and {len(faults) - _SHOWN_FAULTS} more faults"] * (len(faults) > _SHOWN_FAULTS)
        raise ConfigError(f"{source}: " + "; ".join([*faults[:_SHOWN_FAULTS], *more])) from None


def load_config(config_type: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """The configuration in a YAML file with ``key.sub=value`` overrides on top."""
    return build_config(config_type, apply_overrides(read_yaml(path), overrides), str(path))


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML: every key, defaults included, in the order of definition."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)


def config_hash(config: Config) -> str:
    """SHA-256 of the canonical JSON: equal for equal settings, however they were written."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def flatten(content: Mapping[str, Any], skip: Container[str] = (), prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; without the keys in ``skip`` and all below them."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if (key := prefix + name) not in skip:
            flat |= flatten(value, skip, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def _explain(config_type: type[Config], content: Mapping[str, Any], error: pydantic.ValidationError) -> Iterator[str]:
    for item in error.errors(include_url=False):
        path, owner = _locate(config_type, item["loc"])
        key = ".".join(path) or "the configuration"
        if item["type"] == "extra_forbidden":
            known = list(owner.model_fields) if _is_model(owner) else []
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
            yield f"unknown key {key!r}; {remedy}"
        elif item["type"] == "missing":
            yield f"{key!r} is missing; add it"
        elif item["type"] == "union_tag_not_found":
            yield f"'{key}.kind' is missing; add it"
        elif item["type"] == "union_tag_invalid":
            yield f"{key}.kind={item['ctx']['tag']!r} is unknown; use one of {item['ctx']['expected_tags']}"
        elif item["type"] == "value_error":
            yield f"{key}: {item['msg'].removeprefix('Value error, ')}"
        else:
            yield f"{key}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _locate(config_type: Any, location: tuple[int | str, ...]) -> tuple[list[str], Any]:
    """The written path of pydantic's ``location``, which also names members of unions, and the type of its parent."""
    path: list[str] = []
    here = parent = config_type
    for part in location:
        members = _members(here)
        if len(members) > 1 and not isinstance(part, int):
            here = next((member for member in members if _label(member) == str(part).partition("[")[0]), here)
            continue
        path.append(str(part))
        parent = members[0] if members else None
        if _is_model(parent):
            field = parent.model_fields.get(str(part))
            here = field.annotation if field else None
        else:
            here = next((argument for argument in reversed(get_args(parent)) if argument is not Ellipsis), None)
    return path, parent


def _members(annotation: Any) -> list[Any]:
    """The types that a union may be, None left out; any other type is its own only member."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [argument for argument in get_args(annotation) if argument is not types.NoneType]
    return [annotation]


def _label(member: Any) -> str:
    """How pydantic's locations name a member of a union."""
    if _is_model(member) and "kind" in member.model_fields:
        return str(member.model_fields["kind"].default)
    return str(getattr(member, "__name__", member))


def _is_model(annotation: Any) -> TypeGuard[type[pydantic.BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)
