"""The cases of `bench losses`: a loss, inputs of one size, its equation in float64, and who else has it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from monai.losses.contrastive import ContrastiveLoss
from monai.losses.dice import DiceCELoss
from monai.losses.spatial_mask import MaskedLoss
from torch import Tensor, nn
from torch.nn import functional

from jobs.bench.device.lightly import INSTALL, lightly_loss
from ssl_core.losses.alignment import local_alignment
from ssl_core.losses.contrast import multi_positive_nce
from ssl_core.losses.cosine import distance, siamese
from ssl_core.losses.info_nce import nt_xent, queue_nce
from ssl_core.losses.regions import pixel_contrast
from ssl_core.losses.restoration import restoration

Loss = Callable[..., Tensor]
OURS = "tomoscale"


@dataclass(frozen=True)
class Case:
    """One loss on inputs of one size and type.

    Attributes:
        name: The loss.
        inputs: What it is given, in words.
        make: Differentiable inputs, from a generator; float32 values.
        reference: The equation, in float64.
        loss: Our function, of the same inputs.
        peers: Others by name: a function that gives the loss, or `None` and the reason in `notes`.
        dtype: Type of the inputs.
        notes: Remarks by name.
    """

    name: str
    inputs: str
    make: Callable[[torch.Generator], list[Tensor]]
    reference: Loss
    loss: Loss
    peers: dict[str, Loss | None] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    notes: dict[str, str] = field(default_factory=dict)


def cases(quick: bool = False) -> list[Case]:
    """What is measured: sizes of small and large batches, and of the crops of a step."""
    sizes = (16, 64) if quick else (16, 256, 512, 2048)
    return [
        *(_nt_xent(batch, 0.5) for batch in sizes),
        _nt_xent(64, 0.05),
        _nt_xent(64, 0.5, torch.bfloat16),
        _queue(16, 1024) if quick else _queue(256, 65536),
        _byol(64 if quick else 4096),
        _siamese(64 if quick else 4096),
        _positions(32 if quick else 512),
        _pixels(2 if quick else 8),
        _alignment(2, 64 if quick else 1024),
        _masked(2, 16 if quick else 64),
        _dice(2, 16 if quick else 64),
    ]


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
    cosines: Tensor = (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T
    return cosines


def _nt_xent(batch: int, temperature: float, dtype: torch.dtype = torch.float32) -> Case:
    index = torch.arange(2 * batch)

    def reference(a: Tensor, b: Tensor) -> Tensor:
        z = torch.cat([a, b])
        s = _cosines(z, z) / temperature
        s = s.masked_fill(torch.eye(2 * batch, dtype=torch.bool), -torch.inf)
        return -s.log_softmax(1)[index, index.roll(batch)].mean()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        z, row = torch.cat([a, b]), index.to(a.device)
        return nt_xent(z, z, row.roll(batch), row, temperature)

    words = f"2 x {batch} x 128, t {temperature}{', bf16' if dtype == torch.bfloat16 else ''}"
    case = Case("NT-Xent (SimCLR)", words, _pair(batch), reference, loss, dtype=dtype)
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

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return queue_nce(q, k.detach(), negatives.to(q.device), t)

    def lightly() -> Loss:
        peer = lightly_loss("ntx_ent_loss", "NTXentLoss")(t, memory_bank_size=(length, 128))
        peer.memory_bank.bank = negatives.clone()

        def call(q: Tensor, k: Tensor) -> Tensor:
            # It takes the new keys in with the same call; back to the same negatives.
            peer.memory_bank.bank = peer.memory_bank.bank.to(q.device)
            peer.memory_bank.bank[:batch] = negatives[:batch]
            peer.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
            value: Tensor = peer(q, k.detach())
            return value

        return call

    notes = {"lightly": "with taking the new keys in"}
    case = Case("queue (MoCo)", f"{batch} x 128, queue {length}, t {t}", _pair(batch), reference, loss, notes=notes)
    return _lightly(case, lightly)


def _byol(batch: int) -> Case:
    def reference(a: Tensor, b: Tensor) -> Tensor:
        return (2 - 2 * _pairwise(a, b.detach())).mean()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return distance(a, b.detach()).mean()

    def lightly() -> Loss:
        peer = lightly_loss("negative_cosine_similarity", "NegativeCosineSimilarity")()
        return lambda a, b: 2 + 2 * peer(a, b.detach())

    case = Case("2 - 2 cos (BYOL)", f"{batch} x 256", _pair(batch, 256), reference, loss)
    return _lightly(case, lightly)


def _siamese(batch: int) -> Case:
    def make(g: torch.Generator) -> list[Tensor]:
        return [*_pair(batch, 256)(g), *_pair(batch, 256)(g)]

    def reference(pre_a: Tensor, pro_a: Tensor, pre_b: Tensor, pro_b: Tensor) -> Tensor:
        return -(_pairwise(pre_a, pro_b.detach()) + _pairwise(pre_b, pro_a.detach())).mean() / 2

    def lightly() -> Loss:
        peer = lightly_loss("negative_cosine_similarity", "NegativeCosineSimilarity")()
        return lambda pre_a, pro_a, pre_b, pro_b: (peer(pre_a, pro_b.detach()) + peer(pre_b, pro_a.detach())) / 2

    case = Case("siamese (PCRLv2, SimSiam)", f"4 x {batch} x 256", make, reference, siamese)
    return _lightly(case, lightly)


def _pairwise(a: Tensor, b: Tensor) -> Tensor:
    cosines: Tensor = (a / a.norm(dim=1, keepdim=True) * (b / b.norm(dim=1, keepdim=True))).sum(1)
    return cosines


def _positions(batch: int) -> Case:
    t = 0.1
    where = torch.arange(2 * batch) % batch
    near = (where[:, None] - where[None]).abs() <= max(1, batch // 16)
    other = ~torch.eye(2 * batch, dtype=torch.bool)

    def reference(a: Tensor, b: Tensor) -> Tensor:
        z = torch.cat([a, b])
        logs = (_cosines(z, z) / t).masked_fill(~other, -torch.inf).log_softmax(1)
        positive = near & other
        return -(torch.where(positive, logs, 0).sum(1) / positive.sum(1)).mean()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        z = torch.cat([a, b])
        return multi_positive_nce(z, z, near.to(z.device), other.to(z.device), t)

    return Case("positives by position (PCL)", f"2 x {batch} x 128, t {t}", _pair(batch), reference, loss)


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

    def loss(z: Tensor) -> Tensor:
        ids = region.to(z.device).expand(images, -1)
        return pixel_contrast(z, ids, torch.ones_like(ids, dtype=torch.bool), t)

    return Case(
        "pixels of regions (LRC, form A)", f"{images} x {regions} x {pixels} x 128, t {t}", make, reference, loss
    )


def _alignment(batch: int, positions: int) -> Case:
    def make(g: torch.Generator) -> list[Tensor]:
        return [torch.randn(batch, 64, positions, generator=g) for _ in range(2)]

    def reference(a: Tensor, b: Tensor) -> Tensor:
        gaps = [(1 - _cosines(one.T, two.T).amax(1)).abs().mean() for one, two in zip(a, b, strict=True)]
        return torch.stack(gaps).mean()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return local_alignment(a, b).mean()

    return Case("local alignment (SSAL)", f"2 x {batch} x 64 x {positions}", make, reference, loss)


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

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return restoration(x, y.detach(), mask.to(x.device))

    masked = MaskedLoss(nn.MSELoss())
    peers: dict[str, Loss | None] = {"MONAI": lambda x, y: masked(x, y.detach(), mask.to(x.device)) / share}
    return Case("hidden voxels (MAE)", f"{batch} x {side}^3, a quarter hidden", make, reference, loss, peers)


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
