"""Gradients that are averaged during the backward pass: whole, in order, and to the bit those averaged after it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_core.distributed import ProcessGroup, Single
from ssl_core.methods.base import LossTerms
from ssl_core.train import buckets, compiling
from ssl_core.train.engine import Engine, EngineConfig, NonFiniteError
from storage.errors import ConfigError
from tests.distributed.test_engine_ranks import CONFIG, STEPS, mine
from tests.kit.processes import spawn
from tests.kit.toy_method import Toy, batch

FLAT: dict[str, Any] = {"steps": 9, "warmup_steps": 0, "log_every": 1}


class Twins(Single):
    """Two ranks that have the same; notes what leaves, and what else the engine asks in between."""

    world = 2
    overlaps = True

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def begin_sum(self, x: Tensor) -> Callable[[], Tensor]:
        copy = x.clone()
        self.parts.append(copy)
        return lambda: 2 * copy


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter is a bucket, and none is in the last one."""
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 1)
    monkeypatch.setattr(buckets, "LAST_BYTES", 0)


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many buckets had left at the end of each step's backward pass."""
    counts: list[int] = []
    average = buckets.Buckets.average

    def note(self: buckets.Buckets, votes: Tensor) -> None:
        counts.append(self.left)
        average(self, votes)

    monkeypatch.setattr(buckets.Buckets, "average", note)
    return counts


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def trained(method: nn.Module, twins: Twins, steps: int = 3, **settings: Any) -> nn.Module:
    engine = Engine(method, EngineConfig(**FLAT, **settings), collectives=twins)
    for step in range(steps):
        engine.step(batch(4 * step, 4))
    return method


def late() -> Twins:
    twins = Twins()
    twins.overlaps = False
    return twins


class Odd(Toy):
    """A toy whose network is used twice, with a parameter more that is used in every second step only."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.ones(3))

    def forward(self, views: Any, ctx: Any) -> LossTerms:
        first, again = super().forward(views, ctx), super().forward(views, ctx)
        more = {"extra": self.extra.square().sum()} if ctx.step % 2 else {}
        return LossTerms({"first": first.total, "again": again.total.square(), **more})


class Nested(Toy):
    """A toy that starts backward passes within one, and so gives its parameters gradients in portions.

    Args:
        first: The step from which it does.
    """

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, views: Any, ctx: Any) -> LossTerms:
        x = views.roles["whole"][0].image_BCDHW.clone().requires_grad_()
        if ctx.step < self.first:
            return LossTerms({"fit": self.online(x).square().mean()})
        halves = [checkpoint(self.online, half, use_reentrant=True) for half in x.chunk(2)]
        return LossTerms({"fit": torch.cat(halves).square().mean()})


@pytest.mark.usefixtures("small")
def test_gradients_leave_in_the_backward_pass_last_layers_first(left: list[int]) -> None:
    twins = Twins()
    method = trained(Toy(), twins, steps=2)
    sizes = [p.numel() for p in method.online.parameters()]
    assert [len(part) for part in twins.parts] == [*reversed(sizes), 2] * 2
    assert left == [0, 4]
    assert_equal(method, trained(Toy(), late(), steps=2))


@pytest.mark.usefixtures("small")
def test_a_network_that_is_used_twice_gives_its_whole_gradient(left: list[int]) -> None:
    """And a parameter that gets none in a step leaves when the pass is over."""
    early = trained(Odd(), Twins(), steps=4)
    assert_equal(early, trained(Odd(), late(), steps=4))
    # Parameters of a module come before those of its parts: `extra` is the first, and the last to leave.
    assert left[:4] == [0, 5, 4, 5]


@pytest.mark.usefixtures("small")
def test_only_the_last_part_of_a_batch_sends_gradients(left: list[int]) -> None:
    assert_equal(trained(Toy(), Twins(), accumulate=2), trained(Toy(), late(), accumulate=2))
    assert left[:3] == [0, 4, 4]


@pytest.mark.usefixtures("small")
def test_gradients_in_portions_leave_when_they_are_whole(left: list[int]) -> None:
    assert_equal(trained(Nested(0), Twins()), trained(Nested(0), late()))
    assert left == [0] * 6


@pytest.mark.usefixtures("small")
def test_a_gradient_that_grows_on_its_way_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"a second one for online\.\d\.\w+, after the first was on its way"):
        trained(Nested(1), Twins())


@pytest.mark.usefixtures("small")
def test_samples_are_named_where_gradients_have_left_already(left: list[int]) -> None:
    engine, views = Engine(Toy(), EngineConfig(**FLAT), collectives=Twins()), batch(4, 2)
    engine.step(batch(0, 2))
    before = {name: tensor.clone() for name, tensor in engine.method.state_dict().items()}
    views.roles["whole"][0].image_BCDHW[1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"^step 2;.*samples \[4, 5\]"):
        engine.step(views)
    assert left == [0, 4]
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.method.state_dict().items())


@pytest.mark.usefixtures("small")
def test_a_compiled_method_gives_its_whole_gradient(left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        return graph.forward

    monkeypatch.setattr(compiling, "why_not", lambda _device: "")  # which compiles for minutes on a busy machine
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_(module, backend=backend))
    assert_equal(trained(Toy(), Twins(), compile=True), trained(Toy(), late(), compile=True))
    assert left[:3] == [0, 4, 4]


def test_buckets_follow_from_the_parameters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 100)
    monkeypatch.setattr(buckets, "LAST_BYTES", 10)
    assert buckets._cut([4, 4, 4, 50, 99, 100, 60, 60]) == [
        range(6, 8),
        range(5, 6),
        range(3, 5),
        range(2, 3),
        range(2),
    ]
    assert buckets._cut([4]) == [range(1)]
    assert buckets._cut([11]) == [range(1), range(0)]


def train_both_ways(folder: Path) -> None:
    """To the bit, in float32, with a contrast whose backward pass has collectives of its own."""
    buckets.BUCKET_BYTES, buckets.LAST_BYTES = 100, 50
    methods = []
    for overlap in (True, False):
        toy = Toy(seed=dist.get_rank(), contrast=True, global_norm=True)
        engine = Engine(toy, EngineConfig(**CONFIG), collectives=ProcessGroup(overlap=overlap))
        for step in range(STEPS):
            engine.step(mine(step, torch.float32))
        methods.append(toy)
    assert_equal(*methods)


def test_three_ranks_are_bitwise_the_same_with_and_without_the_overlap(tmp_path: Path) -> None:
    """So a run may move between one node and several, and may be done again on one machine."""
    spawn(3, tmp_path, [train_both_ways])
