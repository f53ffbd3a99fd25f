"""A step without numbers refuses what a step of the job would refuse, and nothing else."""

from typing import Any

import pytest
import torch

from ssl_core.config import parse, resolved
from ssl_core.methods.base import method_class, method_names
from ssl_core.testing.method import BACKBONE, tiny_config
from ssl_core.train.dry_step import check_step
from storage.errors import ConfigError

SMALL: dict[str, dict[str, Any]] = {
    "basic_unet": {"features": [8, 8, 8, 8, 8, 8]},
    "dynunet": {"filters": [8, 8, 8], "strides": [1, 2, 2], "kernel_size": [3, 3, 3]},
    "resenc": {
        "n_stages": 3,
        "features_per_stage": [8, 8, 8],
        "kernel_sizes": [3, 3, 3],
        "strides": [1, 2, 2],
        "n_blocks_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
    },
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]},
    "swin_unetr": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [3, 3, 3, 3]},
    "unet": {"channels": [8, 8, 8], "strides": [2, 2]},
}


def check(arguments: dict[str, Any], backbone: str = "basic_unet", size: int = 32, **settings: Any) -> None:
    config = parse(method_class("simclr").Config, {"crops": {"size_DHW": [size] * 3}} | settings)
    check_step("simclr", config, backbone, arguments, samples=2)


@pytest.mark.parametrize("name", method_names())
def test_every_method_passes_and_nothing_is_drawn(name: str) -> None:
    state = torch.random.get_rng_state()
    check_step(name, tiny_config(name), *BACKBONE, samples=1)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", SMALL)
def test_every_network_passes(name: str) -> None:
    if name in ("resenc", "swin_unetr"):
        pytest.importorskip({"resenc": "dynamic_network_architectures", "swin_unetr": "einops"}[name])
    check(SMALL[name], name)


UNFIT: list[tuple[str, dict[str, Any], str]] = [
    ("basic_unet", {"features": [16, 16]}, "backbone.arguments.features"),
    ("basic_unet", {"act": "foo", "bias": True}, "backbone.arguments.act"),
    ("basic_unet", {"norm": "foo"}, "backbone.arguments.norm"),
    ("basic_unet", {"upsample": "foo"}, "backbone.arguments.upsample"),
    ("unet", {"kernel_size": 4}, "backbone.arguments.kernel_size"),
    ("unet", {"adn_ordering": "XYZ"}, "backbone.arguments.adn_ordering"),
    ("unet", {"strides": [2, 2, 2, 2, 2]}, "backbone.arguments"),
    ("dynunet", {"kernel_size": [4, 4, 4, 4]}, "backbone.arguments.kernel_size"),
    ("dynunet", {"kernel_size": [3, 3, 3]}, "backbone.arguments.kernel_size"),
    ("dynunet", {"norm_name": "foo"}, "backbone.arguments.norm_name"),
    ("dynunet", {"upsample_kernel_size": [3, 3, 3]}, "backbone.arguments.upsample_kernel_size"),
    ("segresnet", {"blocks_up": [1]}, "backbone.arguments"),
    ("segresnet", {"blocks_up": [1, 1, 1, 1]}, "backbone.arguments"),
    ("segresnet", {"init_filters": 7}, "backbone.arguments.init_filters"),
    ("segresnet", {"upsample_mode": "foo"}, "backbone.arguments.upsample_mode"),
]


@pytest.mark.parametrize(("backbone", "arguments", "key"), UNFIT)
def test_a_network_that_cannot_be_built_or_run_is_refused_by_its_key(
    backbone: str, arguments: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check(arguments, backbone)
    assert refused.value.thing.startswith(key)
    assert refused.value.expected
    assert refused.value.found
    assert refused.value.remedy
    assert "fake" not in str(refused.value).lower()


@pytest.mark.parametrize(
    ("size", "key"),
    [
        (20, "method.crops.size_DHW"),
        (16, "method.crops.size_DHW"),  # one position at the deepest level
    ],
)
def test_crops_that_do_not_fit_a_network_are_refused(size: int, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check({}, size=size)
    assert refused.value.thing.startswith(key)


def test_a_level_that_a_network_has_not_is_refused() -> None:
    settings = resolved(tiny_config("pgl")) | {"feature_level": 9}
    with pytest.raises(ConfigError, match="feature_level"):
        check_step("pgl", parse(method_class("pgl").Config, settings), *BACKBONE, samples=1)


def test_a_method_that_needs_numbers_is_left_to_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusing it would refuse methods that work."""
    kind = method_class("simclr")
    forward = kind.forward

    def with_a_number(self: Any, views: Any, ctx: Any) -> Any:
        if float(next(iter(views.roles.values()))[0].image_BCDHW.mean()) > 1:
            raise ValueError("bright")
        return forward(self, views, ctx)

    monkeypatch.setattr(kind, "forward", with_a_number)
    check({})
