"""The configuration of the comparison."""

from typing import Self

from pydantic import Field, model_validator

from jobs.configs.groups import BackboneConfig, LabelledConfig
from ssl_core.config import Config
from ssl_core.downstream.settings import FinetuneConfig
from ssl_core.views.intensity import IntensityPolicy


class NnUnetConfig(Config):
    """What is cut of nnU-Net's own plan, so that a small machine can train it."""

    features: tuple[int, ...] | None = Field(None, description="features of its stages; those that it plans when empty")
    patch_DHW: tuple[int, int, int] | None = Field(None, description="its crop, voxels; as it plans when empty")
    batch: int | None = Field(None, ge=2, description="crops of a step; as it plans when empty")


class CompareConfig(Config):
    """One training from random weights on all drawn subjects, and nnU-Net's in the same time."""

    labelled: LabelledConfig = Field(description="the volumes; of the drawn subjects nnU-Net has the inner ones too")
    backbone: BackboneConfig = BackboneConfig()
    intensity: IntensityPolicy = IntensityPolicy()
    finetune: FinetuneConfig = FinetuneConfig()
    seed: int = Field(0, ge=0, description="of weights, crops and augmentations on this side")
    tolerance_mm: float = Field(1.0, gt=0, description="of the normalised surface Dice, mm")
    nnunet: NnUnetConfig = NnUnetConfig()

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        if self.finetune.task != "segmentation":
            raise ValueError(f"finetune.task: segmentation, which nnU-Net does, not {self.finetune.task}")
        return self
