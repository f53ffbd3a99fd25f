"""Mirrored windows: equivariance, the mean of probabilities, and sides that are never swapped."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_core.portable import Predictor
from ssl_core.portable.inference.mirror import mirrored
from ssl_core.portable.inference.settings import check_mirror, names_side
from storage.errors import ConfigError
from tests.kit.small_models import segmenter_bundle


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv3d(1, 3, 3, padding=1).double().requires_grad_(False)


def test_a_mirrored_window_gives_the_mirrored_probabilities() -> None:
    network, x = _network(), torch.randn(2, 1, 5, 6, 7, dtype=torch.float64)
    for axes in ((2,), (3, 4), (2, 3, 4)):
        scores = mirrored(network, axes)
        whole = scores(x)
        assert torch.allclose(whole.sum(1), torch.ones(()), atol=1e-6)
        for axis in axes:
            assert torch.allclose(scores(x.flip(axis)), whole.flip(axis), atol=1e-6)
            assert not torch.allclose(network(x.flip(axis)), network(x).flip(axis), atol=1e-2), "by itself it does not"


def test_it_is_the_mean_of_all_mirrorings() -> None:
    network, x = _network(), torch.randn(1, 1, 4, 5, 6, dtype=torch.float64)
    flips = [tuple(axis for axis, on in zip((2, 4), pattern, strict=True) if on) for pattern in product((0, 1), (0, 1))]
    expected = torch.stack([network(x.flip(f)).softmax(1).flip(f) for f in flips]).mean(0)
    assert torch.allclose(mirrored(network, (2, 4))(x).double(), expected, atol=1e-6)
    assert mirrored(network, ()) is network


def test_a_mirrored_volume_has_the_mirrored_mask(tmp_path: Path) -> None:
    """Windows at 0, 8, 16 of 32 voxels lie alike from both ends."""
    bundle = segmenter_bundle(tmp_path / "b")
    values = np.random.default_rng(0).gamma(2.0, 100.0, (1, 32, 24, 16)).astype(np.float32)
    predictor = Predictor(bundle, "cpu", mirror=("D", "W"))
    mask, maps = predictor.segmented(values, np.eye(4), probabilities=True)
    assert maps is not None
    assert len(np.unique(mask)) == 3
    plain = Predictor(bundle, "cpu")
    for axis in (0, 2):
        flipped, flipped_maps = predictor.segmented(np.flip(values, axis + 1).copy(), np.eye(4), probabilities=True)
        assert flipped_maps is not None
        assert np.allclose(np.flip(flipped_maps, axis + 1), maps, atol=1e-5)
        assert (np.flip(flipped, axis) == mask).mean() > 0.999
        alone = plain.segment(np.flip(values, axis + 1).copy(), np.eye(4))
        assert (np.flip(alone, axis) == plain.segment(values, np.eye(4))).mean() < 0.99
    assert np.allclose(maps.sum(0), 1, atol=1e-5)
    assert np.array_equal(np.array([0, 1, 7])[maps.argmax(0)], mask)


@pytest.mark.parametrize(
    ("name", "sided"),
    [
        *((name, True) for name in ("left kidney", "kidney_L", "Kidney-R", "rh.cortex", "LeftLung", "kidneyR", "LV")),
        *((name, False) for name in ("liver", "vertebra L3", "label-1", "anterior", "cleft", "frontal", "gallbladder")),
    ],
)
def test_names_that_say_a_side(name: str, sided: bool) -> None:
    assert names_side(name) is sided


def test_left_and_right_are_never_swapped_where_a_label_names_a_side(tmp_path: Path) -> None:
    labels = ((0, "background"), (1, "left kidney"), (7, "right kidney"))
    bundle = segmenter_bundle(tmp_path / "b", labels=labels)
    with pytest.raises(ConfigError, match=r"mirror.*W, with the label 'left kidney'.*leave W out"):
        Predictor(bundle, "cpu", mirror=("W",))
    assert Predictor(bundle, "cpu", mirror=("D", "H")).inference.mirror == ("D", "H")
    check_mirror(("W",), ["liver"], "mirror")
    for axes in (("X",), ("D", "D")):
        with pytest.raises(ConfigError, match="axes of D, H, W, each once"):
            check_mirror(axes, ["liver"], "mirror")
