"""The benchmarks of the training device measure what they say."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from jobs.bench.__main__ import main
from jobs.bench.device import nnssl, rate
from jobs.bench.device.rate import convolution_rate, step_operations
from jobs.bench.device.step import PARTS, VARIANTS, bench_step, crops, measure, method_on, stored
from ssl_core.methods.base import LossTerms, method_class
from ssl_core.testing.memory import peak_of
from ssl_core.views.types import RoleSpec, ViewSpec
from tests.kit.phantoms import write_phantoms

SMALL = {"small": ("basic_unet", {"features": (4, 4, 8, 8, 8, 4)})}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "SHAPES", ((8, 16),))  # the machine's own rate takes many seconds


def small(edge: int = 32, **settings: Any) -> Any:
    return measure("simclr", "small", size_DHW=(edge,) * 3, batch=2, warmup=1, backbones=SMALL, **settings)


def test_a_row_adds_up() -> None:
    row = small(steps=2, operations=4e9, rate=1e11)
    assert set(row.shares) == set(PARTS)
    assert sum(row.shares.values()) == pytest.approx(1.0)
    assert min(row.shares.values()) >= 0
    assert row.shares["network"] > 0.05
    assert row.shares["backward"] > 0.05
    assert row.samples_per_s == pytest.approx(2 / row.step_s[0])
    assert row.reached == pytest.approx(4e9 / row.step_s[0] / 1e11)
    # Weights and two moments of AdamW; the few weights that SimCLR does not train have none.
    assert row.state_mib * 2**20 == pytest.approx(3 * 4 * row.parameters, rel=0.05)
    assert row.step_mib * 2**20 > 4 * row.parameters  # gradients at least


def test_checkpointing_shows_in_the_memory_of_a_step() -> None:
    kept, recomputed = small(steps=1), small(steps=1, variant="checkpointing")
    assert recomputed.step_mib < 0.9 * kept.step_mib


@pytest.mark.parametrize("method", ["lrc", "supervised"])
def test_methods_that_read_maps_are_measured(method: str) -> None:
    row = measure(method, "small", size_DHW=(32, 32, 32), batch=2, steps=1, warmup=0, backbones=SMALL)
    assert row.method == method
    assert row.samples_per_s > 0


def test_crops_carry_the_maps_that_the_views_want() -> None:
    host = next(crops(ViewSpec((RoleSpec("a", 1, (12, 20, 16)),), maps=("one", "two")), 2))
    assert set(host.maps_BDHW) == {"one", "two"}
    assert host.maps_BDHW["one"].shape == host.image_BCDHW[:, 0].shape
    assert len(np.unique(host.maps_BDHW["one"][0])) == 2 * 3 * 2


def test_views_are_the_methods_own_but_for_their_size() -> None:
    for name in ("pgl", "pcrlv2", "simclr"):
        kind = method_class(name)
        made = method_on(name, "small", (32, 48, 32), SMALL)
        for role, own in zip(kind.view_spec(made.config).roles, kind.view_spec(kind.Config()).roles, strict=True):
            assert replace(role, size_DHW=own.size_DHW) == own
            assert role.size_DHW == ((32, 32, 32) if role.name == "local" else (32, 48, 32))


def test_a_slow_source_shows_as_wait() -> None:
    def slow(spec: Any) -> Any:
        for host in crops(spec, 2):
            time.sleep(1.0)
            yield host

    row = small(steps=1, source=slow)
    assert row.shares["wait"] > 0.01  # without it, 0.001; more than 0.1 on an idle machine
    assert row.step_s[0] > 1.0


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "compile"])
def test_every_variant_trains(variant: str) -> None:
    # Deepest maps of three voxels an edge: of two, weight gradients in bf16 are wrong on some processors, and refused.
    row = small(edge=48, steps=1, variant=variant)
    assert row.variant == variant
    assert row.precision == ("bf16" if "bf16" in variant else "fp32")


def test_a_store_can_be_the_source(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    write_phantoms(url, 4)
    row = small(steps=1, source=lambda spec: stored(url, spec, 2))
    assert row.shares["wait"] > 0


def test_operations_of_convolutions_are_counted_forward_and_backward() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 5, 3, padding=1)

        def forward(self, views: Any, _ctx: Any) -> LossTerms:
            return LossTerms({"x": self.conv(views).square().mean()})

    method = Once()
    # The input needs no gradient: one product forward, one for the kernel.
    assert step_operations(method, torch.randn(2, 3, 4, 6, 8)) == 2 * 2 * 27 * 3 * 5 * 2 * 4 * 6 * 8  # type: ignore[arg-type]
    assert all(p.grad is None for p in method.parameters())


def test_the_rate_is_that_of_the_fastest_shape() -> None:
    both = [convolution_rate(CPU, shapes=shapes, repeats=3) for shapes in (((2, 6),), ((2, 6), (32, 16)))]
    assert 1e6 < both[0] < both[1] < 1e14


def test_the_largest_memory_of_a_call_is_counted_to_the_byte() -> None:
    def work() -> None:
        first = torch.ones(1000, 1000)
        second = first + 1
        del first, second
        torch.ones(500, 1000).sum()

    assert 8_000_000 <= peak_of(work, CPU) < 8_100_000


@pytest.mark.parametrize("name", ["unet", "dynunet", "segresnet"])
def test_backbones_of_the_benchmark_train(name: str) -> None:
    row = measure("mae", name, size_DHW=(32, 32, 32), batch=1, steps=1, warmup=0)
    assert row.parameters > 1e5
    assert row.samples_per_s > 0


def test_views_of_nnssl_are_counted_two_a_crop() -> None:
    assert [round(p.views_per_s) for p in nnssl.PUBLISHED] == [127, 139, 104, 141]


def test_rows_of_a_run_share_one_rate_and_one_count() -> None:
    result = bench_step(
        ["simclr"], ["basic_unet"], variants=["plain", "unfused"], devices=["cpu"], size_DHW=(32, 32, 32), batch=1,
        steps=1, warmup=0, say=lambda _: None,
    )  # fmt: skip
    one, two = result["rows"]
    assert (one["variant"], two["variant"]) == ("plain", "unfused")
    assert one["gflop"] == two["gflop"] > 0
    assert [one["rate_gflops"]] == [two["rate_gflops"]] == [rate / 1e9 for rate in result["rates"].values()]


def test_the_command_writes_figures_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    command = ["step", "--methods", "simclr", "--size", "32", "32", "32", "--batch", "2", "--steps", "1"]
    command += ["--devices", "cpu", "--out", str(file)]
    assert main([*command, "precision=fp32"]) == 0
    found = json.loads(file.read_text())
    assert found["rows"][0]["method"] == "simclr"
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert "samples/s" in capsys.readouterr().out
    assert main([*command, "precison=fp32"]) == 2
    assert "did you mean 'precision'" in capsys.readouterr().err
    assert main([*command, "--variants", "fast"]) == 2
    assert "bf16_channels_last" in capsys.readouterr().err
