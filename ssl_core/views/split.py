"""Batches of views, cut along their samples."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from ssl_core.views.types import ViewBatch
from storage.errors import ConfigError

T = TypeVar("T")


def split(views: ViewBatch, parts: int) -> list[ViewBatch]:
    """Consecutive equal parts of a batch.

    Raises:
        ConfigError: the batch cannot be cut into that many.
    """
    if parts == 1:
        return [views]
    size, rest = divmod(len(views), parts)
    if rest or not size:
        raise ConfigError("accumulate", expected=f"a divisor of the rank's batch of {len(views)}", found=str(parts))
    return [_cut(views, slice(i * size, (i + 1) * size)) for i in range(parts)]


def _cut(value: T, part: slice) -> T:
    """The same nesting with every tensor cut along its first axis."""
    cut: Any = value
    if isinstance(value, Tensor):
        cut = value[part]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _cut(getattr(value, f.name), part) for f in dataclasses.fields(value)}
        cut = dataclasses.replace(value, **fields)
    elif isinstance(value, tuple):
        cut = tuple(_cut(v, part) for v in value)
    elif isinstance(value, Mapping):
        cut = {k: _cut(v, part) for k, v in value.items()}
    return cut
