"""A step is the same with any number of ranks, at the same number of samples in a network at once."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ssl_core.distributed import ProcessGroup
from ssl_core.testing.method import tiny_method
from ssl_core.testing.views import synthetic_views
from ssl_core.train.engine import Engine, EngineConfig
from tests.kit.thread_ranks import on_threads

BATCH, PARTS, MOST = 12, 2, 2
SETTINGS: dict[str, Any] = {"precision": "fp64", "steps": 4, "warmup_steps": 0, "log_every": 1, "accumulate": PARTS}


def seen_at_once(method: nn.Module) -> list[int]:
    """Samples of each pass through the trained network, as they come."""
    sizes: list[int] = []
    for layer in method.backbone.net.modules():
        if isinstance(layer, nn.Conv3d):
            layer.register_forward_pre_hook(lambda _layer, inputs: sizes.append(len(inputs[0])))
    return sizes


def trained(
    monkeypatch: pytest.MonkeyPatch, name: str, history: list[int], micro_batch: int | None
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]], int]:
    """State, reports and the largest batch in a network after a step with each number of ranks of the history."""
    config = EngineConfig(micro_batch=micro_batch, **SETTINGS)
    state: dict[str, Any] = {}
    reports, largest = [], 0
    for step, world in enumerate(history):
        methods = [tiny_method(name) for _ in range(world)]
        sizes = [seen_at_once(method) for method in methods]

        def one(
            rank: int, step: int = step, world: int = world, methods: list[Any] = methods, before: Any = state
        ) -> Any:
            engine = Engine(methods[rank], config, collectives=ProcessGroup())
            if before:
                engine.load_state_dict(before)
            samples = list(range(step * BATCH + rank, (step + 1) * BATCH, world))
            spec = type(methods[rank]).view_spec(methods[rank].config)
            report = engine.step(synthetic_views(spec, samples, torch.float64))
            return engine.state_dict(), report

        state, report = copy.deepcopy(on_threads(monkeypatch, world, one)[0])
        reports.append(report)
        largest = max(largest, *(max(seen) for seen in sizes))
    return state["method"], reports, largest


@pytest.mark.parametrize("name", ["mocov2", "mae"])
def test_any_history_of_ranks_trains_to_the_same_weights_at_the_same_batch_in_the_network(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, reports, _ = trained(monkeypatch, name, [1] * 4, None)
    state, others, largest = trained(monkeypatch, name, [2, 1, 2, 3], MOST)
    assert largest == MOST
    for one, other in zip(reports, others, strict=True):
        figures = {key: value for key, value in one.items() if not key.startswith("monitor/")}  # some are a rank's own
        assert {key: other[key] for key in figures} == pytest.approx(figures, rel=1e-8, abs=1e-10)
    for key, tensor in whole.items():
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=1e-9, msg=key)
