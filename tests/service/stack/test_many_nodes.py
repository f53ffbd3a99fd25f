"""Pre-training on two machines of namespaces, each with its own network, processes and host name."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.node_settings import SETTINGS
from jobs.configs import PretrainConfig
from jobs.pretrain.loop import JOURNAL
from jobs.tracking.runs import Point
from ssl_core.config import dump_yaml
from ssl_core.train import checkpoint
from tests.kit.networks import SMALL
from tests.kit.nodes import Lab, why_not
from tests.kit.phantoms import write_phantoms
from tests.kit.pretraining import config, train

pytestmark = [pytest.mark.service, pytest.mark.skipif(bool(reason := why_not()), reason=reason)]
BIN = Path(sys.executable).parent
PORT = 6379


def environment(folder: Path, lab: Lab) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_", "AWS_"))}
    (folder / "token").write_text("t" * 40)
    return own | {
        **SETTINGS,
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_ADDRESS": f"{lab.address(lab.names[0])}:{PORT}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "OMP_NUM_THREADS": "1",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        "CUDA_VISIBLE_DEVICES": "",
        # /tmp/node is another folder on each node; both paths are empty but where a test fills them.
        "PYTHONPATH": os.pathsep.join(["/tmp/node/site", *sys.path]),
        "AWS_SHARED_CREDENTIALS_FILE": "/tmp/node/keys",
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, dict[str, str]]]:
    """A head and a worker of one CPU each, and the environment of their processes.

    Each calls itself 127.0.1.1 in /etc/hosts, as Debian's installer writes it.
    """
    folder = tmp_path_factory.mktemp("nodes")
    with Lab(["head", "worker"], own_name="debian") as lab:
        variables = environment(folder, lab)
        common = ["--block", "--disable-usage-stats", "--num-cpus=1", "--object-store-memory=150000000"]
        address = f"{lab.address('head')}:{PORT}"
        head = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        for name, own in (("head", head), ("worker", [f"--address={address}"])):
            command = [str(BIN / "ray"), "start", f"--node-ip-address={lab.address(name)}", *own, *common]
            lab.start(name, command, variables, folder / f"{name}.log")
            _wait_for_cpus(lab, variables, 1 if name == "head" else 2, folder / f"{name}.log")
        yield lab, variables


def _wait_for_cpus(lab: Lab, variables: dict[str, str], count: int, log: Path) -> None:
    said = "nothing"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        time.sleep(2)
        try:
            command = lab.inside("head", [str(BIN / "ray"), "status"])
        except LookupError:  # its first process is not there yet
            continue
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        said = done.stdout + done.stderr
        if f"/{count}.0 CPU" in said:
            return
    raise AssertionError(f"no cluster of {count} CPUs: {said[-1000:]}\n{log.read_text()[-2000:]}")


def written(folder: Path, cluster: dict[str, int], **engine: int) -> tuple[PretrainConfig, list[str]]:
    """A job on phantoms in this folder, and the command that runs it."""
    write_phantoms((folder / "store").as_uri(), 8, shape=(20, 34, 22))
    job = config((folder / "store").as_uri(), "pgl", **engine)
    changes = {
        "runs": (folder / "runs").as_uri(),
        "cluster": job.cluster.model_copy(update=cluster),
        "backbone": job.backbone.model_copy(update={"name": "resenc", "arguments": SMALL["resenc"]}),  # without MONAI
    }
    job = job.model_copy(update=changes)
    (folder / "c.yaml").write_text(dump_yaml(job))
    return job, [str(BIN / "python"), "-m", "jobs.pretrain", str(folder / "c.yaml")]


def test_workers_on_two_nodes_find_each_other_and_equal_one(
    cluster: tuple[Lab, dict[str, str]], tmp_path: Path
) -> None:
    lab, variables = cluster
    job, command = written(tmp_path, {"workers": 2}, steps=4, checkpoint_every=2)
    done = subprocess.run(
        lab.inside("head", command), env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"ip={lab.address('worker')}" in done.stdout + done.stderr, "no worker was on the second node"
    last = max((tmp_path / "runs" / job.name).glob("step-*"))
    meta = checkpoint.read_meta(last)
    result, points = train(job, tmp_path / "one")
    assert meta["samples"] == result["samples"]
    losses = {point.step: point.metrics["loss"] for point in map(Point.from_json, meta[JOURNAL])}
    expected = {point.step: point.metrics["loss"] for point in points}
    assert losses.keys() == expected.keys()
    # AdamW turns a rounding of a small gradient into a whole step; bitwise is what two ranks of one machine are.
    np.testing.assert_allclose([losses[step] for step in expected], list(expected.values()), rtol=1e-3)


def test_after_notice_of_preemption_no_step_is_repeated_and_training_goes_on_on_the_nodes_that_stay(
    cluster: tuple[Lab, dict[str, str]], tmp_path: Path
) -> None:
    """Notice as `ray drain-node` gives it, to the second of two nodes; with one worker less, as the job allows."""
    lab, variables = cluster
    job, command = written(tmp_path, {"workers": 2, "min_workers": 1}, steps=150, checkpoint_every=140, log_every=5)
    number = _number(lab, variables, "worker")
    process = subprocess.Popen(
        lab.inside("head", command), env=variables, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.decode())
        if "step 5/" in lines[-1]:
            _announce(lab, variables, number)
    assert process.wait(60) == 0, "".join(lines[-60:])
    text = "".join(lines)
    (saved,) = re.findall(r"saved at step (\d+), as a node will be taken away", text)
    assert 5 < int(saved) < 140
    assert re.findall(r"resumed at step (\d+)", text) == [saved], text[-8000:]
    steps = [int(step) for step in re.findall(r"(?<!at )\bstep (\d+)/150", text)]
    assert steps == sorted(set(steps)), "a step was repeated"
    meta = checkpoint.read_meta(max((tmp_path / "runs" / job.name).glob("step-*")))
    result, _ = train(job, tmp_path / "one")
    assert meta["samples"] == result["samples"]


def _number(lab: Lab, variables: dict[str, str], name: str) -> str:
    """Ray's own number of a node."""
    listing = "import ray; ray.init(); print({n['NodeManagerAddress']: n['NodeID'] for n in ray.nodes()}[%r])"
    command = [str(BIN / "python"), "-c", listing % lab.address(name)]
    done = subprocess.run(lab.inside("head", command), env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def _announce(lab: Lab, variables: dict[str, str], number: str) -> None:
    command = [str(BIN / "ray"), "drain-node", f"--address={variables['RAY_ADDRESS']}", f"--node-id={number}"]
    notice = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=90"]
    done = subprocess.run(lab.inside("head", command + notice), env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_doctor_names_the_node_that_lacks_the_key_and_the_one_with_another_torch(
    cluster: tuple[Lab, dict[str, str]],
) -> None:
    lab, variables = cluster
    keys, other = lab.folder / "head" / "tmp" / "keys", lab.folder / "worker" / "tmp" / "site" / "torch-1.2.3.dist-info"
    keys.write_text("[default]\naws_access_key_id = k\naws_secret_access_key = s\n")
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.2.3\n")
    try:
        command = lab.inside("head", [str(BIN / "python"), "-m", "jobs.nodes", "--store", "s3://runs"])
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=400)
    finally:
        shutil.rmtree(other.parent)
        keys.unlink()
    assert done.returncode == 1, done.stdout + done.stderr
    wrong = done.stdout.rpartition("\n\n")[2].splitlines()
    head, worker = (f"{lab.address(name)} ({name}): " for name in ("head", "worker"))
    assert all(line.startswith((head, worker)) for line in wrong), wrong
    torch = [line for line in wrong if ": torch: " in line]
    assert len(torch) == 1, wrong
    assert torch[0].startswith(f"{worker}torch: 1.2.3, where the client has ")
    assert torch[0].endswith("; install requirements.lock there")
    no_key = "S3: no credentials in this environment; "
    assert [line.partition(": ")[0] for line in wrong if no_key in line] == [worker.removesuffix(": ")]
    assert any(line.startswith(f"{head}S3: ") for line in wrong), "its key is of no use where no S3 answers"
    assert not any(": interface: " in line or ": settings: " in line for line in wrong), wrong
