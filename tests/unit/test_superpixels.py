import numpy as np
import pytest
from skimage.segmentation import felzenszwalb
from sklearn.metrics import adjusted_rand_score

from ssl_core.superpixels import felzenszwalb_nd, superpixels
from storage.errors import RefusedInput


def phantom(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    grid = np.indices(shape).sum(0) // 12 % 3 / 3.0
    return np.clip(grid + 0.03 * random.standard_normal(shape) + 0.1, 0, 1)


@pytest.mark.parametrize("scale", [10.0, 100.0, 1000.0])
def test_two_dimensions_give_the_partition_of_scikit_image(scale: float) -> None:
    image = phantom((40, 48))
    ours = felzenszwalb_nd(image, scale, 0.5, 20)
    theirs = felzenszwalb(image, scale=scale, sigma=0.5, min_size=20, channel_axis=None)
    assert adjusted_rand_score(theirs.ravel(), ours.ravel()) == 1.0


def test_scaling_intensities_and_scale_alike_changes_nothing() -> None:
    image = phantom((12, 16, 16))
    assert np.array_equal(felzenszwalb_nd(image, 50.0, 0.5, 10), felzenszwalb_nd(image / 4, 12.5, 0.5, 10))


def test_numbers_never_repeat_between_slices_and_zero_is_free() -> None:
    ids = superpixels(phantom((3, 32, 32)), "slices")
    seen = [set(np.unique(plane)) for plane in ids]
    assert ids.min() == 1
    assert not (seen[0] & seen[1]) | (seen[1] & seen[2])


def test_regions_of_a_volume_reach_through_slices() -> None:
    image = np.full((8, 16, 16), 0.1)
    image[:, :, 8:] = 0.9
    ids = superpixels(image, "volume", scale=10.0, sigma=0.0)
    assert len(np.unique(ids)) == 2
    assert len(np.unique(ids[:, :, 12])) == 1


def test_small_regions_are_merged() -> None:
    image = np.zeros((8, 8, 8))
    image[4, 4, 4] = 1.0
    assert len(np.unique(superpixels(image, "volume", scale=0.1, sigma=0.0, min_size=1))) == 2
    assert len(np.unique(superpixels(image, "volume", scale=0.1, sigma=0.0, min_size=20))) == 1


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.float32), np.zeros((4, 8, 8), np.int16), np.full((4, 8, 8), 2.0)]
)
def test_images_that_would_be_misread_are_refused(image: np.ndarray) -> None:
    with pytest.raises(RefusedInput):
        superpixels(image)
