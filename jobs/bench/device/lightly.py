"""Losses of lightly, which is not among the project's dependencies."""

import importlib
import importlib.util
import sys
import types
from typing import Any

INSTALL = "pip install --no-deps lightly"


def lightly_loss(module: str, name: str) -> Any:
    """A loss class of lightly.

    Its packages import torchvision, which these losses do not use: where it is absent, empty modules stand in for it
    while they are imported.

    Raises:
        ImportError: lightly is not installed.
    """
    if importlib.util.find_spec("lightly") is None:
        raise ImportError("lightly is not installed")
    missing = ("torchvision", "torchvision.ops", "torchvision.transforms")
    stand_in = importlib.util.find_spec("torchvision") is None
    if stand_in:
        sys.modules.update({name: _Empty(name) for name in missing})
    try:
        return getattr(importlib.import_module(f"lightly.loss.{module}"), name)
    finally:
        for absent in missing if stand_in else ():
            del sys.modules[absent]


class _Empty(types.ModuleType):
    """A module in which every public name is a class of nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return type(name, (), {})
