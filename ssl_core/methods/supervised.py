"""Supervised: segment the labels that a store has; the control that shows what labels are worth, and a base of LRC."""

from pydantic import Field, field_validator
from torch import Tensor, nn, stack, zeros_like

from ssl_core.config import Name
from ssl_core.methods.base import (
    Crops,
    LossTerms,
    MethodConfig,
    StepContext,
    decode,
    encode,
    register,
    spread,
    tiny_settings,
    train_only,
    with_memo,
)
from ssl_core.methods.parts.region_pixels import map_at
from ssl_core.networks.backbone import Backbone
from ssl_core.views.types import ViewBatch, ViewSpec


@register("supervised")
class Supervised(nn.Module):
    """Segmentation of labelled crops as pre-training; not self-supervised.

    Idea: where some volumes have labels, predicting them is a pre-training like any other, and the one to beat.

    Formula: L = cross-entropy + (1 - soft Dice), the mean over samples and views; Dice over the `values` without
    background, in each sample, as MONAI's DiceCELoss computes it. A 1 x 1 x 1 convolution on the finest decoder level
    makes the logits; the label is read at the centres of that level's features.

    Traps: labels of the test split are not read, but labels of the subjects that a later study calls unlabelled would
    be: pin `stream.split` and the manifest; volumes without the label are left out; padding counts as background.

    Cost: one encoder and one decoder pass a view.

    Use it as the upper reference of a label-efficiency study, or below LRC (`method: {name: lrc, base: supervised}`),
    as that paper does.
    """

    class Config(MethodConfig):
        """Settings of supervised pre-training."""

        TINY = tiny_settings(values=(223, 322))

        crops: Crops = Field(default=Crops(), description="Views; our choice")
        views: int = Field(default=1, ge=1, description="Views of a sample; our choice (2 for LRC's form B)")
        label: Name = Field(default="label", description="Name of the label map in the store; our choice: ingest's")
        values: tuple[int, ...] = Field(
            default=(1,), min_length=1, description="Label values to tell apart, all others are background; our choice"
        )

        @field_validator("values")
        @classmethod
        def _each_once(cls, values: tuple[int, ...]) -> tuple[int, ...]:
            if 0 in values or len(set(values)) != len(values):
                raise ValueError("label values other than 0, each once")
            return values

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        # MONAI takes seconds to import; who only reads settings or trains another method need not wait for it.
        from monai.losses.dice import DiceCELoss

        self.config, self.backbone = config, backbone
        train_only(backbone, backbone.encoder_keys() + backbone.decoder_keys())
        self.level = backbone.decoder_levels[-1]
        self.classifier = nn.Conv3d(self.level.channels, 1 + len(config.values), 1)
        self.loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)

    @classmethod
    def view_spec(cls, config: Config) -> ViewSpec:
        """Crops of each sample, role `global`, with the label."""
        return ViewSpec((config.crops.role("global", config.views),), (config.label,))

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Term `segmentation`; monitors the voxels classified as the label says and the spread of the features."""
        ctx = with_memo(ctx)
        crops = views.roles["global"][: self.config.views]  # a composition may show more
        losses, right = [], []
        for view in crops:
            logits = self.classifier(decode(self.backbone, view, ctx)[-1])
            d, h, w = logits.shape[2:]
            classes = self._classes(map_at(self.level, view.maps[self.config.label], (int(d), int(h), int(w))))
            exact = logits.float() if logits.dtype.itemsize < 4 else logits  # a sum of 16-bit shares loses voxels
            losses.append(self.loss(exact, classes[:, None]))
            right.append((logits.detach().argmax(1) == classes).double().mean())
        deepest = encode(self.backbone, crops[0], ctx)[-1]
        monitors = {"accuracy": stack(right).mean(), "feature_std": spread(deepest)}
        return LossTerms({"segmentation": stack(losses).mean()}, monitors)

    def _classes(self, label_BDHW: Tensor) -> Tensor:
        """Label values as classes 0, 1, ... in the order of `values`."""
        classes = zeros_like(label_BDHW)
        for number, value in enumerate(self.config.values, 1):
            classes = classes.masked_fill(label_BDHW == value, number)
        return classes
