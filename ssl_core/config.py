"""Configuration at the edge: YAML files, frozen pydantic models, `key.sub=value` overrides, no interpolation.

Unknown keys are refused with the nearest known name. Inside the library, functions take plain arguments.
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from storage.errors import ConfigError
from storage.objects.open import refuse_signature

LONGEST_EDGE, MOST_VOXELS = 4096, 1 << 30
"""Of a crop; no device holds the activations of a larger one."""


class Config(BaseModel):
    """Base of every configuration model: frozen, closed to unknown keys, and every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def _crop(value: tuple[int, int, int]) -> tuple[int, int, int]:
    if not all(1 <= edge <= LONGEST_EDGE for edge in value) or math.prod(value) > MOST_VOXELS:
        raise ValueError(f"edges from 1 to {LONGEST_EDGE} voxels, at most {MOST_VOXELS} voxels in all")
    return value


CropSize = Annotated[tuple[int, int, int], AfterValidator(_crop)]
"""Voxels of a crop along D, H, W."""

C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: a key once, `1e-3` a number, and neither `1:30` nor `010` a number of another base."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping whose keys differ; those that `<<` merges in may be replaced."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = str(getattr(key, "value", "")), key.start_mark.line + 1
            if name in lines:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {name!r} twice, on lines {lines[name]} and {line}: keep one", key.start_mark
                )
            lines[name] = line
        return super().construct_mapping(node, deep)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _NUMBERS]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_NUMBERS[0], re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _NUMBERS[1],
    re.compile(
        r"""^([-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?
        |[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


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
            data = _yaml(Path(source).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(name, expected="a readable YAML file", found=str(error.strerror)) from error
        except (yaml.YAMLError, ValueError) as error:
            problem = getattr(error, "problem", None) if "twice" in str(error) else None
            found = problem or " ".join(str(error).split())
            raise ConfigError(name, expected="a YAML mapping", found=found) from error
        data = {} if data is None else data
        if not isinstance(data, dict):
            raise ConfigError(name, expected="a YAML mapping at the top", found=type(data).__name__)
    for item in overrides:
        _override(data, item)
    return parse(kind, data, name)


def parse(kind: type[C], data: dict[str, Any], name: str = "config") -> C:
    """Validate a mapping; see `load`."""
    for text in _texts(data):
        refuse_signature(text)
    _check_values(kind, data, name)
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


def _texts(value: Any) -> Iterator[str]:
    """Every text in a nested value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


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
        node[last] = _yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) if "twice" in str(error) else None
        raise ConfigError(f"override {item!r}", expected="a YAML value after '='", found=problem or text) from error


def _yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _check_values(kind: Any, value: Any, name: str, path: str = "") -> None:
    """Refuse numbers that are infinite or none, and true and false where a number is meant.

    pydantic would take `true` for 1, and an infinite number wherever only a lower bound is given.

    Args:
        kind: Annotation of the value: a model, a type, or a form of several.
        value: What YAML gave.
        name: What messages call the source.
        path: Dotted keys that lead to the value.

    Raises:
        ConfigError: names the key.
    """
    thing = f"{name}: {path}" if path else name
    if isinstance(value, bool):
        if not {bool, Any} & set(_leaves(kind)):
            raise ConfigError(thing, expected="no true or false here", found=str(value).lower(), remedy="write a value")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(thing, expected="a finite number", found=str(value), remedy="write one, or leave the key out")
    elif isinstance(value, Mapping):
        models = [leaf for leaf in _leaves(kind) if isinstance(leaf, type) and issubclass(leaf, BaseModel)]
        fields = models[0].model_fields if models else {}
        for key, item in value.items():
            annotation = fields[key].annotation if key in fields else Any if models or Any in _leaves(kind) else kind
            _check_values(annotation, item, name, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check_values(kind, item, name, f"{path}.{number}")


def _leaves(kind: Any) -> list[Any]:
    """The plain types that an annotation is made of."""
    parts = [part for part in get_args(kind) if part is not Ellipsis]
    return [leaf for part in parts for leaf in _leaves(part)] if parts else [kind]


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
