"""The store contract on a real S3 server with credentials, and what only S3 has."""

import pickle
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import zarr

from storage.errors import StoreError
from storage.format.layout import Layout
from storage.format.manifest import Manifest
from storage.objects import ByteStore, open_store
from storage.reading.verify import verify
from storage.reading.volume_store import VolumeStore
from storage.testing.phantoms import phantom_label, publish_phantoms
from storage.testing.stores import StoreContract
from tests.kit.publishers import appended, together
from tests.kit.s3server import ADMIN, READER, S3Server

pytestmark = pytest.mark.service


class TestS3(StoreContract):
    @pytest.fixture
    def store(self, s3_environment: S3Server) -> ByteStore:
        return open_store(f"s3://{s3_environment.bucket}/{uuid.uuid4().hex}")


def test_processes_that_publish_together_on_s3_lose_nothing(s3_environment: S3Server) -> None:
    url = f"s3://{s3_environment.bucket}/{uuid.uuid4().hex}"
    together(url, processes=2, each=8)
    found = {record.volume_id for record in Manifest.open(url).records()}
    assert found == {appended(p, i).volume_id for p in range(2) for i in range(8)}


def test_odd_prefixes_mean_what_they_say(s3_environment: S3Server) -> None:
    client = s3_environment.client()
    for name in ("a b", "a+b", "ü", "a@b", "a=b&c"):
        store = open_store(f"s3://{s3_environment.bucket}/odd/{name}")
        store.put("k", name.encode())
        assert client.get_object(Bucket=s3_environment.bucket, Key=f"odd/{name}/k")["Body"].read() == name.encode()
        assert list(store.list()) == ["k"]


def test_wrong_credentials_are_one_clear_error_at_once(
    s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(f"s3://{s3_environment.bucket}/w").put("x", b"-")
    for key, secret in [(ADMIN[0], "wrong"), ("nobody", "wrong")]:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        store, began = open_store(f"s3://{s3_environment.bucket}/w"), time.monotonic()
        for call in (lambda s=store: s.get("x"), lambda s=store: list(s.list()), lambda s=store: s.put("x", b"!")):
            with pytest.raises(StoreError, match="refused.*403.*(InvalidAccessKeyId|SignatureDoesNotMatch)") as caught:
                call()
            assert "<" not in str(caught.value)
        assert time.monotonic() - began < 60  # the deadline of what is repeated is 120 s


def test_rights_are_per_key(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(f"s3://{s3_environment.bucket}/r").put("x", b"-")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER[1])
    store = open_store(f"s3://{s3_environment.bucket}/r")
    assert store.get("x") == b"-"
    for call in (lambda: store.put("x", b"!"), lambda: store.delete("x")):
        with pytest.raises(StoreError, match="refused"):
            call()
    assert store.get("x") == b"-"


THROUGH_PYARROW = """
import sys
from jobs.on_ray.filesystem import storage_for
path, files = storage_for(sys.argv[1])
with files.open_input_stream(f"{path}/x") as file:
    print(files.region, file.read())
"""


def test_credentials_and_endpoint_come_from_files(
    s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    open_store(f"s3://{s3_environment.bucket}/f").put("x", b"-")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name)
    (tmp_path / "keys").write_text(f"[lab]\naws_access_key_id={ADMIN[0]}\naws_secret_access_key={ADMIN[1]}\n")
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion=eu-west-1\nservices=here\n"
        f"[services here]\ns3 =\n  endpoint_url={s3_environment.endpoint}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    url = f"s3://{s3_environment.bucket}/f"
    assert open_store(url).get("x") == b"-"
    # Checkpoints go the same way; in a process of its own, since the AWS library behind pyarrow reads files once.
    done = subprocess.run([sys.executable, "-c", THROUGH_PYARROW, url], capture_output=True, text=True, timeout=240)
    assert done.stdout == "eu-west-1 b'-'\n", done.stderr


def test_stock_zarr_reads_a_volume_from_s3(s3_environment: S3Server) -> None:
    url = f"s3://{s3_environment.bucket}/{uuid.uuid4().hex}"
    _, arrays = publish_phantoms(url, [(40, 50, 60)], layout=Layout((16, 16, 16), (48, 64, 64)))
    options = {
        "key": ADMIN[0],
        "secret": ADMIN[1],
        "client_kwargs": {"endpoint_url": s3_environment.endpoint, "region_name": "us-east-1"},
    }
    group = zarr.open_group(f"{url}/volumes/phantom-000", mode="r", storage_options=options)
    np.testing.assert_array_equal(group["0"][:], arrays["phantom-000"])  # type: ignore[index]
    np.testing.assert_array_equal(group["labels/tissue/0"][:], phantom_label(arrays["phantom-000"]))  # type: ignore[index]


def test_verify_and_read_on_s3(s3_environment: S3Server) -> None:
    url = f"s3://{s3_environment.bucket}/{uuid.uuid4().hex}"
    _, arrays = publish_phantoms(url, [(40, 50, 60), (20, 20, 20)], layout=Layout((16, 16, 16), (32, 32, 64)))
    assert verify(url).ok
    with VolumeStore(url) as store:
        for name, array in arrays.items():
            np.testing.assert_array_equal(store.read_volume(name), array)


def test_a_pickled_store_holds_no_secret(s3_environment: S3Server) -> None:
    store = open_store(f"s3://{s3_environment.bucket}/p")
    store.put("x", b"-")
    data = pickle.dumps(store)
    assert ADMIN[1].encode() not in data
    assert pickle.loads(data).get("x") == b"-"  # noqa: S301
