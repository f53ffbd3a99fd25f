"""One captured step run alone: its loss, and where the first value that is not finite appears."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.configs import PretrainConfig
from jobs.pinning import SETTINGS
from jobs.pretrain.evidence import batch_from
from jobs.pretrain.inputs import view_spec
from jobs.pretrain.loop import build_engine
from ssl_core.config import parse
from ssl_core.methods.base import LossTerms
from ssl_core.train import checkpoint
from ssl_core.train.engine import NonFiniteError
from ssl_core.train.gradients import Outcome
from ssl_core.views.make import make_views
from ssl_core.views.types import ViewBatch
from storage.errors import ConfigError

_CPU = torch.device("cpu")
_STATISTICS = ("running_mean", "running_var")
"""Of batch norms: those of a capture are from after its forward pass, which has spoiled them and does not read them."""


@dataclass(frozen=True)
class Replay:
    """A captured step, run again.

    Attributes:
        step: Counted from 1.
        reason: Why it was captured: `not finite` or `spike`.
        loss: Of this run of it.
        captured_loss: As it was in training.
        threshold: What a spike was judged by.
        terms: The loss terms by name; the last micro-batch's.
        where: Where the first value that is not finite appears; None where all are finite.
        samples: Global indices of the batch.
        notes: What is other than it was in training.
    """

    step: int
    reason: str
    loss: float
    captured_loss: float
    threshold: float | None
    terms: Mapping[str, float]
    where: str | None
    samples: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Whether the loss has the bits that it had."""
        return self.loss == self.captured_loss or (math.isnan(self.loss) and math.isnan(self.captured_loss))


def run_alone(folder: Path) -> Replay:
    """Run the step of a capture on this machine's CPU.

    Args:
        folder: The capture's directory.

    Raises:
        ConfigError: a checkpoint that is no capture.
        TomoscaleError: see `ssl_core.train.checkpoint.load`.
    """
    state, meta = checkpoint.load(folder)
    if "batch" not in state:
        raise ConfigError(str(folder), expected="a capture of a step", found="a checkpoint without a batch")
    job = parse(PretrainConfig, meta[SETTINGS])
    settings = {"precision": meta["precision"], "compile": False, "log_every": 1}
    job = job.model_copy(update={"engine": job.engine.model_copy(update=settings)})
    engine = build_engine(job, _CPU)
    engine.load_state_dict(state, allow_change=True)
    batch = batch_from(state["batch"])
    views = make_views(
        batch, view_spec(job), seed=job.engine.seed, policy=job.intensity, device=_CPU, dtype=engine.dtype
    )
    weights = {name: tensor for name, tensor in state["method"].items() if not name.endswith(_STATISTICS)}
    places = [f"weights: {name}" for name, tensor in weights.items() if not _is_finite(tensor)]
    for role, images in _images(views):
        places += [f"views: {role}"] if not _is_finite(images) else []
    outcomes: list[Outcome] = []
    engine.watch = lambda outcome, _is_own: outcomes.append(outcome)
    watch = _Watch(engine.method)
    before = torch.get_num_threads()
    torch.set_num_threads(int(meta["threads"]))
    try:
        engine.step(views)
    except NonFiniteError:
        places += watch.places
        # The backward pass goes through the modules in the other order.
        bad = [n for n, p in engine.method.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
        places += [f"backward pass: gradient of {name}" for name in reversed(bad)]
    finally:
        torch.set_num_threads(before)
        watch.close()
    return Replay(
        step=int(meta["step"]),
        reason=str(meta["reason"]),
        loss=outcomes[0].loss,
        captured_loss=float(meta["loss"]),
        threshold=meta["threshold"],
        terms=watch.terms,
        where=places[0] if places else None,
        samples=tuple(batch.sample_B.tolist()),
        notes=tuple(_notes(meta)),
    )


class _Watch:
    """Hooks on all modules: where the first output that is not finite comes from, and the loss terms."""

    def __init__(self, method: nn.Module) -> None:
        self.places: list[str] = []
        self.terms: dict[str, float] = {}
        names = {module: name for name, module in method.named_modules()}
        self._handles = [module.register_forward_hook(self._hook(names[module])) for module in names]

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def after(module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, LossTerms):
                self.terms = {term: float(value.detach()) for term, value in output.terms.items()}
                self.places += [f"loss term {term}" for term, value in self.terms.items() if not math.isfinite(value)]
            elif not all(_is_finite(tensor) for tensor in _tensors(output)):
                self.places.append(f"forward pass: output of {name} ({type(module).__name__})")

        return after


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _images(views: ViewBatch) -> list[tuple[str, Tensor]]:
    return [(role, view.image_BCDHW) for role, several in views.roles.items() for view in several]


def _notes(meta: Mapping[str, Any]) -> list[str]:
    notes = []
    if meta["world"] > 1:
        notes.append(
            f"rank {meta['rank']} of {meta['world']} alone: without contrasts, norms and gradients of other ranks"
        )
    if meta["device"] != "cpu":
        notes.append(f"trained on {meta['device']}, where the state is captured after the step, and has other bits")
    if meta[SETTINGS]["engine"]["compile"]:
        notes.append("run without torch.compile")
    return notes
