"""Settings of population based training, and which settings of a trial may change while it runs."""

from collections.abc import Sequence

from pydantic import Field, field_validator

from jobs.configs.space import ENCODER, Dimension
from ssl_core.config import Config
from ssl_core.downstream.settings import CHANGEABLE, FinetuneConfig
from storage.errors import ConfigError

POPULATIONS = ("pbt", "pb2")
"""Schedulers whose trials go on from one another's weights."""
_PREFIX = "finetune."


class PopulationConfig(Config):
    """How the members of a population take over one another's weights and settings."""

    interval: int = Field(
        1, ge=1, description="epochs between two rounds, in which the worst members take over the best; divides epochs"
    )
    quantile: float = Field(
        0.25,
        gt=0,
        le=0.5,
        description="share of the members that are the worst of a round, and of those that are the best",
    )
    resample: float = Field(
        0.25, ge=0, le=1, description="pbt: probability that a setting that is taken over is drawn from the space again"
    )
    factors: tuple[float, ...] = Field(
        (0.8, 1.2),
        description="pbt: what a number that is not drawn again is multiplied by; a choice becomes its neighbour",
    )
    change: tuple[str, ...] | None = Field(
        None, description="settings of `space` that change when they are taken over; all that can when empty"
    )

    @field_validator("factors")
    @classmethod
    def _check_factors(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) <= 0 or set(value) == {1.0}:
            raise ValueError("numbers above 0, not only 1, which changes nothing")
        return value


def why_fixed(dim: Dimension, scheduler: str) -> str:
    """Why a setting cannot change while a trial runs, in words; empty where it can."""
    name = dim.path.removeprefix(_PREFIX)
    if dim.path == ENCODER or name not in CHANGEABLE:
        return "a training that runs cannot change it: a member has it from its start, or from the one it takes over"
    if len(dim.probes()) < 2:
        return "it has one value"
    if name == "encoder_lr_scale" and any(value == 0 for value in dim.probes()):
        return "0 freezes the encoder, whose moments a member that takes it over then lacks: take a small scale"
    if dim.is_list and scheduler == "pb2":
        return "pb2 models how scores follow from numbers: give a range, or take pbt"
    return ""


def changing(dims: Sequence[Dimension], population: PopulationConfig, scheduler: str) -> tuple[Dimension, ...]:
    """The dimensions that change when a member takes another over.

    Raises:
        ConfigError: one that is named cannot change, or none can.
    """
    by_path = {dim.path: dim for dim in dims}
    for path in population.change or ():
        reason = why_fixed(by_path[path], scheduler) if path in by_path else "it is no key of `space`"
        if reason:
            raise ConfigError(
                f"population.change: {path}",
                expected="a key of `space` that may change while a trial runs",
                found=f"one that may not: {reason}",
                remedy=f"leave it out; these may: {_names(dims, scheduler)}",
            )
    asked = by_path if population.change is None else population.change
    free = tuple(dim for dim in dims if dim.path in asked and not why_fixed(dim, scheduler))
    if not free:
        reasons = "; ".join(f"{dim.path}: {why_fixed(dim, scheduler)}" for dim in dims if dim.path != ENCODER)
        raise ConfigError(
            f"space, with scheduler {scheduler}",
            expected=f"a setting that may change while a trial runs: {', '.join(_PREFIX + n for n in CHANGEABLE)}",
            found=reasons or "none",
            remedy="add one, or take another scheduler, such as asha",
        )
    return free


def _names(dims: Sequence[Dimension], scheduler: str) -> str:
    return ", ".join(dim.path for dim in dims if not why_fixed(dim, scheduler)) or "none"


def check_population(
    population: PopulationConfig, scheduler: str, finetune: FinetuneConfig, *, algorithm: str, trials: int
) -> None:
    """Refuse what a population cannot do.

    Raises:
        ValueError: says what is expected.
    """
    if scheduler not in POPULATIONS:
        if population != PopulationConfig():
            raise ValueError(f"scheduler pbt or pb2 with population, which scheduler {scheduler} does not have")
        return
    if algorithm != "random":
        raise ValueError(
            f"algorithm random with scheduler {scheduler}, or to leave it out: {algorithm} would draw the whole"
            " population before any trial has a score, and it is the rounds that choose from then on"
        )
    if trials < 2:
        raise ValueError(f"trials to be 2 or more with scheduler {scheduler}: one member has nobody to take over")
    interval, epochs = population.interval, finetune.epochs
    if epochs % interval or epochs == interval:
        raise ValueError(
            f"population.interval ({interval}) to divide finetune.epochs ({epochs}) into two parts or more: after each"
            " but the last there is a round"
        )
    if finetune.patience is not None:
        raise ValueError(
            f"no finetune.patience with scheduler {scheduler}: members are compared after equal numbers of epochs"
        )
    plain = PopulationConfig()
    if scheduler == "pb2" and (population.resample != plain.resample or population.factors != plain.factors):
        raise ValueError("no population.resample or factors with scheduler pb2, which chooses by a model; or take pbt")
