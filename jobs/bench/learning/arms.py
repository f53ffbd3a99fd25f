"""The rows that `bench learn` compares: methods with settings that fit a small run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ssl_core.methods  # noqa: F401  registers them
from ssl_core.config import parse, resolved
from ssl_core.methods.base import method_class, method_names
from ssl_core.views.types import ViewSpec
from storage.errors import ConfigError

BASES = ("mocov2", "byol", "simclr")
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "aligned": {"restoration": {"w_consistency": 0.0}, "consistency": {"w_restore": 0.0}},
    "ibot": {
        "tokens": {"w_global": 0.0},
        "same_view": {"teacher_view": "same"},
        "restoration": {"w_restore": 1.0},
    },
}
"""Rows beside a method's own, such as `aligned:restoration`: what is left when a part is taken out, or is added."""


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        view_DHW: Voxels of a view.
        batch: Samples of a step.
        steps: Optimizer steps of a run.
        seeds: Of weights, crops and views, by number.
        fitted: Labelled subjects that the read-out is fitted on.
        scored: Subjects that it is scored on, at most.
        filters: Channels of the DynUNet's levels, each after the first at half the resolution.
        lr: Peak learning rate.
        norm: Of the network, a key of `NORMS`.
    """

    view_DHW: tuple[int, int, int] = (16, 24, 24)
    batch: int = 4
    steps: int = 100
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    fitted: int = 12
    scored: int = 32
    filters: tuple[int, ...] = (8, 16, 32, 64)
    lr: float = 2e-3
    norm: str = "instance"


NORMS: dict[str, Any] = {
    "instance": ("INSTANCE", {"affine": True}),
    "batch": ("BATCH", {"affine": True}),
    "group": ("GROUP", {"num_groups": 4, "affine": True}),
}
"""As MONAI's DynUNet is told them; instance norm is its default."""

FULL = Size()
QUICK = Size(steps=20, seeds=(0,), fitted=6, scored=12)


@dataclass(frozen=True)
class Arm:
    """A row of the table: a method with settings."""

    name: str
    method: str
    settings: dict[str, Any]


def arms(methods: Sequence[str], size: Size, overrides: Mapping[str, Any] | None = None) -> list[Arm]:
    """A row for each method at this size; `lrc` has one for each global method it is added to, and see `ABLATIONS`.

    Args:
        methods: Registered names, or names of rows such as `lrc+byol` and `aligned:restoration`; all when empty.
        size: Gives what does not fit a small run otherwise: views, blocks, widths of heads, the queue.
        overrides: Settings on top, for all rows.

    Raises:
        ConfigError: unknown names or settings.
    """
    listed = []
    for row in _rows(methods):
        name, _, part = row.partition(":")
        method, _, base = name.partition("+")
        settings = _small(method, size)
        if base:
            settings |= {"base": base, "base_settings": _small(base, size, views=False)}
        settings |= ABLATIONS[method][part] if part else {}
        listed.append(Arm(row, method, _merge(settings, overrides or {})))
        config_of(listed[-1])
    return listed


def config_of(arm: Arm) -> Any:
    """The method's configuration, checked."""
    return parse(method_class(arm.method).Config, arm.settings, f"settings of {arm.name}")


def spec_of(arm: Arm) -> ViewSpec:
    """The views that the method asks for."""
    spec: ViewSpec = method_class(arm.method).view_spec(config_of(arm))
    return spec


def queue_of(arm: Arm) -> int:
    """Entries of the method's queue, or of its base's; 0 without one."""
    settings = arm.settings | arm.settings.get("base_settings", {})
    return int(settings.get("queue", 0))


def _rows(names: Sequence[str]) -> list[str]:
    """The rows that names stand for; ablations only where they are named, or nothing is."""
    methods = {method: [f"lrc+{b}" for b in BASES] if method == "lrc" else [method] for method in method_names()}
    parts = {f"{method}:{part}": [f"{method}:{part}"] for method, ablations in ABLATIONS.items() for part in ablations}
    every = methods | {row: [row] for row in methods["lrc"]} | parts
    for name in names:
        if name not in every:
            raise ConfigError(f"method {name!r}", expected="one of " + ", ".join(every), found=repr(name))
    return [row for name in names or [*methods, *parts] for row in every[name]]


def _small(method: str, size: Size, *, views: bool = True) -> dict[str, Any]:
    """What a method has to be told at this size; everything else stays at its defaults."""
    fields = method_class(method).Config.model_fields
    fitting: dict[str, Any] = {"hidden": 128, "queue": 128, "block": 8, "locals": 2, "values": (1, 2)}
    if method == "lrc":
        fitting |= {"hidden": 32, "out": 32}  # its head is at full resolution
    if views:
        side = min(size.view_DHW)
        fitting |= {"crops": {"size_DHW": size.view_DHW}, "local": {"size_DHW": (side,) * 3}}
    settings: dict[str, Any] = {}
    for key in fields.keys() & fitting.keys():
        value = fitting[key]
        default = fields[key].get_default(call_default_factory=True)
        settings[key] = resolved(default) | value if isinstance(value, dict) else value
    if "parts" in fields:
        parts = fields["parts"].get_default(call_default_factory=True)
        settings["parts"] = [resolved(p) | {"settings": _small(p.name, size, views=False) | p.settings} for p in parts]
    return settings


def _merge(settings: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others on top, group by group."""
    merged = dict(settings)
    for key, value in overrides.items():
        deeper = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if deeper else value
    return merged
