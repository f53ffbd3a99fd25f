"""A network in shards learns what a whole one learns: gloo on loopback, two ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from ssl_core.distributed import Collectives, Single
from ssl_core.methods.base import method_names
from ssl_core.testing.method import tiny_method
from ssl_core.testing.ranks import Ranks
from ssl_core.testing.views import synthetic_views
from ssl_core.train import checkpoint, sharding
from ssl_core.train.engine import Engine, EngineConfig, NonFiniteError
from ssl_core.train.precision import resolve_precision

STEPS = 2
SHARDED: dict[str, Any] = {
    "steps": STEPS,
    "warmup_steps": 0,
    "log_every": 1,
    "precision": "fp64",
    "accumulate": 2,
    "clip": 0.1,
    "sharding": "full",
}
WHOLE = SHARDED | {"sharding": "none"}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def engine_of(name: str, collectives: Collectives, settings: dict[str, Any]) -> tuple[Engine, Any]:
    """With each layer a unit of its own, and this rank's part of a batch of four."""
    config = EngineConfig(**settings)
    method = tiny_method(name)
    dtype = torch.float64 if resolve_precision(config.precision, torch.device("cpu")) == "fp64" else torch.float32
    samples = [2 * collectives.rank, 2 * collectives.rank + 1]
    batch = synthetic_views(type(method).view_spec(method.config), samples, dtype)
    with mock.patch.object(sharding, "UNIT_BYTES", 1):
        return Engine(method, config, collectives=collectives), batch


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Of a method and its optimizer, by name."""
    moments = {f"{n}/{k}": v for n, entry in state["optimizer"].items() for k, v in entry.items()}
    return {name: tensor.detach().clone() for name, tensor in (state["method"] | moments).items()}


def trained_tensors(engine: Engine) -> dict[str, Tensor]:
    """Without running statistics, which a bad batch moves."""
    state, trained = tensors(engine.state_dict()), engine.optimizer.state_dict()
    return {name: tensor for name, tensor in state.items() if name in trained or "/" in name}


def learnt(
    collectives: Collectives, name: str, settings: dict[str, Any]
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    engine, batch = engine_of(name, collectives, settings)
    logged = [engine.step(batch) for _ in range(STEPS)]
    return tensors(engine.state_dict()), logged


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


@pytest.mark.parametrize("name", method_names())
def test_a_network_in_shards_learns_what_a_whole_one_learns(name: str, two_ranks: Ranks) -> None:
    whole, logged = two_ranks.run(learnt, name, WHOLE)[0]
    for state, lines in two_ranks.run(learnt, name, SHARDED):
        assert state.keys() == whole.keys()
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, whole[key], rtol=0, atol=1e-12, msg=key)
        for line, other in zip(lines, logged, strict=True):
            assert line == pytest.approx(other, rel=1e-9, abs=1e-12)


def shares(collectives: Collectives, name: str) -> tuple[int, int, int]:
    """Trained parameters on this rank, its moments, and trained parameters in all."""
    engine, batch = engine_of(name, collectives, SHARDED)
    engine.step(batch)
    parameters = [p for p in engine.method.parameters() if p.requires_grad]
    moments = [entry[key] for entry in engine.optimizer.state_dict().values() for key in ("exp_avg", "exp_avg_sq")]
    own, own_moments = (sum(t.to_local().numel() for t in tensors) for tensors in (parameters, moments))
    return own, own_moments, sum(p.numel() for p in parameters)


def test_a_rank_keeps_its_share_of_weights_and_moments(two_ranks: Ranks) -> None:
    results = two_ranks.run(shares, "simclr")
    total = results[0][2]
    assert sum(own for own, _, _ in results) == total
    for own, moments, _ in results:
        assert moments == 2 * own
        assert own < 0.6 * total, "axis 0 is cut, so an odd number of channels makes one share larger"


def resumed(collectives: Collectives, folder: Path, name: str) -> list[str]:
    """Tensors that differ between a run and one that went on from its checkpoint."""
    settings = SHARDED | {"precision": "fp32"}
    straight, batch = engine_of(name, collectives, settings)
    straight.step(batch)
    state = straight.state_dict()
    if collectives.rank == 0:
        checkpoint.save(folder / "first", state, {})
    collectives.sum(torch.zeros(1))  # until it is written
    again, _ = engine_of(name, collectives, settings)
    again.load_state_dict(checkpoint.load(folder / "first")[0])
    for engine in (straight, again):
        for _ in range(STEPS - 1):
            engine.step(batch)
    return differing(tensors(straight.state_dict()), tensors(again.state_dict()))


def test_a_run_in_shards_resumes_bitwise_and_goes_on_whole(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(resumed, tmp_path, "byol") == [[], []]
    alone, batch = engine_of("byol", Single(), WHOLE | {"precision": "fp32"})
    alone.load_state_dict(checkpoint.load(tmp_path / "first")[0], allow_change=True)
    assert alone.step_done == 1
    alone.step(batch)


def broken(collectives: Collectives, name: str) -> tuple[str, str]:
    engine, batch = engine_of(name, collectives, SHARDED)
    engine.step(batch)
    before = trained_tensors(engine)
    if collectives.rank == 1:
        for role in batch.roles.values():
            role[0].image_BCDHW.fill_(float("nan"))
    with pytest.raises(NonFiniteError) as caught:
        engine.step(batch)
    assert not differing(before, trained_tensors(engine))
    return caught.value.thing, caught.value.found


def test_a_step_that_is_not_finite_changes_no_shard(two_ranks: Ranks) -> None:
    for thing, _ in two_ranks.run(broken, "simclr"):
        assert thing == "step 2"


def test_one_rank_has_no_shards() -> None:
    engine, batch = engine_of("simclr", Single(), SHARDED)
    whole, _ = engine_of("simclr", Single(), WHOLE)
    for trained in (engine, whole):
        trained.step(batch)
    assert not differing(tensors(engine.state_dict()), tensors(whole.state_dict()))
