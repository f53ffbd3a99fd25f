"""One line gives an encoder with its preprocessing, wherever its bundle is."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from jobs.tracking import models
from jobs.tracking.encoder import load_encoder
from ssl_core import encoder as core
from ssl_core.portable import Predictor
from storage.errors import ConfigError, NotFound, RefusedInput
from tests.kit.bundles import scan
from tests.kit.httpserver import served
from tests.kit.small_models import encoder_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_bundle(tmp_path_factory.mktemp("b") / "bundle")


def test_an_encoder_is_loaded_in_one_line_from_folder_url_and_registry(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = scan(tmp_path, (18, 20, 17))
    image = nib.load(source)
    array, affine = np.asanyarray(image.dataobj), image.affine
    expected = Predictor(bundle, "cpu").features(array, affine)
    monkeypatch.setattr(models, "pull", lambda uri, target: shutil.copytree(bundle, target))
    with served(bundle.parent) as url:
        places = [str(bundle), bundle, bundle.as_uri(), f"{url}/bundle", "models:/brain@champion", "brain"]
        for place in places:
            encoder = load_encoder(place, device="cpu")
            assert np.array_equal(encoder(array, affine), expected), place
    assert np.array_equal(encoder(source), expected)
    assert encoder.strides_DHW == ((1, 1, 1), (2, 2, 2), (4, 4, 4))
    assert encoder.channels == (4, 8, 8)
    assert encoder(array, affine, level=0).shape[0] == 4
    assert encoder.name == "tiny"
    assert not encoder.network.training


def test_what_is_no_encoder_is_named(bundle: Path, tmp_path: Path) -> None:
    encoder = core.load_encoder(bundle, device="cpu")
    for level in (3, -4):
        with pytest.raises(ConfigError, match="level; expected 0 to 2"):
            encoder(np.zeros((4, 4, 4)), np.eye(4), level=level)
    with pytest.raises(ConfigError, match="jobs.tracking.encoder import load_encoder"):
        core.load_encoder("models:/brain@champion")
    with pytest.raises(NotFound, match="bundle's folder"):
        core.load_encoder(tmp_path / "nothing")
    with pytest.raises(NotFound, match=r"nothing/bundle\.json"):
        core.load_encoder((tmp_path / "nothing").as_uri())
    with pytest.raises(RefusedInput, match=r"bundle\.json"):
        core.load_encoder(tmp_path)


@pytest.mark.parametrize("by_url", [False, True])
def test_a_bundle_that_is_damaged_newer_or_foreign_is_refused(bundle: Path, tmp_path: Path, by_url: bool) -> None:
    copy = tmp_path / "copy"
    place = copy.as_uri() if by_url else str(copy)
    shutil.copytree(bundle, copy)
    weights = bytearray((copy / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "weights.safetensors").write_bytes(weights)
    with pytest.raises(RefusedInput, match=r"weights\.safetensors; expected SHA-256"):
        core.load_encoder(place)
    card = json.loads((bundle / "bundle.json").read_text())
    for change, message in (
        ({"format": "tomoscale-bundle/4"}, "a newer version wrote; update tomoscale"),
        ({"format": "zip"}, "name a bundle that tomoscale wrote"),
        ({"files": {}}, "digests of architecture.json"),
        ({"files": None}, "digests of architecture.json"),
    ):
        (copy / "bundle.json").write_text(json.dumps(card | change))
        with pytest.raises(RefusedInput, match=message):
            core.load_encoder(place)
    (copy / "bundle.json").write_text("[]")
    with pytest.raises(RefusedInput, match=r"bundle\.json"):
        core.load_encoder(place)
    if by_url:  # a card from elsewhere names no place outside of the new folder
        files = card["files"] | {"../outside": "0" * 64}
        (copy / "bundle.json").write_text(json.dumps(card | {"files": files}))
        with pytest.raises(ConfigError, match=r"\.\./outside"):
            core.load_encoder(place)
