"""The configurations of the jobs: what a YAML file given to `tomoscale` may say.

Every model is frozen and closed to unknown keys; `tomoscale plan KIND CONFIG` prints the resolved form.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import quote

from pydantic import AfterValidator, Field, field_validator, model_validator

import ssl_core.methods  # noqa: F401  registers the methods that `method.name` may name
from jobs.configs.groups import BackboneConfig, CheckpointConfig, ClusterConfig
from jobs.configs.groups import LabelledConfig as LabelledConfig
from jobs.ingest_config import LONGEST_NAME, JobName, Url
from ssl_core.config import LATER, Config, Fingerprint, Name, digested, parse
from ssl_core.downstream.settings import FinetuneConfig
from ssl_core.methods.base import MethodConfig, method_class
from ssl_core.superpixels.settings import Superpixels
from ssl_core.train.engine import EngineConfig
from ssl_core.views.intensity import IntensityPolicy
from storage.errors import ConfigError
from storage.objects.open import check_url
from storage.stream.order import worlds

_NOT_IN_MODELS = "/:.%'\"@?#\\"
_MODEL_URI = re.compile(r"(models:/)?[^/@]+(@[^/@]+|/[0-9]+)?")


def registrable(name: str) -> bool:
    """Whether MLflow takes the name for a model, and a model URI can say it; a test asks MLflow's own rule."""
    return (
        0 < len(name) <= LONGEST_NAME
        and name == name.strip()
        and name.isprintable()
        and not set(name) & set(_NOT_IN_MODELS)
    )


def _registrable(name: str | None) -> str | None:
    if name is not None and not registrable(name):
        raise ValueError(
            f"a name without any of {' '.join(_NOT_IN_MODELS)}, of 1 to {LONGEST_NAME} characters, as MLflow and model"
            " URIs want it"
        )
    return name


def _check_model(name: str, model: str | None) -> None:
    """Refuse a job whose result could not be registered in the end.

    Raises:
        ConfigError: no model name is given, and the job's is none for a model.
    """
    if model is None and not registrable(name):
        raise ConfigError(
            f"name {name!r}, which is the model's too",
            expected="no dot, which MLflow does not take in a model's name",
            found=repr(name),
            remedy="set `model` to another name, or change this one",
        )


# Refused before anything is trained: the name is needed when all else is done.
ModelName = Annotated[str | None, AfterValidator(_registrable)]


def _experiment(name: str) -> str:
    if not 0 < len(name) <= 500 or name != name.strip() or not name.isprintable():
        raise ValueError("a name of 1 to 500 characters without spaces around it, as MLflow takes one")
    return name


Experiment = Annotated[str, AfterValidator(_experiment)]


class StreamConfig(Config):
    """How crops are drawn from the store."""

    split: Name = Field("train", description="split of the manifest to read")
    global_batch: int = Field(8, ge=1, le=1 << 20, description="samples of one optimizer step, all ranks together")
    lanes: int = Field(
        64, ge=1, le=1 << 20, description="fixed sub-sequences of the order; a multiple of every world size"
    )
    crops_per_visit: int = Field(2, ge=1, le=1 << 20, description="crops cut at each visit of a volume")
    foreground: float = Field(0.8, ge=0, le=1, description="probability that a crop is centred in the foreground box")
    prefetch: int = Field(3, ge=1, le=1024, description="batches read ahead")
    threads: int = Field(2, ge=1, le=1024, description="reading threads of a rank")
    cache_gib: float = Field(0, ge=0, description="bounded on-disk cache of a node, shared by its ranks; 0 is none")


class SuperpixelConfig(Config):
    """A job that computes super-pixels beside the images of a store."""

    name: JobName = Field("superpixels", description="name of the job")
    data: Url = Field(description="URL of an ingested store")
    superpixels: Superpixels = Superpixels()


class ProbeConfig(Config):
    """How well labels follow from the features, watched on a few labelled crops that nothing is ever trained on."""

    label: Name | None = Field(
        "auto", description="label map to watch; `auto` takes the store's first, where it has any; null watches none"
    )
    every: int | None = Field(
        None,
        ge=1,
        description="steps between, one more at the end; a multiple of `engine.probe_every`, which it is when empty",
    )
    train: int = Field(4, ge=1, description="subjects whose labels are known")
    test: int = Field(4, ge=1, description="other subjects, whose labels are asked")
    k: int = Field(5, ge=1, description="nearest features that vote")
    voxels: int = Field(1024, ge=8, description="places looked at in a crop, at most")
    most_share: float = Field(
        0.02, gt=0, le=1, description="largest share of the run's time, after the first; beyond it turns are left out"
    )


class PretrainConfig(Config):
    """A pre-training job.

    The same name continues the same job: its checkpoints, its MLflow run and its place in the stream.
    """

    name: JobName = Field(description="name of the job; the same name resumes")
    data: Url = Field(description="URL of an ingested store, such as s3://volumes/hippocampus")
    fingerprint: Fingerprint | None = Field(None, description="manifest to pin; the latest when empty")
    source: Url | None = Field(
        None, description="folder to ingest when the store has no manifest yet, or `simulated` for the embedded cohort"
    )
    runs: Url = Field("s3://runs", description="URL below which checkpoints are written")
    experiment: Experiment = Field("tomoscale", description="MLflow experiment")
    model: ModelName = Field(None, description="registered model name; the job's name when empty")
    method: dict[str, Any] = Field(default_factory=lambda: {"name": "pgl"}, description="method name and its settings")
    backbone: BackboneConfig = BackboneConfig()
    intensity: IntensityPolicy = IntensityPolicy()
    stream: StreamConfig = StreamConfig()
    engine: EngineConfig = EngineConfig()
    init: str | None = Field(
        None,
        description="encoder to start from: models:/NAME@ALIAS, models:/NAME/VERSION, a bundle's folder or its URL;"
        " fixed by the first start; empty: random weights",
        json_schema_extra=LATER,
    )
    probe: ProbeConfig = ProbeConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoints: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="which checkpoints stay", json_schema_extra=LATER
    )

    @field_validator("method")
    @classmethod
    def _resolve_method(cls, value: dict[str, Any]) -> dict[str, Any]:
        settings = dict(value)
        name = settings.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(
                "method.name",
                expected="the name of a method",
                found=repr(name),
                remedy="`tomoscale methods` lists them",
            )
        # A method's later settings are left out here, as digests of the whole see a plain dictionary.
        return {"name": name, **digested(parse(method_class(name).Config, settings, f"method {name}"))}

    @field_validator("init")
    @classmethod
    def _check_init(cls, value: str | None) -> str | None:
        if value is not None and (value == "none" or not _is_model(value)):
            raise ValueError(
                f"models:/NAME@ALIAS, models:/NAME/VERSION, a bundle's absolute folder or its URL, not {value!r}"
            )
        return value

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        _check_model(self.name, self.model)
        return self

    @model_validator(mode="after")
    def _check_best(self) -> Self:
        best_by = self.checkpoints.best_by or ""
        if best_by.startswith("probe/") and not self.engine.probe_every:
            raise ValueError(f"engine.probe_every above 0, or checkpoints.best_by {best_by!r} is never measured")
        return self

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        world = self.cluster.workers
        if self.stream.global_batch % world or self.stream.lanes % world:
            raise ValueError(
                f"stream.global_batch ({self.stream.global_batch}) and stream.lanes ({self.stream.lanes})"
                f" to be multiples of cluster.workers ({world})"
            )
        rank, parts = self.stream.global_batch // world, self.engine.accumulate
        if rank % parts:
            raise ValueError(f"engine.accumulate ({parts}) to divide the batch of a worker ({rank})")
        least = self.cluster.min_workers
        if least is not None and least not in self.worlds:
            numbers = ", ".join(str(n) for n in self.worlds if n <= world)
            raise ValueError(
                f"cluster.min_workers ({least}) to be a number of workers that can share stream.global_batch,"
                f" stream.lanes and engine.accumulate evenly: {numbers}"
            )
        return self

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        """Constants of a window that the policy does not use would be left out without a word."""
        plain, idle = IntensityPolicy(), () if self.intensity.kind == "ct" else ("low", "high", "mean", "std")
        keys = ", ".join(f"intensity.{k}" for k in idle if getattr(self.intensity, k) != getattr(plain, k))
        if keys:
            raise ValueError(f"no {keys} with intensity.kind {self.intensity.kind}, which has none: ct has")
        return self

    @model_validator(mode="after")
    def _check_probe(self) -> Self:
        every, signs = self.probe.every, self.engine.probe_every
        if every is not None and (not signs or every % signs):
            raise ValueError(f"probe.every ({every}) to be a multiple of engine.probe_every ({signs})")
        return self

    @property
    def method_name(self) -> str:
        """Registered name of the method."""
        return str(self.method["name"])

    @property
    def method_config(self) -> MethodConfig:
        """The method's own settings."""
        settings = {k: v for k, v in self.method.items() if k != "name"}
        config: MethodConfig = parse(method_class(self.method_name).Config, settings, f"method {self.method_name}")
        return config

    @property
    def model_name(self) -> str:
        """Name under which the encoder is registered."""
        return self.model or self.name

    @property
    def worlds(self) -> tuple[int, ...]:
        """Numbers of workers that can share batch, lanes and accumulation evenly, ascending."""
        return worlds(self.stream.lanes, self.stream.global_batch // self.engine.accumulate)

    @property
    def micro_batch(self) -> int | None:
        """Most samples of a worker that are to be in a network at once.

        Where workers may become fewer, those that stay hold larger batches; what they hold at once is what each of all
        workers would.
        """
        if self.engine.micro_batch is not None or self.cluster.min_workers is None:
            return self.engine.micro_batch
        return self.stream.global_batch // self.engine.accumulate // self.cluster.workers


def _is_model(uri: str) -> bool:
    if "://" in uri:
        check_url(uri)
        return True
    return bool(_MODEL_URI.fullmatch(uri)) or Path(uri).is_absolute()


def with_a_network(starts: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse starts that are no model URIs, and starts that name no network at all."""
    for uri in starts:
        if not _is_model(uri):
            raise ValueError(
                f"models:/NAME@ALIAS, models:/NAME/VERSION, a bundle's folder or URL, or `none`, not {uri!r}"
            )
    if all(start == "none" for start in starts):
        raise ValueError("at least one model URI, whose network `none` takes with random weights")
    return starts


class FinetuneJobConfig(Config):
    """Fine-tuning from each start with each seed, evaluated per case on the held-out split."""

    name: JobName = Field(description="name of the job")
    runs: Url = Field("s3://runs", description="URL below which results are written")
    experiment: Experiment = Field("tomoscale", description="MLflow experiment")
    starts: dict[str, str] = Field(description="name of a start to a model URI, or `none` for random weights")
    labelled: LabelledConfig
    finetune: FinetuneConfig = FinetuneConfig()
    seeds: tuple[int, ...] = Field((0, 1, 2), description="seeds of each start, all different")
    concurrent: int = Field(2, ge=1, le=1 << 16, description="trainings at a time")
    cpus_per_run: float = Field(1, gt=0, description="logical CPUs of a training")
    gpus_per_run: float = Field(0, ge=0, description="GPUs of a training; without one it trains on the CPU")
    model: ModelName = Field(None, description="registered name of the segmenter; the job's name when empty")
    register_start: str | None = Field(None, description="start whose first seed is registered; the first when empty")
    nsd_tolerance_mm: float = Field(1.0, gt=0, description="tolerance of the normalised surface Dice")

    @field_validator("starts")
    @classmethod
    def _check_starts(cls, value: dict[str, str]) -> dict[str, str]:
        with_a_network(tuple(value.values()))
        for name in value:  # part of a run's name in MLflow, of its queries and of a file's name
            if name != name.strip() or not name.isprintable() or not 0 < len(quote(name, safe="")) <= LONGEST_NAME:
                raise ValueError(f"names of 1 to {LONGEST_NAME} printable characters, not {name[:40]!r}")
            if {"'", '"'} <= set(name):
                raise ValueError(f"names with one kind of quotes, not {name!r}")
        return value

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) < len(value) or min(value) < 0 or max(value) >= 2**63:
            raise ValueError("one seed or several different ones, from 0 on")
        return value

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        _check_model(self.name, self.model)
        return self

    @model_validator(mode="after")
    def _check_inner(self) -> Self:
        if self.finetune.needs_inner and not self.labelled.inner:
            raise ValueError(
                "labelled.inner to be 1 or more: finetune.select, finetune.patience and finetune.inference ask it"
            )
        return self

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        if (self.finetune.task == "segmentation") != (self.labelled.column is None):
            raise ValueError(
                "labelled.column with finetune.task classification or regression, labelled.label with segmentation"
                f" (task is {self.finetune.task}, column is {self.labelled.column})"
            )
        return self

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if self.register_start is not None and self.register_start not in self.starts:
            raise ValueError(f"register_start to be one of {sorted(self.starts)}")
        return self
