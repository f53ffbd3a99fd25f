"""Checkpoints on their way to a real S3 server that fails now and then."""

import uuid
from pathlib import Path

import pyarrow.fs as pa_fs
import pytest
import torch

from jobs.bench.checkpoint import TrainAlone
from jobs.on_ray.filesystem import storage_for
from jobs.on_ray.uploads import Uploads
from ssl_core.train import checkpoint
from ssl_core.train.checkpoint import Snapshot
from storage.testing.fault_proxy import FaultProxy, Status
from tests.kit.s3server import S3Server

pytestmark = pytest.mark.service


def test_an_upload_that_fails_is_tried_again_while_training_goes_on(
    s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{s3_environment.bucket}/{uuid.uuid4().hex}"
    weights, train = torch.arange(3.0), TrainAlone(url)
    with FaultProxy(s3_environment.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        proxy.inject(Status(503), times=3, method="PUT")
        uploads = Uploads(lambda: None, train=train)
        uploads.report("step-1", {}, lambda: Snapshot.of({"method": {"w": weights}}, {"step": 1}))
        weights += 1
        train.under_way[-1].result(240)
        assert proxy.count()["PUT"] > 3
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_environment.endpoint)
    path, files = storage_for(url)
    pa_fs.copy_files(f"{path}/step-1", str(tmp_path), source_filesystem=files)
    state, meta = checkpoint.load(tmp_path)
    assert (state["method"]["w"].tolist(), meta) == ([0, 1, 2], {"step": 1})
