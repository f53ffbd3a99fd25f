"""Small bundles, the facts that go into one, and a scan to predict."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from ssl_core.bundle import write_bundle
from ssl_core.bundle_card import BundleFacts
from ssl_core.networks import build
from ssl_core.portable.training_data import TrainingData
from ssl_core.views.intensity import IntensityPolicy
from storage.intensity_stats import STATS_ORDER

FEATURES = (4, 4, 8, 8, 16, 4)

LABELS = ((0, "background"), (1, "front"), (7, "back"))


def facts(**changes: object) -> BundleFacts:
    given = {"name": "tiny", "patch_DHW": (32, 32, 32), "intensity": IntensityPolicy(), "labels": LABELS} | changes
    return BundleFacts(**given)  # type: ignore[arg-type]


SPACING = (2.0, 1.5, 1.5)


def learned(**changes: Any) -> TrainingData:
    """What four volumes of MR were like."""
    given: dict[str, Any] = {
        "volumes": 4,
        "modalities": ("MR",),
        "spacing_mm": (SPACING, SPACING),
        "source_mm": (SPACING, SPACING),
        "field_mm": ((60.0, 45.0, 45.0), (80.0, 60.0, 60.0)),
        "intensities": (dict.fromkeys(STATS_ORDER, (10.0, 1200.0)),),
    }
    return TrainingData(**{**given, **changes})


def network(seed: int = 0, out_channels: int = 3) -> object:
    torch.manual_seed(seed)
    return build("basic_unet", features=FEATURES, out_channels=out_channels)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "segmenter"
    lineage = {"data_fingerprint": "abc", "parent": "models:/enc/1"}
    return write_bundle(path, "segmenter", network(), facts(lineage=lineage, metrics={"test/dice": 0.5}))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "encoder"
    return write_bundle(path, "encoder", network(1), facts(labels=()))


def scan(folder: Path, shape: tuple[int, int, int] = (36, 30, 41), seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    array = rng.gamma(2.0, 100.0, shape).astype(np.float32)
    affine = np.array([[0, 0, -1.5, 40], [-1.0, 0, 0, 9], [0, 1.2, 0, -30], [0, 0, 0, 1]])
    path = folder / f"scan-{seed}.nii.gz"
    nib.save(nib.Nifti1Image(array, affine), path)
    return path
