"""Losses at lower decoder levels: on the network's own maps, with nnU-Net's weights, and gone after training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.configs import FinetuneJobConfig
from jobs.plan.buildable import require_buildable
from ssl_core.bundle import write_bundle
from ssl_core.bundle_card import BundleFacts
from ssl_core.config import parse
from ssl_core.distributed import Single
from ssl_core.downstream.deep_supervision import AuxiliaryOutputs, coarser, require_levels, weights
from ssl_core.downstream.finetune import FinetuneConfig, Start, build_segmenter
from ssl_core.downstream.objective import Segmentation
from ssl_core.methods.base import StepContext
from ssl_core.networks import build
from ssl_core.networks.weights import encoder_state
from ssl_core.views.intensity import IntensityPolicy
from ssl_core.views.types import View, ViewBatch
from storage.errors import ConfigError
from tests.kit.networks import SMALL, volume
from tests.oracles import losses as slow

RESENC: dict[str, Any] = {"n_blocks_per_stage": (1, 1, 1, 1), "features_per_stage": (4, 4, 4, 8)}


@pytest.mark.parametrize(("name", "dims"), [*((name, 3) for name in sorted(SMALL)), ("resenc", 2), ("dynunet", 2)])
def test_levels_are_the_maps_of_the_decoder_in_one_pass(name: str, dims: int) -> None:
    torch.manual_seed(0)
    arguments = SMALL[name] if dims == 3 else {**SMALL[name], "spatial_dims": 2}
    backbone = build(name, **arguments).eval()
    coarse = [level for level in backbone.decoder_levels[::-1] if max(level.stride_DHW) > 1]
    assert coarse
    outputs = AuxiliaryOutputs(backbone, len(coarse), seed=0)
    assert outputs.strides == [level.stride_DHW for level in coarse]
    x = volume(backbone)
    features = backbone.features(x)
    maps = zip(backbone.decode(features)[::-1], backbone.decoder_levels[::-1], strict=True)
    coarse_maps = [m for m, level in maps if max(level.stride_DHW) > 1]
    expected = [layer(m) for layer, m in zip(outputs.layers, coarse_maps, strict=True)]
    logits, *levels = outputs(backbone, x)
    assert torch.equal(logits, backbone.logits(x))
    for ours, of_decode in zip(levels, expected, strict=True):
        assert torch.allclose(ours, of_decode, atol=1e-5)
    assert not any(module._forward_hooks for module in backbone.net.modules())
    with pytest.raises(ConfigError, match=f"finetune.deep_supervision.*at most {len(coarse)}"):
        require_levels(name, arguments, len(coarse) + 1)


def test_the_loss_is_the_formulas_in_float64() -> None:
    config = FinetuneConfig(deep_supervision=2, patch_DHW=(16, 8, 8))
    torch.manual_seed(0)
    network = build("resenc", **RESENC, out_channels=3).double()
    objective = Segmentation(network, config, label="l", labels={1: "a", 4: "b"}, pretrained=False).double()
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0, 1, 4])[torch.randint(0, 3, (2, 16, 8, 8), generator=generator)]
    image = torch.randn(2, 1, 16, 8, 8, dtype=torch.float64, generator=generator)
    view = View(image, torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.ones(2, 1, 16, 8, 8), maps={"l": values})
    index = torch.arange(2)
    batch = ViewBatch({"patch": (view,)}, index, index, torch.ones(2, 3), torch.ones(2, 3))
    terms = objective(batch, StepContext(0, 1, 0, Single()))
    assert set(terms.terms) == {"dice", "ce"}
    assert objective.auxiliary is not None
    outputs = [output.detach().numpy() for output in objective.auxiliary(network, image)]
    assert [output.shape[2:] for output in outputs] == [(16, 8, 8), (8, 4, 4), (4, 2, 2)]
    classes = np.where(values.numpy() == 4, 2, values.numpy())
    assert terms.total.item() == pytest.approx(slow.deep_supervision(outputs, classes), abs=1e-9)


def test_weights_are_halved_and_sum_to_one_and_labels_are_nearest() -> None:
    assert weights(4) == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15])
    classes = torch.randint(0, 5, (2, 6, 8, 4), generator=torch.Generator().manual_seed(0))
    nearest = torch.nn.functional.interpolate(classes[:, None].double(), size=(2, 4, 4), mode="nearest-exact")
    assert torch.equal(coarser(classes, (3, 2, 1)), nearest[:, 0].long())


def test_outputs_leave_nothing_behind_and_start_from_the_seed() -> None:
    """Neither a network nor what another training takes over from it knows of them."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    network = build("resenc", **RESENC)
    before = set(network.net.state_dict())
    torch.manual_seed(1)
    first, same, other = (AuxiliaryOutputs(network, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    assert set(network.net.state_dict()) == before
    start = Start("s", encoder_state(network), network.net.state_dict(), "all_but_head")
    again = build_segmenter("resenc", RESENC, 5, 0, start)
    assert torch.equal(again.net.state_dict()["decoder.stages.0.convs.0.conv.weight"],
                       network.net.state_dict()["decoder.stages.0.convs.0.conv.weight"])  # fmt: skip


def test_more_levels_than_there_are_are_refused_at_plan(tmp_path: Path) -> None:
    facts = BundleFacts("m", (16, 16, 16), IntensityPolicy())
    bundle = write_bundle(tmp_path / "b", "encoder", build("resenc", **RESENC), facts)
    job = {"name": "n", "starts": {"a": str(bundle)}, "labelled": {"data": "memory://x"}}
    for levels in (2, 3):
        config = parse(FinetuneJobConfig, job | {"finetune": {"patch_DHW": [16, 16, 16], "deep_supervision": levels}})
        if levels == 2:
            require_buildable(config)
        else:
            with pytest.raises(ConfigError, match=r"finetune.deep_supervision.*at most 2.*lower"):
                require_buildable(config)
