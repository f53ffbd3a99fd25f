"""A plan on a real S3 server: what it counts is what the server was asked."""

import re
import uuid

import pytest

from jobs.plan.measure import measure
from storage.objects import open_store
from storage.objects.tally import Tally, counted
from storage.reading.volume_store import Crop, VolumeStore
from storage.testing.fault_proxy import FaultProxy, Request
from tests.kit.phantoms import write_phantoms
from tests.kit.pretraining import config
from tests.kit.s3server import S3Server

pytestmark = pytest.mark.service


def of_volumes(proxy: FaultProxy) -> list[Request]:
    return [request for request in proxy.requests if request.method == "GET" and "/volumes/" in request.path]


def size_of_answer(request: Request, url: str) -> int:
    if match := re.fullmatch(r"bytes=(\d+)-(\d+)", request.range):
        return int(match[2]) - int(match[1]) + 1
    if request.range:
        return int(request.range.removeprefix("bytes=-"))
    return open_store(url).head(request.path.removeprefix(f"/{url.removeprefix('s3://')}/"))


def test_requests_and_bytes_of_a_plan_are_those_of_the_server(
    s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{s3_environment.bucket}/plan-{uuid.uuid4().hex}"
    write_phantoms(url, 4)
    with FaultProxy(s3_environment.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        tally = Tally()
        with VolumeStore(url, store=counted(open_store(url), tally)) as volumes:
            names = [record.volume_id for record in volumes.manifest.records()]
            before = tally.now()
            proxy.clear()
            volumes.read_many([Crop(name, (2, 3, 4), (9, 10, 11)) for name in names])
            requests, after = of_volumes(proxy), tally.now()
        assert after.requests - before.requests == len(requests) > 0
        assert after.read_bytes - before.read_bytes == sum(size_of_answer(request, url) for request in requests)
        proxy.clear()
        measured = measure(config(url, "simclr"), steps=4)
        assert 0 < measured.requests * measured.steps <= len(of_volumes(proxy))
        assert measured.read_bytes > 0
