"""From host crops to views, on the training device: the one place where pixels and geometry are made together."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_core.to_device import to_device
from ssl_core.views import placement
from ssl_core.views.augment import elastic, presets, spatial
from ssl_core.views.intensity import IntensityPolicy, normalise
from ssl_core.views.types import Elastic, RoleSpec, View, ViewBatch, ViewSpec, centre_of
from storage.errors import ConfigError
from storage.stream.crop_stream import HostBatch


def make_views(
    batch: HostBatch,
    spec: ViewSpec,
    *,
    seed: int,
    policy: IntensityPolicy,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ViewBatch:
    """Cut, resample and augment every view that `spec` asks for.

    The result of a sample depends on (seed, its global index, its crop, the spec) only: not on the batch it is in.

    Args:
        batch: Crops of at least `host_size(spec)` voxels in the stored dtype, with the maps of the spec. A single map
            in `spec.maps` that it lacks is its label.
        spec: The method's views.
        seed: Seed of the run.
        policy: Intensity normalisation.
        device: Where views are made and stay.
        dtype: Dtype of the images. Work is done in float64 for float64 and in float32 otherwise.

    Raises:
        ConfigError: the crop is too small, a map is missing, or roles contradict each other.
    """
    device = torch.device(device)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    d, h, w = batch.image_BCDHW.shape[2:]
    host_DHW = (int(d), int(h), int(w))
    shape_B3, sample_B = np.asarray(batch.shape_B3, np.float64), np.asarray(batch.sample_B, np.int64)
    placed = placement.draw(
        spec,
        seed=seed,
        sample_B=sample_B,
        start_B3=batch.start_B3,
        host_DHW=host_DHW,
        shape_B3=shape_B3,
        spacing_B3=batch.spacing_B3,
        centre_B3=batch.centre_B3,
    )
    stored = to_device(batch.image_BCDHW, device)
    host = normalise(stored, batch.scale_B, batch.offset_B, batch.stats_BCS, policy, work)
    host_maps = {name: to_device(array, device) for name, array in _maps(batch, spec).items()}
    shape_on_device = to_device(shape_B3, device)
    roles: dict[str, tuple[View, ...]] = {}
    for role in spec.roles:
        affine, size = placed[role.name], role.size_DHW
        to_volume = to_device(affine, device)
        position = spatial.positions(affine, batch.start_B3, size, device)
        deformed: list[Elastic | None] = [None] * role.count
        if role.elastic_vox > 0:
            same = role.share_spatial
            deformed = [_elastic(role, 0 if same else v, seed, sample_B, device) for v in range(role.count)]
            moved = [elastic.dense(e.control_B3abc, size, e.spacing_vox) for e in deformed if e is not None]
            position = spatial.deform(position, to_volume, torch.stack(moved))
            clean = spatial.linear(host, position, size)
        else:
            turned = role.rotate_degrees > 0 or role.tilt_degrees > 0
            clean = spatial.image(host, affine, batch.start_B3, position, size, turned=turned)
        valid = spatial.inside(position, batch.start_B3, shape_B3, size).to(dtype).unsqueeze(2)
        carried = {name: spatial.nearest(array, position, size).to(torch.int64) for name, array in host_maps.items()}
        image = presets.augment(clean, role.intensity, seed=seed, sample_B=sample_B, role=role.name).to(dtype)
        clean = clean.to(dtype)
        roles[role.name] = tuple(
            View(
                image_BCDHW=image[v],
                to_volume_B34=to_volume[v],
                position_B3=centre_of(to_volume[v], size) / shape_on_device,
                valid_B1DHW=valid[v],
                clean_BCDHW=clean[v] if role.keep_clean else None,
                maps={name: array[v] for name, array in carried.items()},
                elastic=deformed[v],
            )
            for v in range(role.count)
        )
    return ViewBatch(
        roles=roles,
        volume_B=to_device(np.asarray(batch.volume_B, np.int64), device),
        sample_B=to_device(sample_B, device),
        spacing_B3=to_device(np.asarray(batch.spacing_B3, np.float64), device),
        shape_B3=shape_on_device,
    )


def _elastic(role: RoleSpec, view: int, seed: int, sample_B: NDArray[np.int64], device: torch.device) -> Elastic:
    control = elastic.draw(role.elastic_vox, role.size_DHW, seed=seed, sample_B=sample_B, purpose=(role.name, view))
    return Elastic(to_device(control, device), elastic.spacing_vox(role.elastic_vox))


def _maps(batch: HostBatch, spec: ViewSpec) -> dict[str, NDArray[Any]]:
    arrays = dict(batch.maps_BDHW)
    if len(spec.maps) == 1 and spec.maps[0] not in arrays and batch.label_BDHW is not None:
        arrays[spec.maps[0]] = batch.label_BDHW
    missing = [name for name in spec.maps if name not in arrays]
    if missing:
        raise ConfigError(
            f"map {missing[0]!r}", expected="a label of that name in the stream", found=", ".join(arrays) or "none"
        )
    return {name: arrays[name] for name in spec.maps}
