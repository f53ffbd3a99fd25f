"""Our losses beside lightly's and MONAI's: time, memory, and error against a float64 reference, in one run.

Every implementation of a case gets the same numbers and is timed forward and backward, in turns, so that a machine
whose speed drifts slows all of them. The reference is written from the equation in float64, on the values as they are
after rounding to the inputs' type, so that the error is the implementation's own.
"""

import importlib
import importlib.util
import statistics
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from monai.losses.contrastive import ContrastiveLoss
from monai.losses.dice import DiceCELoss
from monai.losses.spatial_mask import MaskedLoss
from torch import Tensor, nn
from torch.nn import functional

from jobs.bench.device.facts import machine
from jobs.bench.device.rate import seconds
from jobs.bench.measure import spread
from jobs.bench.measure import table as markdown
from ssl_core.losses.alignment import local_alignment
from ssl_core.losses.contrast import multi_positive_nce
from ssl_core.losses.cosine import distance, siamese
from ssl_core.losses.info_nce import nt_xent, queue_nce
from ssl_core.losses.regions import pixel_contrast
from ssl_core.losses.restoration import restoration
from ssl_core.testing.memory import peak_of

Loss = Callable[..., Tensor]
OURS = "tomoscale"
INSTALL = "pip install --no-deps lightly"
COLUMNS = {
    "case": "loss",
    "inputs": "inputs",
    "peer": "whose",
    "ms": "ms, forward and backward",
    "times_ours": "time / ours",
    "peak_mib": "peak MiB",
    "value_error": "error of the value",
    "gradient_error": "error of the gradient",
    "note": "note",
}


@dataclass(frozen=True)
class Case:
    """One loss on inputs of one size and type.

    Attributes:
        name: The loss.
        inputs: What it is given, in words.
        make: Differentiable inputs, from a generator; float32 values.
        reference: The equation, in float64.
        ours: Our function, of the same inputs.
        peers: Others by name: a function that gives the loss, or `None` and the reason in `notes`.
        dtype: Type of the inputs.
        notes: Remarks by name.
    """

    name: str
    inputs: str
    make: Callable[[torch.Generator], list[Tensor]]
    reference: Loss
    ours: Loss
    peers: dict[str, Loss | None] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    notes: dict[str, str] = field(default_factory=dict)


def bench_losses(
    quick: bool = False, *, device: str = "cpu", rounds: int | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Every case; see `cases`.

    Returns:
        JSON-able: `machine` and `rows`: milliseconds as median, least and greatest, `times_ours` as the ratio of
        medians, peak MiB that the call allocates, relative error of the value, and the largest error of the gradient
        over its largest entry.
    """
    where = torch.device(device)
    repeats = rounds or (5 if quick else 15)
    rows = []
    for case in cases(quick):
        found = _rows(case, where, repeats)
        rows += found
        timed = ", ".join(f"{r['peer']} {r['ms']['median']:.3g} ms" for r in found if r["ms"] is not None)
        say(f"{case.name}, {case.inputs}: {timed}")
    return {"machine": machine([where]), "rounds": repeats, "rows": rows}


def format_losses(result: dict[str, Any]) -> str:
    """The rows as a table."""
    rows = [row | {k: None if row[k] is None else f"{row[k]:.0e}" for k in _ERRORS} for row in result["rows"]]
    return markdown(rows, COLUMNS)


def cases(quick: bool = False) -> list[Case]:
    """What is measured: sizes of small and large batches, and of the crops of a step."""
    found: list[Case] = []
    for batch in (16, 64) if quick else (16, 256, 512, 2048):
        found.append(_nt_xent(batch, 0.5))
    found += [_nt_xent(64, 0.05), _nt_xent(64, 0.5, torch.bfloat16)]
    found.append(_queue(16, 1024) if quick else _queue(256, 65536))
    found.append(_byol(64 if quick else 4096))
    found.append(_siamese(64 if quick else 4096))
    found.append(_positions(32 if quick else 512))
    found.append(_pixels(2 if quick else 8))
    found.append(_alignment(2, 64 if quick else 1024))
    found.append(_masked(2, 16 if quick else 64))
    found.append(_dice(2, 16 if quick else 64))
    return found


_ERRORS = ("value_error", "gradient_error")


def _rows(case: Case, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    given = [x.to(case.dtype) for x in case.make(torch.Generator().manual_seed(0))]
    wanted, wanted_grads = _run(case.reference, [x.double() for x in given])
    placed = [x.to(device) for x in given]
    everyone: dict[str, Loss | None] = {OURS: case.ours, **case.peers}
    runners = {name: loss for name, loss in everyone.items() if loss is not None}
    times: dict[str, list[float]] = {name: [] for name in runners}
    found: dict[str, dict[str, Any]] = {}
    for name, loss in runners.items():
        value, grads = _run(loss, placed)
        held = peak_of(partial(_run, loss, placed), device)
        found[name] = {
            "peak_mib": held / 2**20,
            "value_error": abs(value - wanted) / max(abs(wanted), 1e-300),
            "gradient_error": max(
                float((a.cpu().double() - b).abs().max() / b.abs().max())
                for a, b in zip(grads, wanted_grads, strict=True)
            ),
        }
    for _ in range(repeats):
        for name, loss in runners.items():
            times[name].append(1e3 * seconds(partial(_run, loss, placed), device))
    ours = statistics.median(times[OURS])
    rows = []
    for name in everyone:
        measured = name in times
        rows.append(
            {"case": case.name, "inputs": case.inputs, "peer": name}
            | {
                "ms": spread(times[name]) if measured else None,
                "times_ours": statistics.median(times[name]) / ours if measured else None,
                "note": case.notes.get(name, ""),
            }
            | found.get(name, {"peak_mib": None, "value_error": None, "gradient_error": None})
        )
    return rows


def _run(loss: Loss, inputs: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """The value and the gradients of the inputs that have one."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return float(value.detach()), [g for g in grads if g is not None]


def lightly_loss(module: str, name: str) -> Any:
    """A loss class of lightly.

    Its packages import torchvision, which these losses do not use: where it is absent, empty modules stand in for it
    while they are imported.

    Raises:
        ImportError: lightly is not installed.
    """
    if importlib.util.find_spec("lightly") is None:
        raise ImportError("lightly is not installed")
    missing = ("torchvision", "torchvision.ops", "torchvision.transforms")
    stand_in = importlib.util.find_spec("torchvision") is None
    if stand_in:
        sys.modules.update({name: _Empty(name) for name in missing})
    try:
        return getattr(importlib.import_module(f"lightly.loss.{module}"), name)
    finally:
        for absent in missing if stand_in else ():
            del sys.modules[absent]


class _Empty(types.ModuleType):
    """A module in which every public name is a class of nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return type(name, (), {})


def _lightly(case: Case, make: Callable[[], Loss]) -> Case:
    """The case with lightly's loss, or with the reason why there is none."""
    try:
        case.peers["lightly"] = make()
    except ImportError as error:
        case.peers["lightly"] = None
        case.notes["lightly"] = f"not measured: {error}; {INSTALL}"
    return case


def _pair(batch: int, width: int = 128) -> Callable[[torch.Generator], list[Tensor]]:
    def make(g: torch.Generator) -> list[Tensor]:
        a = torch.randn(batch, width, generator=g)
        return [a, a + torch.randn(batch, width, generator=g)]

    return make


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T


def _nt_xent(batch: int, temperature: float, dtype: torch.dtype = torch.float32) -> Case:
    index = torch.arange(2 * batch)

    def reference(a: Tensor, b: Tensor) -> Tensor:
        z = torch.cat([a, b])
        s = _cosines(z, z) / temperature
        s = s.masked_fill(torch.eye(2 * batch, dtype=torch.bool), -torch.inf)
        return -s.log_softmax(1)[index, index.roll(batch)].mean()

    def ours(a: Tensor, b: Tensor) -> Tensor:
        z, here = torch.cat([a, b]), index.to(a.device)
        return nt_xent(z, z, here.roll(batch), here, temperature)

    words = f"2 x {batch} x 128, t {temperature}{', bf16' if dtype == torch.bfloat16 else ''}"
    case = Case("NT-Xent (SimCLR)", words, _pair(batch), reference, ours, dtype=dtype)
    # It compares all pairs of vectors by broadcasting: (2B)^2 E numbers, several times.
    pairs_gib = 4 * (2 * batch) ** 2 * 128 * 4 / 2**30
    case.peers["MONAI"] = ContrastiveLoss(temperature) if pairs_gib < 4 else None
    if case.peers["MONAI"] is None:
        case.notes["MONAI"] = f"not measured: compares pairs by broadcasting, about {pairs_gib:.0f} GiB"
    return _lightly(case, lambda: lightly_loss("ntx_ent_loss", "NTXentLoss")(temperature))


def _queue(batch: int, length: int) -> Case:
    t = 0.2
    negatives = functional.normalize(torch.randn(length, 128, generator=torch.Generator().manual_seed(1)), dim=1)

    def reference(q: Tensor, k: Tensor) -> Tensor:
        positive = _cosines(q, k.detach()).diagonal()[:, None]
        return -torch.cat([positive, _cosines(q, negatives.double())], dim=1).div(t).log_softmax(1)[:, 0].mean()

    def ours(q: Tensor, k: Tensor) -> Tensor:
        return queue_nce(q, k.detach(), negatives.to(q.device), t)

    def lightly() -> Loss:
        loss = lightly_loss("ntx_ent_loss", "NTXentLoss")(t, memory_bank_size=(length, 128))
        loss.memory_bank.bank = negatives.clone()

        def call(q: Tensor, k: Tensor) -> Tensor:
            # It takes the new keys in with the same call; back to the same negatives.
            loss.memory_bank.bank = loss.memory_bank.bank.to(q.device)
            loss.memory_bank.bank[:batch] = negatives[:batch]
            loss.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
            value: Tensor = loss(q, k.detach())
            return value

        return call

    notes = {"lightly": "with taking the new keys in"}
    case = Case("queue (MoCo)", f"{batch} x 128, queue {length}, t {t}", _pair(batch), reference, ours, notes=notes)
    return _lightly(case, lightly)


def _byol(batch: int) -> Case:
    def reference(a: Tensor, b: Tensor) -> Tensor:
        return (2 - 2 * _pairwise(a, b.detach())).mean()

    def ours(a: Tensor, b: Tensor) -> Tensor:
        return distance(a, b.detach()).mean()

    def lightly() -> Loss:
        loss = lightly_loss("negative_cosine_similarity", "NegativeCosineSimilarity")()
        return lambda a, b: 2 + 2 * loss(a, b.detach())

    case = Case("2 - 2 cos (BYOL)", f"{batch} x 256", _pair(batch, 256), reference, ours)
    return _lightly(case, lightly)


def _siamese(batch: int) -> Case:
    def make(g: torch.Generator) -> list[Tensor]:
        return [*_pair(batch, 256)(g), *_pair(batch, 256)(g)]

    def reference(pre_a: Tensor, pro_a: Tensor, pre_b: Tensor, pro_b: Tensor) -> Tensor:
        return -(_pairwise(pre_a, pro_b.detach()) + _pairwise(pre_b, pro_a.detach())).mean() / 2

    def lightly() -> Loss:
        loss = lightly_loss("negative_cosine_similarity", "NegativeCosineSimilarity")()
        return lambda pre_a, pro_a, pre_b, pro_b: (loss(pre_a, pro_b.detach()) + loss(pre_b, pro_a.detach())) / 2

    case = Case("siamese (PCRLv2, SimSiam)", f"4 x {batch} x 256", make, reference, siamese)
    return _lightly(case, lightly)


def _pairwise(a: Tensor, b: Tensor) -> Tensor:
    return (a / a.norm(dim=1, keepdim=True) * (b / b.norm(dim=1, keepdim=True))).sum(1)


def _positions(batch: int) -> Case:
    t = 0.1
    where = torch.arange(2 * batch) % batch
    near = (where[:, None] - where[None]).abs() <= max(1, batch // 16)
    other = ~torch.eye(2 * batch, dtype=torch.bool)

    def reference(a: Tensor, b: Tensor) -> Tensor:
        z = torch.cat([a, b])
        logs = (_cosines(z, z) / t).masked_fill(~other, -torch.inf).log_softmax(1)
        chosen = near & other
        return -(torch.where(chosen, logs, 0).sum(1) / chosen.sum(1)).mean()

    def ours(a: Tensor, b: Tensor) -> Tensor:
        z = torch.cat([a, b])
        return multi_positive_nce(z, z, near.to(z.device), other.to(z.device), t)

    return Case("positives by position (PCL)", f"2 x {batch} x 128, t {t}", _pair(batch), reference, ours)


def _pixels(images: int) -> Case:
    t, regions, pixels = 0.1, 16, 16
    region = torch.arange(regions).repeat_interleave(pixels)

    def make(g: torch.Generator) -> list[Tensor]:
        return [torch.randn(images, regions * pixels, 128, generator=g)]

    def reference(z: Tensor) -> Tensor:
        same = (region[:, None] == region[None]) & ~torch.eye(len(region), dtype=torch.bool)
        total = z.new_zeros(())
        for one in z:
            logs = _cosines(one, one) / t
            logs = logs.masked_fill(torch.eye(len(region), dtype=torch.bool), -torch.inf).log_softmax(1)
            total = total - (torch.where(same, logs, 0).sum(1) / same.sum(1)).mean()
        return total / images

    def ours(z: Tensor) -> Tensor:
        ids = region.to(z.device).expand(images, -1)
        return pixel_contrast(z, ids, torch.ones_like(ids, dtype=torch.bool), t)

    return Case(
        "pixels of regions (LRC, form A)", f"{images} x {regions} x {pixels} x 128, t {t}", make, reference, ours
    )


def _alignment(batch: int, positions: int) -> Case:
    def make(g: torch.Generator) -> list[Tensor]:
        return [torch.randn(batch, 64, positions, generator=g) for _ in range(2)]

    def reference(a: Tensor, b: Tensor) -> Tensor:
        gaps = [(1 - _cosines(one.T, two.T).amax(1)).abs().mean() for one, two in zip(a, b, strict=True)]
        return torch.stack(gaps).mean()

    def ours(a: Tensor, b: Tensor) -> Tensor:
        return local_alignment(a, b).mean()

    return Case("local alignment (SSAL)", f"2 x {batch} x 64 x {positions}", make, reference, ours)


def _masked(batch: int, side: int) -> Case:
    # The same share in every sample, so that MONAI's mean over all voxels is ours but for a factor.
    hidden = torch.zeros(batch, 1, side**3)
    hidden[..., ::4] = 1
    mask = hidden.reshape(batch, 1, side, side, side)
    share = float(mask.mean())

    def make(g: torch.Generator) -> list[Tensor]:
        return [torch.randn(batch, 1, side, side, side, generator=g) for _ in range(2)]

    def reference(x: Tensor, y: Tensor) -> Tensor:
        return (x - y.detach())[mask.bool()].square().mean()

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return restoration(x, y.detach(), mask.to(x.device))

    masked = MaskedLoss(nn.MSELoss())
    peers: dict[str, Loss | None] = {"MONAI": lambda x, y: masked(x, y.detach(), mask.to(x.device)) / share}
    return Case("hidden voxels (MAE)", f"{batch} x {side}^3, a quarter hidden", make, reference, ours, peers)


def _dice(batch: int, side: int) -> Case:
    label = torch.arange(batch * side**3).reshape(batch, 1, side, side, side) // side % 3
    monai = DiceCELoss(include_background=False, softmax=True, to_onehot_y=True, batch=True)

    def make(g: torch.Generator) -> list[Tensor]:
        return [torch.randn(batch, 3, side, side, side, generator=g)]

    def reference(x: Tensor) -> Tensor:
        logs, truth = x.log_softmax(1), functional.one_hot(label[:, 0], 3).movedim(-1, 1).double()
        p = logs.exp()
        axes = (0, 2, 3, 4)
        both, total = (p * truth).sum(axes), p.sum(axes) + truth.sum(axes)
        overlap = 1 - (2 * both + monai.dice.smooth_nr) / (total + monai.dice.smooth_dr)
        return overlap[1:].mean() - (logs * truth).sum(1).mean()

    notes = {OURS: "MONAI's own, used as it is for fine-tuning"}
    return Case(
        "Dice and cross entropy",
        f"{batch} x 3 x {side}^3",
        make,
        reference,
        lambda x: monai(x, label.to(x.device)),
        notes=notes,
    )
