"""The configuration of a search over settings of a fine-tuning."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from jobs.configs import Experiment, LabelledConfig, ModelName, _check_model, with_a_network
from jobs.configs.groups import require_segmentation
from jobs.configs.population import POPULATIONS, PopulationConfig, changing, check_population
from jobs.configs.space import ENCODER, Dimension, dimensions, require_buildable_space, with_settings
from jobs.ingest_config import JobName, Url
from ssl_core.config import LATER, Config, flatten, parse, resolved
from ssl_core.downstream.finetune import FinetuneConfig
from ssl_core.downstream.inference import MOST_DRAWS
from storage.errors import ConfigError

_REFUSED = {
    "bohb": "BOHB, whose `TuneBOHB` fails with every ConfigSpace from 1.0 on (ray#46995): use algorithm tpe with"
    " scheduler hyperband, which is the same pair of ideas",
}
_SYNCHRONOUS = ("halving", "hyperband", *POPULATIONS)
OBJECTIVES = ("dice", "seconds")


class SearchSpace(Config):
    """The space as before dotted paths: ranges of two settings, still read."""

    lr: tuple[float, float] = Field((3e-4, 1e-2), description="`finetune.lr`: lowest and highest, drawn log-uniformly")
    encoder_lr_scale: tuple[float, ...] = Field(
        (0.1, 0.3, 1.0), description="`finetune.encoder_lr_scale`: the choices, drawn uniformly"
    )

    @field_validator("lr")
    @classmethod
    def _check_lr(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("two numbers above 0, the lower first")
        return value

    @field_validator("encoder_lr_scale")
    @classmethod
    def _check_choices(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) < 0:
            raise ValueError("at least one choice, none below 0")
        return value


class ConfirmConfig(Config):
    """Draws of labelled subjects that the best settings are refit on beside a reference, scored on the test split."""

    draws: int = Field(
        6, ge=2, le=MOST_DRAWS, description="draws of labelled subjects, of the seeds after `labelled.subjects_seed`"
    )
    seeds: int = Field(1, ge=1, le=64, description="trainings of each side and draw")
    model: ModelName = Field(None, description="registered name of the segmenter; the search's name when empty")
    nsd_tolerance_mm: float = Field(1.0, gt=0, description="tolerance of the normalised surface Dice")


class TuneConfig(Config):
    """A search over fine-tuning settings with early stopping on each epoch's metric."""

    name: JobName = Field(description="name of the search; the same name resumes")
    runs: Url = Field("s3://runs", description="URL below which the search's state is written")
    experiment: Experiment = Field("tomoscale", description="MLflow experiment")
    encoders: tuple[str, ...] = Field(
        description="model URIs to start from, or `none` for random weights of the first one's network; a dimension of"
        " the search, which `space` may name as `encoder` instead"
    )
    labelled: LabelledConfig
    finetune: FinetuneConfig = FinetuneConfig()
    space: dict[str, Any] = Field(
        default_factory=lambda: resolved(SearchSpace()),
        description="dotted path of a setting to what it is drawn from, such as `finetune.lr: {loguniform: [1e-4,"
        " 1e-2]}`; kinds: uniform, loguniform, quniform, randint, choice, grid; the form before, `lr` and"
        " `encoder_lr_scale`, is still read",
    )
    trials: int = Field(6, ge=1, le=1 << 20, description="trials in all; of a grid, its points, which are the default")
    concurrent: int | None = Field(
        2, ge=1, le=1 << 16, description="trials at a time; as many as the cluster's CPUs and GPUs allow when null"
    )
    cpus_per_trial: float = Field(1, gt=0, description="logical CPUs of a trial")
    gpus_per_trial: float = Field(0, ge=0, description="GPUs of a trial; without one it trains on the CPU")
    grace_epochs: int = Field(1, ge=1, description="epochs before a trial may be stopped; the first rung")
    reduction: int = Field(2, ge=2, description="one in this many goes on at each rung")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the searcher, and of every trial's weights and crops")
    algorithm: Literal["tpe", "random", "grid"] = Field(
        "tpe",
        description="what draws the settings; tpe is Optuna's; random, and the default, with scheduler pbt and pb2",
        json_schema_extra=LATER,
    )
    scheduler: Literal["asha", "halving", "hyperband", "median", "none", "pbt", "pb2"] = Field(
        "asha",
        description="what stops trials: asha at each rung by the trials before; halving and hyperband wait at each rung"
        " for all trials of a bracket; median goes by the median of running means; none stops no trial; with pbt and"
        " pb2 the worst take over weights and settings of the best, see `population`",
        json_schema_extra=LATER,
    )
    population: PopulationConfig = Field(PopulationConfig(), json_schema_extra=LATER)
    deterministic: bool = Field(
        False,
        description="suggest and stop as if trials ran one after another, whatever the order of their reports",
        json_schema_extra=LATER,
    )
    ahead: int = Field(
        4,
        ge=1,
        le=1 << 16,
        description="deterministic tpe: a suggestion knows the trials up to this many before it, so that many run at"
        " once at most",
        json_schema_extra=LATER,
    )
    objectives: tuple[Literal["dice", "seconds"], ...] = Field(
        ("dice",), description="`[dice, seconds]` searches for the front of both", json_schema_extra=LATER
    )
    hours: float | None = Field(
        None, gt=0, description="most hours of the search, all its starts together", json_schema_extra=LATER
    )
    money: float | None = Field(
        None,
        gt=0,
        description="most that all trials together may cost; needs `price_per_hour`",
        json_schema_extra=LATER,
    )
    price_per_hour: float | None = Field(
        None, gt=0, description="price of an hour of one trial: its share of a node", json_schema_extra=LATER
    )
    points: tuple[dict[str, Any], ...] = Field(
        (), description="settings to try first, by dotted path; what one leaves out is drawn", json_schema_extra=LATER
    )
    from_searches: tuple[str, ...] = Field(
        (),
        description="earlier searches of the experiment in MLflow, whose trials tpe starts from",
        json_schema_extra=LATER,
    )
    compare_scratch: bool = Field(
        False,
        description="search random weights too, with as many trials again, each start among its own",
        json_schema_extra=LATER,
    )

    confirm: ConfirmConfig | None = Field(
        None,
        description="refit the best on several draws of labelled subjects, compare it on held-out ones, register it;"
        " the reference is the best of the other start with `compare_scratch`, else the settings as they were",
        json_schema_extra=LATER,
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """`encoder` of the space into `encoders`, the points of a grid into `trials`, and what draws a population."""
        if not isinstance(data, dict):
            return data
        if data.get("scheduler") in POPULATIONS:
            data = {"algorithm": "random", **data}
        if not isinstance(data.get("space"), dict):
            return data
        data = {**data, "space": dict(data["space"])}
        if ENCODER in data["space"]:
            if "encoders" in data:
                raise ConfigError(
                    f"space: {ENCODER}",
                    expected="it here or `encoders`, which are the same dimension",
                    found="both",
                    remedy="leave `encoders` out",
                )
            (starts,) = dimensions({ENCODER: data["space"].pop(ENCODER)}, cls)
            data["encoders"] = starts.values
        if data.get("algorithm") == "grid" and "trials" not in data and isinstance(data.get("encoders"), list | tuple):
            dims = dimensions(data["space"], cls) if not _is_old(data["space"]) else ()
            data["trials"] = len(data["encoders"]) * math.prod(len(dim.values) for dim in dims) or 1
        return data

    @field_validator("scheduler", "algorithm", mode="before")
    @classmethod
    def _check_scheduler(cls, value: Any) -> Any:
        if reason := _REFUSED.get(str(value).lower()):
            raise ValueError(f"no {reason}")
        return value

    @field_validator("encoders")
    @classmethod
    def _check_encoders(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("different encoders")
        return with_a_network(value)

    @field_validator("space")
    @classmethod
    def _check_space(cls, value: dict[str, Any]) -> dict[str, Any]:
        if _is_old(value):
            return resolved(parse(SearchSpace, value, "space"))
        dimensions(value, cls)
        return value

    @field_validator("objectives")
    @classmethod
    def _check_objectives(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value not in (OBJECTIVES[:1], OBJECTIVES):
            raise ValueError("[dice] or [dice, seconds]")
        return value

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        require_segmentation(self.finetune.task, self.labelled.column, "a search")
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.grace_epochs > self.finetune.epochs:
            raise ValueError(
                f"grace_epochs ({self.grace_epochs}) to be at most finetune.epochs ({self.finetune.epochs})"
            )
        if self.money is not None and self.price_per_hour is None:
            raise ValueError("price_per_hour with money, or nothing says what a trial costs")
        if self.compare_scratch and self.encoders == ("none",):
            raise ValueError("an encoder with compare_scratch, beside which random weights are searched")
        return self

    @model_validator(mode="after")
    def _check_steered(self) -> Self:
        if not self.labelled.inner:
            raise ValueError("labelled.inner to be 1 or more: the inner split is what a search is steered by")
        if len(self.labelled.draws) > 1:
            raise ValueError("one labelled.subjects_seed: a search is on one draw; finetune and study go over draws")
        return self

    @model_validator(mode="after")
    def _check_searched(self) -> Self:
        base = flatten(resolved(self.finetune), "finetune.")
        plain = flatten(resolved(FinetuneConfig()), "finetune.")
        for dim in self.dimensions:
            if dim.path != ENCODER and base.get(dim.path) != plain.get(dim.path):
                key = dim.path.removeprefix("finetune.") if _is_old(self.space) else dim.path
                raise ValueError(f"no {dim.path}, which each trial draws from space.{key}: set that")
        require_buildable_space(self.finetune, self.dimensions)
        return self

    @model_validator(mode="after")
    def _check_algorithm(self) -> Self:
        grids = [dim.path for dim in self.dimensions if dim.kind == "grid"]
        ranges = [dim.path for dim in self.dimensions if not dim.is_list]
        if self.algorithm == "grid" and self.compare_scratch and len(self.encoders) > 1:
            raise ValueError(
                f"one encoder with algorithm grid and compare_scratch, not {len(self.encoders)}: the grid of random"
                " weights would have fewer points, and a search of another size decides by its size"
            )
        if self.algorithm == "grid":
            if ranges:
                raise ValueError(f"grid or choice for every setting with algorithm grid, not {', '.join(ranges)}")
            points = math.prod(len(dim.values) for dim in self.dimensions)
            if self.trials != points:
                raise ValueError(f"trials ({self.trials}) to be the points of the grid ({points}), or to be left out")
        elif grids:
            raise ValueError(f"algorithm grid with {', '.join(grids)}, or choice in place of grid")
        if self.from_searches and self.algorithm != "tpe":
            raise ValueError("algorithm tpe with from_searches: no other learns from earlier trials")
        return self

    @model_validator(mode="after")
    def _check_population(self) -> Self:
        check_population(self.population, self.scheduler, self.finetune, algorithm=self.algorithm, trials=self.trials)
        if self.finetune.schedule:
            raise ValueError("no finetune.schedule in a search, whose settings hold for a whole trial or change by pbt")
        if not self.is_population:
            return self
        plain = type(self).model_fields
        for key in ("grace_epochs", "reduction"):
            if getattr(self, key) != plain[key].default:
                raise ValueError(
                    f"no {key} with scheduler {self.scheduler}, whose rounds are population.interval apart"
                )
        if any(dim.path == "finetune.patience" for dim in self.dimensions):
            raise ValueError(f"no finetune.patience in the space with scheduler {self.scheduler}")
        changing(self.dimensions, self.population, self.scheduler)
        return self

    @model_validator(mode="after")
    def _check_confirmed(self) -> Self:
        if self.confirm is None:
            return self
        _check_model(self.name, self.confirm.model)
        if "none" in self.encoders and not self.compare_scratch:
            raise ValueError(
                "compare_scratch: true with confirm, in place of `none` among the encoders: starts are compared after"
                " searches of equal size"
            )
        return self

    @model_validator(mode="after")
    def _check_modes(self) -> Self:
        if len(self.objectives) > 1 and self.scheduler != "none":
            raise ValueError("scheduler none with two objectives: a stopped trial has no seconds of a whole one")
        if self.deterministic and (len(self.objectives) > 1 or self.hours or self.money):
            raise ValueError("no seconds, hours or money with deterministic: time is another in every run")
        return self

    @model_validator(mode="after")
    def _check_points(self) -> Self:
        by_path = {dim.path: dim for dim in self.dimensions}
        for number, settings in enumerate(self.points):
            for path, value in settings.items():
                thing = f"points.{number}: {path}"
                if path not in by_path:
                    raise ConfigError(
                        thing, expected=f"a setting of the space: {', '.join(by_path)}", found="another setting"
                    )
                if not by_path[path].holds(value):
                    raise ConfigError(thing, expected="a value that the space holds", found=repr(value)[:120])
            with_settings(self.finetune, settings, f"points.{number}")
        if self.points and self.algorithm == "grid":
            raise ValueError("no points with algorithm grid, which tries every point")
        return self

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """What each setting of a trial is drawn from, the encoder first."""
        starts = Dimension(ENCODER, "choice", values=self.encoders)
        if not _is_old(self.space):
            return (starts, *dimensions(self.space, type(self)))
        before = parse(SearchSpace, self.space, "space")
        low, high = before.lr
        rates = Dimension("finetune.lr", "loguniform", low, high) if low < high else None
        scales = Dimension("finetune.encoder_lr_scale", "choice", values=tuple(dict.fromkeys(before.encoder_lr_scale)))
        return (starts, rates or Dimension("finetune.lr", "choice", values=(low,)), scales)

    def values_of(self, path: str) -> tuple[Any, ...]:
        """The values that trials may have of a setting whose values can be listed.

        Args:
            path: Such as `finetune.transfer`.
        """
        listed = [dim.values for dim in self.dimensions if dim.path == path]
        return listed[0] if listed else (flatten(resolved(self.finetune), "finetune.")[path],)

    @property
    def arms(self) -> tuple[tuple[str, ...], ...]:
        """Encoders of each search in this one: all of them, or with `compare_scratch` those and random weights."""
        if not self.compare_scratch:
            return (self.encoders,)
        return tuple(uri for uri in self.encoders if uri != "none"), ("none",)

    @property
    def total(self) -> int:
        """Trials of all arms."""
        return self.trials * len(self.arms)

    @property
    def waits(self) -> bool:
        """Whether trials wait at a rung for those of their bracket."""
        return self.scheduler in _SYNCHRONOUS

    @property
    def is_population(self) -> bool:
        """Whether trials go on from one another's weights."""
        return self.scheduler in POPULATIONS

    @property
    def changing(self) -> tuple[Dimension, ...]:
        """What changes when a member of a population takes another over."""
        return changing(self.dimensions, self.population, self.scheduler)


def _is_old(space: Mapping[str, Any]) -> bool:
    """Whether a space has the form of before dotted paths."""
    return set(space) <= set(SearchSpace.model_fields)
