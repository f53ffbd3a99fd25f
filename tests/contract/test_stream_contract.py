import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from storage.errors import CorruptChunk, NotFound, StoreError
from storage.format.layout import Layout
from storage.format.manifest import Manifest
from storage.format.volume import Membership, Volume
from storage.format.volume_writer import write_volume
from storage.objects import open_store
from storage.reading.volume_store import VolumeStore, padding_values
from storage.stream.crop_stream import CropStream
from storage.testing.streams import StreamContract
from tests.kit.httpserver import served
from tests.kit.s3server import S3Server

SHAPES = [(9, 11, 13), (20, 26, 28), (5, 7, 30), (12, 12, 12), (8, 9, 10), (16, 5, 6)]
_number = itertools.count()


def publish(url: str) -> None:
    """Six small volumes, sharded, with a label, in split "train", and one in split "test"."""
    store, rng, records = open_store(url), np.random.default_rng(2), []
    for i, shape in enumerate([*SHAPES, (8, 8, 8)]):
        array = rng.integers(-1000, 1000, (1, *shape)).astype(np.int16)
        label = (rng.random(shape) < 0.05).astype(np.uint8)
        records.append(
            write_volume(
                store,
                f"vol-{i:02d}",
                Volume(
                    array,
                    spacing_mm=(2.0, 1.0, 1.0 + i),
                    affine=np.eye(4),
                    labels={"organs": label},
                    scale=0.5 + i,
                    offset=-3.0,
                ),
                membership=Membership(subject=f"s{i}", split="train" if i < len(SHAPES) else "test"),
                layout=Layout((4, 4, 4), (8, 8, 8)),
            )
        )
    Manifest.from_records(records, {"name": "stream-contract"}).write(store)


class StoredStreamContract(StreamContract):
    """Adds what only a real store can show. Its data set is written once; who damages it repairs it."""

    @pytest.fixture(scope="class")
    def writer(self, url: str) -> str:
        """Where the data set is written to be read at `url`."""
        return url

    @pytest.fixture(scope="class")
    def source(self, url: str, writer: str) -> Iterator[VolumeStore]:
        publish(writer)
        with VolumeStore(url, threads=3) as store:
            yield store

    def test_padding_is_the_stores(self, source: VolumeStore) -> None:
        spec = replace(self.spec, crop_DHW=(30, 30, 31), foreground=0.0)
        with CropStream(source, spec) as stream:
            batch = next(stream)
        for b in range(len(batch.sample_B)):
            record = source.manifest.record(int(batch.volume_B[b]))
            volume = source.read_volume(record.volume_id)
            d, h, w = -batch.start_B3[b]
            expected = np.full((1, 30, 30, 31), padding_values(record)[0], np.int16)
            nd, nh, nw = record.shape_DHW
            expected[:, d : d + nd, h : h + nh, w : w + nw] = volume
            assert np.array_equal(batch.image_BCDHW[b], expected)

    def test_labels_follow_their_image(self, source: VolumeStore) -> None:
        spec = replace(self.spec, crop_DHW=(4, 4, 4), label="organs", class_balance=1.0)
        with CropStream(source, spec) as stream:
            batch = next(stream)
        assert batch.label_BDHW is not None
        for b in range(len(batch.sample_B)):
            whole = source.read_volume(source.manifest.record(int(batch.volume_B[b])).volume_id, "organs")
            d, h, w = batch.start_B3[b]
            assert np.array_equal(batch.label_BDHW[b], whole[0, d : d + 4, h : h + 4, w : w + 4])
            assert batch.label_BDHW[b].any()

    @pytest.mark.parametrize("damage", ["deleted", "empty", "flipped"])
    def test_a_damaged_shard_raises_and_names_volume_and_key(
        self, source: VolumeStore, url: str, writer: str, damage: str
    ) -> None:
        store = open_store(writer)
        whole = {key: store.get(key) for key in store.list("volumes/vol-03/0/c/")}
        assert whole
        seen: set[int] = set()
        try:
            for key, content in whole.items():
                if damage == "deleted":
                    store.delete(key)
                    continue
                data = bytearray(content)
                data[len(data) // 3] ^= 0x10
                store.put(key, b"" if damage == "empty" else bytes(data))
            with (
                VolumeStore(url, threads=3) as damaged,  # it has read nothing before
                CropStream(damaged, self.spec) as stream,
                pytest.raises(StoreError) as caught,
            ):
                seen.update(int(v) for batch in stream for v in batch.volume_B)
        finally:
            for key, content in whole.items():
                store.put(key, content)
        assert isinstance(caught.value, NotFound if damage == "deleted" else CorruptChunk)
        assert "vol-03" in str(caught.value)
        assert "volumes/vol-03/0/c/" in str(caught.value)
        assert source.manifest.index_of("vol-03") not in seen, "no voxel of a damaged volume was handed out"


class TestFiles(StoredStreamContract):
    @pytest.fixture(scope="class")
    def url(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        return (tmp_path_factory.mktemp("files") / "store").as_uri()


class TestMemory(StoredStreamContract):
    @pytest.fixture(scope="class")
    def url(self) -> str:
        return f"memory://stream-contract-{next(_number)}"


class TestFsspec(StoredStreamContract):
    """fsspec's own local file system stands for all that go through the plain path."""

    @pytest.fixture(scope="class")
    def url(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        return f"local://{tmp_path_factory.mktemp('fsspec')}"


class TestHttp(StoredStreamContract):
    """Read only: the data set is written to the folder that the server shows."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("http")

    @pytest.fixture(scope="class")
    def writer(self, folder: Path) -> str:
        return folder.as_uri()

    @pytest.fixture(scope="class")
    def url(self, folder: Path) -> Iterator[str]:
        with served(folder) as url:
            yield url


@pytest.mark.service
class TestS3(StoredStreamContract):
    @pytest.fixture(scope="class")
    def server(self) -> Iterator[S3Server]:
        server = S3Server()
        try:
            server.start()
            yield server
        finally:
            server.remove()

    @pytest.fixture(scope="class")
    def url(self, server: S3Server) -> Iterator[str]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_SHARED_CREDENTIALS_FILE"):
                patch.delenv(name, raising=False)
            for name, value in server.environment.items():
                patch.setenv(name, value)
            yield f"s3://{server.bucket}/stream-contract-{next(_number)}"
