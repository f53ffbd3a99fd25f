"""Weights that load completely, or not at all."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssl_core.networks.backbone import Backbone
from storage.errors import TomoscaleError


class WeightsError(TomoscaleError):
    """Weights do not fit a network to the last name and shape. Nothing has been loaded."""


@dataclass(frozen=True)
class LoadReport:
    """How weights compare with a network.

    Attributes:
        matched: Names that are wanted, present and of the right shape.
        missing: Names that are wanted and absent.
        unexpected: Names that are present and not wanted.
        mismatched: Names of another shape, with the shape wanted and the shape found.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def complete(self) -> bool:
        """Whether every name and shape matches."""
        return bool(self.matched) and not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        """Counts, with names of all that does not match."""
        shapes = [f"{name} ({own} wanted, {other} found)" for name, own, other in self.mismatched]
        parts = [
            f"{len(names)} {what}: {_some(names)}"
            for what, names in (
                ("missing", list(self.missing)),
                ("unexpected", list(self.unexpected)),
                ("of another shape", shapes),
            )
            if names
        ]
        return "; ".join([f"{len(self.matched)} matched", *parts])


def compare(net: nn.Module, state: Mapping[str, Tensor], keys: Iterable[str] | None = None) -> LoadReport:
    """Names and shapes of `state` against `net.state_dict()`, or against its entries `keys`."""
    own = net.state_dict()
    required = list(own) if keys is None else list(keys)
    return LoadReport(
        matched=tuple(k for k in required if k in own and k in state and own[k].shape == state[k].shape),
        missing=tuple(k for k in required if k not in state or k not in own),
        unexpected=tuple(k for k in state if k not in set(required)),
        mismatched=tuple(
            (k, tuple(own[k].shape), tuple(state[k].shape))
            for k in required
            if k in own and k in state and own[k].shape != state[k].shape
        ),
    )


@torch.no_grad()
def load_exact(net: nn.Module, state: Mapping[str, Tensor], keys: Iterable[str] | None = None) -> LoadReport:
    """Copy `state` into `net` when every name and shape matches, and refuse otherwise.

    Args:
        net: Any module, such as a stock MONAI network.
        state: Weights by name; values are converted to the network's dtype and device.
        keys: The names that must be in `state`, no more and no fewer, such as `Backbone.encoder_keys()`; all of the
            network's when `None`.

    Raises:
        WeightsError: lists what is missing, unexpected or of another shape; the network is left as it was.
    """
    report = compare(net, state, keys)
    if not report.complete:
        count = len(report.matched) + len(report.missing) + len(report.mismatched)
        raise WeightsError(
            f"weights for {type(net).__name__}",
            expected=f"all {count} names and shapes of the network and no others",
            found=str(report),
            remedy="build the network with the arguments that the weights were trained with",
        )
    own = net.state_dict()
    for name in report.matched:
        own[name].copy_(state[name])
    return report


def encoder_state(backbone: Backbone) -> dict[str, Tensor]:
    """Copies of the encoder's weights under the stock network's names; loads with `load_exact(..., encoder_keys())`."""
    state = backbone.net.state_dict()
    return {name: state[name].detach().clone().contiguous() for name in backbone.encoder_keys()}


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
