"""What a worker finds out about its surroundings before it trains."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import ray.train.torch

from jobs.configs import PretrainConfig
from jobs.pretrain import worker
from ssl_core.config import resolved
from ssl_core.distributed import Single


@pytest.mark.parametrize(("on_node", "overlap"), [(2, False), (1, True)])
def test_gradients_overlap_where_workers_are_on_more_than_one_node(
    on_node: int, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Context:
        def get_world_rank(self) -> int:
            return 1

        def get_world_size(self) -> int:
            return 2

        def get_local_world_size(self) -> int:
            return on_node

        def get_local_rank(self) -> int:
            return on_node - 1

        def get_node_rank(self) -> int:
            return 2 - on_node

    calls: list[bool] = []

    def current(*, overlap: bool) -> Single:
        calls.append(overlap)
        return Single()

    monkeypatch.setattr(ray.train, "get_context", Context)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: None)
    monkeypatch.setattr(worker, "current", current)
    monkeypatch.setattr(worker, "NodeMetrics", lambda *_: nullcontext())
    monkeypatch.setattr(worker, "run", lambda *_args, collectives, **_: calls.append(isinstance(collectives, Single)))
    config = PretrainConfig.model_validate({"name": "n", "data": "memory://d", "runs": "memory://r"})
    worker.train_loop({"config": resolved(config), "run_id": "r", "lease": "l"})
    assert calls == [overlap, True]


@pytest.mark.parametrize(
    ("local", "on_node", "world", "node", "sampled"),
    [
        (0, 2, 2, 0, [("r", "")]),
        (1, 2, 2, 0, []),
        (0, 2, 4, 1, [("r", "node-1")]),
        (1, 2, 4, 1, []),
        (0, 1, 1, 0, [("r", "")]),
    ],
)
def test_one_rank_of_a_node_says_what_the_node_does(
    local: int, on_node: int, world: int, node: int, sampled: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"local_rank": local, "local_world_size": on_node, "world_size": world, "node_rank": node}
    context: Any = SimpleNamespace(**{f"get_{name}": partial(int, value) for name, value in facts.items()})
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(worker, "NodeMetrics", lambda *words: calls.append(words) or nullcontext())
    with worker._node_metrics(context, "r"):
        assert calls == sampled
