"""Groups of settings of the jobs: the network, what a job asks of the cluster, which checkpoints stay."""

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from jobs.ingest_config import Url
from ssl_core.config import LATER, Config, Fingerprint, Name, digested, flatten, resolved
from ssl_core.downstream.inference import MOST_DRAWS
from ssl_core.networks import backbone_names
from ssl_core.networks.registry import check_arguments

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"  # Ray's, which are those of Kubernetes
_LABEL_KEY = re.compile(rf"([a-z0-9.-]{{1,253}}/)?{_LABEL}")
_LABEL_VALUE = re.compile(rf"!?({_LABEL}|in\({_LABEL}(, *{_LABEL})*\))")


def changed(config: Config, before: Mapping[str, Any], free: Collection[str]) -> dict[str, str]:
    """Settings that are not what they were, by dotted key, each as a line; those in groups named `free` may change.

    Args:
        config: What is asked for now.
        before: What was asked for then, as `ssl_core.config.resolved` gave it; where nobody kept it, nothing is said.
        free: Keys of the first level.
    """
    now, then = flatten(resolved(config)) if before else {}, flatten(before)
    known = {**then, **flatten(digested(config))}  # without settings that came later and have their default
    keys = [key for key in known if key.partition(".")[0] not in free and now.get(key) != then.get(key)]
    return {key: f"{key}={now.get(key)} (was {then.get(key)})" for key in keys}


class BackboneConfig(Config):
    """Which network, and the arguments that build it."""

    name: str = Field("basic_unet", description="registered backbone name")
    arguments: dict[str, Any] = Field(
        default_factory=lambda: {"features": [16, 16, 32, 64, 128, 16]}, description="keyword arguments of the backbone"
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if value not in backbone_names():
            raise ValueError(f"one of {', '.join(backbone_names())}")
        return value

    @model_validator(mode="after")
    def _check_arguments(self) -> Self:
        check_arguments(self.name, self.arguments)
        return self


class ClusterConfig(Config):
    """What a job asks of the cluster."""

    workers: int = Field(2, ge=1, le=1 << 16, description="training workers")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="elastic: the job runs with what there is, from this many to `workers`, as far as the number"
        " divides `stream.global_batch` and `stream.lanes`, with the same samples and contrasts a step, and no more"
        " samples of a worker in its network at once than with `workers`; exactly `workers` when empty",
    )
    cpus_per_worker: float = Field(1, gt=0, description="logical CPUs of a worker")
    gpu: bool = Field(False, description="one GPU a worker; without it training is on the CPU")
    max_failures: int = Field(
        5,
        ge=-1,
        description="worker-group restarts before the job fails; -1 is no limit, but for errors that would come again",
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK",
        description="Ray's strategy: workers on few nodes or on many; the strict ones on one node, or each on its own",
        json_schema_extra=LATER,
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="labels of the nodes that workers may run on, such as {ray.io/market-type: on-demand}; a value may"
        " be `!VALUE`, `in(A, B)` or `!in(A, B)`",
        json_schema_extra=LATER,
    )

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        for key, value in self.labels.items():
            if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                raise ValueError(
                    f"labels as KEY: VALUE, !VALUE, in(A, B) or !in(A, B) in Ray's letters, not {key}: {value}"
                )
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) to be at most workers ({self.workers})")
        return self


class CheckpointConfig(Config):
    """Which checkpoints of a pre-training stay, and which becomes the registered model."""

    keep: int = Field(
        2, ge=1, description="checkpoints that stay: the newest, or with `best_by` the best and the newest beside them"
    )
    best_by: str | None = Field(
        None, description="metric that says which are best, such as `probe/knn_dice`, as last measured before each"
    )
    best_is: Literal["max", "min"] = Field("max", description="whether the largest value of it is best or the smallest")
    register_best: bool = Field(False, description="register the encoder of the best checkpoint, not of the last step")

    @model_validator(mode="after")
    def _check_best(self) -> Self:
        if self.register_best and self.best_by is None:
            raise ValueError("best_by to be set with register_best, or nothing says which is best")
        return self


def require_segmentation(task: str, column: str | None, job: str) -> None:
    """Refuse classes and numbers of whole volumes in a job that knows segmenters only.

    Raises:
        ValueError: as said.
    """
    if task != "segmentation" or column is not None:
        raise ValueError(f"finetune.task=segmentation and no labelled.column: {job} compares segmenters only")


class LabelledConfig(Config):
    """Which labelled subjects a fine-tuning sees; subject-level splits of the manifest throughout."""

    data: Url = Field(description="URL of an ingested store with labels")
    fingerprint: Fingerprint | None = Field(None, description="manifest to pin; the latest when empty")
    label: Name = Field("label", description="name of the label map")
    column: Name | None = Field(
        None,
        description="column of the subject table whose value a classification or a regression learns, in place of"
        " `label`; volumes without a value are left out and named",
        json_schema_extra=LATER,
    )
    subjects: int = Field(8, ge=1, description="labelled training subjects to use, drawn by `subjects_seed`")
    subjects_seed: int | tuple[int, ...] = Field(
        0,
        description="seed of that draw; a fine-tuning may have a list, all different: each draw is then trained from"
        f" each start with each seed, and intervals and tests are over draws too, of which there are {MOST_DRAWS} at"
        " most",
    )
    inner: int = Field(
        2,
        ge=0,
        description="of those, subjects held out as the inner split, which steers the search and chooses epochs;"
        " 0 trains on all for a fixed length",
    )
    test_limit: int | None = Field(None, ge=1, description="most test volumes to evaluate; all when empty")

    @field_validator("subjects_seed")
    @classmethod
    def _check_draws(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        seeds = value if isinstance(value, tuple) else (value,)
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**63:
            raise ValueError(f"one seed or several different ones, from 0 on, not {list(seeds)}")
        if len(seeds) > MOST_DRAWS:
            raise ValueError(f"{MOST_DRAWS} draws at most, whose signs the exact test goes through, not {len(seeds)}")
        return seeds[0] if len(seeds) == 1 else value

    @model_validator(mode="after")
    def _check_column(self) -> Self:
        if self.column is not None and self.label != type(self).model_fields["label"].default:
            raise ValueError(f"label ({self.label!r}) or column ({self.column!r}), not both")
        return self

    @property
    def draws(self) -> tuple[int, ...]:
        """Seeds of the draws of subjects."""
        return self.subjects_seed if isinstance(self.subjects_seed, tuple) else (self.subjects_seed,)

    def of_draw(self, seed: int) -> Self:
        """The same with one draw."""
        return self.model_copy(update={"subjects_seed": seed})

    @model_validator(mode="after")
    def _check_inner(self) -> Self:
        if self.inner >= self.subjects:
            raise ValueError(f"inner ({self.inner}) to be less than subjects ({self.subjects}); the rest train")
        return self
