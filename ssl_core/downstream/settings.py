"""How a segmenter is fine-tuned: what is taken over, what is trained when, the loss, the views and the loop."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ssl_core.config import LATER, LEAST_SCALE, MOST_SCALE, Config, CropSize
from ssl_core.downstream.inference_choice import InferenceConfig
from ssl_core.train.engine import EngineConfig
from ssl_core.views.augment.presets import PRESETS
from ssl_core.views.types import RoleSpec, ViewSpec

Transfer = Literal["encoder", "encoder_decoder", "all_but_head"]


class TrainedParts(Config):
    """Which parts of a pre-trained network are trained, and from which step on; random weights are trained whole."""

    parts: Literal["full", "frozen_encoder", "decoder_first", "gradual"] = Field(
        "full",
        description="`full`: all from the first step; `frozen_encoder`: all but the encoder; `decoder_first`: that for"
        " `steps` steps, then all; `gradual`: that too, then one more encoder level every `steps` steps, deepest first",
    )
    steps: int = Field(0, ge=0, description="Steps of `decoder_first` and `gradual`")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="Each encoder level has this times the learning rate of the next deeper one"
    )

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if (self.parts in ("decoder_first", "gradual")) != (self.steps > 0):
            raise ValueError("steps: from 1 on with parts decoder_first and gradual, and 0 with others")
        return self


class FinetuneConfig(Config):
    """How a segmenter is trained."""

    transfer: Transfer = Field(
        "encoder",
        description="What a pre-trained start brings: its encoder, its decoder too, or all but the output layer;"
        " matched by name and shape, or refused",
    )
    channels: Literal["exact", "repeat"] = Field(
        "exact",
        description="`repeat`: a start of one channel takes volumes of several, as the weights of its first convolution"
        " are repeated and divided by their number; `exact`: such a start is refused",
    )
    trained: TrainedParts = TrainedParts()
    epochs: int = Field(10, ge=1, description="Epochs; the inner metric is measured after each")
    steps_per_epoch: int = Field(10, ge=1, description="Optimizer steps of an epoch")
    batch: int = Field(4, ge=1, le=1 << 16, description="Crops of a step")
    patch_DHW: CropSize = Field((32, 48, 32), description="Crop and sliding window, voxels (D, H, W)")
    lr: float = Field(2e-3, gt=0, description="Peak learning rate (AdamW)")
    encoder_lr_scale: float = Field(
        1.0,
        ge=0,
        description="Learning rate of a pre-trained encoder relative to the rest; random weights always use 1",
    )
    weight_decay: float = Field(1e-2, ge=0, description="AdamW's decay of kernels; never of biases and norms")
    warmup_steps: int = Field(5, ge=0, description="Steps of linear warm-up, then a half cosine to 0")
    clip: float = Field(12.0, ge=0, description="Largest gradient norm (nnU-Net's value); 0 does not clip")
    accumulate: int = Field(
        1, ge=1, description="Parts that a batch is cut into, one after the other; Dice is over the crops of a part"
    )
    precision: Literal["auto", "fp32", "bf16", "fp64"] = Field(
        "auto", description="auto: bf16 autocast on CUDA devices that have it, else fp32; fp64 is for tests"
    )
    channels_last: bool = Field(False, description="Kernels and activations in channels_last_3d order")
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay of a moving average of the weights, which is then what is measured and stored; a step k"
        " never has more than (1 + k) / (10 + k); 0: none",
    )
    loss: Literal["dice_ce", "tversky_ce", "dice_focal", "tversky_focal"] = Field(
        "dice_ce", description="A loss of regions, over all crops of a part, plus a loss of voxels"
    )
    tversky_beta: float = Field(
        0.7, gt=0, lt=1, description="Tversky's weight of missed voxels; 1 less it of false ones (Salehi et al. 2017)"
    )
    focal_gamma: float = Field(2.0, ge=0, description="Focal loss's exponent (Lin et al. 2017)")
    select: Literal["last", "best"] = Field(
        "last", description="Weights that are stored: of the last epoch, or of the best by the inner split"
    )
    patience: int | None = Field(
        None, ge=1, description="Epochs without a better inner metric after which training ends; never when empty"
    )
    class_balance: float = Field(0.5, ge=0, le=1, description="Share of crops centred on a labelled voxel")
    inference: InferenceConfig = Field(InferenceConfig(), json_schema_extra=LATER)
    flip: tuple[float, float, float] = Field(
        (0.0, 0.0, 0.5), description="Flip probability along D, H, W; W at 0 where a label names a side"
    )
    scale: tuple[float, float] = Field((0.9, 1.1), description="In-plane zoom")
    rotate_degrees: float = Field(10.0, ge=0, le=180, description="Largest rotation about D")
    intensity: str = Field("light", description="Intensity augmentation")

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        if not LEAST_SCALE <= self.scale[0] <= self.scale[1] <= MOST_SCALE:
            raise ValueError(
                f"scale: two numbers from {LEAST_SCALE} to {MOST_SCALE}, the lower first, not {self.scale}"
            )
        plain = type(self).model_fields["warmup_steps"].default
        if self.warmup_steps >= self.steps and self.warmup_steps > plain:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) below all {self.steps} steps, or `lr` is never reached"
            )
        if not all(0 <= share <= 1 for share in self.flip):
            raise ValueError(f"flip: three probabilities from 0 to 1, not {self.flip}")
        if self.intensity not in PRESETS:
            raise ValueError(f"intensity: one of {', '.join(PRESETS)}, not {self.intensity!r}")
        return self

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.trained.steps >= self.steps:
            raise ValueError(f"trained.steps ({self.trained.steps}) below all {self.steps} steps")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate ({self.accumulate}) to divide batch ({self.batch})")
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.epochs * self.steps_per_epoch

    @property
    def needs_inner(self) -> bool:
        """Whether volumes of the inner split decide something."""
        return self.select == "best" or self.patience is not None or self.inference.needs_inner

    def engine(self, seed: int) -> EngineConfig:
        """The engine's settings; a checkpoint is due after each epoch."""
        return EngineConfig(
            steps=self.steps,
            lr=self.lr,
            warmup_steps=min(self.warmup_steps, self.steps - 1),
            weight_decay=self.weight_decay,
            clip=self.clip,
            accumulate=self.accumulate,
            precision=self.precision,
            channels_last=self.channels_last,
            seed=seed,
            log_every=self.steps,
            checkpoint_every=self.steps_per_epoch,
            probe_every=0,
        )

    def views(self, label: str) -> ViewSpec:
        """One view of each crop, role `patch`, with the label map."""
        role = RoleSpec(
            name="patch",
            count=1,
            size_DHW=self.patch_DHW,
            scale=self.scale,
            flip=self.flip,
            rotate_degrees=self.rotate_degrees,
            intensity=self.intensity,
        )
        return ViewSpec(roles=(role,), maps=(label,))
