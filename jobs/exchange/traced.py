"""TorchScript: the network traced on one window and frozen, so that what no output needs is left out."""

import json
import warnings
from pathlib import Path

import torch
from torch.jit._trace import TracerWarning

from jobs.exchange.model import Model

FILE = "model.ts"


def write(model: Model, folder: Path) -> list[str]:
    """`model.ts`, which holds `card.json` as an extra file too, `card.json` and `MODEL_CARD.md`."""
    with torch.no_grad(), warnings.catch_warnings():
        # Checks of sizes are traced as constants; `check` runs what was written on another batch.
        warnings.simplefilter("ignore", TracerWarning)
        traced = torch.jit.freeze(torch.jit.trace(model.outputs, model.window(), check_trace=False))
    card = json.dumps(model.card("torchscript", file=FILE), ensure_ascii=False)
    torch.jit.save(traced, folder / FILE, _extra_files={"card.json": card.encode()})
    model.write_card(folder, "torchscript", file=FILE)
    model.check("torchscript", torch.jit.load(folder / FILE), batch=2)
    d, h, w = model.predictor.plan.patch_DHW
    return [f"{FILE}: (B, {model.predictor.plan.channels}, {d}, {h}, {w}) float32 to {', '.join(model.names)}"]
