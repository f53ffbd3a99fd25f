import io

import numpy as np
import pytest
from matplotlib import image

from jobs.pages import pictures as picture
from ssl_core.views.intensity import IntensityPolicy
from ssl_core.views.make import make_views
from ssl_core.views.types import RoleSpec, ViewSpec
from tests.kit.crops import noise


def _pixels(png):
    assert png.startswith(b"\x89PNG")
    return image.imread(io.BytesIO(png))[..., :3]


def _amount(pixels, colour):
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(pixels - rgb).max(2) < 0.02).sum())


@pytest.mark.parametrize("more", [{}, {"rotate_degrees": 25.0}, {"tilt_degrees": 15.0}, {"elastic_vox": 1.0}])
def test_views_show_their_shared_region(more):
    spec = ViewSpec((RoleSpec("a", 2, (10, 16, 16), (0.8, 1.2), False, (0.5, 0.5, 0.5), min_overlap=0.3, **more),))
    views = make_views(noise(spec, 2), spec, seed=0, policy=IntensityPolicy()).roles["a"]
    shown = {"shape_DHW": (80, 90, 100), "sample": 1}
    pixels = _pixels(picture.views_picture(*views, **shown, spacing_mm=(3.0, 1.0, 1.0), title="two views"))
    assert _amount(pixels, picture.EDGE) > 500
    assert picture.views_picture(*views, **shown) == picture.views_picture(*views, **shown)


def test_views_without_a_shared_region_say_so():
    spec = ViewSpec((RoleSpec("a", 1, (8, 8, 8)), RoleSpec("b", 1, (8, 8, 8))))
    views = make_views(noise(spec, 1), spec, seed=0, policy=IntensityPolicy()).roles
    far = views["b"][0]
    far.to_volume_B34[:, :, 3] += 1000
    pixels = _pixels(picture.views_picture(views["a"][0], far, shape_DHW=(80, 90, 100)))
    assert _amount(pixels, picture.EDGE) == 0


def test_overlay_colours_every_label():
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(12, 30, 40))
    truth = np.zeros(volume.shape, np.uint8)
    truth[3:9, 5:15, 5:20], truth[5:9, 18:28, 20:38] = 1, 2
    pixels = _pixels(picture.overlay_picture(volume, truth, np.roll(truth, 1, 2), labels={1: "liver", 2: "spleen"}))
    assert min(_amount(pixels, c) for c in picture.COLOURS[:2]) > 50
    assert _amount(pixels, picture.COLOURS[2]) == 0
    tall = _pixels(picture.overlay_picture(volume, truth, None))
    assert tall.shape[0] < pixels.shape[0]
    _pixels(picture.overlay_picture(volume[:1], None, None, slices=3))
    _pixels(picture.overlay_picture(volume, np.zeros_like(truth), None))


def test_slices_cover_the_labels():
    mask = np.zeros((30, 4, 4), bool)
    mask[10:20] = True
    assert picture._labelled_slices(mask, 30, 5) == [11, 13, 15, 17, 19]
    assert picture._labelled_slices(mask, 30, 1) == [15]
    assert len(picture._labelled_slices(None, 2, 5)) <= 2
