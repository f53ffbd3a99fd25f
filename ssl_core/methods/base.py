"""The one contract of every self-supervised method.

A method is one file: a frozen config, the views it wants, named loss terms, and, where it needs them, what happens
after a step and which encoder is exported. Randomness and collectives come in through the `StepContext`, so that a
method runs on one CPU in a test and cannot forget to gather. Whoever runs it on several ranks binds its batch norms to
them, as the engine does.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, TypeVar, cast, runtime_checkable

from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_core.config import LEAST_SCALE, MOST_SCALE, Config, CropSize, parse
from ssl_core.distributed import Collectives, Single
from ssl_core.networks.backbone import Backbone
from ssl_core.views.types import RoleSpec, View, ViewBatch, ViewSpec
from storage.errors import ConfigError


class MethodConfig(Config):
    """Base of a method's settings. Every field carries a description that names its source or says "our choice".

    Attributes:
        TINY: Settings that make a step take milliseconds, such as small crops and narrow heads; tests run with them.
    """

    TINY: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @classmethod
    def tiny(cls) -> Self:
        """The defaults with `TINY` in their place.

        Raises:
            ConfigError: `TINY` does not fit the fields.
        """
        return parse(cls, dict(cls.TINY), f"TINY of {cls.__qualname__}")

    @model_validator(mode="before")
    @classmethod
    def _keep_own_defaults(cls, data: Any) -> Any:
        """A group given in part, such as `crops`, keeps the rest as this method has it, not as the group's class."""
        if not isinstance(data, dict):
            return data
        merged = dict(data)
        for key in data.keys() & cls.model_fields.keys():
            default = cls.model_fields[key].get_default(call_default_factory=True)
            if isinstance(default, Config) and isinstance(data[key], dict):
                merged[key] = default.model_dump() | data[key]
        return merged


def tiny_settings(**settings: Any) -> Mapping[str, Any]:
    """Crops of 16^3 voxels and these settings, for `MethodConfig.TINY`."""
    return MappingProxyType({"crops": {"size_DHW": (16, 16, 16)}} | settings)


Temperature = Annotated[float, Field(ge=1e-3, le=1e3)]
"""Of a contrast; beyond, a softmax is one number or all alike to float32, and nothing is learned."""
_SOURCE = "source: the group's line, else our choice"


class Crops(Config):
    """The crops that a method compares, and how they are augmented."""

    size_DHW: CropSize = Field(default=(64, 64, 64), description=f"Voxels of a view along D, H, W; {_SOURCE}")
    scale: tuple[float, float] = Field(
        default=(1.0, 1.0),
        description=f"Lowest and highest ratio of the box cut from the volume to the view; {_SOURCE}",
    )
    scale_depth: bool = Field(
        default=False, description=f"Whether D is scaled too; {_SOURCE}, as sibling code scales H and W"
    )
    flip: tuple[float, float, float] = Field(
        default=(0.5, 0.5, 0.5), description=f"Probability of a flip along D, H, W; {_SOURCE}"
    )
    rotate_degrees: float = Field(default=0.0, ge=0, le=180, description=f"Largest rotation about D; {_SOURCE}")
    tilt_degrees: float = Field(
        default=0.0, ge=0, le=90, description=f"Largest rotation about H and about W; {_SOURCE}"
    )
    stretch: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description=f"Largest relative change of each axis' scale by itself, of D only with `scale_depth`; {_SOURCE}",
    )
    elastic_vox: float = Field(default=0.0, ge=0, description="Largest elastic displacement, view voxels; our choice")
    min_overlap: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description=f"Least intersection over union of the boxes; 0 places them independently; {_SOURCE}",
    )
    intensity: Literal["none", "light", "strong", "genesis", "pcrlv2", "pcrlv2_local"] = Field(
        default="light",
        description="Named list of intensity changes: `light` is PGL's (second-hand), `strong` ours, `genesis` nnssl's,"
        " `pcrlv2` its code's",
    )

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        if not LEAST_SCALE <= self.scale[0] <= self.scale[1] <= MOST_SCALE:
            raise ValueError(
                f"scale: two numbers from {LEAST_SCALE} to {MOST_SCALE}, the lower first, not {self.scale}"
            )
        if not all(0 <= share <= 1 for share in self.flip):
            raise ValueError(f"flip: three probabilities from 0 to 1, not {self.flip}")
        return self

    def role(self, name: str, count: int, **changes: Any) -> RoleSpec:
        """A role of views with these settings."""
        settings: dict[str, Any] = {"name": name, "count": count} | self.model_dump() | changes
        return RoleSpec(**settings)


@dataclass(frozen=True)
class StepContext:
    """What a method is given besides the views.

    Attributes:
        step: Optimizer step, counted from 0.
        max_steps: Steps of the whole run.
        seed: Seed of the run; draw with `ssl_core.methods.parts.counter_random` from it and the samples' indices, never
            from a global.
        collectives: Differentiable gathers and reductions over ranks; `Single()` on one rank.
        memo: Encoder and decoder maps made so far in this forward pass, so that objectives composed over shared views
            do not make them twice; see `encode`. `None` outside such a composition.
    """

    step: int
    max_steps: int
    seed: int = 0
    collectives: Collectives = field(default_factory=Single)
    memo: dict[tuple[int, int], list[Tensor]] | None = None


@dataclass(frozen=True)
class LossTerms:
    """Named, already weighted scalar terms; their sum is optimised and each is logged.

    Each term is a mean over the global batch in this sense: averaged over ranks with equal local batches it equals
    the value of one rank on the joined batch. `monitors` are logged and carry no gradient.
    """

    terms: Mapping[str, Tensor]
    monitors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """Sum of the terms."""
        values = list(self.terms.values())
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total

    def named(self, total: Tensor) -> dict[str, Tensor]:
        """All values by the names under which they are logged; `total` is `self.total`, computed before."""
        losses = {f"loss/{name}": value for name, value in self.terms.items()}
        return {"loss": total} | losses | {f"monitor/{name}": value for name, value in self.monitors.items()}


@runtime_checkable
class Method(Protocol):
    """An `nn.Module` with these members; built as `Kind(config, backbone)`.

    `register` gives a class that does not define them an empty `after_step` and an `encoder` that is its `backbone`.

    Contract (see `ssl_core.testing.method_contract.MethodContract`): finite loss for a batch of one and more; every
    trainable parameter gets a gradient and no target parameter does; permuting the batch leaves the loss unchanged;
    two ranks give the gradients of one; a resumed run is bitwise equal; the encoder loads into the stock network
    completely.
    """

    Config: ClassVar[type[MethodConfig]]

    @classmethod
    def view_spec(cls, config: Any) -> ViewSpec:
        """The views that `forward` expects."""
        ...

    def __call__(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Loss terms of a batch."""
        ...

    def after_step(self, ctx: StepContext) -> None:
        """Called after each optimizer step: moving averages, queues."""
        ...

    def encoder(self) -> Backbone:
        """What is exported."""
        ...


def encode(backbone: Backbone, view: View, ctx: StepContext, upto: int | None = None) -> list[Tensor]:
    """Encoder maps of a view, finest first; made once when objectives share the view and the backbone.

    The memo keys on identity, which is safe because the composition that opened it holds views and backbone.
    """
    if ctx.memo is None:
        return backbone.features(view.image_BCDHW, upto)
    key = (id(backbone), id(view))
    if key not in ctx.memo:
        ctx.memo[key] = backbone.features(view.image_BCDHW)
    return ctx.memo[key]


def decode(backbone: Backbone, view: View, ctx: StepContext) -> list[Tensor]:
    """Decoder maps of a view, coarsest first; made once as `encode` does."""
    if ctx.memo is None:
        return backbone.decode(encode(backbone, view, ctx))
    key = (id(backbone), -id(view))  # no id is negative, so that encoder and decoder maps do not meet
    if key not in ctx.memo:
        ctx.memo[key] = backbone.decode(encode(backbone, view, ctx))
    return ctx.memo[key]


def clean_of(view: View) -> Tensor:
    """The view before its intensity changes.

    Raises:
        ConfigError: the role did not ask for it.
    """
    if view.clean_BCDHW is None:
        raise ConfigError("view", expected="its clean copy", found="none", remedy="set keep_clean in the role")
    return view.clean_BCDHW


def with_memo(ctx: StepContext) -> StepContext:
    """The same step with a memo of encoder maps, an outer composition's where there is one."""
    return ctx if ctx.memo is not None else replace(ctx, memo={})


def train_only(backbone: Backbone, keys: Iterable[str]) -> None:
    """Let gradients reach these names of `backbone.net` and no others, so that unused weights are left as they are."""
    trained = set(keys)
    for name, parameter in backbone.net.named_parameters():
        parameter.requires_grad_(name in trained)


def level_for(backbone: Backbone, size_DHW: tuple[int, int, int], level: int | None, positions: int = 6) -> int:
    """The level that is set, else the deepest with at least `positions` features along H and W; at worst the finest.

    Raises:
        ConfigError: the backbone has no such level.
    """
    if level is not None:
        if not 0 <= level < len(backbone.levels):
            raise ConfigError("feature_level", expected=f"0 to {len(backbone.levels) - 1}", found=str(level))
        return level
    strides = [candidate.stride_DHW for candidate in backbone.levels]
    enough = [i for i, s in enumerate(strides) if min(size_DHW[1] // s[1], size_DHW[2] // s[2]) >= positions]
    return enough[-1] if enough else 0


def spread(feature_BCDHW: Tensor) -> Tensor:
    """Mean deviation of unit features over batch and positions; near 1/sqrt(C) when healthy, 0 when collapsed."""
    unit = nn.functional.normalize(feature_BCDHW.detach().float(), dim=1)
    return unit.transpose(0, 1).flatten(1).std(1, correction=0).mean()


M = TypeVar("M", bound=type[nn.Module])
_REGISTRY: dict[str, type[nn.Module]] = {}


def _after_step(self: nn.Module, ctx: StepContext) -> None:
    """Nothing follows a step."""


def _encoder(self: nn.Module) -> Backbone:
    """The trained backbone."""
    return cast(Backbone, self.backbone)


def register(name: str) -> Callable[[M], M]:
    """Class decorator: makes a method known under `name`, with its nested `Config`.

    A class without an `after_step` gets one that does nothing; one without an `encoder` exports its `backbone`.

    Raises:
        ValueError: the name is taken.
    """

    def add(kind: M) -> M:
        if name in _REGISTRY:
            raise ValueError(f"method {name!r} is registered twice")
        for member, default in (("after_step", _after_step), ("encoder", _encoder)):
            if not hasattr(kind, member):
                setattr(kind, member, default)
        _REGISTRY[name] = kind
        return kind

    return add


def method_names() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_REGISTRY)


def method_class(name: str) -> Any:
    """The class registered under `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in _REGISTRY:
        scratch = (
            "without pre-training there is no job: `none` is a start in tune and finetune" if name == "none" else ""
        )
        names = "one of " + ", ".join(method_names())
        raise ConfigError(f"method {name!r}", expected=names, found=repr(name), remedy=scratch)
    return _REGISTRY[name]
