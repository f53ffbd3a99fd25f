"""What is done to the network's output, as a bundle records it: mirrored windows and largest components."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

AXES = ("D", "H", "W")
_WORDS = "left|right|lt|rt|lh|rh|lv|rv|la|ra|sin|dex|sinister|dexter|sinistra|dextra"
_SIDE = re.compile(rf"(?<![a-z])(?:(?:{_WORDS})(?![a-z])|[lr](?![a-z0-9]))")  # but not the vertebra L3


@dataclass(frozen=True)
class Inference:
    """How masks are made of what the network computes.

    Attributes:
        mirror: Axes along which windows are mirrored too, of `AXES`; probabilities of all 2**n mirrorings are averaged.
        largest_component: Label values of which only the largest connected component is left.
    """

    mirror: tuple[str, ...] = ()
    largest_component: tuple[int, ...] = ()

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> "Inference":
        """Read what `dump` wrote.

        Raises:
            ValueError: an entry that this version does not know.
        """
        unknown = set(data) - {"mirror", "largest_component"}
        mirror = tuple(str(axis) for axis in data.get("mirror", ()))
        if unknown or set(mirror) - set(AXES):
            raise ValueError(f"inference {dict(data)}")
        return cls(mirror, tuple(int(value) for value in data.get("largest_component", ())))

    def dump(self) -> dict[str, Any]:
        """A JSON object; empty where nothing is done."""
        filled = {"mirror": list(self.mirror), "largest_component": list(self.largest_component)}
        return {key: value for key, value in filled.items() if value}

    @property
    def flips(self) -> tuple[int, ...]:
        """Axes of (B, C, D, H, W) that `mirror` names."""
        return tuple(2 + AXES.index(axis) for axis in self.mirror)

    def text(self, labels: Iterable[tuple[int, str]]) -> str:
        """What is done, for people; empty where nothing is."""
        names = dict(labels)
        lines = []
        if self.mirror:
            lines.append(f"averaged over windows mirrored along {', '.join(self.mirror)}")
        if self.largest_component:
            lines.append(f"largest component of {', '.join(names.get(v, str(v)) for v in self.largest_component)}")
        return "; ".join(lines)


PLAIN = Inference()
"""Nothing is done."""


def check_mirror(mirror: Sequence[str], labels: Iterable[str], setting: str) -> None:
    """Refuse a mirrored left where a label is of one side.

    Args:
        mirror: Axes.
        labels: Names of the labels. A name that says no side, such as a number, cannot be told to have one.
        setting: What messages call `mirror`.

    Raises:
        ConfigError: an axis that is none, or W with a label that names a side.
    """
    if set(mirror) - set(AXES) or len(set(mirror)) < len(mirror):
        raise ConfigError(setting, expected=f"axes of {', '.join(AXES)}, each once", found=", ".join(mirror))
    if "W" in mirror and (name := sided(labels)):
        raise ConfigError(
            setting,
            expected="no mirroring along W, left to right, since labels name a side",
            found=f"W, with the label {name!r}",
            remedy="leave W out",
        )


def sided(labels: Iterable[str]) -> str | None:
    """The first label whose name says a side, of which a mirrored image would be of the other; None without."""
    return next((name for name in labels if names_side(name)), None)


def names_side(name: str) -> bool:
    """Whether a label's name says left or right: as a word of it, or as its letter (`kidney_L`, `lh.cortex`)."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)  # LeftKidney, kidneyL
    return _SIDE.search(apart.lower()) is not None


def merged(
    stored: Inference,
    mirror: Sequence[str] | None,
    largest_component: Sequence[int] | None,
    labels: Sequence[tuple[int, str]],
) -> Inference:
    """What a bundle does by itself, with what a caller says in its place; None leaves the bundle's.

    Args:
        stored: The bundle's.
        mirror: Axes.
        largest_component: Label values.
        labels: (value, name) of each class, background first.

    Raises:
        ConfigError: an axis that may not be mirrored, or a value that no label has.
    """
    if mirror is not None:
        check_mirror(mirror, [name for _, name in labels], "mirror")
    if largest_component is not None:
        check_values(largest_component, labels, "largest_component")
    return Inference(
        stored.mirror if mirror is None else tuple(mirror),
        stored.largest_component if largest_component is None else tuple(largest_component),
    )


def check_values(values: Sequence[int], labels: Sequence[tuple[int, str]], setting: str) -> None:
    """Refuse values that no label has.

    Raises:
        ConfigError: names the first of them; the background counts as none.
    """
    names = dict(labels[1:])
    for value in values:
        if value not in names:
            raise ConfigError(
                setting,
                expected="labels of the model: " + ", ".join(f"{v} ({n})" for v, n in names.items()),
                found=str(value),
                remedy="`tomoscale models show MODEL` lists them",
            )


def axes_of(text: str) -> tuple[str, ...]:
    """Axes written as `D,H` or `DH`; none for `none`."""
    return () if text.lower() == "none" else tuple(text.upper().replace(",", ""))


def values_of(text: str, labels: Sequence[tuple[int, str]], setting: str) -> tuple[int, ...]:
    """Label values written as names or values with commas between; every one for `all`, none for `none`.

    Args:
        text: What was written.
        labels: (value, name) of each class, background first.
        setting: What messages call it.

    Raises:
        ConfigError: neither a name nor a value of a label.
    """
    if text in ("all", "none"):
        return tuple(value for value, _ in labels[1:]) if text == "all" else ()
    number = {name: value for value, name in labels[1:]} | {str(value): value for value, _ in labels[1:]}
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in number:
            raise ConfigError(
                setting,
                expected="labels of the model: " + ", ".join(f"{v} ({n})" for v, n in labels[1:]),
                found=part,
                remedy="`tomoscale models show MODEL` lists them",
            )
    return tuple(dict.fromkeys(number[part] for part in parts))
