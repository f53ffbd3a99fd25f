"""Real methods in the engine: what is saved is all there is."""

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ssl_core.methods  # noqa: F401  registers them
from ssl_core.config import parse
from ssl_core.methods.base import method_class
from ssl_core.monitor.collapse import CollapseWarning, probe
from ssl_core.networks import build
from ssl_core.testing.method import tiny_method
from ssl_core.testing.views import synthetic_views
from ssl_core.train import checkpoint, compiling
from ssl_core.train.engine import Engine, EngineConfig
from ssl_core.train.loop import fit
from ssl_core.views.make import make_views
from tests.kit import crops

SMALL = {"crops": {"size_DHW": [32, 32, 32], "min_overlap": 0.2, "flip": [0.5, 0.5, 0.5]}, "hidden": 16, "out": 8}


def engine_of(name: str, seed: int) -> tuple[Engine, Any]:
    kind = method_class(name)
    config = parse(kind.Config, SMALL)
    torch.manual_seed(seed)
    backbone = build(
        "basic_unet", spatial_dims=3, in_channels=1, out_channels=2, features=(4, 4, 8, 8, 8, 4), dropout=0.2
    )
    settings = EngineConfig(steps=6, warmup_steps=2, lr=0.01, log_every=1, probe_every=2)
    return Engine(kind(config, backbone), settings), kind.view_spec(config)


def batches(spec: Any, first: int) -> Iterator[Any]:
    for step in itertools.count(first):
        batch = crops.noise(spec, 2, seed=step, first=step * 2)
        yield make_views(batch, spec, seed=0, policy=crops.AS_STORED)


@pytest.mark.parametrize("name", ["pgl", "mocov2"])
def test_resume_is_bitwise_at_several_steps(tmp_path: Path, name: str) -> None:
    def save(step: int, state: dict[str, Any]) -> None:
        checkpoint.save(tmp_path / str(step), state, {})

    straight, spec = engine_of(name, seed=0)
    straight.config = straight.config.model_copy(update={"checkpoint_every": 1})
    logged: dict[int, dict[str, float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        fit(straight, batches(spec, 0), report=lambda s, m: logged.update({s: m}), save=save, probe=probe)
    end, _ = checkpoint.load(tmp_path / "6")
    for at in (1, 3, 5):
        resumed, _ = engine_of(name, seed=at)
        resumed.load_state_dict(checkpoint.load(tmp_path / str(at))[0])
        again: dict[int, dict[str, float]] = {}
        # Probes come at other steps or not at all: they must leave no trace.
        fit(resumed, batches(spec, at), report=lambda s, m, to=again: to.update({s: m}), save=lambda *_: None)
        for step, metrics in again.items():
            for key, value in metrics.items():
                assert key.startswith("time/") or value == logged[step][key], (at, step, key)
        now = resumed.state_dict()
        for group in ("method", "optimizer"):
            assert_same(now[group], end[group], f"{group} from step {at}")


@pytest.mark.parametrize("name", ["pgl", "mae"])
def test_a_compiled_method_has_the_same_losses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)  # traced as for any backend, and run without a C++ compiler
        return graph.forward

    monkeypatch.setattr(compiling, "why_not", lambda device: "")
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_(module, backend=backend))
    losses = []
    for on in (False, True):
        method = tiny_method(name)
        settings = EngineConfig(steps=3, warmup_steps=0, log_every=1, precision="fp64", compile=on)
        engine, spec = Engine(method, settings), type(method).view_spec(method.config)
        batches = (synthetic_views(spec, [2 * step, 2 * step + 1], torch.float64) for step in range(3))
        losses.append([engine.step(views)["loss"] for views in batches])
        assert bool(graphs) == on
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def assert_same(a: Any, b: Any, where: str) -> None:
    if isinstance(a, dict):
        assert sorted(a) == sorted(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}: {key}")
    else:
        assert torch.equal(a, b), where
