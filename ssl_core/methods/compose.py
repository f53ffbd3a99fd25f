"""compose: a weighted sum of other methods on shared views and one backbone, from a config alone."""

from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_core.config import Config as Settings
from ssl_core.config import parse
from ssl_core.methods.base import (
    Crops,
    LossTerms,
    MethodConfig,
    StepContext,
    method_class,
    register,
    tiny_settings,
    with_memo,
)
from ssl_core.networks.backbone import Backbone
from ssl_core.views.types import RoleSpec, ViewBatch, ViewSpec
from storage.errors import ConfigError


class Part(Settings):
    """One method of a composition."""

    name: str = Field(description="A registered method")
    weight: float = Field(default=1.0, gt=0, description="Factor of its terms")
    settings: dict[str, Any] = Field(default={}, description="Its settings; `crops` comes from the composition")


@register("compose")
class Compose(nn.Module):
    """A weighted sum of methods.

    Idea: most ideas are two known objectives on the same crops; this makes the next one a config.

    Formula: L = sum over parts of weight L_part. All parts share the backbone and, where their roles have the same
    name, the views: such roles are merged into the most demanding one, and must otherwise agree.

    Traps: weights of losses of different scale mean little by themselves, look at the logged terms; the crops are the
    composition's, so Models Genesis restores what `crops.intensity` changed, which is little unless that is `genesis`;
    every part that keeps a moving average keeps its own copy of the backbone; methods that mask their input encode it
    themselves, so nothing is saved there.

    Cost: the sum of the parts; encoder maps of a view are made once for all parts that take them as they are.

    Use it to try combinations before writing a method.
    """

    class Config(MethodConfig):
        """Settings of a composition."""

        TINY = tiny_settings(
            parts=[
                {"name": "models_genesis"},
                {"name": "pgl", "weight": 0.5, "settings": {"hidden": 16, "out": 8}},
            ]
        )

        crops: Crops = Field(
            default=Crops(min_overlap=0.3), description="Views of all parts that have `crops`; our choice"
        )
        parts: tuple[Part, ...] = Field(
            default=(Part(name="models_genesis", settings={}), Part(name="pgl", weight=0.5, settings={})),
            min_length=1,
            description="The methods; our choice: one restoration and one consistency objective",
        )

        @model_validator(mode="after")
        def _parts_fit(self) -> "Compose.Config":
            if any(part.name == "compose" for part in self.parts):
                raise ValueError("parts other than `compose` itself")
            if any("crops" in part.settings for part in self.parts):
                raise ValueError("parts without `crops` of their own: those of the composition are for all")
            merge([method_class(p.name).view_spec(part_config(self, p)) for p in self.parts])
            return self

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        trained: set[str] = set()
        parts = []
        for part in config.parts:
            parts.append(method_class(part.name)(part_config(config, part), backbone))
            trained |= {name for name, p in backbone.net.named_parameters() if p.requires_grad}
        # Each part has chosen what it trains; together they train the union.
        for name, parameter in backbone.net.named_parameters():
            parameter.requires_grad_(name in trained)
        self.parts = nn.ModuleList(parts)

    @classmethod
    def view_spec(cls, config: Config) -> ViewSpec:
        """The views of all parts."""
        return merge([method_class(p.name).view_spec(part_config(config, p)) for p in config.parts])

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Terms and monitors of all parts, named `<method>/<term>`."""
        ctx = with_memo(ctx)
        terms: dict[str, Tensor] = {}
        monitors: dict[str, Tensor] = {}
        for i, (part, method) in enumerate(zip(self.config.parts, self.parts, strict=True)):
            label = part.name if [p.name for p in self.config.parts].count(part.name) == 1 else f"{part.name}_{i}"
            losses = method(views, ctx)
            terms |= {f"{label}/{name}": part.weight * term for name, term in losses.terms.items()}
            monitors |= {f"{label}/{name}": value for name, value in losses.monitors.items()}
        return LossTerms(terms, monitors)

    def after_step(self, ctx: StepContext) -> None:
        """What each part does."""
        for part in self.parts:
            part.after_step(ctx)  # type: ignore[operator]


def part_config(config: Compose.Config, part: Part) -> Any:
    """A part's settings, with the composition's crops where it has any."""
    kind = method_class(part.name).Config
    settings = dict(part.settings)
    if "crops" in kind.model_fields:
        settings["crops"] = config.crops.model_dump()
    return parse(kind, settings, f"settings of part {part.name}")


def merge(specs: list[ViewSpec]) -> ViewSpec:
    """One specification that serves all: roles of one name must agree but for their count and clean copy.

    Raises:
        ConfigError: two parts want different views under one name.
    """
    roles: dict[str, RoleSpec] = {}
    for spec in specs:
        for role in spec.roles:
            if role.name not in roles:
                roles[role.name] = role
                continue
            other = roles[role.name]
            count, clean = max(other.count, role.count), other.keep_clean or role.keep_clean
            both = [replace(r, count=count, keep_clean=clean) for r in (other, role)]
            if both[0] != both[1]:
                raise ConfigError(f"view role {role.name!r}", expected=str(both[0]), found=str(both[1]))
            roles[role.name] = both[0]
    maps = tuple(dict.fromkeys(m for spec in specs for m in spec.maps))
    return ViewSpec(tuple(roles.values()), maps, tuple(dict.fromkeys(s for spec in specs for s in spec.superpixels)))
