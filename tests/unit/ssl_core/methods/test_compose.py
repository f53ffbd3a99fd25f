"""Compositions beyond the contract: sums of their parts on views that the parts share."""

import copy
from dataclasses import replace

import pytest
import torch

from ssl_core.methods.base import (
    Crops,
)
from ssl_core.methods.compose import merge
from ssl_core.testing.method import (
    context,
    tiny_method,
)
from ssl_core.views.types import ViewSpec
from storage.errors import ConfigError
from tests.kit.methods import (
    batch_of,
    changed,
)


def test_settings_of_a_part_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match="nothing"):
        changed("compose", parts=[{"name": "nothing"}])


def test_crops_that_a_part_would_not_get_are_refused() -> None:
    with pytest.raises(ConfigError, match="crops"):
        changed("compose", parts=[{"name": "byol", "settings": {"crops": {"size_DHW": (16, 16, 16)}}}])


def test_a_composition_is_the_weighted_sum_of_its_parts() -> None:
    parts = [
        {"name": "simclr", "weight": 2.0, "settings": {"hidden": 16}},
        {"name": "byol", "settings": {"hidden": 16}},
    ]
    both = tiny_method("compose", changed("compose", parts=parts)).double()
    batch = batch_of(both, [0, 1], torch.float64)
    terms = both(batch, context(0)).terms
    for i, (name, weight) in enumerate((("simclr", 2.0), ("byol", 1.0))):
        alone = copy.deepcopy(both.parts[i])(batch, context(0)).terms
        for key, value in alone.items():
            assert terms[f"{name}/{key}"].item() == pytest.approx(weight * value.item(), abs=1e-10)


@pytest.mark.parametrize("views", [1, 3])
def test_a_part_of_a_composition_takes_as_many_of_the_shared_views_as_it_asked_for(views: int) -> None:
    labels = {"views": views, "values": [223, 322]}
    parts = [{"name": "supervised", "settings": labels}]
    parts += [{"name": name, "settings": {"hidden": 16}} for name in ("simclr", "mocov2", "byol", "pgl")]
    parts += [{"name": "aligned", "settings": {"hidden": 16, "block": 4}}, {"name": "mae", "settings": {"block": 4}}]
    parts += [{"name": "ibot", "settings": {"hidden": 16, "prototypes": 16, "positions": 64, "block": 4}}]
    parts += [{"name": "pcrlv2", "settings": {"local": {"size_DHW": (8, 8, 8)}, "locals": 2}}]
    method = tiny_method("compose", changed("compose", parts=parts)).double()
    batch = batch_of(method, [0, 1], torch.float64)
    terms = copy.deepcopy(method)(batch, context(0)).terms
    for named, part in zip(parts, method.parts, strict=True):
        said = sum(term.item() for key, term in terms.items() if key.startswith(f"{named['name']}/"))
        fewer = {role.name: batch.roles[role.name][: role.count] for role in type(part).view_spec(part.config).roles}
        alone = part(replace(batch, roles=fewer), context(0)).total.item()
        assert alone == pytest.approx(said, abs=1e-10), named["name"]


def test_a_composition_encodes_shared_views_once() -> None:
    parts = [{"name": "simclr", "settings": {"hidden": 16}}, {"name": "byol", "settings": {"hidden": 16}}]
    method = tiny_method("compose", changed("compose", parts=parts))
    passes: list[int] = []
    method.backbone.net.input_block.register_forward_hook(lambda *_: passes.append(1))
    method(batch_of(method, [0, 1]), context(0))
    assert len(passes) == 2


def test_a_composition_shows_what_its_most_demanding_part_asks_for() -> None:
    one, other = (
        ViewSpec((Crops().role("global", count, keep_clean=clean),)) for count, clean in ((3, True), (2, False))
    )
    for specs in ([one, other], [other, one]):
        (role,) = merge(specs).roles
        assert (role.count, role.keep_clean) == (3, True)


def test_a_composition_of_views_that_disagree_is_refused() -> None:
    specs = [ViewSpec((Crops(flip=(0.0, 0.0, p)).role("global", 2),)) for p in (0.0, 0.5)]
    with pytest.raises(ConfigError, match="global"):
        merge(specs)
