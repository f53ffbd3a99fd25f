"""What jobs write into bundles beside the weights: the spacing and the classes of the data behind them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.configs import LabelledConfig
from jobs.finetune import train_from
from jobs.tracking import bundles as bundling
from ssl_core.bundle import write_bundle
from ssl_core.bundle_card import BundleFacts, stored_spacing
from ssl_core.downstream.finetune import FinetuneConfig, build_segmenter
from ssl_core.portable import Predictor
from ssl_core.views.intensity import IntensityPolicy
from storage.errors import ConfigError
from storage.format.manifest import Manifest
from storage.format.volume import Membership, Provenance, Volume
from storage.format.volume_writer import write_volume
from storage.objects import open_store
from tests.kit.phantoms import write_phantoms
from tests.kit.pretraining import config, train


def _resampled(url: str, *, mixed: bool) -> None:
    """Phantoms as an ingest with a target spacing publishes them."""
    records = list(write_phantoms(url, 8).records())
    note = "resampled from 3x1x1 to 1x1x1 mm (D, H, W), bspline"
    records = [replace(record, notes=(*record.notes, note)) for record in records]
    if mixed:
        records[0] = replace(records[0], spacing_mm=(2.0, 1.0, 1.0))
    Manifest.from_records(records, {"name": "phantoms"}).write(open_store(url))


@pytest.mark.parametrize("mixed", [False, True])
def test_an_encoder_asks_for_the_spacing_that_its_volumes_were_resampled_to(mixed: bool, tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    _resampled(url, mixed=mixed)
    job = config(url, "simclr", steps=1, warmup_steps=0)
    train(job, tmp_path / "run")
    bundle = bundling.write_encoder(job, tmp_path / "run" / "step-1", tmp_path / "bundle", run_id="r")
    predictor = Predictor(bundle, "cpu")
    card = (bundle / "MODEL_CARD.md").read_text(encoding="utf-8")
    scan = np.random.default_rng(0).normal(100, 20, (12, 16, 10)).astype(np.float32)
    found = predictor.features(scan, np.diag([2.0, 2.0, 2.0, 1.0]), level=0)
    if mixed:
        assert predictor.plan.spacing_mm is None
        assert found.shape[1:] == (10, 32, 24)  # 2 mm was trained at along D, and not along H and W
        assert "their spacings differ: (1.0, 1.0, 1.0), (2.0, 1.0, 1.0)" in card
    else:
        assert (predictor.plan.spacing_mm, predictor.plan.interpolation) == ((1.0, 1.0, 1.0), "bspline")
        assert found.shape[1:] == (20, 32, 24)
        assert "resampled to (1.0, 1.0, 1.0) mm" in card


def test_spacings_that_differ_by_rounding_are_one(tmp_path: Path) -> None:
    records = list(write_phantoms((tmp_path / "store").as_uri(), 3).records())
    thick = [replace(r, spacing_mm=(s, 1.0, 1.0)) for r, s in zip(records, (10.0, 10.0000006, 9.99996), strict=True)]
    assert stored_spacing(thick) == (None, "linear")
    thick[0] = replace(thick[0], notes=("resampled from 3x1x1 to 10x1x1 mm (D, H, W), linear",))
    assert stored_spacing(thick) == ((10.0, 1.0, 1.0), "linear")
    with pytest.raises(ConfigError, match="one spacing"):
        stored_spacing([*thick, replace(thick[0], spacing_mm=(9.9, 1.0, 1.0))])


def test_a_class_that_the_training_volumes_lack_is_scored_all_the_same(tmp_path: Path) -> None:
    """Left out, it would raise the mean Dice of exactly those trainings that had too few volumes to show it."""
    url = (tmp_path / "store").as_uri()
    records = list(write_phantoms(url, 8).records())
    label = np.zeros((20, 24, 22), np.uint8)
    label[5:9, 5:9, 5:9] = 7
    rare = write_volume(
        open_store(url),
        "rare",
        Volume(
            np.random.default_rng(0).integers(0, 200, (1, 20, 24, 22)).astype(np.int16),
            spacing_mm=(1.0, 1.0, 1.0),
            affine=np.eye(4),
            labels={"labels": label},
        ),
        membership=Membership(subject="rare", split="test"),
        provenance=Provenance(source="rare"),
    )
    Manifest.from_records([*records, rare], {"name": "phantoms"}).write(open_store(url))
    network = build_segmenter("unet", {"channels": [4, 8], "strides": [2], "norm": "instance"}, 2, 0, None)
    facts = BundleFacts("encoder", (16, 16, 16), IntensityPolicy())
    encoder = write_bundle(tmp_path / "encoder", "encoder", network, facts)
    trained = train_from(
        "none",
        LabelledConfig(data=url, label="labels", subjects=3, inner=1),
        FinetuneConfig(epochs=1, steps_per_epoch=1, batch=2, patch_DHW=(16, 16, 16), warmup_steps=0),
        seed=0,
        like=str(encoder),
    )
    trained.store.close()
    assert list(trained.labels) == [1, 7]
    assert trained.network.arguments["out_channels"] == 3
