"""Activation checkpointing changes what is kept, and nothing else."""

import copy
from typing import Any

import pytest
import torch

from ssl_core.networks import build, recompute
from ssl_core.networks.pyramid import cut_batches
from ssl_core.networks.registry import backbone_names
from ssl_core.testing.memory import peak_of
from ssl_core.testing.method import tiny_method
from ssl_core.testing.views import synthetic_views
from ssl_core.train.engine import Engine, EngineConfig
from storage.errors import ConfigError
from tests.kit.networks import SMALL, volume


def kept_bytes(network: Any, x: torch.Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, storages counted once."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.logits(x).sum().backward()
    return sum(storages.values())


@pytest.mark.parametrize("name", backbone_names())
def test_gradients_are_the_same_bits_and_less_is_kept(name: str) -> None:
    torch.manual_seed(0)
    plain = build(name, **SMALL[name]).train()
    spare = copy.deepcopy(plain)
    assert recompute.enable(spare) >= 3
    x = volume(plain)
    kept = [kept_bytes(network, x) for network in (plain, spare)]
    assert kept[1] < 0.8 * kept[0]
    twins = zip(plain.named_parameters(), spare.named_parameters(), strict=True)
    for (one, p), (two, q) in twins:
        assert one == two
        assert (p.grad is None) == (q.grad is None), one
        assert p.grad is None or torch.equal(p.grad, q.grad), one


def test_a_copy_of_a_checkpointed_block_uses_its_own_weights() -> None:
    network = build("basic_unet", **SMALL["basic_unet"])
    recompute.enable(network)
    x, twin = volume(network), copy.deepcopy(network)
    before = twin.logits(x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(twin.logits(x), before)


def test_the_engine_trains_to_the_same_weights() -> None:
    states = []
    for on in (False, True):
        settings = EngineConfig(steps=3, warmup_steps=0, log_every=1, activation_checkpointing=on)
        method = tiny_method("byol")
        engine = Engine(method, settings)
        spec = type(method).view_spec(method.config)
        for step in range(3):
            engine.step(synthetic_views(spec, [2 * step, 2 * step + 1]))
        states.append(engine.state_dict()["method"])
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_batch_norm_and_networks_without_blocks_are_refused() -> None:
    normed = build("basic_unet", **SMALL["basic_unet"], norm="batch")
    with pytest.raises(ConfigError, match="batch norm in TwoConv"):
        recompute.enable(normed)
    with pytest.raises(ConfigError, match="TwoConv"):
        recompute.enable(torch.nn.Sequential(torch.nn.Conv3d(1, 1, 3)))


@pytest.mark.parametrize("name", ["dynunet", "unet"])
def test_a_batch_in_parts_has_the_maps_and_gradients_of_the_whole(name: str) -> None:
    torch.manual_seed(0)
    whole = build(name, **SMALL[name]).double().train()
    parts = copy.deepcopy(whole)
    cut_batches(parts, 2)
    x = torch.randn(3, *volume(whole).shape[1:], dtype=torch.float64)
    for network in (whole, parts):
        maps = network.features(x)
        sum(m.square().mean() for m in (*maps, *network.decode(maps))).backward()
    for (one, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), one
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-10), one


def test_a_batch_in_parts_holds_activations_of_one_part() -> None:
    """Twice the samples in twice the parts hold little more: maps, and no activations between them."""
    peaks = []
    for samples, parts in ((2, 1), (4, 1), (4, 2)):
        network = build("basic_unet", **SMALL["basic_unet"]).train()
        cut_batches(network, parts)
        x = torch.randn(samples, *volume(network).shape[1:])
        peaks.append(peak_of(lambda net=network, x=x: net.features(x)[-1].mean().backward(), torch.device("cpu")))
    assert peaks[2] < (peaks[0] + peaks[1]) / 2


def test_a_batch_norm_wants_the_whole_batch() -> None:
    normed = build("basic_unet", **SMALL["basic_unet"], norm="batch")
    with pytest.raises(ConfigError, match="batch norm in basic_unet"):
        cut_batches(normed, 2)
    cut_batches(normed, 1)
