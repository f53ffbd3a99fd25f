"""The configuration of a study: which starts are compared, with how many labels, over how many draws and seeds."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote

from pydantic import (
    AfterValidator,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from jobs.configs import LabelledConfig, PretrainConfig, _experiment, _is_model
from jobs.configs.groups import require_segmentation
from jobs.ingest_config import JobName, Url
from ssl_core.config import LATER, Config, Fingerprint, Name, parse, resolved
from ssl_core.downstream.finetune import FinetuneConfig
from ssl_core.downstream.inference import MOST_DRAWS
from ssl_core.downstream.settings import TrainedParts, Transfer

VALIDATION = 1 << 32
"""First seed of the draws that settings are searched on; those of the test count from 0."""
LONGEST_START = 60
"""Characters of a start's name, which is part of names of runs and of a legend."""
_OF_NO_ORIGIN = ("trained", "encoder")
"""What a start of random weights says of its transfer: the default, and what was the default before."""
_ENDLESS = 1 << 32
"""Epochs that no warm-up outlasts."""


class SupervisedStart(Config):
    """Labelled subjects that a start is pre-trained on with their labels: the control for what labels would give."""

    subjects: int = Field(ge=1, description="labelled subjects of the train split, the same whatever the draw")
    steps: int = Field(ge=1, description="optimizer steps of that training")
    lr: float = Field(5e-3, gt=0, description="its peak learning rate")


class StudyStart(Config):
    """Where a training begins; with neither `model`, `pretrain` nor `supervised` it is random weights."""

    model: str | None = Field(
        None,
        description="a model to start from: models:/NAME@ALIAS, models:/NAME/VERSION, a bundle's folder or its URL",
    )
    pretrain: dict[str, Any] | None = Field(
        None, description="settings of its pre-training on top of the study's own; `{}` takes those as they are"
    )
    supervised: SupervisedStart | None = Field(None, description="pre-train it with labels")
    transfer: Transfer = Field(
        "trained", description="what of the pre-trained network is taken; `trained`: the decoder where that was trained"
    )
    length: float = Field(1.0, gt=0, le=1000, description="fine-tuning steps are this many times those of the search")
    lr_scale: float = Field(1.0, ge=0, description="`finetune.encoder_lr_scale` of this start")
    trained: TrainedParts = Field(TrainedParts(), description="`finetune.trained` of this start")
    all_labels: bool = Field(
        False, description="train on every labelled subject of the train split whatever the count: an upper bound"
    )

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        origins = [key for key in ("model", "pretrain", "supervised") if getattr(self, key) is not None]
        if len(origins) > 1:
            raise ValueError(f"one of model, pretrain and supervised, not {' and '.join(origins)}")
        if self.model is not None and (self.model == "none" or not _is_model(self.model)):
            raise ValueError(
                f"models:/NAME@ALIAS, models:/NAME/VERSION, a bundle's absolute folder or its URL: {self.model!r}"
            )
        takes = self.transfer not in _OF_NO_ORIGIN
        if not origins and (takes or self.lr_scale != 1 or self.trained != TrainedParts()):
            raise ValueError("no transfer, lr_scale and trained with random weights, which have nothing to transfer")
        return self

    @property
    def is_scratch(self) -> bool:
        """Whether it begins with random weights."""
        return self.model is None and self.pretrain is None and self.supervised is None


class StudySearch(Config):
    """The search of learning rate and length, the same for every start, on draws that are never tested."""

    lr: tuple[float, ...] = Field((2e-3, 5e-3, 1e-2), description="`finetune.lr`: the values tried")
    steps: tuple[int, ...] = Field((100, 300), description="optimizer steps of a fine-tuning: the values tried")
    widen: int = Field(
        0,
        ge=0,
        le=8,
        description="how often a start whose best rate lies at an end of those tried gets one more beyond it",
        json_schema_extra=LATER,
    )
    draws: int = Field(2, ge=1, le=64, description="draws of labelled subjects that each setting is tried on")
    subjects: int = Field(4, ge=1, description="further subjects of the train split that a setting is scored on")
    labels: tuple[int, ...] = Field(
        (), description="counts of labels to search at, the others taking the nearest one's settings; all when empty"
    )

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        for key, values in (("lr", self.lr), ("steps", self.steps)):
            if not values or min(values) <= 0 or len(set(values)) < len(values):
                raise ValueError(f"{key}: one value above 0 or several different ones")
        return self


def _of_any_length(value: Any, handler: ValidatorFunctionWrapHandler) -> FinetuneConfig:
    """Fine-tuning settings whose warm-up is not held to their own number of steps, which the search gives."""
    if not isinstance(value, Mapping) or "warmup_steps" not in value:
        return handler(value)  # type: ignore[no-any-return]
    settings: FinetuneConfig = handler({**value, "warmup_steps": 0})
    warmup = handler({"epochs": _ENDLESS, "warmup_steps": value["warmup_steps"]}).warmup_steps
    return settings.model_copy(update={"warmup_steps": warmup})


class StudyConfig(Config):
    """A comparison of starts over draws of labelled subjects, counts of labels and pre-training seeds."""

    name: JobName = Field(description="name of the study; the same name goes on where it was")
    data: Url = Field(description="URL of an ingested store with labels")
    fingerprint: Fingerprint | None = Field(None, description="manifest to pin; the latest when empty")
    source: Url | None = Field(
        None, description="folder to ingest when the store has no manifest yet, or `simulated` for the embedded cohort"
    )
    label: Name = Field("label", description="name of the label map")
    runs: Url = Field("s3://runs", description="URL below which results are written")
    cache: Url | None = Field(
        None, description="URL of pre-trained networks, which studies share; `<runs>/pretrained` when empty"
    )
    experiment: Annotated[str, AfterValidator(_experiment)] = Field("tomoscale", description="MLflow experiment")
    pretrain: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of a pre-training job that all starts share: method, backbone, stream, engine and so on;"
        " its network and intensity are those of random weights too",
    )
    starts: dict[str, StudyStart] = Field(description="name of a start to what it is")
    reference: str = Field("scratch", description="the start that all others are tested against")
    labels: tuple[int, ...] = Field((1, 2, 5, 10), description="counts of labelled subjects")
    draws: int = Field(8, ge=1, le=MOST_DRAWS, description="draws of labelled subjects, each nested in the counts")
    pretrainings: int = Field(3, ge=1, le=64, description="pre-trainings of each start, by seed from 0")
    primary: tuple[str, ...] = Field(
        (), description="starts whose tests share the level (Holm); all but the reference when empty"
    )
    primary_labels: tuple[int, ...] = Field((), description="counts of labels of those tests; all when empty")
    halves: bool = Field(
        False,
        description="test each of them also against the reference with twice its labels, where `labels` has that count;"
        " these tests share the level too",
        json_schema_extra=LATER,
    )
    sd: float = Field(
        0.05, gt=0, description="assumed standard deviation of a difference in Dice between draws, for the power"
    )
    search: StudySearch = StudySearch()
    finetune: Annotated[FinetuneConfig, WrapValidator(_of_any_length)] = Field(
        default_factory=FinetuneConfig, description="the rest of the fine-tuning; `epochs` are points of its curve"
    )
    validation: int = Field(1, ge=1, description="further subjects that a tested training's curve is measured on")
    test_limit: int | None = Field(None, ge=1, description="most test volumes; all when empty")
    nsd_tolerance_mm: float = Field(1.0, gt=0, description="tolerance of the normalised surface Dice")
    slices: bool = Field(
        True,
        description="show slices of test scans in the report; without them it may go to people who may not see scans",
        json_schema_extra=LATER,
    )
    until: Literal["search", "test"] = Field(
        "test",
        description="`search` ends with the scores on validation draws, records no choice and leaves the test shut; the"
        " same study goes on from there with `test`",
    )
    concurrent: int = Field(2, ge=1, le=1 << 16, description="cells at a time")
    cpus_per_cell: float = Field(1, gt=0, description="logical CPUs of a cell")
    gpus_per_cell: float = Field(0, ge=0, description="GPUs of a cell; without one it trains on the CPU")

    @field_validator("starts")
    @classmethod
    def _check_starts(cls, value: dict[str, StudyStart]) -> dict[str, StudyStart]:
        if len(value) < 2:
            raise ValueError("two starts or more, or there is nothing to compare")
        for name in value:
            if name != name.strip() or not name.isprintable() or not 0 < len(quote(name, safe="")) <= LONGEST_START:
                raise ValueError(f"names of 1 to {LONGEST_START} printable characters, not {name[:40]!r}")
            if {"'", '"'} & set(name):
                raise ValueError(f"names without quotes, not {name!r}")
        return value

    @field_validator("labels", "primary_labels")
    @classmethod
    def _check_labels(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value and (min(value) < 1 or list(value) != sorted(set(value))):
            raise ValueError("different counts from 1 on, ascending")
        return value

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        require_segmentation(self.finetune.task, None, "a study")
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if not self.labels:
            raise ValueError("labels: one count or more")
        if self.reference not in self.starts:
            raise ValueError(f"reference to be one of {', '.join(self.starts)}, not {self.reference!r}")
        strange = [name for name in self.primary if name not in self.starts or name == self.reference]
        if strange:
            raise ValueError(f"primary: names of starts other than the reference, not {', '.join(strange)}")
        if self.halves and not self.halved:
            raise ValueError(f"halves: a count whose double is among labels {list(self.labels)}")
        for key, counts in (("primary_labels", self.primary_labels), ("search.labels", self.search.labels)):
            if not set(counts) <= set(self.labels):
                raise ValueError(f"{key}: counts that are among labels {list(self.labels)}, not {list(counts)}")
        for key in ("lr", "steps_per_epoch", "encoder_lr_scale", "trained"):
            if getattr(self.finetune, key) != FinetuneConfig.model_fields[key].default:
                raise ValueError(f"no finetune.{key}: the search and each start say it")
        if self.finetune.transfer not in _OF_NO_ORIGIN:
            raise ValueError("no finetune.transfer: each start says it")
        if self.finetune.schedule:
            raise ValueError("no finetune.schedule: it is of one number of epochs, and each start may have another")
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        for start in self.starts:
            for steps in self.search.steps:
                self.settings(start, self.search.lr[0], steps)
        return self

    @model_validator(mode="after")
    def _check_pretrainings(self) -> Self:
        pretraining = self.pretraining
        for start in self.starts:
            pretraining(start, 0)  # before anything is trained
        return self

    def pretraining(self, start: str | None, seed: int) -> PretrainConfig:
        """The pre-training job of a start, or with None what all starts share.

        Raises:
            ConfigError: a setting is wrong, or is the study's to give.
        """
        extra = (self.starts[start].pretrain or {}) if start is not None else {}
        where = self.pretraining_key(start)
        for key in ("name", "runs", "experiment", "source", "model"):
            for group in (self.pretrain, extra):
                if key in group:
                    raise ValueError(f"no {key} in {where}, which the study gives")
        data = merged({"probe": {"label": None}, "engine": {"probe_every": 0}}, merged(self.pretrain, extra))
        data |= {"name": "pretraining", "data": data.get("data", self.data)}
        data["engine"] = {**data["engine"], "seed": seed}
        data["cluster"] = {**data.get("cluster", {}), "workers": 1, "min_workers": None}
        return parse(PretrainConfig, data, where)

    def pretraining_key(self, start: str | None) -> str:
        """Where the configuration says how a start is pre-trained."""
        own = start is not None and self.starts[start].pretrain
        return f"starts.{start}.pretrain" if own else "pretrain"

    def seeds_of(self, start: str) -> int:
        """Pre-trainings of a start: random weights and a model that there is have one."""
        origin = self.starts[start]
        return 1 if origin.is_scratch or origin.model is not None else self.pretrainings

    @property
    def cache_url(self) -> str:
        """Where pre-trained networks lie."""
        from storage.objects import join

        return self.cache or join(self.runs, "pretrained")

    @property
    def searched_labels(self) -> tuple[int, ...]:
        """Counts of labels that settings are searched at."""
        return self.search.labels or self.labels

    def nearest_searched(self, labels: int) -> int:
        """The searched count of labels whose settings a count takes: the nearest by ratio, the smaller of two."""
        return min(self.searched_labels, key=lambda count: (abs(math.log(count / labels)), count))

    @property
    def compared(self) -> tuple[tuple[str, int], ...]:
        """Pairs of a start and a count of labels whose tests share the level."""
        starts = self.primary or tuple(name for name in self.starts if name != self.reference)
        return tuple((start, count) for count in self.primary_labels or self.labels for start in starts)

    @property
    def halved(self) -> tuple[tuple[str, int], ...]:
        """Those of `compared` that are also tested against the reference with twice their labels."""
        return tuple((start, count) for start, count in self.compared if self.halves and 2 * count in self.labels)

    @property
    def comparisons(self) -> int:
        """Tests that share the level."""
        return len(self.compared) + len(self.halved)

    def labelled(self, labels: int, draw: int, fingerprint: str, *, further: int) -> LabelledConfig:
        """The subjects of a cell. The same draw with fewer labels has some of the same subjects.

        Args:
            labels: Subjects that train.
            draw: Seed of the draw.
            fingerprint: Of the manifest to read.
            further: Subjects that are scored and not trained on; the same for every count of a draw.
        """
        return LabelledConfig(
            data=self.data,
            fingerprint=fingerprint,
            label=self.label,
            subjects=labels + further,
            subjects_seed=draw,
            inner=further,
            test_limit=self.test_limit,
        )

    def settings(self, start: str, lr: float, steps: int, *, points: int | None = None) -> FinetuneConfig:
        """How a cell is fine-tuned.

        Args:
            start: Name of the start, whose `length` multiplies the steps; another name is random weights.
            lr: Peak learning rate.
            steps: Optimizer steps of a start of length 1, rounded up to a whole number for each point.
            points: Points of the curve; those of `finetune.epochs` when None.
        """
        origin = self.starts.get(start, StudyStart())
        points = self.finetune.epochs if points is None else points
        total = max(1, round(steps * origin.length))
        points = min(points, total)
        data = resolved(self.finetune) | {
            "epochs": points,
            "steps_per_epoch": -(-total // points),
            "lr": lr,
            "encoder_lr_scale": origin.lr_scale,
            "trained": resolved(origin.trained),
            "transfer": origin.transfer,
        }
        return parse(FinetuneConfig, data, f"fine-tuning of {start}")


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others on top, group by group; a method of another name replaces the whole group."""
    result = dict(settings)
    for key, value in changes.items():
        before = result.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            is_other = "name" in value and before.get("name") != value["name"]
            result[key] = value if is_other else merged(before, value)
        else:
            result[key] = value
    return result
