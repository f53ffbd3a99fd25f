"""Zarr arrays and OME-Zarr images (0.4 and 0.5), in a folder that ends in .zarr.

OME-Zarr says spacing and translation but no orientation: axes z, y, x are taken as canonical, growing to superior,
anterior and right, unless the group carries an affine as this project writes it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from storage import geometry
from storage.errors import RefusedInput
from storage.ingest.readers.raw import (
    Affine,
    Array,
    RawVolume,
    ReadPolicy,
    VolumeHeader,
    channels_of_series,
    check_size,
    pick_series,
)
from storage.ingest.readers.reader import FileReader

READER = f"zarr/{zarr.__version__}"
_COMPUTED = "superpixels-"
"""How maps begin that this project computed and lists among the labels of an image."""
_TO_MM = {
    "meter": 1e3,
    "decimeter": 100.0,
    "centimeter": 10.0,
    "millimeter": 1.0,
    "micrometer": 1e-3,
    "nanometer": 1e-6,
    "angstrom": 1e-7,
    "inch": 25.4,
}


def zarr_reader() -> FileReader:
    """The reader of the format."""
    return FileReader(read_zarr, labels_in=own_labels, label_of=_read_label, header_of=read_zarr_header)


def own_labels(path: str) -> list[str]:
    """The label maps that an OME-Zarr image lists, of version 0.5 or 0.4."""
    for name in ("zarr.json", ".zattrs"):
        try:
            document = json.loads((Path(path) / "labels" / name).read_bytes())
            attributes = document["attributes"]["ome"] if name == "zarr.json" else document
            names = sorted(str(label) for label in attributes["labels"])
        except (OSError, ValueError, LookupError, TypeError):
            continue
        return [f"{path}/labels/{name}" for name in names if not name.startswith(_COMPUTED) and ".." not in name]
    return []


def _read_label(path: str, policy: ReadPolicy, image: RawVolume) -> RawVolume:
    """Read a map of its own, or one inside the image."""
    own = not path.lower().endswith(".zarr")
    return read_own_label(path, policy, image) if own else read_zarr(path, policy)


def read_zarr(path: str, policy: ReadPolicy) -> RawVolume:
    """Read the full-resolution array of an image group, or a bare array of three or four axes.

    Raises:
        RefusedInput: names the folder and what is wrong with it.
    """
    notes: list[str] = []
    image = _opened(path, policy, notes)
    array: Array = np.asarray(image.node[...])
    array = array.reshape(-1, *array.shape[-3:])
    series = len(array)
    if not image.channels:
        array = pick_series(path, array, policy, notes)
    scale, offset = image.scale, image.offset
    if (scale, offset) != (1.0, 0.0):
        array = array.astype(np.float32) * np.float32(scale) + np.float32(offset)
    return RawVolume(array, image.affine, READER, notes=notes, series=series, scale=scale, offset=offset)


def read_zarr_header(path: str, policy: ReadPolicy) -> VolumeHeader:
    """What `read_zarr` would return, from the metadata alone. Errors as of `read_zarr`."""
    notes: list[str] = []
    image = _opened(path, policy, notes)
    shape: tuple[int, ...] = (math.prod(image.node.shape[:-3]), *image.node.shape[-3:])
    if not image.channels:
        shape = (channels_of_series(path, shape, policy, notes), *shape[1:])
    return VolumeHeader(shape, image.affine, notes=tuple(notes))


@dataclass(frozen=True, slots=True)
class _Image:
    """An array and what its group says: `channels`, whether its first axis is of channels, `affine` to RAS+ mm."""

    node: Any
    channels: bool
    scale: float
    offset: float
    affine: Affine


def _opened(path: str, policy: ReadPolicy, notes: list[str]) -> _Image:
    try:
        node: Any = zarr.open(path, mode="r")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedInput(path, expected="a Zarr array or OME-Zarr image", found=str(error)[:200]) from error
    spacing, origin = [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]
    axes = ""
    affine: Affine | None = None
    scale, offset, unit_mm = 1.0, 0.0, 1.0
    if isinstance(node, zarr.Group):
        attributes: dict[str, Any] = dict(node.attrs)
        ome: Any = attributes.get("ome", attributes)
        try:
            axes, spacing, origin, unit_mm = _image(path, ome["multiscales"][0], notes)
            array_node: Any = node[ome["multiscales"][0]["datasets"][0]["path"]]
            own = attributes.get("tomoscale", {})
            scale, offset = float(own.get("scale", 1)), float(own.get("offset", 0))
            affine = np.array(own["affine_ras_mm"], np.float64).reshape(4, 4) if "affine_ras_mm" in own else None
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RefusedInput(
                path, expected="an OME-Zarr image with multiscales", found=f"{type(error).__name__}: {error}"
            ) from error
    else:
        array_node = node
        notes.append("a bare array: 1 mm voxels along canonical axes assumed")
    check_size(path, tuple(array_node.shape), policy)
    if array_node.ndim not in (3, 4, 5) or (axes and len(axes) != array_node.ndim):
        raise RefusedInput(
            path, expected="three to five axes, as named", found=f"shape {array_node.shape}, axes {axes!r}"
        )
    if axes and axes[-3:] != "zyx":
        raise RefusedInput(path, expected="axes that end in z, y, x", found=repr(axes))
    _count_chunks(array_node, notes)
    if affine is None:
        affine = np.diag([*spacing[::-1], 1.0])
        affine[:3, 3] = origin[::-1]
        notes.append("no orientation stored: z, y, x taken to grow to superior, anterior, right")
    affine = geometry.check_affine(affine, path, unit_mm)
    return _Image(array_node, axes.startswith("c"), scale, offset, affine)


def _count_chunks(array: Any, notes: list[str]) -> None:
    """Say how much of an array no file holds: Zarr may leave out what is empty, and a copy may lose more."""
    stored, total = array.nchunks_initialized, array.nchunks
    if stored < total:
        notes.append(f"{total - stored} of {total} chunks are not stored and were read as {array.fill_value}")


def read_own_label(path: str, policy: ReadPolicy, image: RawVolume) -> RawVolume:
    """Read a label map that an OME-Zarr image holds in its folder `labels`.

    Args:
        path: Of the map: `<image>/labels/<name>`, its last `labels`.
        image: The image, as read; where both have the same scale and translation, its affine is the map's too.

    Raises:
        RefusedInput: as `read_zarr`.
    """
    raw = read_zarr(path, policy)
    places = []
    for folder in (path, path.rpartition("/labels/")[0]):
        attributes: dict[str, Any] = dict(zarr.open_group(folder, mode="r").attrs)
        ome: Any = attributes.get("ome", attributes)
        places.append(_image(folder, ome["multiscales"][0], [])[1:3])
    if np.allclose(places[0], places[1], rtol=1e-4, atol=1e-4):
        raw.affine, raw.notes = image.affine, []
    return raw


def _image(path: str, image: Any, notes: list[str]) -> tuple[str, list[float], list[float], float]:
    """Axes, spacing and origin in mm along z, y, x, and mm in the largest unit, of a `multiscales` entry."""
    dataset = image["datasets"][0]
    axes = "".join(axis["name"] for axis in image["axes"])
    unit_of = {axis["name"]: axis.get("unit") for axis in image["axes"] if axis["name"] in ("z", "y", "x")}
    unknown = sorted({str(unit) for unit in unit_of.values()} - {*_TO_MM, "None"})
    if unknown:
        raise RefusedInput(path, expected=f"a unit of length among {', '.join(_TO_MM)}", found=", ".join(unknown))
    if None in unit_of.values():
        notes.append("no unit of length stored: millimetres assumed")
    transforms = [*dataset.get("coordinateTransformations", []), *image.get("coordinateTransformations", [])]
    units_mm = {name: _TO_MM.get(str(unit), 1.0) for name, unit in unit_of.items()}
    spacing, origin = _placed(axes, units_mm, transforms)
    return axes, spacing, origin, max(units_mm.values())


def _placed(axes: str, units: dict[str, float], transforms: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Spacing and origin in mm along z, y, x."""
    at = [axes.index(name) for name in "zyx"]
    scale, shift = np.ones(len(axes)), np.zeros(len(axes))
    for transform in transforms:
        if transform["type"] == "scale":
            scale, shift = scale * transform["scale"], shift * transform["scale"]
        elif transform["type"] == "translation":
            shift = shift + transform["translation"]
        elif transform["type"] != "identity":
            raise ValueError(f"a coordinate transformation of type {transform['type']!r}")
    mm = [units[name] for name in "zyx"]
    return [float(scale[a]) * u for a, u in zip(at, mm, strict=True)], [
        float(shift[a]) * u for a, u in zip(at, mm, strict=True)
    ]
