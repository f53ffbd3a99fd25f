"""A server whose certificate is not trusted is no server that is away: nobody waits an hour for it."""

import time
from collections.abc import Iterator

import pytest
import requests

from cluster import jobclient, patience
from jobs.tracking.outage import is_away, through_outage
from jobs.tracking.runs import client
from storage.errors import StackError, StoreError
from storage.objects import open_store
from tests.kit.tls_server import tls_server


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tls_server(tmp_path_factory.mktemp("tls")) as address:
        yield address


def test_a_certificate_that_is_not_trusted_ends_a_request_of_s3_at_once(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"expected a certificate of https.*trusts; found \w+; .*SSL_CERT_FILE"):
        open_store("s3://bucket/folder").get("key")
    assert time.monotonic() - began < 10


def test_a_certificate_that_is_not_trusted_is_no_outage_of_mlflow(address: str) -> None:
    began = time.monotonic()
    with pytest.raises(requests.exceptions.SSLError) as raised:
        through_outage(lambda: requests.get(address, timeout=10), "the points of a run")
    assert not is_away(raised.value)
    assert time.monotonic() - began < 10


def test_a_certificate_that_is_not_trusted_is_no_outage_of_the_job_server(address: str) -> None:
    lines: list[str] = []
    began = time.monotonic()
    with pytest.raises(StackError, match="expected a certificate that this machine trusts; found self-signed"):
        patience.through_outage(lambda: jobclient.list_jobs(address), address, "job", 3600, lines.append)
    assert not lines
    assert time.monotonic() - began < 10


def test_a_certificate_that_is_not_trusted_is_named_before_a_job_begins(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(StackError, match=r"trusts; found self-signed.*CA_BUNDLE"):
        client()
