"""A volume of a store, as the OME community's own reader and models see it."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from ome_zarr.io import parse_url
from ome_zarr.reader import Node, Reader
from ome_zarr_models.v05.image import Image
from ome_zarr_models.v05.image_label import ImageLabel

from storage.format.layout import Layout
from storage.format.manifest import Manifest
from storage.format.records import VolumeRecord
from storage.format.volume import Volume
from storage.format.volume_writer import write_derived, write_volume
from storage.objects import open_store
from storage.testing.phantoms import phantom, phantom_label

LAYOUT = Layout((8, 8, 8), (16, 24, 16))
TURNED = np.array([[0.8, -0.6, 0, -70], [0.6, 0.8, 0, -40], [0, 0, 2.5, 12], [0, 0, 0, 1.0]])
STRAIGHT = np.array([[0.7, 0, 0, -90.25], [0, 0.8, 0, -40.5], [0, 0, 2.5, 12], [0, 0, 0, 1.0]])


def publish(folder: Path, affine: np.ndarray, labelled: bool) -> VolumeRecord:
    """One volume of two channels in more than one shard, with a label and a computed map."""
    store, image = open_store(str(folder)), phantom((21, 40, 19), channels=2)
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0)[::-1].tolist())
    labels = {"tissue": phantom_label(image)} if labelled else {}
    record = write_volume(
        store,
        "v",
        Volume(image, spacing_mm=spacing, affine=affine, labels=labels),
        layout=LAYOUT,
    )
    if labelled:
        write_derived(store, record, "regions-1", phantom_label(image).astype(np.int32) + 7, "test")
    Manifest.from_records([record]).write(store)
    return Manifest.open(store).record(0)


def nodes(folder: Path) -> dict[str, Node]:
    """What ome-zarr finds at the volume, by name."""
    location = parse_url(folder / "volumes" / "v")
    assert location is not None
    return {str(node.metadata["name"]): node for node in Reader(location)() if node.data}


def test_ome_zarr_reads_image_label_and_computed_map(tmp_path: Path) -> None:
    record = publish(tmp_path, STRAIGHT, labelled=True)
    image = phantom((21, 40, 19), channels=2)
    found = nodes(tmp_path)
    expected = {"v": image, "tissue": phantom_label(image), "regions-1": phantom_label(image).astype(np.int32) + 7}
    assert set(found) == set(expected)
    for name, voxels in expected.items():
        read = found[name].data[0].compute()
        assert read.dtype == voxels.dtype
        np.testing.assert_array_equal(read, voxels)
    for name, node in found.items():
        axes = [(a["name"], a["type"], a.get("unit")) for a in node.metadata["axes"]]
        space = [(n, "space", "millimeter") for n in "zyx"]
        assert axes == ([("c", "channel", None), *space] if name == "v" else space)
        ((scale, translation),) = node.metadata["coordinateTransformations"]
        assert scale["scale"][-3:] == list(record.spacing_mm) == pytest.approx([2.5, 0.8, 0.7])
        x, y, z = np.reshape(record.affine, (4, 4))[:3, 3]
        assert translation["translation"][-3:] == [z, y, x] == [12, -40.5, -90.25]
        assert len(scale["scale"]) == len(translation["translation"]) == len(axes)


def test_a_turned_volume_has_its_spacing_and_no_place_that_would_be_wrong(tmp_path: Path) -> None:
    record = publish(tmp_path, TURNED, labelled=False)
    ((scale,),) = nodes(tmp_path)["v"].metadata["coordinateTransformations"]
    assert scale["scale"] == [1.0, *record.spacing_mm] == pytest.approx([1, 2.5, 1, 1])


def test_the_metadata_pass_the_models_of_the_specification(tmp_path: Path) -> None:
    publish(tmp_path / "plain", STRAIGHT, labelled=False)
    Image.from_zarr(zarr.open_group(str(tmp_path / "plain" / "volumes" / "v"), mode="r"))
    publish(tmp_path / "labelled", STRAIGHT, labelled=True)
    for name in ("tissue", "regions-1"):
        folder = tmp_path / "labelled" / "volumes" / "v" / "labels" / name
        ImageLabel.from_zarr(zarr.open_group(str(folder), mode="r"))
