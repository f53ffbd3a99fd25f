"""Backbones by name. Networks of optional packages are imported when they are asked for."""

import importlib
from typing import Any

from ssl_core.networks.feature_centres import offsets
from ssl_core.networks.pyramid import Architecture, Pyramid
from storage.errors import ConfigError

_WHERE = {  # name: module of this package, its architecture, the extra that brings its dependency
    "basic_unet": ("basic_unet", "BASIC_UNET", ""),
    "dynunet": ("dynunet", "DYNUNET", ""),
    "resenc": ("resenc", "RESENC", "resenc"),
    "segresnet": ("segresnet", "SEGRESNET", ""),
    "swin_unetr": ("swin_unetr", "SWIN_UNETR", "swin"),
    "unet": ("unet", "UNET", ""),
}


def backbone_names() -> list[str]:
    """Names that `build` knows, sorted."""
    return sorted(_WHERE)


def architecture(name: str) -> Architecture:
    """How a named network is seen as a pyramid.

    Raises:
        ConfigError: unknown name, or its optional package is not installed.
    """
    if name not in _WHERE:
        raise ConfigError(f"backbone {name!r}", expected="one of " + ", ".join(backbone_names()), found=repr(name))
    module, attribute, extra = _WHERE[name]
    try:
        kind: Architecture = getattr(importlib.import_module(f"ssl_core.networks.{module}"), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"backbone {name!r}",
            expected="its package to be installed",
            found=str(error),
            remedy=f"pip install 'tomoscale[{extra}]'",
        ) from error
    return kind


def build(name: str, **arguments: Any) -> Pyramid:
    """A backbone with fresh weights.

    Args:
        name: One of `backbone_names()`.
        **arguments: Keyword arguments of the stock class; `in_channels` and `out_channels` for all.

    Raises:
        ConfigError: unknown name, missing package, or arguments that the stock class refuses.
    """
    kind = architecture(name)
    try:
        return Pyramid(name, kind, arguments, offsets(name, kind, arguments))
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise ConfigError(f"arguments of backbone {name!r}", expected=str(error), found=repr(arguments)) from error
