"""What a worker finds out about its surroundings before it trains."""

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

    calls: list[bool] = []

    def current(*, overlap: bool) -> Single:
        calls.append(overlap)
        return Single()

    monkeypatch.setattr(ray.train, "get_context", Context)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: None)
    monkeypatch.setattr(worker, "current", current)
    monkeypatch.setattr(worker, "run", lambda *_args, collectives, **_: calls.append(isinstance(collectives, Single)))
    config = PretrainConfig.model_validate({"name": "n", "data": "memory://d", "runs": "memory://r"})
    worker.train_loop({"config": resolved(config), "run_id": "r", "lease": "l"})
    assert calls == [overlap, True]
