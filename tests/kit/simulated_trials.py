"""A trial without a network: learning curves that follow from the settings, as a fine-tuning would report them."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.configs import LabelledConfig
from ssl_core.downstream.finetune import FinetuneConfig

PAUSE = "SIMULATED_EPOCH_S"
"""Environment variable: seconds of an epoch."""
NOTES = "SIMULATED_NOTES"
"""Environment variable: a folder in which each epoch that is trained leaves a file."""


def curve(lr: float, batch: int, epoch: int, noise: float = 0.0) -> float:
    """Dice after an epoch: best near lr 1e-3 and batch 6, and rising faster for larger rates."""
    peak = 0.9 - 0.12 * abs(math.log10(lr) + 3) - 0.004 * abs(batch - 6)
    return peak * (1 - math.exp(-epoch * (0.5 + 0.1 * math.log10(lr / 1e-5)))) + noise * math.sin(97 * lr * epoch)


def train(
    start: str,
    labelled: LabelledConfig,
    settings: FinetuneConfig,
    *,
    seed: int,
    like: str,
    on_epoch: Callable[[int, dict[str, float]], None],
    gpu: bool = False,
    checkpoints: Any = None,
) -> Any:
    """Stands for `jobs.finetune.train_from`; rates above 0.09 come to no number, rates below 2e-6 to an error."""
    if settings.lr < 2e-6:
        raise ArithmeticError("the rate is too small to train with")
    for epoch in range(1, settings.epochs + 1):
        time.sleep(float(os.environ.get(PAUSE, "0")))
        if notes := os.environ.get(NOTES):
            Path(notes, f"{settings.lr!r}-{epoch}-{time.monotonic_ns()}").touch()
        dice = math.nan if settings.lr > 0.09 else curve(settings.lr, settings.batch, epoch)
        on_epoch(epoch, {"loss": 1 - dice, "inner_dice": dice})
