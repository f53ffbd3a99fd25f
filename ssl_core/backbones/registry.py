"""Backbones by name."""

from typing import Any

from ssl_core.backbones.basic_unet import BASIC_UNET
from ssl_core.backbones.pyramid import Architecture, Pyramid
from storage.errors import ConfigError

ARCHITECTURES: dict[str, Architecture] = {
    "basic_unet": BASIC_UNET,
}


def backbone_names() -> list[str]:
    """Names that `build` knows, sorted."""
    return sorted(ARCHITECTURES)


def build(name: str, **arguments: Any) -> Pyramid:
    """A backbone with fresh weights.

    Args:
        name: One of `backbone_names()`.
        **arguments: Keyword arguments of the stock class.

    Raises:
        ConfigError: unknown name, or arguments that the stock class refuses.
    """
    if name not in ARCHITECTURES:
        raise ConfigError(f"backbone {name!r}", expected="one of " + ", ".join(backbone_names()), found=repr(name))
    architecture = ARCHITECTURES[name]
    try:
        offsets = [g.offset for g in architecture.geometry(arguments)]
        known = [o for o in offsets if o is not None]
        return Pyramid(name, architecture, arguments, known)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"arguments of backbone {name!r}", expected=str(error), found=repr(arguments)) from error
