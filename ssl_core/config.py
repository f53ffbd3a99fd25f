"""Configuration at the edge: YAML files, frozen pydantic models, `key.sub=value` overrides, no interpolation.

Unknown keys are refused with the nearest known name. Inside the library, functions take plain arguments.
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError
from pydantic.config import JsonDict

from storage.errors import ConfigError
from storage.objects.open import refuse_credentials, refuse_signature

LONGEST_EDGE, MOST_VOXELS = 4096, 1 << 30
"""Of a crop; no device holds the activations of a larger one."""
LEAST_SCALE, MOST_SCALE = 0.1, 10.0
"""Of the box that a view shows, to the view: beyond, a view shows less than a few voxels, or hardly any of them."""


class Config(BaseModel):
    """Base of every configuration model: frozen, closed to unknown keys, and every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def _crop(value: tuple[int, int, int]) -> tuple[int, int, int]:
    if not all(1 <= edge <= LONGEST_EDGE for edge in value) or math.prod(value) > MOST_VOXELS:
        raise ValueError(f"edges from 1 to {LONGEST_EDGE} voxels, at most {MOST_VOXELS} voxels in all")
    return value


CropSize = Annotated[tuple[int, int, int], AfterValidator(_crop)]
"""Voxels of a crop along D, H, W."""


def _name(value: str) -> str:
    if value != value.strip() or not value.isprintable() or not 0 < len(value) <= LONGEST_TEXT:
        raise ValueError(f"a name of 1 to {LONGEST_TEXT} printable characters, without spaces around it")
    return value


LONGEST_TEXT = 200
Name = Annotated[str, AfterValidator(_name)]
"""Of something in a store, such as a split or a label map."""
Fingerprint = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]{1,128}$")]
"""Of a manifest; it becomes part of an object's key."""

C = TypeVar("C", bound=Config)

LATER: JsonDict = {"later": True}
"""For `json_schema_extra` of a setting that came after version 0.1.0: digests leave it out while it has its default, so
that what an earlier version wrote is gone on from."""


MOST_NODES = 100_000
"""Of a YAML text, each alias counted as what it stands for; a few lines of nested aliases could mean billions."""
LARGEST_NUMBER = 1e15
"""Of a setting that is no whole number, in either direction; whole ones have 64 bits, as seeds do. Our choice."""


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: a key once, `1e-3` a number, and neither `1:30` nor `010` a number of another base."""

    def get_single_node(self) -> yaml.Node | None:
        """The document, checked as a whole: also what only an alias or `<<` brings into a mapping."""
        root: yaml.Node | None = super().get_single_node()
        if root is not None:
            _check_node(root, {})
        return root


def _check_node(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many nodes it stands for, aliases written out.

    Args:
        node: A part of a document.
        sizes: What the parts before it came to; 0 for those that it lies in.

    Raises:
        ConstructorError: a key twice, an alias of what it lies in, an explicit tag on something else, too many nodes.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise _refusal(node, "an alias of the value that it lies in: write the value out")
        return sizes[id(node)]
    sizes[id(node)] = 0
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(getattr(key, "value", "")), key.start_mark.line + 1
            if name in lines:
                raise _refusal(key, f"key {name!r} twice, on lines {lines[name]} and {line}: keep one")
            lines[name] = line
            parts += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        parts = list(node.value)
    elif node.tag in _NUMBERS and not any(form.match(node.value) for form in _FORMS):
        raise _refusal(node, f"{node.value!r} tagged as a number: write a plain one")
    size = 1 + sum(_check_node(part, sizes) for part in parts)
    if size > MOST_NODES:
        raise _refusal(node, f"{size} values with all aliases written out, where {MOST_NODES} are the most")
    sizes[id(node)] = size
    return size


class _RefusedText(yaml.constructor.ConstructorError):
    """What is wrong in our own words, which say the line where it helps."""


def _refusal(node: yaml.Node, words: str) -> _RefusedText:
    return _RefusedText(None, None, words, node.start_mark)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _NUMBERS]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FORMS = (
    re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"),
    re.compile(
        r"""^([-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?
        |[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
)
_Loader.add_implicit_resolver(_NUMBERS[0], _FORMS[0], list("-+0123456789"))
_Loader.add_implicit_resolver(_NUMBERS[1], _FORMS[1], list("-+0123456789."))


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
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            found = str(error.problem) if isinstance(error, _RefusedText) else " ".join(str(error).split())
            raise ConfigError(name, expected="a YAML mapping", found=found) from error
        data = {} if data is None else data
        if not isinstance(data, dict):
            raise ConfigError(name, expected="a YAML mapping at the top", found=type(data).__name__)
    for item in overrides:
        _override(data, item, kind)
    return parse(kind, data, name)


def parse(kind: type[C], data: dict[str, Any], name: str = "config") -> C:
    """Validate a mapping; see `load`."""
    for text in _texts(data):
        refuse_signature(text)
        if "://" in text:
            refuse_credentials(text)
    _check_values(kind, data, name)
    try:
        config = kind.model_validate(data)
        _check_sizes(name, flatten(resolved(config)))
        _check_texts(config, name)
        return config
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
        is_group = isinstance(first["input"], dict) and first["type"] == "value_error"  # whose message names the values
        found = "settings that do not fit together" if is_group else repr(first["input"])[:120]
        raise ConfigError(thing, expected=message, found=found) from error


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
    """First 16 hex digits of the SHA-256 of the resolved configuration; see `LATER`."""
    text = json.dumps(digested(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digested(config: Config) -> dict[str, Any]:
    """`resolved` without settings of `LATER` that have their default."""
    values = resolved(config)
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if field.json_schema_extra == LATER and value == field.get_default(call_default_factory=True):
            del values[name]
        elif isinstance(value, Config):
            values[name] = digested(value)
    return values


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML, keys in the order of their definition."""
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True)


def _override(data: dict[str, Any], item: str, kind: type[BaseModel] | None = None) -> None:
    """Apply `key.sub=value` to `data`, in place. A group of `kind` is changed in those settings that are named."""
    key, separator, text = item.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {item!r}", expected="key=value or key.sub=value", found=item)
    node = data
    *parents, last = key.split(".")
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {item!r}", expected=f"{part!r} to be a group of keys", found=repr(child))
        node, kind = child, _group(kind, part)
    try:
        value = _yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = error.problem if isinstance(error, _RefusedText) else text
        raise ConfigError(f"override {item!r}", expected="a YAML value after '='", found=str(problem)) from error
    if re.search(r"\s#", text) and not (isinstance(value, str) and "#" in value):
        raise ConfigError(
            f"override {item!r}",
            expected="a value without a comment",
            found="' #', from which on YAML leaves out the rest",
            remedy="leave the comment out, or put quotes around a value that holds it",
        )
    _put(node, last, value, _group(kind, last))


def _put(data: dict[str, Any], key: str, value: Any, kind: type[BaseModel] | None) -> None:
    """Set a key; of a group whose settings `kind` names, those that the value does not name stay."""
    before = data.get(key)
    if kind is None or not isinstance(before, dict) or not isinstance(value, dict):
        data[key] = value
        return
    for name, item in value.items():
        _put(before, name, item, _group(kind, str(name)))


def _group(kind: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    """Model of a group of settings; None for a value, and for a mapping whose keys are free."""
    field = None if kind is None else kind.model_fields.get(name)
    leaves = _leaves(field.annotation) if field else []
    return next((leaf for leaf in leaves if isinstance(leaf, type) and issubclass(leaf, BaseModel)), None)


def _yaml(text: str) -> Any:
    return _own(yaml.load(text, _Loader))


def _own(value: Any) -> Any:
    """A copy in which each alias is a value of its own: to replace a key in one place leaves the others."""
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    return [_own(item) for item in value] if isinstance(value, list) else value


def _check_sizes(name: str, flat: Mapping[str, Any]) -> None:
    """Refuse numbers that no setting has, whatever its own bounds are.

    Raises:
        ConfigError: names the key.
    """
    for key, value in flat.items():
        for item in value if isinstance(value, list) else [value]:
            whole = isinstance(item, int)
            if isinstance(item, int | float) and abs(item) > (2**63 - 1 if whole else LARGEST_NUMBER):
                most = "of at most 64 bits" if whole else f"of at most {LARGEST_NUMBER:g}"
                raise ConfigError(f"{name}: {key}", expected=f"a number {most}", found=str(item)[:40])


def _check_texts(value: Any, name: str, path: str = "") -> None:
    """Refuse texts and keys without a letter, but for texts whose default that is.

    An unset variable of a shell makes one. It would name nothing, or the folder above.

    Raises:
        ConfigError: names the key.
    """
    thing = f"{name}: {path}" if path else name
    if isinstance(value, str) and not value.strip():
        remedy = "write one; leave the key out where nothing is meant"
        raise ConfigError(thing, expected="a text that is not empty", found=repr(value), remedy=remedy)
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        value = {key: item for key, item in value if item != "" or fields[key].default != ""}
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not str(key).strip():
                raise ConfigError(thing, expected="keys that are not empty", found=repr(key), remedy="name it")
            _check_texts(item, name, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check_texts(item, name, f"{path}.{number}")


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
