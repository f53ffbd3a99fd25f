"""Views made on an accelerator against the same views made on the CPU."""

import pytest
import torch

from ssl_core.views.intensity import IntensityPolicy
from ssl_core.views.make import make_views
from ssl_core.views.types import RoleSpec, ViewSpec
from tests.kit.crops import noise
from tests.kit.view_specs import EVERYTHING

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_geometry_and_maps_are_equal_and_images_close():
    quiet = ViewSpec(tuple(RoleSpec(**{**vars(r), "intensity": "none"}) for r in EVERYTHING.roles), EVERYTHING.maps)
    batch = noise(quiet, 4)
    made = [make_views(batch, quiet, seed=0, policy=IntensityPolicy(), device=d) for d in ("cpu", "cuda")]
    for name in ("pair", "turned"):
        for ours, theirs in zip(made[0].roles[name], made[1].roles[name], strict=True):
            assert torch.equal(ours.to_volume_B34, theirs.to_volume_B34.cpu())
            assert torch.equal(ours.maps["label"], theirs.maps["label"].cpu())
            assert torch.equal(ours.valid_B1DHW, theirs.valid_B1DHW.cpu())
            assert torch.allclose(ours.image_BCDHW, theirs.image_BCDHW.cpu(), atol=1e-3)


@pytest.mark.parametrize("preset", ["light", "strong", "genesis", "pcrlv2"])
def test_a_seed_repeats_on_the_device(preset):
    spec = ViewSpec(tuple(RoleSpec(**{**vars(r), "intensity": preset}) for r in EVERYTHING.roles))
    batch = noise(spec, 4)
    first, second = (make_views(batch, spec, seed=1, policy=IntensityPolicy(), device="cuda") for _ in range(2))
    for name, views in first.roles.items():
        for a, b in zip(views, second.roles[name], strict=True):
            assert a.image_BCDHW.is_cuda
            assert torch.equal(a.image_BCDHW, b.image_BCDHW)
