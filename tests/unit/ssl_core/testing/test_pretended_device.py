"""The GPU path on a device that is not there: what would mix devices there, and what would make the host wait.

A step of each method is in the contract, `ssl_core.testing.method_contract.MethodContract`.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from jobs.pretrain.loop import collectives_backend
from ssl_core.distributed import ProcessGroup, Single
from ssl_core.downstream.finetune import FinetuneConfig, build_segmenter, predict_volume, train_segmenter
from ssl_core.monitor.collapse import probe
from ssl_core.monitor.label_transfer import Labelled, knn_dice
from ssl_core.networks import build
from ssl_core.networks.registry import backbone_names
from ssl_core.portable.windows import slide_features
from ssl_core.testing.method import faults_on_a_device, tiny_method
from ssl_core.testing.pretended_device import DEVICE, Record, pretended_device
from ssl_core.testing.views import map_tensors, synthetic_views
from ssl_core.train import checkpoint
from ssl_core.train.engine import Engine, EngineConfig, NonFiniteError
from ssl_core.views.augment.presets import PRESETS
from ssl_core.views.intensity import IntensityPolicy
from ssl_core.views.make import make_views
from ssl_core.views.types import ViewBatch, ViewSpec
from storage.format.manifest import Manifest
from storage.reading.volume_store import VolumeStore
from tests.kit.crops import noise
from tests.kit.networks import SMALL, volume
from tests.kit.phantoms import write_phantoms
from tests.kit.toy_method import Toy, batch
from tests.kit.view_specs import EVERYTHING, TILTED


def moved(views: ViewBatch) -> ViewBatch:
    found: ViewBatch = map_tensors(views, lambda x: x.to(DEVICE))
    return found


def lines(seen: Record) -> list[str]:
    return [f"{wait.where} {wait.why}" for wait in seen.waits]


def test_what_a_device_refuses_is_refused() -> None:
    with pretended_device():
        x = torch.ones(3, device=DEVICE)
        assert (x.is_cuda, x.device.type, torch.zeros_like(x).is_cuda, torch.zeros(3).is_cuda) == (
            *(True, "cuda"),
            True,
            False,
        )
        for mixed in (
            lambda: x + torch.ones(3),
            lambda: torch.stack([x[0], torch.tensor(1.0)]),
            lambda: torch.zeros(3).copy_(x) @ x,
        ):
            with pytest.raises(RuntimeError, match="expected all tensors on one device"):
                mixed()
        for generator in (torch.Generator(), torch.Generator("cpu")):
            with pytest.raises(RuntimeError, match="a generator and a tensor on different devices"):
                x.normal_(generator=generator)
        with pytest.raises(RuntimeError, match="a generator and a tensor on different devices"):
            torch.rand(3, generator=torch.Generator(DEVICE))
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert (x + torch.tensor(1.0)).tolist() == [2.0] * 3  # a scalar of the host is let in


def test_a_collective_takes_what_nccl_takes() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pretended_device():
            x = torch.arange(6.0, device=DEVICE).reshape(2, 3)
            with pytest.raises(RuntimeError, match="contiguous"):
                dist.all_reduce(x.t())
            group = ProcessGroup()
            assert torch.equal(group.sum(x.t()), x.t())
            assert torch.equal(group.gather(x.t()), x.t())
            weight = x.clone().requires_grad_()
            (group.gather(weight.t()).t() * group.sum(weight.t()).t()).t().sum().backward()
            assert torch.equal(weight.grad, 2 * x)
    finally:
        dist.destroy_process_group()


def test_ranks_of_a_gpu_job_gather_host_tensors_too() -> None:
    """The sample record is one; NCCL alone would refuse it at the first batch."""
    backend = dist.distributed_c10d.BackendConfig(dist.Backend(collectives_backend(gpu=True)))
    assert backend.get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}


WAITING: dict[str, Callable[[torch.Tensor], Any]] = {
    "a number": lambda x: float(x[0]),
    "a truth": lambda x: bool((x > 0).any()),
    "a list": lambda x: x.tolist(),
    "a mask": lambda x: x[x > 0],
    "an assigned number": lambda x: x.__setitem__(0, 1.0),
    "a tensor of a list": lambda x: torch.tensor([1.0], device=x.device),
    "ordinary memory": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "like another": lambda x: torch.ones(3).to(x),
    "another type": lambda x: torch.ones(3).pin_memory().to(x.device, torch.float64, non_blocking=True),
    "not told to go on": lambda x: torch.ones(3).pin_memory().to(x.device),
    "an index of the host": lambda x: x[torch.arange(2)],
    "how many": lambda x: torch.unique(x),
}
FREE: dict[str, Callable[[torch.Tensor], Any]] = {
    "pinned": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "to pinned": lambda x: torch.empty(3, pin_memory=True).copy_(x, non_blocking=True),
    "a masked fill": lambda x: x.__setitem__(x > 0, 1.0),
    "a filled number": lambda x: x[0].fill_(1.0),
    "an index on the device": lambda x: x[x.argsort()],
    "arithmetic": lambda x: (x * 2 + 1).sum(),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_makes_the_host_wait_is_named_by_its_line(name: str) -> None:
    with pretended_device() as seen:
        x = torch.ones(3, device=DEVICE)
        WAITING[name](x)
    assert [wait.where.partition(":")[0] for wait in seen.waits] == ["testing/test_pretended_device.py"]


@pytest.mark.parametrize("name", FREE)
def test_what_is_queued_is_no_wait(name: str) -> None:
    with pretended_device() as seen:
        FREE[name](torch.ones(3, device=DEVICE))
    assert lines(seen) == []


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("aligned", {"precision": "auto", "channels_last": True, "activation_checkpointing": True}),
        ("lrc", {"precision": "bf16", "accumulate": 2, "deterministic": False}),
        ("simclr", {"clip": 0.0, "optimizer": "sgd", "fused": False}),
    ],
)
def test_an_engine_mixes_nothing_and_waits_for_nothing(name: str, settings: dict[str, Any]) -> None:
    assert faults_on_a_device(Single(), name, settings, steps=2) == []


@pytest.mark.parametrize(
    ("name", "deterministic", "expected"),
    [
        ("pgl", False, {"grid_sampler_3d_backward"}),
        ("pcrlv2", False, {"upsample_trilinear3d_backward"}),
        ("pgl", True, set()),
        ("pcrlv2", True, set()),
        ("supervised", True, {"nll_loss2d_forward"}),
    ],
)
def test_what_adds_in_no_fixed_order_is_known(name: str, deterministic: bool, expected: set[str]) -> None:
    method = tiny_method(name)
    views = synthetic_views(type(method).view_spec(method.config), [0, 1])
    config = EngineConfig(steps=9, warmup_steps=0, precision="fp32", deterministic=deterministic)
    with pretended_device() as seen:
        Engine(method, config, device=DEVICE).step(moved(views))
    assert {wait.why for wait in seen.unordered} == expected


def test_a_step_there_is_the_step_here(tmp_path: Path) -> None:
    """Also that a state goes to disk and back to the device, and that a run goes on from it with the same bits."""
    config = EngineConfig(steps=9, warmup_steps=0, log_every=1, precision="fp64", deterministic=False)
    views = [batch(step * 4, 4, torch.float64) for step in range(4)]
    here = Engine(Toy(norm=True), config)
    wanted = [here.step(v)["loss"] for v in views]
    with pretended_device():
        first, second = (Engine(Toy(norm=True), config, device=DEVICE) for _ in range(2))
        found = [first.step(moved(v))["loss"] for v in views[:2]]
        checkpoint.save(tmp_path / "state", first.state_dict(), {})
        second.load_state_dict(checkpoint.load(tmp_path / "state")[0])
        assert [e.step(moved(v))["loss"] for v in views[2:] for e in (first, second)] == pytest.approx(
            [x for x in wanted[2:] for _ in range(2)], abs=1e-12
        )
        for one, two in zip(first.method.parameters(), second.method.parameters(), strict=True):
            assert torch.equal(one, two)
    assert found == pytest.approx(wanted[:2], abs=1e-12)


def test_a_bad_step_is_told_when_the_next_one_has_been_launched() -> None:
    method = tiny_method("mae")
    spec = type(method).view_spec(method.config)
    with pretended_device() as seen:
        engine = Engine(method, EngineConfig(steps=99, log_every=99, precision="fp32"), device=DEVICE)
        views = [moved(synthetic_views(spec, [2 * step, 2 * step + 1])) for step in range(4)]
        views[2].roles["global"][0].image_BCDHW[1].fill_(torch.nan)
        engine.step(views[0])
        seen.waits.clear()
        engine.step(views[1])
        engine.step(views[2])
        assert lines(seen) == []
        with pytest.raises(NonFiniteError, match=r"^step 3; .* in samples \[4, 5\]"):
            engine.step(views[3])


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_views_mix_nothing_wait_for_nothing_and_are_those_of_the_host(preset: str) -> None:
    spec = ViewSpec(tuple(replace(role, intensity=preset) for role in (*EVERYTHING.roles, TILTED)), EVERYTHING.maps)
    crops, how = noise(spec, 3), {"seed": 0, "policy": IntensityPolicy()}
    here = make_views(crops, spec, **how)
    with pretended_device() as seen:
        made = make_views(crops, spec, **how, device=DEVICE)
        assert lines(seen) == []
        back = map_tensors(made, lambda x: x.cpu())
    for role, views in here.roles.items():
        for ours, theirs in zip(views, back.roles[role], strict=True):
            assert torch.equal(ours.image_BCDHW, theirs.image_BCDHW)
            assert torch.equal(ours.maps["label"], theirs.maps["label"])


@pytest.mark.parametrize("name", backbone_names())
def test_networks_mix_nothing_and_wait_for_nothing(name: str) -> None:
    """And which of their ops have no deterministic kernel on CUDA, as `ssl_core.train.determinism` tells."""
    network = build(name, **SMALL[name]).train()
    x = volume(network)
    with pretended_device() as seen:
        torch.use_deterministic_algorithms(True, warn_only=True)
        network.to(DEVICE)
        x = x.to(DEVICE)
        seen.waits.clear()
        network.decode(network.features(x))[-1].mean().backward()
        assert lines(seen) == []
        unordered = {wait.why for wait in seen.unordered}
    pools = {"resenc": {"avg_pool3d_backward"}, "basic_unet": {"max_pool3d_with_indices_backward"}}
    assert unordered == pools.get(name, set())


def test_probes_mix_nothing() -> None:
    method = tiny_method("pgl")
    views = synthetic_views(type(method).view_spec(method.config), [0, 1])
    generator = torch.Generator().manual_seed(0)
    image, label = torch.randn(3, 1, 16, 16, 16, generator=generator), torch.zeros(3, 16, 16, 16, dtype=torch.int64)
    label[:, 4:12] = 1
    engine = Engine(method, EngineConfig(steps=5, warmup_steps=0, precision="fp32"))
    here = probe(engine, views) | {"knn": knn_dice(engine, Labelled(image, label, 2))}
    with pretended_device():
        engine = Engine(tiny_method("pgl"), EngineConfig(steps=5, warmup_steps=0, precision="fp32"), device=DEVICE)
        found = probe(engine, moved(views)) | {"knn": knn_dice(engine, Labelled(image.to(DEVICE), label.to(DEVICE), 2))}
    assert found == pytest.approx(here, abs=1e-4)


def test_fine_tuning_waits_once_an_epoch_and_windows_come_back(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    write_phantoms(url, 3)
    how: dict[str, Any] = {"labels": {1: "ball"}, "policy": IntensityPolicy()}
    window, image = (16, 16, 16), np.random.default_rng(0).normal(size=(1, 20, 16, 16)).astype(np.float32)
    with VolumeStore(url, Manifest.open(url)) as store:

        def trained(device: torch.device, steps: int) -> tuple[Any, float]:
            network = build_segmenter("unet", {"channels": [4, 8], "strides": [2], "norm": "instance"}, 2, 0, None)
            how_long: dict[str, Any] = {"epochs": 1, "steps_per_epoch": steps, "warmup_steps": 1}
            config = FinetuneConfig(**how_long, batch=2, patch_DHW=window, precision="fp32")
            rows: dict[str, Any] = {"train": (0, 1), "inner": (), "pretrained": False, "seed": 0, "label": "labels"}
            return network, train_segmenter(network, config, store, device=device, **rows, **how)[0]["loss"]

        def applied(network: Any, device: torch.device) -> tuple[Any, torch.Tensor]:
            air = np.zeros(1, np.float32)
            deep = slide_features(
                lambda x: network.features(x)[1], image, air, window, stride_DHW=(2, 2, 2), device=device
            )
            return predict_volume(network, store, 2, window=window, device=device, **how), deep

        network, loss = trained(torch.device("cpu"), 3)
        mask, deep = applied(network, torch.device("cpu"))
        waits = []
        for steps in (2, 3):  # the first and the last are reported
            with pretended_device() as seen:
                there, there_loss = trained(DEVICE, steps)
                waits.append(lines(seen))
                there_mask, there_deep = applied(there, DEVICE)
    assert waits[0] == waits[1]
    assert there_loss == pytest.approx(loss, abs=1e-5)
    assert np.mean(there_mask == mask) > 0.99
    torch.testing.assert_close(there_deep, deep, atol=1e-3, rtol=1e-3)
