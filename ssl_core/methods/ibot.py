"""Masked self-distillation (iBOT): a masked student predicts, token by token, what a following teacher sees."""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_core.losses.cosine import masked_mean
from ssl_core.losses.distillation import cross_entropy, entropy, prototype_logits, teacher_distribution
from ssl_core.losses.restoration import Kind, restoration
from ssl_core.methods.base import (
    Crops,
    LossTerms,
    MethodConfig,
    StepContext,
    Temperature,
    decode,
    encode,
    level_for,
    register,
    spread,
    tiny_settings,
    train_only,
)
from ssl_core.methods.parts.counter_random import uniforms
from ssl_core.methods.parts.masking import block_mask
from ssl_core.methods.parts.points import inside, sample_features, to_view, to_volume
from ssl_core.methods.parts.region_pixels import map_at
from ssl_core.networks.backbone import Backbone, Level
from ssl_core.networks.ema import follow, short_run_momentum, target_of
from ssl_core.networks.heads import Norm, PixelHead, head
from ssl_core.to_device import filled
from ssl_core.views.types import View, ViewBatch, ViewSpec


@register("ibot")
class IBOT(nn.Module):
    """Masked self-distillation (iBOT, Zhou et al., arXiv 2111.07832) on convolutional networks; see the settings.

    Idea: the teacher, a moving average of the student, sees a crop whole; the student sees it with blocks hidden and
    predicts what the teacher makes of the hidden places, and of the crop as a whole. So targets are learned features,
    not voxels. SMIT (arXiv 2205.10342) adds restoration to it: `w_restore`.

    Formula: with cosines s of a student's and t of the teacher's embeddings with K prototypes,
    P_t = softmax((t - c) / t_teacher), P_s = softmax(s / 0.1) and H = -P_t . log P_s,
    L = `w_tokens` H_tokens + `w_global` H_global + `w_restore` R. H_tokens is the mean over both views of the mean over
    hidden positions, the teacher's token being that of the same view, of the same physical place in the other view, or
    both (`teacher_view`). H_global compares pooled deepest maps across the views. R is that of `mae`. After a step
    c <- 0.9 c + 0.1 mean t over all ranks, and the teacher's weights follow as those of `byol` do; c moves faster in
    the first steps by the same rule.

    Traps: it can collapse in two ways, onto one prototype (`token_prototypes` falls to 1), against which a lower
    `centre_momentum` works, and to a flat teacher (`token_entropy` rises to 1), against which lower teacher
    temperatures do; intensities must be centred near 0, as hidden voxels are set to 0; the loss is a cross-entropy
    whose target moves, so it cannot be compared over steps.

    Cost: two passes of the whole network and two of the teacher's; a second copy of the weights; `positions` rows of K
    numbers for each view, four times.

    Use it where `aligned` or `mae` are used, and beside them in `compose`. Ablations: `w_global` = 0, `tokens`,
    `teacher_view`, `w_restore`.
    """

    class Config(MethodConfig):
        """Settings of iBOT; local crops, which its longest runs add, are left out."""

        TINY = tiny_settings(block=4, hidden=16, out=8, prototypes=16, positions=64)

        crops: Crops = Field(
            default=Crops(scale=(1.0, 1.4), flip=(0.0, 0.0, 0.5), min_overlap=0.3),
            description="Views; our choice: those of `aligned`, with light intensity changes as iBOT has some",
        )
        w_tokens: float = Field(default=1.0, gt=0, description="Weight of the tokens' loss; iBOT's 1")
        w_global: float = Field(default=1.0, ge=0, description="Weight of the pooled maps' loss; iBOT's 1")
        w_restore: float = Field(
            default=0.0, ge=0, description="Weight of restoration of hidden voxels; 0 is iBOT, 1 after SMIT's idea"
        )
        ratio: float = Field(
            default=0.5,
            gt=0,
            lt=1,
            description="Share of blocks hidden; our choice (iBOT: none half of the time, else 0.1 to 0.5)",
        )
        block: int = Field(default=8, ge=1, description="Side of the blocks, voxels; our choice (iBOT: 16)")
        tokens: Literal["decoder", "encoder"] = Field(
            default="decoder",
            description="Tokens are positions of the decoder's finest map or of an encoder level; our choice",
        )
        feature_level: int | None = Field(
            default=None,
            ge=0,
            description="Encoder level of the tokens; unset: deepest with 6 positions in-plane, our choice",
        )
        teacher_view: Literal["same", "other", "both"] = Field(
            default="both",
            description="View in which the teacher sees a token; iBOT's is `same`, the other by geometry is ours",
        )
        positions: int = Field(default=512, ge=1, description="Hidden positions drawn from a view, at most; our choice")
        prototypes: int = Field(default=1024, ge=2, description="K; our choice (iBOT: 8192)")
        hidden: int = Field(default=512, ge=1, description="Hidden width of the heads; our choice (iBOT: 2048)")
        out: int = Field(default=128, ge=1, description="Embedding width; our choice (iBOT: 256)")
        norm: Norm = Field(
            default="batch", description="Norm in the heads, over the global batch; our choice (iBOT: none)"
        )
        student_temperature: Temperature = Field(default=0.1, description="Of the student; iBOT's 0.1")
        global_temperature: Temperature = Field(default=0.04, description="Of the teacher's pooled maps; iBOT's 0.04")
        token_temperature: Temperature = Field(
            default=0.07, description="Of the teacher's tokens after the rise from `global_temperature`; iBOT's 0.07"
        )
        temperature_rise: float = Field(
            default=0.3, ge=0, le=1, description="Share of the run in which it rises; iBOT's code: 30 of 100 epochs"
        )
        centre_momentum: float = Field(default=0.9, ge=0, le=1, description="Momentum of the centres; iBOT's 0.9")
        loss: Kind = Field(default="mse", description="Error of a voxel in restoration; nnssl's L2, as `mae`")
        ema_start: float = Field(
            default=0.99,
            ge=0,
            le=1,
            description="Momentum of the teacher, on a cosine to 1, lower in the first steps; our choice (iBOT: 0.996)",
        )

        @model_validator(mode="after")
        def _fits(self) -> "IBOT.Config":
            if max(self.crops.size_DHW) <= self.block:
                raise ValueError(f"a block smaller than the view, which would be hidden whole, not {self.block}")
            if self.feature_level is not None and self.tokens == "decoder":
                raise ValueError("feature_level only with tokens=encoder: those of the decoder are of its finest map")
            return self

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        self.decodes = config.tokens == "decoder" or bool(config.w_restore)
        last = len(backbone.levels) - 1
        self.level = level_for(backbone, config.crops.size_DHW, config.feature_level)
        self.deepest = last if self.decodes or config.w_global else self.level
        if self.decodes:
            train_only(backbone, backbone.encoder_keys() + backbone.decoder_keys())
        else:
            train_only(backbone, backbone.level_keys(self.level) + backbone.level_keys(self.deepest))
        self.prototypes = nn.Linear(config.out, config.prototypes, bias=False)
        widths = [self.place.channels, config.hidden, config.out]
        self.token_projector = head(widths, norm=config.norm)
        self.target_backbone, self.target_prototypes = target_of(backbone), target_of(self.prototypes)
        self.target_token_projector = target_of(self.token_projector)
        if config.w_global:
            self.global_projector = head([backbone.levels[-1].channels, *widths[1:]], norm=config.norm)
            self.target_global_projector = target_of(self.global_projector)
        if config.w_restore:
            self.restore = PixelHead(backbone.decoder_levels[-1], int(backbone.arguments.get("in_channels", 1)))
        # One row for the tokens, one for the pooled maps.
        self.register_buffer("centre_2K", torch.zeros(2, config.prototypes))
        self.centre_2K: Tensor
        self._fresh: list[tuple[Tensor, Tensor]] = []

    @property
    def place(self) -> Level:
        """Where tokens lie."""
        return self.backbone.decoder_levels[-1] if self.config.tokens == "decoder" else self.backbone.levels[self.level]

    @classmethod
    def view_spec(cls, config: Config) -> ViewSpec:
        """Two overlapping crops of each sample, role `global`; what is restored is the clean copy."""
        return ViewSpec((config.crops.role("global", 2, keep_clean=bool(config.w_restore)),))

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Terms `tokens`, `global` and `restoration`.

        Monitors: the teacher's mean entropy as a share of log K, the number of prototypes that it uses (exp of the
        entropy of its mean distribution), the tokens compared for each drawn, and the spread of the deepest features.
        """
        config, pair = self.config, views.roles["global"][:2]  # a composition may show more
        masks = [
            block_mask(ctx.seed, views.sample_B, view.size_DHW, config.block, config.ratio, f"ibot {v}")
            for v, view in enumerate(pair)
        ]
        maps = [
            self.backbone.features(torch.where(mask, 0.0, view.image_BCDHW), self.deepest)
            for mask, view in zip(masks, pair, strict=True)
        ]
        decoded = [self.backbone.decode(m)[-1] for m in maps] if self.decodes else []
        with torch.no_grad():
            teacher_maps = [encode(self.target_backbone, view, ctx, self.deepest) for view in pair]
        online = decoded if config.tokens == "decoder" else [m[self.level] for m in maps]
        tokens, token_sum, monitors = self._tokens(
            views, masks, online, self._teacher_tokens(pair, teacher_maps, ctx), ctx
        )
        terms = {"tokens": config.w_tokens * tokens}
        sums = [token_sum]
        if config.w_global:
            whole, global_sum = self._global(maps, teacher_maps)
            terms["global"] = config.w_global * whole
            sums.append(global_sum)
        if config.w_restore:
            errors = [
                restoration(
                    self.restore(d),
                    view.image_BCDHW if view.clean_BCDHW is None else view.clean_BCDHW,
                    mask * view.valid_B1DHW,
                    config.loss,
                )
                for d, view, mask in zip(decoded, pair, masks, strict=True)
            ]
            terms["restoration"] = config.w_restore * torch.stack(errors).mean()
        self._fresh.append((torch.stack([s[0] for s in sums]), torch.stack([s[1] for s in sums])))
        monitors["feature_std"] = spread(maps[0][self.deepest])
        return LossTerms(terms, monitors)

    @torch.no_grad()
    def after_step(self, ctx: StepContext) -> None:
        """Moves the centres towards the mean teacher logits of all ranks, and the teacher towards the student."""
        logits, counts = (ctx.collectives.sum(torch.stack(parts).sum(0)) for parts in zip(*self._fresh, strict=True))
        self._fresh.clear()
        rows = len(logits)
        # A young centre follows faster, as a young target does.
        momentum = min(self.config.centre_momentum, (1 + ctx.step) / (10 + ctx.step))
        moved = torch.lerp(logits / counts.clamp_min(1)[:, None], self.centre_2K[:rows].to(logits), momentum)
        self.centre_2K[:rows] = torch.where(counts[:, None] > 0, moved.to(self.centre_2K), self.centre_2K[:rows])
        momentum = short_run_momentum(ctx.step, ctx.max_steps, self.config.ema_start)
        for target, online in self._followed():
            follow(target, online, momentum)

    def _followed(self) -> list[tuple[nn.Module, nn.Module]]:
        names = ["backbone", "prototypes", "token_projector"] + ["global_projector"] * bool(self.config.w_global)
        return [(getattr(self, f"target_{name}"), getattr(self, name)) for name in names]

    def _teacher_tokens(self, pair: tuple[View, ...], maps: list[list[Tensor]], ctx: StepContext) -> list[Tensor]:
        if self.config.tokens == "encoder":
            return [m[self.level] for m in maps]
        with torch.no_grad():
            if ctx.memo is None:
                return [self.target_backbone.decode(m)[-1] for m in maps]
            return [decode(self.target_backbone, view, ctx)[-1] for view in pair]

    def _tokens(
        self, views: ViewBatch, masks: list[Tensor], online: list[Tensor], target: list[Tensor], ctx: StepContext
    ) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]:
        config, pair, level = self.config, views.roles["global"][:2], self.place
        student, teacher, usable = [], [], []
        for v, view in enumerate(pair):
            index_BN, points_BN3, hidden_BN = draw_hidden(
                masks[v],
                view,
                level,
                size_of(online[v]),
                views,
                config.positions,
                seed=ctx.seed,
                purpose=f"ibot tokens {v}",
            )
            student.append(rows_at(online[v], index_BN))
            if config.teacher_view != "other":
                teacher.append(rows_at(target[v], index_BN))
                usable.append(hidden_BN)
            if config.teacher_view != "same":
                points = to_view(pair[1 - v], to_volume(view, points_BN3))
                values_BNC, between_BN = sample_features(target[1 - v], level, points)
                teacher.append(values_BNC)
                usable.append(hidden_BN & between_BN & inside(pair[1 - v], points))
        each = len(teacher) // len(student)
        weight_SN = torch.cat(usable)
        student_RK = self._logits(self.token_projector, self.prototypes, student)
        # Both comparisons of a view follow each other, so its logits are repeated view by view.
        per_view = student_RK.view(len(student), 1, -1, config.prototypes)
        student_RK = per_view.expand(-1, each, -1, -1).reshape(-1, config.prototypes)
        with torch.no_grad():
            teacher_RK = self._logits(self.target_token_projector, self.target_prototypes, teacher)
            p_RK = teacher_distribution(teacher_RK, self.centre_2K[0], self._token_temperature(ctx))
        loss_R = cross_entropy(student_RK, p_RK, config.student_temperature)
        loss = masked_mean(loss_R.view_as(weight_SN), weight_SN)
        weight_R = weight_SN.flatten().to(p_RK.dtype)
        count = weight_R.sum().clamp_min(1)
        mean_K = (p_RK * weight_R[:, None]).sum(0) / count
        monitors = {
            "token_entropy": (entropy(p_RK) * weight_R).sum() / count / math.log(config.prototypes),
            "token_prototypes": entropy(mean_K).exp(),
            "tokens_compared": weight_R.mean(),
        }
        return loss, mean_logits(teacher_RK, weight_SN), monitors

    def _global(
        self, maps: list[list[Tensor]], teacher_maps: list[list[Tensor]]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        config = self.config
        student_RK = self._logits(self.global_projector, self.prototypes, [pooled(m[-1]) for m in maps])
        with torch.no_grad():
            across = [pooled(m[-1]) for m in reversed(teacher_maps)]
            teacher_RK = self._logits(self.target_global_projector, self.target_prototypes, across)
            p_RK = teacher_distribution(teacher_RK, self.centre_2K[1], config.global_temperature)
        loss_R = cross_entropy(student_RK, p_RK, config.student_temperature)
        return loss_R.mean(), mean_logits(teacher_RK, torch.ones_like(loss_R, dtype=torch.bool)[:, None])

    def _logits(self, projector: nn.Module, prototypes: nn.Linear, features: list[Tensor]) -> Tensor:
        rows_RC = torch.cat([f.flatten(0, -2) for f in features])
        return prototype_logits(projector(rows_RC), prototypes.weight)

    def _token_temperature(self, ctx: StepContext) -> float:
        low, high = self.config.global_temperature, self.config.token_temperature
        rise = self.config.temperature_rise * ctx.max_steps
        return low + (high - low) * (min(ctx.step / rise, 1.0) if rise else 1.0)


def draw_hidden(
    mask_B1DHW: Tensor,
    view: View,
    level: Level,
    size_dhw: tuple[int, int, int],
    views: ViewBatch,
    positions: int,
    *,
    seed: int,
    purpose: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of a map whose centres are hidden and in the volume, drawn uniformly without replacement.

    Args:
        mask_B1DHW: Whether a voxel of the view is hidden.
        view: That the map is made of.
        level: Where the map's positions lie.
        size_dhw: Of the map.
        views: Gives samples and volumes.
        positions: How many are drawn, N; all of a smaller map.
        seed: With the samples and the purpose the only source of chance.
        purpose: Of the draw.

    Returns:
        index_BN over the flattened map, points_BN3, edge coordinates of the view, and valid_BN: false for those that
        make up the number where too few are hidden.
    """
    _, h, w = size_dhw
    hidden_BM = map_at(level, mask_B1DHW[:, 0], size_dhw).flatten(1)
    luck_BM = uniforms(seed, views.sample_B, purpose, hidden_BM.shape[1])
    index_BN = (luck_BM + hidden_BM).topk(min(positions, hidden_BM.shape[1]), dim=1).indices
    k_BN3 = torch.stack([index_BN // (h * w), index_BN // w % h, index_BN % w], dim=2)
    points_BN3 = k_BN3 * filled(level.stride_DHW, index_BN.device) + filled(level.offset_DHW, index_BN.device)
    place_BN3, shape_B13 = to_volume(view, points_BN3), views.shape_B3[:, None]
    shown_BN = ((place_BN3 >= 0) & (place_BN3 <= shape_B13)).all(dim=2)
    return index_BN, points_BN3, hidden_BM.gather(1, index_BN) & shown_BN


def mean_logits(logits_RK: Tensor, weight_SN: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over sets of each set's mean logits over its rows that count, (K,), and how many sets have such rows."""
    weight_SN = weight_SN.to(logits_RK.dtype)
    per_row = logits_RK.view(*weight_SN.shape, -1) * weight_SN[:, :, None]
    counts_S = weight_SN.sum(1)
    return (per_row.sum(1) / counts_S.clamp_min(1)[:, None]).sum(0), (counts_S > 0).to(logits_RK.dtype).sum()


def rows_at(map_BCdhw: Tensor, index_BN: Tensor) -> Tensor:
    """The features of these positions of the flattened map, (B, N, C)."""
    flat_BCM = map_BCdhw.flatten(2)
    return flat_BCM.gather(2, index_BN[:, None].expand(-1, flat_BCM.shape[1], -1)).transpose(1, 2)


def pooled(map_BCdhw: Tensor) -> Tensor:
    """Mean over the map, (B, C), at least float32: means of samples are alike but for what 16 bits would round."""
    return map_BCdhw.mean((2, 3, 4), dtype=torch.promote_types(map_BCdhw.dtype, torch.float32))


def size_of(map_BCdhw: Tensor) -> tuple[int, int, int]:
    """Positions of a map along each axis."""
    d, h, w = map_BCdhw.shape[2:]
    return int(d), int(h), int(w)
