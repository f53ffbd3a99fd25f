import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from skimage.segmentation import felzenszwalb
from sklearn.metrics import adjusted_rand_score

from ssl_core.superpixels.segment import felzenszwalb_nd, of_volume, superpixels
from ssl_core.superpixels.settings import Superpixels
from storage.errors import RefusedInput
from storage.format.records import VolumeRecord
from storage.format.volume import Volume
from storage.format.volume_writer import write_volume
from storage.objects.memory import MemoryStore


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


def slow_regions(image: np.ndarray, k: float, min_size: int) -> list[set[tuple[int, ...]]]:
    """The graph method as its paper says it, on sets of voxels; neighbours share at least a corner."""
    places = list(np.ndindex(*image.shape))
    steps = [s for s in product((-1, 0, 1), repeat=image.ndim) if s > (0,) * image.ndim]
    edges = []
    for p in places:
        for q in (tuple(a + b for a, b in zip(p, s, strict=True)) for s in steps):
            if all(0 <= i < n for i, n in zip(q, image.shape, strict=True)):
                edges.append((abs(float(image[p]) - float(image[q])), p, q))
    region, inner = {p: {p} for p in places}, {p: 0.0 for p in places}  # both by a voxel of the region
    for merging in (False, True):
        for weight, p, q in sorted(edges):
            a, b = region[p], region[q]
            if a is b:
                continue
            light = weight <= min(inner[p] + k / len(a), inner[q] + k / len(b))
            if min(len(a), len(b)) < min_size if merging else light:
                for r in a | b:
                    region[r], inner[r] = a, weight
                a |= b
    return [r for p, r in region.items() if p == min(r)]


def test_three_dimensions_give_the_partition_of_the_papers_rule() -> None:
    image = phantom((6, 9, 11))
    ids = felzenszwalb_nd(image, 40.0, 0.0, 8)
    wanted = slow_regions(image, 40.0 / 255, 8)
    found = [{tuple(p) for p in np.argwhere(ids == i).tolist()} for i in range(ids.max() + 1)]
    assert len(wanted) > 3
    assert sorted(map(sorted, found)) == sorted(map(sorted, wanted))


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


def record(low: float, high: float) -> VolumeRecord:
    image = np.zeros((1, 2, 4, 4), np.int16)
    made = write_volume(
        MemoryStore("memory://superpixels"),
        "v",
        Volume(image, spacing_mm=(1, 1, 1), affine=np.eye(4)),
    )
    return replace(made, scale=2.0, offset=-10.0, stats=({"p0_5": low, "p99_5": high},))


def halves() -> np.ndarray:
    """Stored values of air at -60, and of two tissues at 20 and 60; of a second channel that nobody looks at."""
    stored = np.full((2, 2, 24, 24), -25, np.int16)
    stored[0, :, 4:20, 4:12], stored[0, :, 4:20, 12:20] = 15, 35
    stored[1] = np.random.default_rng(0).integers(-100, 100, stored.shape[1:])
    return stored


@pytest.mark.parametrize("mode", ["slices", "volume"])
def test_a_volume_is_windowed_and_its_air_is_left_out(mode: str) -> None:
    settings = Superpixels(mode=mode, scale=20.0, sigma=0.0)
    ids = of_volume(halves(), record(-50.0, 70.0), settings)
    assert ids.dtype == np.int32
    assert ids.shape == (2, 24, 24)
    assert not ids[:, :4].any()
    tissues = [set(np.unique(ids[0, 4:20, part])) for part in (slice(4, 12), slice(12, 20))]
    assert all(len(found) == 1 for found in tissues)
    assert tissues[0] != tissues[1]
    assert (set(np.unique(ids[0])) == set(np.unique(ids[1]))) == (mode == "volume")
    # A window that ends below both tissues shows them as one; one that begins above the first, the first as air.
    together = of_volume(halves(), record(-50.0, 70.0), settings.model_copy(update={"window": (-50.0, 10.0)}))
    assert len(np.unique(together[0])) == 2
    alone = of_volume(halves(), record(-50.0, 70.0), settings.model_copy(update={"window": (30.0, 70.0)}))
    assert not alone[:, :, 4:12].any()
    assert alone[:, 4:20, 12:20].all()


def test_a_constant_volume_has_no_region_and_a_broken_one_is_refused() -> None:
    assert not of_volume(np.full((1, 3, 24, 24), 7, np.int16), record(4.0, 4.0), Superpixels()).any()
    broken = np.zeros((1, 3, 24, 24), np.float32)
    broken[0, 1, 2, 3] = np.nan
    with pytest.raises(RefusedInput, match="NaN"):
        of_volume(broken, record(0.0, 1.0), Superpixels())


def test_a_large_volume_is_cut_into_slabs_whose_numbers_do_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    image = phantom((12, 16, 16))
    monkeypatch.setattr("ssl_core.superpixels.segment.SLAB_VOXELS", 12 * 16 * 16 // 3)
    ids = superpixels(image, "volume")
    for first in (0, 4, 8):
        alone = felzenszwalb_nd(image[first : first + 4], 100.0, 0.5, 20)
        assert adjusted_rand_score(alone.ravel(), ids[first : first + 4].ravel()) == 1.0
    assert len(np.unique(ids)) == sum(len(np.unique(ids[first : first + 4])) for first in (0, 4, 8))


def test_settings_name_the_map() -> None:
    assert Superpixels(scale=100).name == Superpixels().name != Superpixels(scale=99).name
    assert Superpixels().overrides() == ()
    assert Superpixels(mode="volume", window=(-160, 240)).overrides() == ("mode=volume", "window=[-160.0,240.0]")
    with pytest.raises(ValueError, match="lower"):
        Superpixels(window=(240, -160))


def test_a_task_imports_no_torch() -> None:
    """One is started for each core of a cluster, and waits for its imports first."""
    program = "import sys, ssl_core.superpixels.segment, storage.ingest.derived_maps; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
