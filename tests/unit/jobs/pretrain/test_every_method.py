"""One configuration trains every method from a store, with nothing but its name changed."""

import uuid
from pathlib import Path

import pytest
import torch

from jobs.configs import PretrainConfig
from jobs.pretrain.loop import Hooks, run
from jobs.superpixels import compute
from ssl_core.config import load, parse
from ssl_core.methods.base import method_class, method_names
from ssl_core.views.types import ViewSpec
from tests.kit.phantoms import write_phantoms

EXAMPLE = Path(__file__).parents[4] / "examples/configs/pretrain_any.yaml"
SMALL = [
    "method.crops.size_DHW=[16,16,32]",
    "backbone.arguments.filters=[4,4,8,8]",
    "stream={global_batch: 2, lanes: 4}",
    "engine={steps: 2, warmup_steps: 1, log_every: 1, checkpoint_every: 2, probe_every: 2}",
]


def job(name: str, data: str) -> PretrainConfig:
    return load(PretrainConfig, EXAMPLE, [f"method.name={name}", f"data={data}", *SMALL])


@pytest.fixture(scope="module")
def data() -> str:
    """Labelled volumes with the super-pixels of every method that reads some."""
    url = f"memory://{uuid.uuid4().hex}"
    write_phantoms(url, 6, label="label")
    for name in method_names():
        views: ViewSpec = method_class(name).view_spec(job(name, url).method_config)
        for settings in views.superpixels:
            compute(url, settings, say=lambda _line: None)
    return url


@pytest.mark.parametrize("name", method_names())
def test_it_trains(name: str, data: str) -> None:
    config = job(name, data)
    assert config.method["crops"]["size_DHW"] == [16, 16, 32]
    losses: list[float] = []
    hooks = Hooks(publish=lambda *_: None, on_point=lambda p: losses.append(p.metrics["loss"]))
    done = run(config, hooks, restore=None, device=torch.device("cpu"))
    assert done["steps"] == 2
    assert len(losses) == 2
    assert all(torch.isfinite(torch.tensor(losses)))
    assert parse(PretrainConfig, config.model_dump(mode="json")) == config
