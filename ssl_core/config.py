"""Configuration at the edge: YAML files, frozen pydantic models, `key.sub=value` overrides, no interpolation.

Unknown keys are refused with the nearest known name. Inside the library, functions take plain arguments.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from storage.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration model: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


C = TypeVar("C", bound=Config)


def load(kind: type[C], source: str | Path | dict[str, Any], overrides: Iterable[str] = ()) -> C:
    """Read a YAML file or a mapping into `kind`, with `key.sub=value` overrides applied last.

    Raises:
        ConfigError: unreadable file, unknown key, or a value of the wrong kind; names the key.
    """
    name = "config"
    if isinstance(source, dict):
        data = json.loads(json.dumps(source))
    else:
        name = str(source)
        try:
            data = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(name, expected="a readable YAML file", found=str(error.strerror)) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(name, expected="a YAML mapping", found=" ".join(str(error).split())) from error
        data = {} if data is None else data
        if not isinstance(data, dict):
            raise ConfigError(name, expected="a YAML mapping at the top", found=type(data).__name__)
    for item in overrides:
        _override(data, item)
    return parse(kind, data, name)


def parse(kind: type[C], data: dict[str, Any], name: str = "config") -> C:
    """Validate a mapping; see `load`."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        # An unknown key first: where it is a misspelt one, the missing right one is only its consequence.
        first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        path = ".".join(str(p) for p in first["loc"])
        thing = f"{name}: {path}" if path else name
        if first["type"] == "extra_forbidden":
            places = {place.rpartition(".")[2]: place for place in _places(kind) if place != path}
            near = difflib.get_close_matches(str(first["loc"][-1]), places, n=1)
            # A right name in the wrong group is said with its group.
            meant = places[near[0]] if near and near[0] == first["loc"][-1] else next(iter(near), "")
            hint = f"did you mean {meant!r}?" if meant else "remove it; `tomoscale plan KIND CONFIG` prints every key"
            key = f"unknown key {first['loc'][-1]!r}"
            raise ConfigError(thing, expected="a known key", found=key, remedy=hint) from error
        if first["type"] == "missing":
            remedy = "set it in the file or as key=value"
            raise ConfigError(thing, expected="a value", found="none", remedy=remedy) from error
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").partition(", unable")[0]
        raise ConfigError(thing, expected=message, found=repr(first.get("input"))[:120]) from error


def overridden(overrides: Iterable[str]) -> dict[str, Any]:
    """`key.sub=value` items as nested mappings, the later one winning.

    Raises:
        ConfigError: an item of another form.
    """
    data: dict[str, Any] = {}
    for item in overrides:
        _override(data, item)
    return data


def resolved(config: Config) -> dict[str, Any]:
    """The whole configuration, defaults included, as plain JSON-able values."""
    return config.model_dump(mode="json")


def digest(config: Config) -> str:
    """First 16 hex digits of the SHA-256 of the resolved configuration."""
    text = json.dumps(resolved(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML, keys in the order of their definition."""
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True)


def _override(data: dict[str, Any], item: str) -> None:
    key, separator, text = item.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {item!r}", expected="key=value or key.sub=value", found=item)
    node = data
    *parents, last = key.split(".")
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {item!r}", expected=f"{part!r} to be a group of keys", found=repr(child))
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {item!r}", expected="a YAML value after '='", found=text) from error


def _places(kind: type[BaseModel], group: str = "") -> Iterator[str]:
    """Every key with the groups it is in; those further up come last."""
    for name, field in kind.model_fields.items():
        for sub in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(sub, type) and issubclass(sub, BaseModel):
                yield from _places(sub, f"{group}{name}.")
    yield from (f"{group}{name}" for name in kind.model_fields)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
