"""What version 0.1.0 wrote is read by this one: a store, a checkpoint that is resumed from, two bundles.

`tests/fixtures/written-by-0.1.0.tar.xz` was made by that version's code: `store` by `write_phantoms`, `checkpoint`
after step 2 of `tests.kit.pretraining.config("store", "pgl", steps=4, checkpoint_every=2)`, bundles of tiny networks.
`facts.json` and `expected.npz` hold what that version computed from them.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ssl_core.bundle import load_backbone
from ssl_core.portable import Predictor
from storage.format.manifest import Manifest
from storage.reading.verify import verify
from tests.kit.pretraining import config, train

PACKED = Path(__file__).parents[2] / "fixtures/written-by-0.1.0.tar.xz"


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(PACKED) as packed:
        packed.extractall(folder, filter="data")
    return folder


def test_a_store_is_read_whole(before: Path) -> None:
    facts = json.loads((before / "facts.json").read_text())
    url = (before / "store").as_uri()
    manifest = Manifest.open(url)
    assert manifest.fingerprint == facts["fingerprint"]
    assert len(manifest) == 4
    assert not verify(url).problems


def test_a_run_goes_on_from_its_checkpoint(before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads((before / "facts.json").read_text())
    monkeypatch.chdir(before)  # the store's URL is part of what a checkpoint must agree with
    job = config("store", "pgl", steps=4, checkpoint_every=2)
    result, points = train(job, tmp_path, before / "checkpoint")
    assert result["steps"] == 4
    assert result["samples"] == facts["samples"]
    losses = dict(facts["losses"])
    assert [point.step for point in points] == [4]
    # Bitwise on one machine; another processor's kernels sum in another order.
    assert points[0].metrics["loss"] == pytest.approx(losses[4], rel=5e-4)


def test_a_segmenter_predicts_what_it_predicted(before: Path) -> None:
    expected = np.load(before / "expected.npz")
    with pytest.warns(UserWarning, match="does not say which spacing"):
        mask = Predictor(before / "segmenter").predict(expected["scan"], expected["affine"])
    assert mask.shape == expected["mask"].shape
    assert (mask == expected["mask"]).mean() > 0.999


def test_an_encoder_gives_the_features_that_it_gave(before: Path) -> None:
    expected = np.load(before / "expected.npz")
    features = Predictor(before / "encoder").features(expected["scan"], expected["affine"])
    np.testing.assert_allclose(features, expected["features"], rtol=1e-3, atol=1e-3)
    assert load_backbone(before / "encoder").name == "basic_unet"
