"""Super-pixels by Ray tasks on the stack's S3, and a pre-training job that reads them beside labels."""

import json

import pytest

from cluster.stack_info import StackInfo
from jobs import submit
from jobs.cli import main as cli
from jobs.configs import PretrainConfig
from ssl_core.config import parse
from ssl_core.superpixels.settings import Superpixels
from storage.format.manifest import Manifest
from storage.objects import open_store
from tests.kit.phantoms import write_phantoms

pytestmark = [pytest.mark.service, pytest.mark.timeout(1200)]


def test_lrc_pre_trains_beside_labels_on_super_pixels_that_its_own_job_made(
    local_stack: StackInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    data, name = "s3://volumes/superpixels", Superpixels(mode="volume", scale=50).name
    before = write_phantoms(data, 6).fingerprint
    job = parse(
        PretrainConfig,
        {
            "name": "lrc-on-stack",
            "data": data,
            "method": {
                "name": "lrc",
                "base": "supervised",
                "base_settings": {"label": "labels"},
                "superpixels": {"mode": "volume", "scale": 50},
                "crops": {"size_DHW": [16, 32, 16]},
                "hidden": 8,
                "out": 8,
                "pixels": 8,
            },
            "backbone": {"name": "basic_unet", "arguments": {"features": [4, 4, 8, 8, 16, 4]}},
            "stream": {"global_batch": 4, "lanes": 8},
            "engine": {"steps": 4, "warmup_steps": 1, "log_every": 1, "checkpoint_every": 4, "probe_every": 0},
            "cluster": {"workers": 2},
        },
    )
    lines: list[str] = []
    submit.run(local_stack.jobs_address, "jobs.pretrain", job, job.name, show=lines.append)
    text = "\n".join(lines)
    assert "step 4/4" in text
    assert "segmentation" in text
    assert "region" in text
    assert f"computing {name}" in text
    assert "6 computed" in text
    assert "registered models:/lrc-on-stack/1" in text
    manifest = Manifest.open(data)
    assert manifest.fingerprint != before
    assert len(manifest.select(labelled=name)) == 6
    assert not list(open_store(data).list("derive/"))
    state = ["--state", str(local_stack.state_dir)]
    assert cli.main(["data", "superpixels", data, "mode=volume", "scale=50", "--local", *state]) == 0
    assert "0 computed, 0 left by an earlier run, 6 already there" in capsys.readouterr().out
    assert cli.main(["data", "verify", data, "--json", *state]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
