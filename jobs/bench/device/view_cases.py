"""The cases of `bench views`: an operation on a batch of crops, ours, MONAI's and kornia's with the same parameters."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from monai.transforms.compose import Compose
from monai.transforms.croppad.array import SpatialCrop
from monai.transforms.intensity import array as monai_intensity
from monai.transforms.spatial import array as monai_spatial
from torch import Tensor

from jobs.bench.device.step import POLICY, crops
from ssl_core.views.augment import elastic, intensity, spatial
from ssl_core.views.augment import paint as regions
from ssl_core.views.augment.draws import generators, uniforms
from ssl_core.views.make import make_views
from ssl_core.views.types import RoleSpec, ViewSpec

Operation = Callable[[Tensor], Tensor]
OURS = "tomoscale"


@dataclass(frozen=True)
class Case:
    """One operation on a batch of crops (N, 1, D, H, W) with values in about [0, 1].

    Attributes:
        name: The operation.
        operation: What views use.
        peers: Others by name; `None` where the library is absent, the reason in `notes`.
        border: Voxels at each face that are left out of the comparison, where kernels are cut differently.
        same: Whether results are comparable.
        choice: What the project uses, and why.
        notes: Remarks by name.
    """

    name: str
    operation: Operation
    peers: dict[str, Operation | None]
    choice: str
    border: int = 0
    same: bool = True
    notes: dict[str, str] = field(default_factory=dict)


def cases(batch: int, side: int, device: torch.device) -> list[Case]:
    """All operations on `batch` crops, `side` voxels for a view."""
    kornia = _kornia()
    return [
        _crop(batch, side, device),
        _flip(batch, side, device, kornia),
        _resize(batch, side, device),
        _affine(batch, side, device, kornia),
        _elastic(batch, side, device),
        _noise(batch, device),
        _blur(batch, kornia),
        _brightness(batch),
        _contrast(batch),
        _gamma(batch),
        _paint(batch, device),
        _shuffle(batch, side, device),
        _whole(batch, side, device),
    ]


def _resample(batch: int, side: int, device: torch.device, linear_B33: np.ndarray, shift_B3: np.ndarray) -> Operation:
    """Our resampling: view centre to the crop's centre plus a shift, by a linear map; all in voxels."""
    size = (side, side, side)
    turned = bool((linear_B33 * (1 - np.eye(3))).any())

    def run(x: Tensor) -> Tensor:
        middle = np.array(x.shape[2:]) / 2 + shift_B3
        offset_B3 = middle - linear_B33 @ np.full(3, side / 2)
        affine, start = np.concatenate([linear_B33, offset_B3[..., None]], axis=2)[None], np.zeros((batch, 3), np.int64)
        position = spatial.positions(affine, start, size, device)
        return spatial.image(x, affine, start, position, size, turned=turned)[0]

    return run


def _each(make: Callable[[int], Callable[[Tensor], Any]], count: int) -> Operation:
    """A transform for every sample, made once, applied one after another."""
    transforms = [make(i) for i in range(count)]
    return lambda x: torch.stack([torch.as_tensor(transforms[i](x[i])) for i in range(count)])


def _draw(batch: int, purpose: str, count: int) -> np.ndarray:
    return uniforms(0, np.arange(batch), (purpose,), count)


def _crop(batch: int, side: int, device: torch.device) -> Case:
    shift = np.floor((_draw(batch, "crop", 3) - 0.5) * side / 2)
    low = (np.array([side + side // 2] * 3) - side) // 2 + shift

    def cut(i: int) -> Callable[[Tensor], Any]:
        return SpatialCrop(roi_start=low[i].astype(int).tolist(), roi_end=(low[i] + side).astype(int).tolist())

    operation = _resample(batch, side, device, np.tile(np.eye(3), (batch, 1, 1)), shift)
    why = "ours: the same slices, placed by the view's geometry, from which masks and losses know where they are"
    return Case("crop", operation, {"MONAI": _each(cut, batch)}, why)


def _flip(batch: int, side: int, device: torch.device, kornia: ModuleType | None) -> Case:
    middle = slice(side // 4, side // 4 + side)

    def flip(i: int) -> Callable[[Tensor], Any]:
        turn = monai_spatial.Flip((0, 1, 2))
        return lambda x: turn(x[:, middle, middle, middle])

    operation = _resample(batch, side, device, np.tile(-np.eye(3), (batch, 1, 1)), np.zeros((batch, 3)))
    case = Case(
        "crop and flip",
        operation,
        {"MONAI": _each(flip, batch)},
        "ours: slices and torch's flip",
    )
    if kornia is None:
        return _absent(case)
    augment = kornia.augmentation
    kinds = (augment.RandomDepthicalFlip3D, augment.RandomVerticalFlip3D, augment.RandomHorizontalFlip3D)
    turns = torch.nn.Sequential(*(kind(p=1.0) for kind in kinds))
    case.peers["kornia"] = lambda x: turns(x[:, :, middle, middle, middle])
    return case


def _resize(batch: int, side: int, device: torch.device) -> Case:
    resize = monai_spatial.Resize((side,) * 3, mode="trilinear", align_corners=False)
    operation = _resample(batch, side, device, np.tile(1.5 * np.eye(3), (batch, 1, 1)), np.zeros((batch, 3)))
    why = "ours: every sample has its own box, between voxels, which torch's interpolation does not take"
    together = torch.nn.functional.interpolate
    peers: dict[str, Operation | None] = {
        "MONAI": _each(lambda i: resize, batch),
        "torch": lambda x: together(x, size=(side,) * 3, mode="trilinear", align_corners=False),
    }
    return Case("resize", operation, peers, why, notes={"torch": "one size for the whole batch"})


def _affine(batch: int, side: int, device: torch.device, kornia: ModuleType | None) -> Case:
    u = _draw(batch, "affine", 10)
    angle = np.deg2rad(30 * (2 * u[:, 0] - 1))
    rotate = np.tile(np.eye(3), (batch, 1, 1))
    rotate[:, 1, 1] = rotate[:, 2, 2] = np.cos(angle)
    rotate[:, 1, 2], rotate[:, 2, 1] = -np.sin(angle), np.sin(angle)
    scale = (0.8 + 0.4 * u[:, 1:4]) * np.where(u[:, 4:7] < 0.5, -1, 1)
    linear, shift = rotate * scale[:, None, :], (u[:, 7:10] - 0.5) * side / 8

    def move(i: int) -> Callable[[Tensor], Any]:
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = linear[i], shift[i]
        return monai_spatial.Affine(
            affine=matrix, spatial_size=(side,) * 3, mode="bilinear", padding_mode="border", image_only=True
        )

    case = Case(
        "crop, flip, rotate, scale and resize",
        _resample(batch, side, device, linear, shift),
        {"MONAI": _each(move, batch)},
        "ours: one gather for the batch, and the geometry comes from the same numbers",
    )
    if kornia is None:
        return _absent(case)

    def warp(x: Tensor) -> Tensor:
        # Its matrices are in voxel indices, ordered (W, H, D), from the source to the result.
        offset = (np.array(x.shape[2:]) - 1) / 2 + shift - linear @ np.full(3, (side - 1) / 2)
        whole = np.tile(np.eye(4), (batch, 1, 1))
        whole[:, :3, :3], whole[:, :3, 3] = linear[:, ::-1, ::-1], offset[:, ::-1]
        matrix = torch.from_numpy(np.linalg.inv(whole)[:, :3]).to(x)
        warped: Tensor = kornia.geometry.transform.warp_affine3d(x, matrix, (side,) * 3, padding_mode="border")
        return warped

    case.peers["kornia"] = warp
    return case


def _elastic(batch: int, side: int, device: torch.device) -> Case:
    size, most = (side, side, side), 2.0

    def operation(x: Tensor) -> Tensor:
        control = elastic.draw(most, size, seed=0, sample_B=np.arange(batch), purpose=("bench",))
        moved = elastic.dense(torch.from_numpy(control).to(device), size, elastic.spacing_vox(most))
        offset = np.tile((np.array(x.shape[2:]) - side) / 2, (batch, 1))
        affine = np.concatenate([np.tile(np.eye(3), (batch, 1, 1)), offset[..., None]], axis=2)[None]
        position = spatial.positions(affine, np.zeros((batch, 3), np.int64), size, device)
        position = spatial.deform(position, torch.from_numpy(affine).to(device), moved[None])
        return spatial.linear(x, position, size)[0]

    def deform(i: int) -> Callable[[Tensor], Any]:
        transform = monai_spatial.Rand3DElastic((8, 8), (100, 100), prob=1.0, spatial_size=size, padding_mode="border")
        transform.set_random_state(i)
        return transform

    why = "ours: its displacement is known at every point and can be inverted, which aligned losses need"
    return Case("crop and deform elastically", operation, {"MONAI": _each(deform, batch)}, why, same=False)


def _noise(batch: int, device: torch.device) -> Case:
    std = 0.05 + 0.1 * _draw(batch, "noise", 1)[:, 0]

    def operation(x: Tensor) -> Tensor:
        return intensity.add_noise(x, std, generators(0, np.arange(batch), ("bench",), device))

    def add(i: int) -> Callable[[Tensor], Any]:
        transform = monai_intensity.RandGaussianNoise(prob=1.0, std=float(std[i]), sample_std=False)
        transform.set_random_state(i)
        return transform

    why = "ours: drawn on the device, by a generator of each sample"
    return Case("Gaussian noise", operation, {"MONAI": _each(add, batch)}, why, same=False)


def _blur(batch: int, kornia: ModuleType | None) -> Case:
    sigma = 0.5 + _draw(batch, "blur", 1)[:, 0]

    def smooth(i: int) -> Callable[[Tensor], Any]:
        return monai_intensity.GaussianSmooth(float(sigma[i]), approx="sampled")

    case = Case(
        "Gaussian blur",
        lambda x: intensity.blur(x, sigma),
        {"MONAI": _each(smooth, batch)},
        "ours: a kernel for each sample without a loop",
        border=8,
    )
    if kornia is None:
        return _absent(case)
    width = 2 * int(np.ceil(4 * sigma.max())) + 1
    kernels = [kornia.filters.get_gaussian_kernel3d((width,) * 3, (float(s),) * 3)[0] for s in sigma]
    stacked = torch.stack(kernels)

    def dense(x: Tensor) -> Tensor:
        out: Tensor = kornia.filters.filter3d(x, stacked.to(x))
        return out

    case.peers["kornia"] = dense
    case.notes["kornia"] = f"one dense kernel of {width}^3 a sample"
    return case


def _brightness(batch: int) -> Case:
    factor = 0.75 + 0.5 * _draw(batch, "multiply", 1)[:, 0]

    def scale(i: int) -> Callable[[Tensor], Any]:
        return monai_intensity.ScaleIntensityFixedMean(float(factor[i]) - 1, preserve_range=True, fixed_mean=False)

    why = "ours: one batched operation on the device"
    return Case("brightness", lambda x: intensity.multiply(x, factor), {"MONAI": _each(scale, batch)}, why)


def _contrast(batch: int) -> Case:
    factor = 0.6 + 0.8 * _draw(batch, "contrast", 1)[:, 0]

    def scale(i: int) -> Callable[[Tensor], Any]:
        return monai_intensity.ScaleIntensityFixedMean(float(factor[i]) - 1, preserve_range=True, fixed_mean=True)

    why = "ours: one batched operation on the device"
    return Case("contrast", lambda x: intensity.contrast(x, factor), {"MONAI": _each(scale, batch)}, why)


def _gamma(batch: int) -> Case:
    exponent = 0.7 + 0.8 * _draw(batch, "gamma", 1)[:, 0]
    peers: dict[str, Operation | None] = {
        "MONAI": _each(lambda i: monai_intensity.AdjustContrast(float(exponent[i])), batch),
    }
    return Case("gamma", lambda x: intensity.gamma(x, exponent), peers, "ours: as brightness")


def _paint(batch: int, device: torch.device) -> Case:
    outer = np.arange(batch) % 2 == 0

    def operation(x: Tensor) -> Tensor:
        d, h, w = x.shape[2:]
        low, high = regions.windows(_draw(batch, "paint", regions.PAINT_DRAWS), (d, h, w), outer)
        return regions.paint(x, low, high, outer, generators(0, np.arange(batch), ("bench",), device))

    def drop(i: int) -> Callable[[Tensor], Any]:
        transform = monai_intensity.RandCoarseDropout(
            regions.WINDOWS, 12, dropout_holes=i % 2 == 1, fill_value=(0.0, 1.0), max_spatial_size=32, prob=1.0
        )
        transform.set_random_state(i)
        return transform

    why = "ours: windows as in Models Genesis, seeded by sample, on the device; MONAI's few holes are faster on a CPU"
    return Case("in- and out-painting", operation, {"MONAI": _each(drop, batch)}, why, same=False)


def _shuffle(batch: int, side: int, device: torch.device) -> Case:
    u = _draw(batch, "shuffle", 6)

    def operation(x: Tensor) -> Tensor:
        return regions.shuffle(x, u, generators(0, np.arange(batch), ("bench",), device))

    def mix(i: int, windows: int) -> Callable[[Tensor], Any]:
        transform = monai_intensity.RandCoarseShuffle(windows, 2, max_spatial_size=9, prob=1.0)
        transform.set_random_state(i)
        return transform

    everywhere, part = 10_000 * side**3 // 64**3, "MONAI, a part"
    why = "ours: all of the view is shuffled, without a loop over windows"
    notes = {"MONAI": f"{everywhere} windows, as many as Models Genesis has", part: "100 windows"}
    peers: dict[str, Operation | None] = {
        "MONAI": _each(lambda i: mix(i, everywhere), batch),
        part: _each(lambda i: mix(i, 100), batch),
    }
    return Case("local shuffling", operation, peers, why, same=False, notes=notes)


def _whole(batch: int, side: int, device: torch.device) -> Case:
    """A view as SimCLR's, from stored voxels: normalised, cut, flipped, turned, scaled, then the `light` preset."""
    role = RoleSpec("view", 1, (side,) * 3, scale=(0.8, 1.2), flip=(0.5, 0.5, 0.5), rotate_degrees=15.0)
    spec = ViewSpec((role,))
    host = next(crops(spec, batch))
    stored = torch.from_numpy(host.image_BCDHW)

    def operation(_x: Tensor) -> Tensor:
        views = make_views(host, spec, seed=0, policy=POLICY, device=device)
        return views.roles["view"][0].image_BCDHW

    def all_of_it(i: int) -> Callable[[Tensor], Any]:
        chain = Compose(
            [
                monai_intensity.ScaleIntensityRange(-700, 700, -2.33, 2.33, clip=True),
                monai_spatial.RandAffine(
                    prob=1.0,
                    rotate_range=(np.deg2rad(15.0), 0, 0),
                    translate_range=[(n - side) / 4 for n in stored.shape[2:]],
                    scale_range=(0, (-0.2, 0.2), (-0.2, 0.2)),
                    spatial_size=(side,) * 3,
                    padding_mode="border",
                ),
                *(monai_spatial.RandFlip(0.5, axis) for axis in range(3)),
                monai_intensity.RandGaussianNoise(prob=0.1, std=0.3),
                monai_intensity.RandGaussianSmooth((0.5, 1.0), (0.5, 1.0), (0.5, 1.0), prob=0.2),
                monai_intensity.RandScaleIntensityFixedMean(0.5, factors=0.25, fixed_mean=False, preserve_range=True),
                monai_intensity.RandAdjustContrast(0.5, (0.7, 1.5)),
            ]
        )
        chain.set_random_state(i)
        return lambda _x: chain(stored[i].to(device).float())

    why = "ours, made of the operations above"
    return Case("a whole view, preset `light`", operation, {"MONAI": _each(all_of_it, batch)}, why, same=False)


def _absent(case: Case) -> Case:
    case.peers["kornia"] = None
    case.notes["kornia"] = "not measured: kornia is not installed; pip install 'tomoscale[bench]'"
    return case


def _kornia() -> ModuleType | None:
    if importlib.util.find_spec("kornia") is None:
        return None
    import kornia

    module: ModuleType = kornia
    return module
