"""`architecture.json` and weights to a stock network, nothing renamed and nothing left over."""

import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from .errors import RefusedInput
from .safetensors import same_tensors

_NETS = "monai.networks.nets."
PACKAGES = {
    f"{_NETS}BasicUNet": ("monai",),
    f"{_NETS}UNet": ("monai",),
    f"{_NETS}DynUNet": ("monai",),
    f"{_NETS}SegResNet": ("monai",),
    f"{_NETS}SwinUNETR": ("monai", "einops"),
    "dynamic_network_architectures.architectures.unet.PlainConvUNet": ("monai", "dynamic-network-architectures"),
    "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet": ("monai", "dynamic-network-architectures"),
}
"""The only classes that an `architecture.json` may name, and what each needs beside torch."""


def build(name: str, architecture: dict[str, Any]) -> nn.Module:
    """The stock network, with fresh weights; the caller's random state is left as it was.

    Raises:
        RefusedInput: a class outside `PACKAGES`, its package is missing, or arguments that the class does not take.
    """
    kind = architecture.get("class")
    if kind not in PACKAGES:
        raise RefusedInput(
            name, expected="one of " + ", ".join(PACKAGES), found=repr(kind), remedy="use a bundle of a known network"
        )
    module, _, attribute = str(kind).rpartition(".")
    try:
        stock = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        packages = " ".join(PACKAGES[kind])
        raise RefusedInput(name, expected=packages, found=str(error), remedy=f"pip install {packages}") from error
    try:
        arguments = with_classes(architecture["arguments"])
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = stock(**arguments)
    except (AttributeError, ImportError, TypeError, ValueError) as error:  # MONAI looks for einops only now
        raise RefusedInput(name, expected=f"arguments of {kind}", found=str(error)) from error
    return network.eval()


def with_classes(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as the class wants them: tuples for JSON's lists, layers of torch for `{"torch.nn": NAME}`.

    Raises:
        AttributeError: no layer of that name.
    """
    return {key: _frozen(value) for key, value in arguments.items()}


def load(name: str, network: nn.Module, weights: dict[str, Tensor], keys: list[str] | None) -> None:
    """Copy `weights` into `network`.

    Args:
        name: What the message names.
        network: Built by `build`.
        weights: Must be exactly `keys`, or the whole state when `keys` is None.
        keys: The encoder's names in the stock network's state.

    Raises:
        RefusedInput: a name missing or left over, another shape or dtype, or several values for one tensor.
    """
    state = network.state_dict()
    required = set(state if keys is None else keys)
    wrong = sorted(required ^ set(weights)) + sorted(required - set(state))
    wrong += sorted(
        key
        for key in required & set(weights) & set(state)
        if (weights[key].shape, weights[key].dtype) != (state[key].shape, state[key].dtype)
    )
    if wrong:
        raise RefusedInput(
            name,
            expected=f"{len(required)} tensors of the stock network, by name, shape and dtype",
            found=f"{len(wrong)} that do not match: " + ", ".join(wrong[:5]),
            remedy="the bundle is damaged or of another version; pull it again",
        )
    # Bundles of before hold a tensor once for each name that the network has for it.
    differing = [
        other
        for other, one in same_tensors(state).items()
        if other in weights and one in weights and not torch.equal(weights[other], weights[one])
    ]
    if differing:
        raise RefusedInput(
            name,
            expected="equal values under all names of one tensor",
            found=f"{len(differing)} that differ, the first: {differing[0]}",
            remedy="the bundle is damaged; train it again",
        )
    network.load_state_dict({**state, **weights}, strict=True)


def logits(network: nn.Module, dims: int, x_BCDHW: Tensor) -> Tensor:
    """The stock network's output, (B, K, D, H, W); a 2-D network (`dims` 2) sees each slice along D by itself."""
    if dims == 3:
        return network(x_BCDHW)
    return _unfold(network(_fold(x_BCDHW)), x_BCDHW)


class _Enough(Exception):
    """Ends a forward pass of which everything that was asked for is there."""


def feature_maps(network: nn.Module, dims: int, modules: list[str], x_BCDHW: Tensor) -> list[Tensor]:
    """Outputs of the named sub-modules in one forward pass of the stock network, in the given order.

    The pass ends with the last of them: for maps of an encoder no decoder is computed.
    """
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            maps[name] = output
            if len(maps) == len(set(modules)):
                raise _Enough

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in modules]
    try:
        with contextlib.suppress(_Enough):
            network(x_BCDHW if dims == 3 else _fold(x_BCDHW))
    finally:
        for handle in handles:
            handle.remove()
    return [maps[name] if dims == 3 else _unfold(maps[name], x_BCDHW) for name in modules]


def _fold(x_BCDHW: Tensor) -> Tensor:
    """Slices along D into the batch, (B * D, C, H, W)."""
    return x_BCDHW.transpose(1, 2).flatten(0, 1)


def _unfold(x: Tensor, like_BCDHW: Tensor) -> Tensor:
    """Back to (B, C, D, H, W)."""
    return x.unflatten(0, (like_BCDHW.shape[0], like_BCDHW.shape[2])).transpose(1, 2)


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        if list(value) == ["torch.nn"]:
            layer = getattr(nn, str(value["torch.nn"]))
            if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
                raise AttributeError(f"torch.nn has no layer {value['torch.nn']!r}")
            return layer
        return {key: _frozen(item) for key, item in value.items()}
    return value
