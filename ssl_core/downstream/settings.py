"""How a segmenter or a head is fine-tuned: what is taken over, what is trained when, loss, views and loop."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ssl_core.config import LATER, LEAST_SCALE, MOST_SCALE, Config, CropSize, parse, resolved
from ssl_core.downstream.inference_choice import InferenceConfig
from ssl_core.portable.inference.settings import sided
from ssl_core.train.engine import EngineConfig
from ssl_core.views.augment.presets import PRESETS
from ssl_core.views.types import RoleSpec, ViewSpec
from storage.errors import ConfigError

NNUNET_GEOMETRY: dict[str, Any] = {
    "scale": (0.7, 1.4),
    "scale_depth": True,
    "scale_share": 0.2,
    "rotate_degrees": 30.0,
    "tilt_degrees": 30.0,
    "rotate_share": 0.2,
    "centred": True,
}
"""nnU-Net v2's spatial transform of isotropic 3-D patches (`nnUNetTrainer.get_training_transforms`), but for mirrors.

Angles are drawn for each axis by themselves, one zoom for all three. Turns are rigid in millimetres here. Where slices
are so far apart that a turned view does not fit its crop, it keeps its rotation about D only; nnU-Net turns such
patches by any angle about D instead."""

Transfer = Literal["trained", "encoder", "encoder_decoder", "all_but_head"]

CHANGEABLE = (
    "lr",
    "encoder_lr_scale",
    "trained.layer_decay",
    "weight_decay",
    "clip",
    "tversky_beta",
    "focal_gamma",
    "class_balance",
    "flip",
    "scale",
    "rotate_degrees",
    "intensity",
)
"""Settings that may be others from an epoch on: the network, the optimizer's moments and the count of steps stay.

Of others the state of a training is made (`ema`, `deep_supervision`), its place in the order of crops (`batch`), or the
course of its rate (`warmup_steps`)."""


class Change(Config):
    """Settings that hold from an epoch on."""

    epoch: int = Field(ge=2, description="First epoch that is trained with them, counted from 1")
    settings: dict[str, Any] = Field(
        min_length=1, description=f"Values by name, of {', '.join(CHANGEABLE)}; others stay as they are"
    )


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


Task = Literal["segmentation", "classification", "regression"]
WITHOUT_HEADS = (
    "transfer", "ema", "loss", "tversky_beta", "focal_gamma", "deep_supervision", "class_balance", "class_draw",
    "centred", "inference", "schedule",
)  # fmt: skip
"""Settings of segmenters that a class or a number of a whole volume has no use for."""
OF_VIEWS = ("channels_last", "accumulate", "geometry", "flip", "scale", "rotate_degrees", "intensity")
OF_ENCODERS = ("trained", "encoder_lr_scale")


class HeadConfig(Config):
    """A class or a number of a whole volume, from pooled features of the encoder through one linear layer."""

    frozen: bool = Field(
        False,
        description="A linear probe: the encoder is left as it is, features of each volume are computed once, from all"
        " windows, and standardised by the training volumes; else the encoder is trained too, on crops",
    )
    levels: int = Field(
        1, ge=1, le=16, description="Deepest encoder levels whose maps are averaged over positions and joined"
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="Of a classification: `balanced`: each class weighs as much as another, by the training volumes; a"
        " class that has half of another's volumes then weighs twice as much in each",
    )
    loss: Literal["smooth_l1", "mse"] = Field(
        "smooth_l1", description="Of a regression, on targets standardised by the training subjects' mean and deviation"
    )


class FinetuneConfig(Config):
    """How a segmenter is trained, or a head."""

    transfer: Transfer = Field(
        "trained",
        description="What a pre-trained start brings: `trained`: its encoder, and its decoder where that was trained;"
        " or its encoder, its decoder too, all but the output layer; matched by name and shape, or refused",
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
    deep_supervision: int = Field(
        0,
        ge=0,
        le=16,
        description="Decoder levels below the output that have the loss too, through output layers that are thrown away"
        " after training; weights are halved from level to level and 1 in all; nnU-Net's are all but the coarsest",
        json_schema_extra=LATER,
    )
    select: Literal["last", "best"] = Field(
        "last", description="Weights that are stored: of the last epoch, or of the best by the inner split"
    )
    patience: int | None = Field(
        None, ge=1, description="Epochs without a better inner metric after which training ends; never when empty"
    )
    class_balance: float = Field(0.5, ge=0, le=1, description="Share of crops centred on a labelled voxel")
    class_draw: Literal["volume", "all"] = Field(
        "volume",
        description="Class of that voxel: `volume`: each class of the crop's volume as likely, as nnU-Net draws it;"
        " `all`: each class of all training volumes as likely, in a volume that has it, for classes that few have",
        json_schema_extra=LATER,
    )
    centred: bool = Field(
        False,
        description="Views lie about the voxel that their crop was drawn about, as nnU-Net's do; else anywhere in the"
        " crop, which is larger than a view and may hold a small structure that the view leaves out",
        json_schema_extra=LATER,
    )
    geometry: Literal["own", "nnunet"] = Field(
        "own",
        description="`own`: `scale` and `rotate_degrees`; `nnunet`: centred, a fifth of the views turned by up to 30"
        " degrees about all three axes, a fifth zoomed by 0.7 to 1.4 along all; crops of 14 times a view's voxels are"
        " read for it, and of twice as many where a view is flat",
        json_schema_extra=LATER,
    )
    inference: InferenceConfig = Field(InferenceConfig(), json_schema_extra=LATER)
    flip: tuple[float, float, float] = Field(
        (0.0, 0.0, 0.5),
        description="Flip probability along D, H, W; never along W where a label names a side",
    )
    scale: tuple[float, float] = Field((0.9, 1.1), description="In-plane zoom")
    rotate_degrees: float = Field(10.0, ge=0, le=180, description="Largest rotation about D")
    intensity: str = Field("light", description="Intensity augmentation")
    task: Task = Field(
        "segmentation",
        description="`segmentation` learns `labelled.label`; `classification` and `regression` learn a class or a"
        " number of a whole volume, `labelled.column`",
        json_schema_extra=LATER,
    )
    head: HeadConfig = Field(HeadConfig(), description="of a classification or a regression", json_schema_extra=LATER)
    schedule: tuple[Change, ...] = Field(
        (),
        description="Settings that change between epochs, the earliest change first; population based training writes"
        " it into `best.yaml`",
        json_schema_extra=LATER,
    )

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
    def _check_crops(self) -> Self:
        """A setting that another one leaves without effect would be believed to have one."""
        plain = type(self).model_fields
        if self.class_draw == "all" and not self.class_balance:
            raise ValueError("class_balance above 0 with class_draw=all, or no crop is centred on a class")
        if self.geometry == "nnunet":
            for key in ("scale", "rotate_degrees"):
                if getattr(self, key) != plain[key].default:
                    raise ValueError(f"no {key} with geometry=nnunet, which has its own; set geometry=own for yours")
        return self

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        if self.task == "segmentation":
            if self.head != HeadConfig():
                raise ValueError(
                    "no head with task=segmentation, which has none: set task=classification or regression"
                )
            return self
        idle = [(key, f"task={self.task}") for key in WITHOUT_HEADS]
        if self.head.frozen:
            idle += [(key, "head.frozen") for key in (*OF_ENCODERS, *OF_VIEWS)]
        for key, why in idle:
            field = type(self).model_fields[key]
            if getattr(self, key) != field.get_default(call_default_factory=True):
                raise ValueError(f"no {key} with {why}, where it has no effect")
        key = "loss" if self.task == "classification" else "class_weights"
        if getattr(self.head, key) != HeadConfig.model_fields[key].default:
            raise ValueError(f"no head.{key} with task={self.task}, where it has no effect")
        return self

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.trained.steps >= self.steps:
            raise ValueError(f"trained.steps ({self.trained.steps}) below all {self.steps} steps")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate ({self.accumulate}) to divide batch ({self.batch})")
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        before = 1
        for number, change in enumerate(self.schedule):
            thing = f"finetune.schedule.{number}"
            if not before < change.epoch <= self.epochs:
                raise ConfigError(
                    f"{thing}.epoch",
                    expected=f"an epoch after {before}, of {self.epochs}",
                    found=str(change.epoch),
                    remedy="write the earliest change first, each epoch once",
                )
            for name in change.settings:
                if name not in CHANGEABLE:
                    raise ConfigError(
                        f"{thing}.settings",
                        expected=f"settings that may change between epochs: {', '.join(CHANGEABLE)}",
                        found=repr(name),
                        remedy="set it for the whole training, in `finetune`",
                    )
            if (self.at(change.epoch).encoder_lr_scale == 0) != (self.encoder_lr_scale == 0):
                raise ConfigError(
                    f"{thing}.settings.encoder_lr_scale",
                    expected="0 in all epochs or in none",
                    found=f"{self.at(change.epoch).encoder_lr_scale:g} after {self.encoder_lr_scale:g}",
                    remedy="take a small scale in place of 0, which freezes the encoder: such a training has no moments"
                    " of it to go on with",
                )
            before = change.epoch
        return self

    @property
    def mirrors(self) -> bool:
        """Whether views are to be mirrored from left to right in some epoch."""
        return any(self.at(epoch).flip[2] > 0 for epoch in (1, *(change.epoch for change in self.schedule)))

    def at(self, epoch: int) -> Self:
        """What holds in an epoch, counted from 1; without a schedule.

        Raises:
            ConfigError: together the settings are no configuration.
        """
        data = resolved(self) | {"schedule": []}
        for change in self.schedule:
            if change.epoch <= epoch:
                data = with_changes(data, change.settings)
        return parse(type(self), data, f"finetune, epoch {epoch}")

    def begun(self, epochs: int) -> Self:
        """What so many epochs are trained with, later changes left out: what follows cannot have changed them."""
        return self.model_copy(update={"schedule": tuple(c for c in self.schedule if c.epoch <= epochs)})

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

    def views(self, label: str | None, names: Iterable[str] = ()) -> ViewSpec:
        """One view of each crop, role `patch`, with the label map.

        Args:
            label: Name of the map; None without one.
            names: Of its classes; none is mirrored from left to right where one says a side.
        """
        along_d, along_h, along_w = self.flip
        role = RoleSpec(
            name="patch",
            count=1,
            size_DHW=self.patch_DHW,
            scale=self.scale,
            flip=(along_d, along_h, 0.0 if sided(names) else along_w),
            rotate_degrees=self.rotate_degrees,
            intensity=self.intensity,
            centred=self.centred,
        )
        if self.geometry == "nnunet":
            role = replace(role, **NNUNET_GEOMETRY)
        return ViewSpec(roles=(role,), maps=() if label is None else (label,))


def with_changes(data: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration with other values in place.

    Args:
        data: Plain values in groups; left as it is.
        settings: Values by dotted name.
    """
    changed = dict(data)
    for name, value in settings.items():
        group, _, rest = name.partition(".")
        changed[group] = with_changes(changed.get(group) or {}, {rest: value}) if rest else value
    return changed
