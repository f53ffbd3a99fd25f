"""Several processes train as one: gloo on loopback, float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ssl_core.distributed import ProcessGroup
from ssl_core.train import checkpoint
from ssl_core.train.engine import Engine, EngineConfig, NonFiniteError
from ssl_core.train.loop import fit
from tests.kit.processes import spawn
from tests.kit.toy_method import Toy, batch, views_of

STEPS, BATCH = 6, 12
CONFIG: dict[str, Any] = {"steps": STEPS, "warmup_steps": 2, "log_every": 1, "lr": 0.05, "clip": 0.05}
EXACT = EngineConfig(precision="fp64", **CONFIG)
# One step of it takes the gradient itself off the weights: AdamW and clipping would hide a factor.
PLAIN = EngineConfig(
    precision="fp64", optimizer="sgd", momentum=0.0, weight_decay=0.0, clip=0.0, lr=1.0, steps=9, warmup_steps=0
)


def mine(step: int, dtype: torch.dtype) -> Any:
    """This rank's part of the global batch: every W-th sample, as the stream deals them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    picked = [batch(step * BATCH + i, 1, dtype) for i in range(rank, BATCH, world)]
    return views_of(
        torch.cat([v.roles["whole"][0].image_BCDHW for v in picked]), torch.cat([v.sample_B for v in picked])
    )


def engine(config: EngineConfig, **settings: Any) -> Engine:
    # Another seed on each rank: rank 0's weights must win.
    return Engine(Toy(seed=dist.get_rank(), **settings), config, collectives=ProcessGroup())


def train_exact(folder: Path) -> None:
    trained = engine(EXACT, contrast=True, global_norm=True)
    logged = [trained.step(mine(step, torch.float64)) for step in range(STEPS)]
    assert_equal_on_all_ranks(trained)
    if dist.get_rank() == 0:
        checkpoint.save(folder / "exact", trained.state_dict(), {"logged": logged})


def one_plain_step(folder: Path) -> None:
    stepped = engine(PLAIN, contrast=True)
    stepped.step(mine(0, torch.float64))
    if dist.get_rank() == 0:
        checkpoint.save(folder / "plain", stepped.state_dict(), {})


def train_and_resume(folder: Path) -> None:
    config = EngineConfig(accumulate=2, **CONFIG)
    straight = engine(config, norm=True, dropout=0.2)
    for step in range(STEPS):
        straight.step(mine(step, torch.float32))
        if step == 2:
            if dist.get_rank() == 0:
                checkpoint.save(folder / "half", straight.state_dict(), {})
            dist.barrier()
    resumed = engine(config, norm=True, dropout=0.2)
    resumed.load_state_dict(checkpoint.load(folder / "half")[0])
    for step in range(3, STEPS):
        resumed.step(mine(step, torch.float32))
    assert_equal_on_all_ranks(straight)
    for name, tensor in straight.method.state_dict().items():
        assert torch.equal(tensor, resumed.method.state_dict()[name]), name


def stop_together(folder: Path) -> None:
    stopped, saves = engine(EngineConfig(**CONFIG)), list[int]()
    asked = iter([False, dist.get_rank() == 1, False, False])
    source = (mine(step, torch.float32) for step in range(STEPS))
    done = fit(stopped, source, report=quiet, save=lambda s, _: saves.append(s), stop=lambda: next(asked))
    assert (done, saves) == (2, [2])
    assert stopped.stopping


def fail_together(folder: Path) -> None:
    broken = engine(EngineConfig(**CONFIG))
    broken.step(mine(0, torch.float32))
    views = mine(1, torch.float32)
    if dist.get_rank() == 1:
        views.roles["whole"][0].image_BCDHW[0] = float("nan")
    bad = list(range(BATCH + 1, 2 * BATCH, dist.get_world_size()))
    with pytest.raises(NonFiniteError) as caught:
        broken.step(views)
    assert str(bad) in caught.value.found
    assert caught.value.thing == "step 2"


def quiet(*_: Any) -> None:
    pass


def assert_equal_on_all_ranks(trained: Engine) -> None:
    for name, tensor in trained.method.state_dict().items():
        rows = ProcessGroup().gather(tensor.detach().double().reshape(1, -1))
        assert torch.equal(rows, rows[:1].expand_as(rows)), name


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two ranks are asked, in one start of two processes."""
    folder = tmp_path_factory.mktemp("two")
    spawn(2, folder, [train_exact, one_plain_step, train_and_resume, stop_together, fail_together])
    return folder / "exact"


def joined(step: int) -> Any:
    """What two ranks have together. The loss does not care for the order within a batch; only the toy's queue does."""
    order = [i for rank in range(2) for i in range(rank, BATCH, 2)]
    parts = [batch(step * BATCH + i, 1, torch.float64) for i in order]
    return views_of(torch.cat([v.roles["whole"][0].image_BCDHW for v in parts]), torch.cat([v.sample_B for v in parts]))


def test_gradients_are_not_off_by_the_world_size(exact: Path) -> None:
    two = checkpoint.load(exact.parent / "plain")[0]["method"]
    alone = Engine(Toy(seed=0, contrast=True), PLAIN)
    before = {name: tensor.clone() for name, tensor in alone.method.online.named_parameters()}
    alone.step(joined(0))
    for name, tensor in alone.method.online.named_parameters():
        gradient = before[name] - tensor
        assert float(gradient.detach().norm()) > 1e-6, name
        torch.testing.assert_close(before[name] - two[f"online.{name}"], gradient, rtol=0, atol=1e-10, msg=name)


def test_two_ranks_are_one_on_the_joined_batch(exact: Path) -> None:
    state, meta = checkpoint.load(exact)
    alone = Engine(Toy(seed=0, contrast=True, global_norm=True), EXACT)
    logged = [alone.step(joined(step)) for step in range(STEPS)]
    for one, two in zip(logged, meta["logged"], strict=True):
        assert one == pytest.approx(two, rel=1e-10)
    mine = alone.state_dict()
    for name, tensor in mine["method"].items():
        torch.testing.assert_close(tensor, state["method"][name], rtol=0, atol=1e-10, msg=name)
    for name, entry in mine["optimizer"].items():
        for key, tensor in entry.items():
            torch.testing.assert_close(tensor, state["optimizer"][name][key], rtol=0, atol=1e-10, msg=f"{name} {key}")


def test_a_checkpoint_of_two_ranks_loads_on_one(exact: Path) -> None:
    alone = Engine(Toy(contrast=True, global_norm=True), EXACT)
    alone.load_state_dict(checkpoint.load(exact)[0])
    assert alone.step_done == STEPS


def test_three_ranks_resume_bitwise(tmp_path: Path) -> None:
    """With three ranks the order of additions in an all-reduce depends on the place in the buffer."""
    spawn(3, tmp_path, [train_and_resume])
