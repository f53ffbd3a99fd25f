"""Volumes: what is written is what is read, by us and by stock readers; damage raises and names itself."""

import json
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec

from storage.errors import ConfigError, CorruptChunk, NotFound, RefusedInput, StoreError
from storage.format.codecs import Chain, DamagedError, default_codecs
from storage.format.layout import Layout, choose_layout
from storage.format.manifest import Manifest
from storage.format.shard_index import build_index
from storage.format.volume import Volume
from storage.format.volume_writer import write_volume
from storage.format.zarr_metadata import array_document, group_document, parse_array
from storage.objects import ByteStore, open_store
from storage.objects.local import FileStore
from storage.reading.volume_store import Crop, VolumeStore, padding_values
from storage.testing.phantoms import phantom, phantom_label, publish_phantoms

SHAPES = [(35, 50, 36), (70, 41, 90), (9, 64, 64)]
SMALL = Layout((16, 16, 16), (32, 48, 32))
AFFINE = np.eye(4)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    url = (tmp_path_factory.mktemp("store") / "set").as_uri()
    _, arrays = publish_phantoms(url, SHAPES, layout=SMALL, channels=2)
    return url, arrays


def numpy_crop(
    array: np.ndarray, start: tuple[int, ...], size: tuple[int, ...], padding: Sequence[float]
) -> np.ndarray:
    out = np.stack([np.full(size, value, array.dtype) for value in padding])
    for d, h, w in np.ndindex(*size):
        at = (start[0] + d, start[1] + h, start[2] + w)
        if all(0 <= a < n for a, n in zip(at, array.shape[1:], strict=True)):
            out[:, d, h, w] = array[(slice(None), *at)]
    return out


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), gap=st.sampled_from([0, 200, 1 << 20]))
def test_any_crop_equals_numpy_slicing_with_padding(
    published: tuple[str, dict[str, Any]], data: st.DataObject, gap: int
) -> None:
    url, arrays = published
    crops = []
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(arrays)))
        shape = arrays[name].shape[1:]
        size = tuple(data.draw(st.integers(1, 20)) for _ in range(3))
        start = tuple(data.draw(st.integers(-25, n + 5)) for n in shape)
        crops.append(Crop(name, start, size))
    with VolumeStore(url, gap=gap, threads=3) as store:
        images, labels = store.read_many(crops), store.read_many(crops, label="tissue")
        for crop, image, label in zip(crops, images, labels, strict=True):
            array = arrays[crop.volume_id]
            padding = padding_values(store.record(crop.volume_id))
            assert image.dtype == np.int16
            assert image.flags.c_contiguous
            np.testing.assert_array_equal(image, numpy_crop(array, crop.start_DHW, crop.size_DHW, padding))
            expected = numpy_crop(phantom_label(array)[None], crop.start_DHW, crop.size_DHW, [0])
            np.testing.assert_array_equal(label, expected)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32"])
def test_every_type_comes_back_bit_for_bit(dtype: str) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    array = np.random.default_rng(1).integers(0, 100, (1, 20, 17, 33)).astype(dtype)
    record = write_volume(open_store(url), "v", Volume(array, spacing_mm=(1, 1, 1), affine=AFFINE))
    Manifest.from_records([record]).write(open_store(url))
    with VolumeStore(url) as store:
        found = store.read_volume("v")
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("i", range(len(SHAPES)))
def test_stock_readers_open_what_is_written(published: tuple[str, dict[str, Any]], i: int) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    url, arrays = published
    name = f"phantom-{i:03d}"
    base = f"{url}/volumes/{name}".removeprefix("file://")
    group = zarr.open_group(base, mode="r")
    image = group["0"]
    assert isinstance(image, zarr.Array)
    np.testing.assert_array_equal(image[:], arrays[name])
    assert image.metadata.dimension_names == ("c", "z", "y", "x")  # type: ignore[union-attr]
    label = zarr.open_array(f"{base}/labels/tissue/0", mode="r")
    np.testing.assert_array_equal(label[:], phantom_label(arrays[name]))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{base}/0/"}}
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), arrays[name])


def test_the_metadata_are_ome_zarr_0_5(published: tuple[str, dict[str, Any]]) -> None:
    url, _ = published
    store = open_store(f"{url}/volumes/phantom-000")
    ome = json.loads(store.get("zarr.json"))["attributes"]["ome"]
    assert ome["version"] == "0.5"
    (scales,) = ome["multiscales"]
    assert [(a["name"], a["type"]) for a in scales["axes"]] == [
        ("c", "channel"),
        ("z", "space"),
        ("y", "space"),
        ("x", "space"),
    ]
    (level,) = scales["datasets"]
    assert level == {
        "path": "0",
        "coordinateTransformations": [
            {"type": "scale", "scale": [1.0, 2.0, 0.8, 0.8]},
            {"type": "translation", "translation": [0.0, 0.0, 0.0, 0.0]},
        ],
    }
    assert json.loads(store.get("labels/zarr.json"))["attributes"]["ome"]["labels"] == ["tissue"]
    label = json.loads(store.get("labels/tissue/zarr.json"))["attributes"]["ome"]
    assert label["image-label"] == {"source": {"image": "../../"}}
    assert [a["name"] for a in label["multiscales"][0]["axes"]] == ["z", "y", "x"]


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inside: st.lists(inside) | st.tuples(inside, inside) | st.dictionaries(st.text(), inside),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), TREES))
@settings(deadline=None, max_examples=25)
def test_documents_are_the_text_that_json_gives(attributes: dict[str, Any]) -> None:
    whole = {"attributes": attributes, "node_type": "group", "zarr_format": 3}
    assert group_document(attributes) == json.dumps(whole, indent=1, sort_keys=True).encode()


def test_documents_hold_no_number_that_json_has_not() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        group_document({"x": [np.nan]})


CODECS: list[tuple[dict[str, Any], bool]] = [
    ({"compressors": [BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"), Crc32cCodec()]}, True),
    ({"compressors": [BloscCodec(cname="lz4", clevel=5, shuffle="shuffle")]}, True),
    ({"compressors": [ZstdCodec(level=3), Crc32cCodec()]}, True),
    ({"compressors": [GzipCodec(level=1)]}, True),
    ({"compressors": None}, True),
    ({"filters": [TransposeCodec(order=(0, 3, 1, 2))], "compressors": [ZstdCodec()]}, True),
    ({"serializer": zarr.codecs.BytesCodec(endian="big"), "compressors": [ZstdCodec()]}, True),
    ({"serializer": ShardingCodec(chunk_shape=(1, 8, 8, 8))}, False),
]


@pytest.mark.parametrize(("options", "known"), CODECS, ids=lambda value: str(value)[:60])
def test_what_stock_zarr_writes_in_this_layout_is_read(tmp_path: Path, options: dict[str, Any], known: bool) -> None:
    array = phantom((40, 50, 20), seed=3)
    url = tmp_path.as_uri()
    store = open_store(url)
    record = write_volume(store, "v", Volume(array, spacing_mm=(1, 1, 1), affine=AFFINE))
    written = zarr.create_array(
        str(tmp_path / "volumes" / "v" / "0"),
        shape=array.shape,
        chunks=(1, 16, 16, 16),
        shards=(1, 32, 32, 32),
        dtype="int16",
        overwrite=True,
        config={"write_empty_chunks": True},
        **options,
    )
    written[:] = array

    manifest = Manifest.from_records([replace(record, codecs="")])
    with VolumeStore(url, manifest) as volumes:
        if known:
            np.testing.assert_array_equal(volumes.read_volume("v"), array)
        else:
            with pytest.raises(StoreError, match="sharding_indexed"):
                volumes.read_volume("v")


def transposed(*axes: int) -> dict[str, Any]:
    return {"name": "transpose", "configuration": {"order": list(axes)}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(data_type="complex64"), "complex64"),
        (lambda d: d["codecs"][0]["configuration"]["codecs"].append({"name": "acme.brotli"}), "acme.brotli"),
        (lambda d: d.update(codecs=[{"name": "bytes"}]), "sharding_indexed"),
        (lambda d: d.update(shape=[1, 2, 3, 4]), "shape"),
        (lambda d: d.update(data_type="uint16"), "type uint16 where the manifest says int16"),
        (lambda d: d["codecs"][0]["configuration"]["codecs"].insert(0, transposed(0, 1, 2, 2)), "order of 4 axes"),
        (lambda d: d["chunk_grid"]["configuration"].update(chunk_shape=[1, 8, 0, 8]), "multiples of chunks"),
        (lambda d: d["codecs"][0].pop("configuration"), "sharding_indexed"),
        (lambda d: d.pop("chunk_grid"), "metadata"),
    ],
)
def test_unknown_metadata_are_a_clear_error(change: Callable[[dict[str, Any]], Any], message: str) -> None:

    url = f"memory://{uuid.uuid4().hex}"
    store = open_store(url)
    record = write_volume(store, "v", Volume(phantom((8, 8, 8)), spacing_mm=(1, 1, 1), affine=AFFINE))
    document = json.loads(store.get("volumes/v/0/zarr.json"))
    change(document)
    store.put("volumes/v/0/zarr.json", json.dumps(document).encode())
    with VolumeStore(url, Manifest.from_records([replace(record, codecs="")])) as volumes:
        with pytest.raises(StoreError, match=message) as caught:
            volumes.read_volume("v")
        assert "volumes/v/0/zarr.json" in str(caught.value)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON document with each of its keys or indices."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [*((tree, key) for key in keys), *(place for key in keys for place in places(tree[key]))]


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_metadata_of_any_other_form_are_an_error_that_names_them(data: st.DataObject) -> None:
    codecs = [transposed(0, 3, 1, 2), *default_codecs(np.dtype("i2"))]
    document = json.loads(array_document((1, 40, 50, 20), (1, 32, 32, 32), (1, 16, 16, 16), np.dtype("i2"), "czyx"))
    document["codecs"][0]["configuration"]["codecs"] = codecs
    assert parse_array(json.dumps(document).encode(), "thing").chain.order == (0, 3, 1, 2)
    tree, key = data.draw(st.sampled_from(places(document)))
    if data.draw(st.booleans()):
        del tree[key]
    else:
        tree[key] = data.draw(st.sampled_from([None, True, -1, 0, 3, 1e400, "", "x", [], ["x"], [0], {}, {"name": []}]))
    with suppress(StoreError):
        meta = parse_array(json.dumps(document).encode(), "thing")
        assert all(s >= c > 0 and s % c == 0 for s, c in zip(meta.shard, meta.chunk, strict=True))
        assert meta.chain.order is None or sorted(meta.chain.order) == [0, 1, 2, 3]


def shard_keys(store: ByteStore, name: str) -> list[str]:
    return [key for key in store.list(f"volumes/{name}/0/") if "/c/" in key]


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda data: None,
    "empty": lambda data: b"",
    "truncated at its end": lambda data: data[:-10],
    "truncated to its half": lambda data: data[: len(data) // 2],
    "a bit of the first chunk": lambda data: flip(data, 100),
    "a bit of a blosc header": lambda data: flip(data, 6),
    "a bit of the index": lambda data: flip(data, len(data) - 40),
    "a bit of the index's checksum": lambda data: flip(data, len(data) - 2),
    "something else": lambda data: b"\x00" * len(data),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
@pytest.mark.parametrize("small", [True, False], ids=["whole shard", "ranges"])
def test_damage_raises_and_names_volume_and_key(damage: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    publish_phantoms(url, [(70, 60, 50)], layout=SMALL)
    store = open_store(url)
    key = shard_keys(store, "phantom-000")[0]
    changed = DAMAGE[damage](store.get(key))
    if changed is None:
        store.delete(key)
    else:
        store.put(key, changed)
    if not small:
        monkeypatch.setattr("storage.reading.executor.SMALL_SHARD", 0)
    with VolumeStore(url) as volumes:
        with pytest.raises((NotFound, CorruptChunk)) as caught:
            volumes.read_volume("phantom-000")
        assert "phantom-000" in str(caught.value)
        assert key in str(caught.value)
        # Damage of one shard leaves crops of the others readable.
        assert volumes.read(Crop("phantom-000", (40, 50, 40), (10, 10, 10))).shape == (1, 10, 10, 10)


def test_a_frame_that_claims_more_than_the_memory_is_damaged() -> None:
    frame = bytes.fromhex("28b52ffde0") + (2**62).to_bytes(8, "little") + bytes([1, 0, 0])
    with pytest.raises(DamagedError, match="zstd"):
        Chain(None, np.dtype("<i2"), ("zstd",)).decode(frame, (2, 2))


@pytest.mark.parametrize("entry", [(0, 2**61), (2**61, 9), (2**63, 1), (7, 2**64 - 8), (2**64 - 1, 5), (0, 0)])
@pytest.mark.parametrize("small", [True, False], ids=["whole shard", "ranges"])
def test_a_senseless_index_raises_and_names_volume_and_key(
    entry: tuple[int, int], small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checksum is right: a program wrote it so."""
    url = tmp_path.as_uri()
    publish_phantoms(url, [(30, 30, 30)], layout=Layout((16, 16, 16), (32, 32, 32)))
    store = open_store(url)
    (key,) = shard_keys(store, "phantom-000")
    data = store.get(key)
    entries = {number: (0, 1000) for number in range(8)}
    store.put(key, data[: -16 * 8 - 4] + build_index({**entries, 3: entry}, 8))
    if not small:
        monkeypatch.setattr("storage.reading.executor.SMALL_SHARD", 0)
    with VolumeStore(url) as volumes, pytest.raises(CorruptChunk) as caught:
        volumes.read(Crop("phantom-000", (2, 20, 20), (4, 4, 4)))
    assert "volume phantom-000" in str(caught.value)
    assert key in str(caught.value)


def test_a_store_closed_while_it_is_read_leaves_nobody_waiting(
    published: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.reading.executor.SMALL_SHARD", 0)
    reading, go, found = threading.Event(), threading.Event(), list[Any]()
    suffix = FileStore.get_suffix

    def held(store: FileStore, key: str, n: int) -> bytes:
        reading.set()
        go.wait(60)
        return suffix(store, key, n)

    monkeypatch.setattr(FileStore, "get_suffix", held)
    volumes = VolumeStore(published[0], threads=1)

    def read() -> None:
        try:
            found.append(volumes.read_volume("phantom-001"))
        except StoreError as error:
            found.append(error)

    reader, closer = (threading.Thread(target=work, daemon=True) for work in (read, volumes.close))
    reader.start()
    assert reading.wait(60)
    closer.start()  # while one shard is being read and others wait
    time.sleep(0.1)
    go.set()
    for thread in (closer, reader):
        thread.join(60)
        assert not thread.is_alive()
    assert isinstance(found[0], StoreError) or np.array_equal(found[0], published[1]["phantom-001"])
    with pytest.raises(StoreError, match="an open store"):
        volumes.read_volume("phantom-001")


def test_a_chunk_that_is_not_stored_is_an_error_and_not_fill(tmp_path: Path) -> None:

    array = phantom((40, 40, 40))
    store = open_store(tmp_path.as_uri())
    record = write_volume(store, "v", Volume(array, spacing_mm=(1, 1, 1), affine=AFFINE))
    written = zarr.create_array(
        str(tmp_path / "volumes/v/0"),
        shape=array.shape,
        chunks=(1, 16, 16, 16),
        shards=(1, 48, 48, 48),
        dtype="int16",
        fill_value=-1000,
        overwrite=True,
    )
    written[:, :20] = array[:, :20]
    with (
        VolumeStore(tmp_path.as_uri(), Manifest.from_records([replace(record, codecs="")])) as volumes,
        pytest.raises(CorruptChunk, match="no chunk"),
    ):
        volumes.read_volume("v")


def test_equal_content_is_written_as_equal_bytes() -> None:
    one, two = f"memory://{uuid.uuid4().hex}", f"memory://{uuid.uuid4().hex}"
    first, _ = publish_phantoms(one, SHAPES)
    second, _ = publish_phantoms(two, SHAPES)
    assert first.fingerprint == second.fingerprint
    a, b = open_store(one), open_store(two)
    assert {key: a.get(key) for key in a.list()} == {key: b.get(key) for key in b.list()}


def test_a_small_volume_is_one_object() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    publish_phantoms(url, [(35, 50, 36)], labelled=False)
    assert shard_keys(open_store(url), "phantom-000") == ["volumes/phantom-000/0/c/0/0/0/0"]


def test_records_hold_what_the_array_holds() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    manifest, arrays = publish_phantoms(url, [(40, 50, 60)])
    record, array = manifest.record(0), arrays["phantom-000"]
    label = phantom_label(array)
    (facts,) = record.labels
    assert facts.values == tuple(v for v in (1, 2) if (label == v).any())
    for value, voxels, (lo, hi), points in zip(facts.values, facts.voxels, facts.boxes, facts.points, strict=True):
        at = np.argwhere(label == value)
        assert voxels == len(at)
        assert (lo, hi) == (tuple(at.min(0)), tuple(at.max(0) + 1))
        assert len(points) == len(set(points)) == min(64, voxels)
        assert all(label[p] == value for p in points)
    assert record.shape_DHW == (40, 50, 60)
    assert record.stats[0]["min"] >= -200
    assert record.foreground_hi <= record.shape_DHW


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"array_CDHW": np.zeros((3, 3, 3), "i2")}, RefusedInput),
        ({"array_CDHW": np.zeros((1, 0, 3, 3), "i2")}, RefusedInput),
        ({"array_CDHW": np.zeros((1, 3, 3, 3), "f8")}, RefusedInput),
        ({"spacing_mm": (1, 0, 1)}, RefusedInput),
        ({"spacing_mm": (1, 1)}, RefusedInput),
        ({"affine": np.full((4, 4), np.nan)}, RefusedInput),
        ({"labels": {"x": np.zeros((3, 3, 4), "u1")}}, RefusedInput),
        ({"labels": {"x": np.zeros((3, 3, 3), "f4")}}, RefusedInput),
        ({"labels": {"a/b": np.zeros((3, 3, 3), "u1")}}, ConfigError),
        ({"volume_id": "a/../b"}, ConfigError),
    ],
)
def test_what_the_format_does_not_hold_is_refused_and_nothing_written(
    change: dict[str, Any], error: type[Exception]
) -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    good: dict[str, Any] = {
        "volume_id": "v",
        "array_CDHW": np.zeros((1, 3, 3, 3), "i2"),
        "spacing_mm": (1, 1, 1),
        "affine": AFFINE,
    }
    fields = {**good, **change}
    volume_id = fields.pop("volume_id")
    with pytest.raises(error):
        write_volume(store, volume_id, Volume(**fields))
    assert list(store.list()) == []


def test_unknown_names_are_not_found(published: tuple[str, dict[str, Any]]) -> None:
    with VolumeStore(published[0]) as store:
        with pytest.raises(NotFound, match="nobody"):
            store.read(Crop("nobody", (0, 0, 0), (4, 4, 4)))
        with pytest.raises(NotFound, match="liver.*tissue"):
            store.read(Crop("phantom-000", (0, 0, 0), (4, 4, 4)), label="liver")
        with pytest.raises(ConfigError, match="size"):
            store.read(Crop("phantom-000", (0, 0, 0), (4, 0, 4)))


@settings(deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 700)] * 3),
    crop=st.tuples(*[st.integers(1, 256)] * 3),
    channels=st.integers(1, 3),
)
def test_a_layout_divides_evenly_and_is_bounded(
    shape: tuple[int, int, int], crop: tuple[int, int, int], channels: int
) -> None:
    layout = choose_layout(shape, crop, itemsize=2, channels=channels)
    assert np.prod(layout.shard_DHW) * 2 * channels <= 64 << 20
    for n, k, s in zip(shape, layout.chunk_DHW, layout.shard_DHW, strict=True):
        assert k <= n
        assert s % k == 0
        assert -(-n // k) * k - n < -(-n // k), "padding of less than a voxel a chunk"
