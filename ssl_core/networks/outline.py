"""Networks of shapes alone: what cannot be built, or cannot take a crop, is refused in seconds, without data.

Tensors have shapes and no numbers, so that neither the size of a network nor that of a crop costs memory or time.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    unset_fake_temporarily,
)

from ssl_core.networks.pyramid import Pyramid, Triple
from ssl_core.networks.registry import REFUSALS, architecture, check_arguments
from storage.errors import ConfigError

NEEDS_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
"""Raised where only numbers could say what comes next."""


class _Shapes(FakeTensorMode):
    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shapes":
        return self  # targets are copies of networks, and tensors of two modes do not meet


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within it every new tensor has a shape and no numbers."""
    log = logging.getLogger("torch._subclasses.fake_tensor")  # a traceback for each operation that does not fit
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _Shapes(allow_non_fake_inputs=True):
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        log.setLevel(level)


def outline(name: str, arguments: Mapping[str, Any]) -> Pyramid:
    """A backbone of shapes alone, to be used within `shapes_only`; where its features are centred is not measured.

    Raises:
        ConfigError: no such network can be built; names the arguments that are in the way.
    """
    check_arguments(name, arguments)
    architecture(name)  # a missing package is no fault of the arguments
    try:
        return _built(name, arguments)
    except REFUSALS as refusal:
        error = refusal
    ports = {key: value for key, value in arguments.items() if key in ("spatial_dims", "in_channels", "out_channels")}
    faulty = [key for key in arguments if not _refusal(name, {k: v for k, v in arguments.items() if k != key})]
    faulty = faulty or [key for key, value in arguments.items() if _refusal(name, {**ports, key: value})]
    faulty = faulty or list(arguments)
    words = " ".join(str(error).split()) or type(error).__name__
    raise ConfigError(
        " and ".join(f"backbone.arguments.{key}" for key in faulty),
        expected=f"what {name} can be built with",
        found=f"{', '.join(repr(arguments[key]) for key in faulty)}: {words}",
        remedy="change it, or leave it out for the default"
        if len(faulty) == 1
        else "change one of them so that they fit together, or leave it out for the default",
    ) from error


def check_crop(name: str, arguments: Mapping[str, Any], size_DHW: Triple, key: str) -> None:
    """Refuse a crop that a network cannot be trained on.

    Args:
        name: Registered name.
        arguments: Of the backbone.
        size_DHW: Voxels of the crop.
        key: The setting that says so.

    Raises:
        ConfigError: no such network can be built, or it cannot take the crop; names the setting.
    """
    with shapes_only():
        network = outline(name, arguments).train()
        try:
            network.logits(torch.zeros(1, int(arguments.get("in_channels", 1)), *size_DHW))
        except ConfigError as error:
            raise ConfigError(
                key, expected=error.expected, found=error.found, remedy=error.remedy or f"set {key} to such a size"
            ) from error
        except NEEDS_NUMBERS:
            return


def _built(name: str, arguments: Mapping[str, Any]) -> Pyramid:
    kind, dims = architecture(name), int(arguments.get("spatial_dims", 3))

    centres = [(0.5,) * dims] * len(kind.geometry(dict(arguments)))
    try:
        return Pyramid(name, kind, dict(arguments), centres)
    except NEEDS_NUMBERS:  # of a stock class that computes with tensors as it is built
        with unset_fake_temporarily():
            return Pyramid(name, kind, dict(arguments), centres)


def _refusal(name: str, arguments: Mapping[str, Any]) -> Exception | None:
    try:
        check_arguments(name, arguments)
        with shapes_only():
            _built(name, arguments)
    except (ConfigError, *REFUSALS) as error:
        return error
    return None
