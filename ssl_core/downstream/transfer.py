"""What a pre-trained start brings into a segmenter: matched in every name and shape, or refused."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssl_core.downstream.settings import Transfer
from ssl_core.networks.backbone import Backbone
from ssl_core.networks.outline import outline, shapes_only
from ssl_core.networks.registry import build
from ssl_core.networks.weights import load_exact
from storage.errors import ConfigError


@dataclass(frozen=True)
class Start:
    """Pre-trained weights.

    Attributes:
        name: What a message calls it.
        weights: Encoder tensors under the stock network's names.
        rest: What else was trained with it, such as its decoder.
        transfer: How much of it is taken over.
    """

    name: str
    weights: Mapping[str, Tensor]
    rest: Mapping[str, Tensor] = field(default_factory=dict)
    transfer: Transfer = "trained"


def build_segmenter(name: str, arguments: Mapping[str, Any], classes: int, seed: int, start: Start | None) -> Backbone:
    """Network with random weights from `seed`, then what `start` brings, completely or not at all.

    Args:
        name: Backbone name.
        arguments: Its keyword arguments; `out_channels` is set here.
        classes: Output channels, background included.
        seed: Seed of the random weights.
        start: Pre-trained weights.

    Raises:
        ConfigError: the start has no trained weights for what is to be taken over.
        WeightsError: some tensor has another name or shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(name, **{**arguments, "out_channels": classes})
    if start is not None:
        keys = transferred_keys(network, start.transfer, start.rest)
        require_weights(start.name, start.transfer, keys, {**start.weights, **start.rest})
        more = {key: start.rest[key] for key in keys if key in start.rest}
        load_exact(network.net, {**start.weights, **more}, keys=keys)
    return network


def transferred_keys(network: Backbone, transfer: Transfer, rest: Container[str] = ()) -> list[str]:
    """Names of `network.net` that a transfer fills.

    Args:
        network: The segmenter.
        transfer: What is taken over.
        rest: What the start has beside its encoder: a whole decoder makes `trained` `encoder_decoder`, else it is
            `encoder`.
    """
    if transfer == "trained":
        transfer = "encoder_decoder" if all(key in rest for key in network.decoder_keys()) else "encoder"
    if transfer == "encoder":
        return network.encoder_keys()
    if transfer == "encoder_decoder":
        return list(dict.fromkeys(network.encoder_keys() + network.decoder_keys()))
    head = set(head_keys(network))
    return [key for key in network.net.state_dict() if key not in head]


def repeat_channels(
    name: str, arguments: Mapping[str, Any], weights: Mapping[str, Tensor], channels: int
) -> dict[str, Tensor]:
    """Weights of a network of one channel for one of several.

    The first convolution's weights are repeated over the channels and divided by their number: where all channels show
    one image, the network computes what it computed of that.

    Args:
        name: Backbone name.
        arguments: Its keyword arguments.
        weights: By name.
        channels: Of the new network.
    """
    with shapes_only():
        other = outline(name, {**arguments, "in_channels": channels}).net.state_dict()
        shapes = {key: tuple(tensor.shape) for key, tensor in other.items()}
    return {key: _repeated(tensor, shapes.get(key), channels) for key, tensor in weights.items()}


def _repeated(tensor: Tensor, shape: tuple[int, ...] | None, channels: int) -> Tensor:
    if tensor.dim() < 3 or tensor.shape[1] != 1 or shape != (tensor.shape[0], channels, *tensor.shape[2:]):
        return tensor  # of another layer, or of another network, which loading refuses by name
    return tensor.repeat(1, channels, *(1,) * (tensor.dim() - 2)) / channels


def head_keys(network: Backbone) -> list[str]:
    """Names of `network.net` whose shape follows the number of classes."""
    classes = int(network.arguments["out_channels"])
    with shapes_only():
        other = outline(network.name, {**network.arguments, "out_channels": classes + 1}).net.state_dict()
        shapes = {key: tuple(tensor.shape) for key, tensor in other.items()}
    return [key for key, tensor in network.net.state_dict().items() if tuple(tensor.shape) != shapes[key]]


def require_weights(name: str, transfer: Transfer, keys: list[str], weights: Mapping[str, Tensor]) -> None:
    """Refuse a start that was not trained in all that is to be taken over.

    Raises:
        ConfigError: names the start and the first tensor that it lacks.
    """
    missing = [key for key in keys if key not in weights]
    if transfer in ("encoder_decoder", "all_but_head") and missing:
        raise ConfigError(
            f"transfer {transfer} of {name}",
            expected=f"a model with all {len(keys)} tensors of it",
            found=f"{len(missing)} missing, the first: {missing[0]}",
            remedy="set transfer=trained, or start from a segmenter or from an encoder of a method that trains a"
            " decoder, exported with it: aligned, ibot, mae, models_genesis, supervised",
        )
