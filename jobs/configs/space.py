"""The space of a search: any setting of a trial by its dotted path, with what it is drawn from."""

import difflib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_origin

from pydantic import BaseModel

from ssl_core.config import Config, parse, resolved
from ssl_core.downstream.finetune import FinetuneConfig
from ssl_core.downstream.settings import HeadConfig
from storage.errors import ConfigError

ENCODER = "encoder"
KINDS = {
    "uniform": "[lowest, highest], all numbers between equally likely",
    "loguniform": "[lowest, highest], above 0, all factors equally likely",
    "quniform": "[lowest, highest, step], as uniform, in steps from the lowest",
    "randint": "[lowest, highest], whole numbers, both ends among them",
    "choice": "a list, each equally likely",
    "grid": "a list, each tried; with `algorithm: grid`",
}
"""What a setting may be drawn from, as YAML writes it."""
_LISTS = ("choice", "grid")
_MOST_TOGETHER = 256  # combinations of ends and choices that are built before a job is sent; our choice
_INSIDE = 0.381966  # of the way from the lowest to the highest: no round number, so that whole ones show
_NO_HEADS = "a search compares segmenters only"
_NOT_OF_A_TRIAL = {
    "finetune.epochs": "how long a trial may be is its budget, and the rungs are counted in it",
    "finetune.task": _NO_HEADS,
    **{f"finetune.head.{name}": _NO_HEADS for name in HeadConfig.model_fields},
    "finetune.schedule": "what changes while a trial runs is for scheduler pbt to find",
}


@dataclass(frozen=True)
class Dimension:
    """One setting of a trial and what it is drawn from.

    Attributes:
        path: Dotted, such as `finetune.lr`; `encoder` is the model to start from.
        kind: One of `KINDS`.
        low: Lowest value; 0 of a list.
        high: Highest value; 0 of a list.
        step: Between neighbours of `quniform`; else 0.
        values: Of a list.
    """

    path: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0
    values: tuple[Any, ...] = ()

    @property
    def is_list(self) -> bool:
        """Whether the values are listed one by one."""
        return self.kind in _LISTS

    def probes(self) -> tuple[Any, ...]:
        """Values that stand for all: each of a list, both ends of a range and a number between."""
        if self.is_list:
            return self.values
        if self.kind == "randint":
            return tuple({int(self.low): None, int(self.high): None})
        if self.kind == "quniform":
            return tuple({self.low: None, self.low + self.step: None, self.high: None})
        return tuple({self.low: None, self.low + _INSIDE * (self.high - self.low): None, self.high: None})

    def holds(self, value: Any) -> bool:
        """Whether it could have been drawn."""
        if self.is_list:
            return any(same(value, item) for item in self.values)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self.kind == "randint" and value != int(value):
            return False
        return self.low <= value <= self.high


Settings: TypeAlias = Mapping[str, Any]
"""Values of a trial by dotted path."""


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal as JSON, so that `1` and `true` are not."""
    return json.dumps(one) == json.dumps(other)


def setting_paths(kind: type[BaseModel] = FinetuneConfig, prefix: str = "finetune.") -> Iterator[str]:
    """Dotted path of each setting that a trial could have, budget among them."""
    for name, field in kind.model_fields.items():
        models = [t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_group(t)]
        if models and get_origin(field.annotation) is not tuple:
            yield from setting_paths(models[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def with_settings(base: FinetuneConfig, settings: Settings, name: str = "finetune") -> FinetuneConfig:
    """The configuration with a trial's values in place.

    Args:
        base: What holds for every trial.
        settings: By dotted path; the encoder's is left out.
        name: What messages call the result.

    Raises:
        ConfigError: together they are no configuration.
    """
    data = resolved(base)
    for path, value in settings.items():
        if path == ENCODER:
            continue
        *groups, last = path.removeprefix("finetune.").split(".")
        node = data
        for group in groups:
            if node.get(group) is None:
                node[group] = {}
            node = node[group]
        node[last] = value
    return parse(FinetuneConfig, data, name)


def dimensions(space: Mapping[str, Any], job: type[Config]) -> tuple[Dimension, ...]:
    """What each key of a space is drawn from, in the order of the file.

    Args:
        space: As YAML gives it: dotted path to `{KIND: NUMBERS or LIST}`.
        job: The configuration whose keys are no settings of a trial.

    Raises:
        ConfigError: names the key.
    """
    return tuple(_dimension(path, value, job) for path, value in space.items())


def require_buildable_space(base: FinetuneConfig, dims: Sequence[Dimension]) -> None:
    """Refuse values that a setting itself refuses: each end and each choice alone, then together.

    Raises:
        ConfigError: names the key and the value.
    """
    own = [dim for dim in dims if dim.path != ENCODER]
    for dim in own:
        for value in dim.probes():
            _build(base, {dim.path: value}, dim.kind)
    together = itertools.product(*(dim.probes() for dim in own))
    for values in itertools.islice(together, _MOST_TOGETHER):
        _build(base, dict(zip((dim.path for dim in own), values, strict=True)), "")


def _build(base: FinetuneConfig, settings: Settings, kind: str) -> None:
    try:
        with_settings(base, settings)
    except ConfigError as error:
        words = ", ".join(f"{path} {value}" for path, value in settings.items())
        whole = next(iter(settings.values()))
        inside = kind in ("uniform", "loguniform") and isinstance(whole, float) and "integer" in error.expected
        raise ConfigError(
            f"space: {words}",
            expected=error.expected,
            found=f"{error.found}, from {error.thing}",
            remedy="use randint, which draws whole numbers" if inside else "leave out what the setting refuses",
        ) from error


def _dimension(path: str, value: Any, job: type[Config]) -> Dimension:
    thing = f"space: {path}"
    _require_setting(path, job)
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in KINDS:
        raise ConfigError(
            thing,
            expected=f"one of {', '.join(KINDS)} with its numbers or its list, such as {{loguniform: [1e-4, 1e-2]}}",
            found=json.dumps(value, default=str)[:120],
            remedy=_near_kind(value),
        )
    kind, given_values = next(iter(value.items()))
    if not isinstance(given_values, list | tuple):
        raise ConfigError(f"{thing}.{kind}", expected=KINDS[kind], found=repr(given_values)[:120])
    if kind in _LISTS:
        return _list(path, kind, given_values)
    if path == ENCODER:
        raise ConfigError(thing, expected="choice or grid, with model URIs or `none`", found=kind)
    return _range(path, kind, given_values)


def _near_kind(value: Any) -> str:
    names = [str(key) for key in value] if isinstance(value, Mapping) else []
    near = [hit for name in names for hit in difflib.get_close_matches(name, KINDS, n=1)]
    return f"did you mean {near[0]!r}?" if near else ""


def _list(path: str, kind: str, items: Sequence[Any]) -> Dimension:
    texts = [json.dumps(item) for item in items]
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if not items or twice is not None:
        raise ConfigError(
            f"space: {path}.{kind}",
            expected="at least one choice, all different",
            found="none" if twice is None else f"{twice} twice",
        )
    return Dimension(path, kind, values=tuple(items))


_RANGES: dict[str, tuple[int, Callable[..., bool]]] = {
    "uniform": (2, lambda low, high: low < high),
    "loguniform": (2, lambda low, high: 0 < low < high),
    "quniform": (3, lambda low, high, step: low < high and 0 < step <= high - low),
    "randint": (2, lambda low, high: low < high and low == int(low) and high == int(high)),
}


def _range(path: str, kind: str, items: Sequence[Any]) -> Dimension:
    count, holds = _RANGES[kind]
    numbers = [x for x in items if isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)]
    if len(items) != count or len(numbers) != count or not holds(*numbers):
        raise ConfigError(
            f"space: {path}.{kind}",
            expected=f"{KINDS[kind]}, the lower first",
            found=json.dumps(list(items), default=str)[:120],
        )
    if kind == "quniform":
        low, high, step = numbers
        return Dimension(path, kind, low, low + step * math.floor((high - low) / step + 1e-9), step)
    return Dimension(path, kind, numbers[0], numbers[1])


def _require_setting(path: str, job: type[Config]) -> None:
    """Refuse what is no setting of a trial, with the near ones named.

    Raises:
        ConfigError: names the key.
    """
    paths = (ENCODER, *(p for p in setting_paths() if p not in _NOT_OF_A_TRIAL))
    if path in paths:
        return
    thing, top = f"space: {path}", path.partition(".")[0]
    expected = "a setting of a trial: `encoder`, or one of `finetune`"
    if reason := _NOT_OF_A_TRIAL.get(path):
        raise ConfigError(thing, expected=expected, found=path, remedy=f"leave it out: {reason}")
    if top in job.model_fields and top != "finetune":
        remedy = f"set {top} in the configuration itself: all trials of a search share it"
        raise ConfigError(thing, expected=expected, found=f"{path}, which is not a trial's own", remedy=remedy)
    by_last: dict[str, str] = {}
    for known_path in paths:
        by_last.setdefault(known_path.rpartition(".")[2], known_path)
    near = difflib.get_close_matches(path, paths, n=3)
    near += [by_last[n] for n in difflib.get_close_matches(path.rpartition(".")[2], by_last, n=3)]
    names = ", ".join(dict.fromkeys(near))
    remedy = f"did you mean {names}?" if names else "`tomoscale plan tune CONFIG` prints every key below `finetune`"
    raise ConfigError(thing, expected=expected, found=f"unknown key {path!r}", remedy=remedy)
