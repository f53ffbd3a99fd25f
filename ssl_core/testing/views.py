"""Views without a volume store: of coordinates that are known, and of what leaves a method nothing to work on."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssl_core.views.types import RoleSpec, View, ViewBatch, ViewSpec

DEGENERATE = ("constant images", "no overlap", "one region", "one position", "padding alone")
"""Batches that leave a method nothing to tell apart, compare, or attract; see `degrade`."""


def synthetic_views(spec: ViewSpec, samples: list[int], dtype: torch.dtype = torch.float32) -> ViewBatch:
    """Crops, flipped now and then, of smooth random volumes; sample i is the same in every batch."""
    cuts = [_synthetic_sample(spec, i, dtype) for i in samples]
    roles = {
        role.name: tuple(_stack([cut[role.name][v] for cut in cuts]) for v in range(role.count)) for role in spec.roles
    }
    index = torch.tensor(samples, dtype=torch.int64)
    side = float(_volume_side(spec))
    ones = torch.ones(len(samples), 3, dtype=torch.float64)
    return ViewBatch(roles, index, index.clone(), ones, ones * side)


def take(batch: ViewBatch, index: list[int]) -> ViewBatch:
    """The samples of a batch at these places, in this order."""
    return map_tensors(batch, lambda x: x[index])


def degrade(batch: ViewBatch, case: str) -> None:
    """Make a batch one of `DEGENERATE`, in place."""
    for number, view in enumerate(view for views in batch.roles.values() for view in views):
        images = [x for x in (view.image_BCDHW, view.clean_BCDHW) if x is not None]
        if case == "constant images":
            for image in images:
                image.fill_(0.5)
        elif case == "no overlap":
            view.to_volume_B34[:, :, 3] += 1000.0 * number
        elif case == "one region":
            for ids in view.maps.values():
                ids.fill_(1)
        elif case == "one position":
            view.position_B3.fill_(0.5)
        elif case == "padding alone":
            for tensor in (*images, view.valid_B1DHW, *view.maps.values()):
                tensor.zero_()
        else:
            raise ValueError(case)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same, with every tensor in it changed, however deep."""
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: map_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, tuple):
        return tuple(map_tensors(v, change) for v in value)
    if isinstance(value, Mapping):
        return {k: map_tensors(v, change) for k, v in value.items()}
    return value


def _volume_side(spec: ViewSpec) -> int:
    return max(max(role.size_DHW) for role in spec.roles) + 8


def _synthetic_sample(spec: ViewSpec, sample: int, dtype: torch.dtype) -> dict[str, list[View]]:
    random = torch.Generator().manual_seed(1000 + sample)
    side = _volume_side(spec)
    coarse = torch.randn(1, 1, 6, 6, 6, generator=random, dtype=torch.float64)
    volume = nn.functional.interpolate(coarse, size=(side,) * 3, mode="trilinear")[0]
    volume = (volume - volume.min()) / (volume.max() - volume.min())
    cells = torch.arange(side) // 5
    ids = 1 + cells[:, None, None] * 100 + cells[None, :, None] * 10 + cells[None, None, :]
    cut: dict[str, list[View]] = {}
    for role in spec.roles:
        cut[role.name] = []
        start = torch.randint(0, 8, (3,), generator=random)
        flips = torch.rand(3, generator=random) < torch.tensor(role.flip)
        for v in range(role.count):
            if role.offset_vox is not None and v:
                start = start.clone()
                start[0] = (start[0] + v * role.offset_vox[0]) % 8
            elif v:
                start = torch.randint(0, 8, (3,), generator=random)
            if v and not (role.share_spatial or role.offset_vox is not None):
                flips = torch.rand(3, generator=random) < torch.tensor(role.flip)
            cut[role.name].append(_cut(role, spec, volume, ids, start, flips, random, dtype))
    return cut


def _cut(
    role: RoleSpec,
    spec: ViewSpec,
    volume: Tensor,
    ids: Tensor,
    start: Tensor,
    flips: Tensor,
    random: torch.Generator,
    dtype: torch.dtype,
) -> View:
    size = torch.tensor(role.size_DHW)
    box = tuple(slice(int(a), int(a + n)) for a, n in zip(start, size, strict=True))
    axes = [int(i) for i in torch.nonzero(flips)[:, 0]]
    clean = volume[(slice(None), *box)].flip([a + 1 for a in axes])
    noise = 0.05 * torch.randn(clean.shape, generator=random, dtype=torch.float64)
    sign = torch.where(flips, -1.0, 1.0).double()
    shift = start.double() + torch.where(flips, size.double(), 0.0)
    maps = {name: ids[box].flip(axes)[None].long() for name in spec.maps}
    return View(
        image_BCDHW=(clean + noise)[None].to(dtype),
        to_volume_B34=torch.cat([torch.diag(sign), shift[:, None]], dim=1)[None],
        position_B3=((start + size / 2) / volume.shape[1])[None].double(),
        valid_B1DHW=torch.ones(1, 1, *role.size_DHW, dtype=dtype),
        clean_BCDHW=clean[None].to(dtype) if role.keep_clean else None,
        maps=maps,
    )


def _stack(views: list[View]) -> View:
    first = views[0]
    fields: dict[str, Any] = {
        f.name: torch.cat([getattr(v, f.name) for v in views])
        for f in dataclasses.fields(View)
        if isinstance(getattr(first, f.name), Tensor)
    }
    return View(**fields, maps={k: torch.cat([v.maps[k] for v in views]) for k in first.maps})
