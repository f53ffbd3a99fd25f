"""Three ranks are one rank too; two are in the contract. Also that a group of ranks reports and ends."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ssl_core.distributed import Collectives
from ssl_core.networks.batch_norm import GlobalBatchNorm
from ssl_core.testing.method import assert_same_on_ranks
from ssl_core.testing.ranks import Ranks
from tests.kit import processes


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[Ranks]:
    with Ranks(3) as ranks:
        yield ranks


# Every method is held to two ranks by its contract; a third shows what an order of ranks could change: keys of a queue,
# prototypes, and maps that are matched.
@pytest.mark.parametrize("name", ["mocov2", "pcl", "pgl"])
def test_three_ranks_equal_one(name: str, three_ranks: Ranks) -> None:
    assert_same_on_ranks(three_ranks, name, each=1, steps=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"base": "supervised", "base_settings": {"views": 2, "values": [223, 322]}, "form": "B"},
        {"base": "byol", "base_settings": {"hidden": 16, "out": 8}},
    ],
    ids=["supervised, form B", "byol, form A"],
)
def test_three_ranks_equal_one_for_lrc_with_another_base(three_ranks: Ranks, settings: dict[str, Any]) -> None:
    assert_same_on_ranks(three_ranks, "lrc", each=1, steps=2, **settings)


def test_three_ranks_equal_one_where_aligned_tells_places(three_ranks: Ranks) -> None:
    crops = {"size_DHW": (16, 16, 16), "flip": (0, 0, 0)}
    assert_same_on_ranks(three_ranks, "aligned", each=1, steps=2, w_position=1.0, crops=crops)


def _normalise(collectives: Collectives, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    whole = 3 + torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    each = shape[0] // collectives.world
    mine = whole[collectives.rank * each : (collectives.rank + 1) * each].clone().requires_grad_()
    norm = GlobalBatchNorm(shape[1]).double()
    norm.collectives = collectives
    out = norm(mine)
    out.pow(3).mean().backward()
    assert mine.grad is not None
    return out.detach(), mine.grad / collectives.world, norm.running_var


def test_the_norm_of_three_ranks_is_torchs_on_the_joined_batch(three_ranks: Ranks) -> None:
    shape = (6, 4, 2, 3, 3)
    x = (3 + torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    norm = torch.nn.BatchNorm3d(4).double()
    wanted = norm(x)
    wanted.pow(3).mean().backward()
    results = three_ranks.run(_normalise, shape)
    assert x.grad is not None
    assert torch.allclose(torch.cat([r[0] for r in results]), wanted.detach(), atol=1e-12)
    assert torch.allclose(torch.cat([r[1] for r in results]), x.grad, atol=1e-12)
    assert norm.running_var is not None
    assert all(torch.allclose(r[2], norm.running_var, atol=1e-12) for r in results)


def _collected(collectives: Collectives, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What each collective gives of numbers that bfloat16 has, and the gradient that a gather sends back."""
    own = _numbers(collectives.rank).to(dtype).requires_grad_()
    gathered = collectives.gather(own)
    (gathered * _numbers(9).repeat(collectives.world).to(dtype)).sum().backward()
    assert own.grad is not None
    plain = own.detach()
    results = {"gather": gathered.detach(), "gradient": own.grad, "sum": collectives.sum(plain)}
    return results | {"mean": collectives.mean(plain), "plain gather": collectives.gather(plain)}


def _numbers(seed: int) -> torch.Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16).float()


def test_collectives_of_halves_are_those_of_float32_rounded_once(three_ranks: Ranks) -> None:
    wide, halves = three_ranks.run(_collected, torch.float32), three_ranks.run(_collected, torch.bfloat16)
    for rank in range(3):
        for name in ("gather", "plain gather", "gradient", "sum"):
            assert halves[rank][name].dtype == torch.bfloat16
            assert torch.equal(halves[rank][name], wide[rank][name].to(torch.bfloat16)), name
            assert rank == 0 or "gradient" in name or torch.equal(halves[rank][name], halves[0][name]), name
        torch.testing.assert_close(halves[rank]["mean"].float(), wide[rank]["mean"], rtol=2**-7, atol=0)


def test_an_error_on_a_rank_is_reported() -> None:
    with Ranks(2) as ranks, pytest.raises(RuntimeError, match="says no"):
        ranks.run(processes.fail)


def test_a_rank_that_hangs_is_ended_in_time() -> None:
    ranks = Ranks(2)
    pids = ranks.run(processes.identity)
    ranks.timeout_s = 0.5
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        ranks.run(processes.sleep)
    assert time.monotonic() - began < 240
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
