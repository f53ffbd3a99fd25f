"""Losses and views beside other libraries: where they mean the same thing they give the same numbers."""

import importlib.util
from typing import Any

import pytest
import torch

from jobs.bench.device import loss_cases, view_cases
from jobs.bench.device.losses import bench_losses, format_losses
from jobs.bench.device.views import bench_views, format_views


@pytest.fixture(scope="module")
def loss_rows() -> list[dict[str, Any]]:
    result = bench_losses(quick=True, rounds=1, say=lambda _: None)
    assert "NT-Xent" in format_losses(result)
    rows: list[dict[str, Any]] = result["rows"]
    return rows


@pytest.fixture(scope="module")
def view_rows() -> list[dict[str, Any]]:
    result = bench_views(quick=True, rounds=1, say=lambda _: None)
    assert "gamma: ours" in format_views(result)
    rows: list[dict[str, Any]] = result["rows"]
    return rows


def test_every_loss_agrees_with_its_equation(loss_rows: list[dict[str, Any]]) -> None:
    for row in loss_rows:
        if row["ms"] is None:
            assert row["note"].startswith("not measured"), row
            continue
        exact = row["peer"] == loss_cases.OURS and "bf16" not in row["inputs"]
        assert row["value_error"] < (3e-6 if exact else 1e-2), row
        assert row["gradient_error"] < (5e-6 if exact else 5e-2), row
        assert row["peak_mib"] > 0


def test_peers_are_named_in_every_loss_that_they_offer(loss_rows: list[dict[str, Any]]) -> None:
    whose: dict[str, set[str]] = {}
    for row in loss_rows:
        whose.setdefault(row["case"], set()).add(row["peer"])
    assert whose["NT-Xent (SimCLR)"] == {"tomoscale", "MONAI", "lightly"}
    assert whose["queue (MoCo)"] == whose["2 - 2 cos (BYOL)"] == {"tomoscale", "lightly"}
    assert whose["hidden voxels (MAE)"] == {"tomoscale", "MONAI"}


def test_a_library_that_is_absent_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name in ("lightly", "kornia") else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    byol = next(case for case in loss_cases.cases(quick=True) if "BYOL" in case.name)
    assert byol.peers == {"lightly": None}
    assert "pip install --no-deps lightly" in byol.notes["lightly"]
    flip = next(case for case in view_cases.cases(1, 16, torch.device("cpu")) if case.name == "crop and flip")
    assert flip.peers["kornia"] is None
    assert "tomoscale[bench]" in flip.notes["kornia"]


def test_views_show_what_other_libraries_show(view_rows: list[dict[str, Any]]) -> None:
    compared = [row for row in view_rows if row["difference"] is not None]
    assert {row["case"] for row in compared} >= {"crop", "resize", "crop, flip, rotate, scale and resize", "gamma"}
    for row in compared:
        # MONAI's sampled Gaussian kernel does not sum to one.
        unnormalised = row["case"] == "Gaussian blur" and row["whose"] == "MONAI"
        assert row["difference"] < (5e-2 if unnormalised else 1e-4), row


def test_every_operation_says_what_is_used(view_rows: list[dict[str, Any]]) -> None:
    assert all(
        row["choice"] and row["crops_per_s"]["median"] > 0 for row in view_rows if row["whose"] == view_cases.OURS
    )
    assert len({row["case"] for row in view_rows}) == 13
