"""The pre-training job under fire: the same samples and the same weights, bit for bit, as the undisturbed run."""

import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster import jobclient, stack
from cluster.stack_info import StackInfo
from jobs import submit
from jobs.cli.main import main
from jobs.configs import PretrainConfig
from jobs.tracking import runs as tracking
from ssl_core.config import parse
from ssl_core.train import checkpoint
from storage.errors import StackError
from storage.objects import open_store
from tests.kit.ahead import Ahead
from tests.kit.networks import SMALL
from tests.kit.phantoms import write_phantoms

pytestmark = [pytest.mark.service, pytest.mark.chaos, pytest.mark.timeout(1200)]
STEPS = 80


def config(name: str, data: str, **engine: Any) -> PretrainConfig:
    crops = {"size_DHW": [16, 16, 16], "scale": [1.0, 1.2], "min_overlap": 0.3}
    return parse(
        PretrainConfig,
        {
            "name": name,
            "data": data,
            "method": {"name": "pgl", "crops": crops, "hidden": 32, "out": 16},
            "backbone": {"name": "resenc", "arguments": SMALL["resenc"]},  # starts without MONAI, seconds sooner
            "stream": {"global_batch": 4, "lanes": 8},
            "engine": {"steps": STEPS, "warmup_steps": 4, "log_every": 5, "checkpoint_every": 10, "probe_every": 0}
            | engine,
            "cluster": {"workers": 2},
        },
    )


class Watched:
    """A job followed in a thread, with what it has said."""

    def __init__(self, info: StackInfo, job: PretrainConfig) -> None:
        self.lines: list[str] = []
        self.error: BaseException | None = None
        self._ahead = Ahead(info.state_dir)
        self._thread = threading.Thread(target=self._run, args=(info.jobs_address, job))
        self._thread.start()

    def _run(self, address: str, job: PretrainConfig) -> None:
        try:
            submit.run(address, "jobs.pretrain", job, job.name, show=self.lines.append)
        except BaseException as error:  # noqa: BLE001  handed to the test's thread
            self.error = error

    def wait_for_step(self, step: int) -> None:
        """Return as soon as that step is done; steps are logged in fives."""
        if not self._ahead.wait(rf"^step {step}/", self._thread.is_alive):
            raise AssertionError(f"step {step} was not seen:\n" + "\n".join(self.lines[-20:]))

    def finish(self) -> None:
        self._thread.join()
        if self.error is not None:
            print("\n".join(self.lines))
            raise self.error


def kill(matches: Callable[[psutil.Process], bool]) -> None:
    """SIGKILL one process of this test's stack, if there is one."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if matches(process):
                process.kill()
                return


def undergo(info: StackInfo, data: str, name: str, disturb: Callable[[Watched], None], sign: str) -> str:
    """Run the job and disturb it; returns its name.

    `sign` in the log tells that it was met. Where this process was held up so long that the job had ended by itself, it
    was not, and another job is tried.
    """
    lines: list[str] = []
    for attempt in range(3):
        watched = Watched(info, config(f"{name}-{attempt}", data))
        # After a checkpoint, and long before the end.
        watched.wait_for_step(step := 5 * random.SystemRandom().randrange(4, 8))
        print(f"disturbed after step {step}")
        disturb(watched)
        watched.finish()
        if any(sign in line for line in watched.lines):
            return f"{name}-{attempt}"
        lines += watched.lines
    raise AssertionError(f"{sign!r} was never said:\n" + "\n".join(lines))


def restart_store(info: StackInfo) -> None:
    """SIGKILL the stack's S3 server, and start it again after some seconds."""
    (pid,) = [service.pid for service in stack.status(info.state_dir).services if service.name == "s3"]
    killed = psutil.Process(pid)
    killed.kill()
    killed.wait(120)
    time.sleep(4)
    stack.up(info.state_dir, progress=print)


def named(text: str) -> Callable[[psutil.Process], bool]:
    state = os.environ["TOMOSCALE_STATE"]

    def matches(process: psutil.Process) -> bool:
        return text in " ".join(process.cmdline()) and any(state in value for value in process.environ().values())

    return matches


def outcome(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """State and meta of the job's last checkpoint, fetched from S3."""
    store = open_store(f"s3://runs/{name}/step-{STEPS:08d}")
    target = folder / name
    for key in store.list():
        path = target / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.get(key))
    return checkpoint.load(target)


def assert_same(calm: tuple[dict[str, Any], dict[str, Any]], other: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert other[1]["samples"] == calm[1]["samples"], "another sequence of samples"
    assert other[0]["chain"]["head"] == calm[0]["chain"]["head"], "another chain of steps"
    for name, tensor in calm[0]["method"].items():
        assert torch.equal(tensor, other[0]["method"][name]), name
    for name, entry in calm[0]["optimizer"].items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[0]["optimizer"][name][key])), (name, key)


def assert_each_point_once(name: str) -> None:
    api = tracking.client()
    experiment = api.get_experiment_by_name("tomoscale").experiment_id
    runs = api.search_runs([experiment], f"tags.`tomoscale.job` = '{name}'")
    assert len(runs) == 1, "one logical job is one run"
    assert runs[0].info.status == "FINISHED"
    steps = [m.step for m in api.get_metric_history(runs[0].info.run_id, "loss")]
    assert sorted(steps) == [1, *range(5, STEPS + 1, 5)]


@pytest.fixture(scope="module")
def calm(local_stack: StackInfo, phantoms: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    job = config("calm", phantoms)
    watched = Watched(local_stack, job)
    watched.finish()
    assert_each_point_once("calm")
    return outcome("calm", tmp_path_factory.mktemp("calm"))


def test_a_killed_worker_and_a_restarted_store_change_neither_samples_nor_weights(
    calm: Any, local_stack: StackInfo, phantoms: str, tmp_path: Path
) -> None:
    def disturb(job: Watched) -> None:
        kill(named("ray::RayTrainWorker"))
        job.wait_for_step(50)
        restart_store(local_stack)

    name = undergo(local_stack, phantoms, "killed-worker", disturb, "resumed at step")
    assert_same(calm, outcome(name, tmp_path))
    assert_each_point_once(name)


def test_a_killed_driver_changes_neither_samples_nor_weights(
    calm: Any, local_stack: StackInfo, phantoms: str, tmp_path: Path
) -> None:
    def driver(process: psutil.Process) -> bool:
        return named("jobs.pretrain")(process) and "python" in process.cmdline()[0]

    name = undergo(local_stack, phantoms, "killed-driver", lambda _: kill(driver), "submitting again")
    assert_same(calm, outcome(name, tmp_path))
    assert_each_point_once(name)


def test_a_run_is_what_its_certificate_says(
    calm: Any, local_stack: StackInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify-run", "calm", "--step", str(STEPS - 3), "--json"]) == 0
    results = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert results[f"replay of steps {STEPS - 9} to {STEPS - 3}"]["ok"], "two workers of Ray, two ranks again"
    assert results["models:/calm/1"]["ok"]
    certificate = json.loads(open_store("s3://runs/calm").get("certificate.json"))
    assert certificate["chain"]["head"] == calm[0]["chain"]["head"]
    artifacts = [item.path for item in tracking.client().list_artifacts(certificate["run_id"])]
    assert "certificate.json" in artifacts


def test_a_damaged_volume_ends_the_job_at_once_and_by_name(local_stack: StackInfo) -> None:
    url = "s3://volumes/damaged"
    write_phantoms(url, 8)
    store = open_store(url)
    for shard in [key for key in store.list("volumes/phantom-002/") if "/c/" in key and "labels" not in key]:
        data = bytearray(store.get(shard))
        data[100] ^= 1
        store.put(shard, bytes(data))
    watched = Watched(local_stack, config("damaged", url))
    with pytest.raises(StackError, match="phantom-002") as refused:
        watched.finish()
    assert "ingest into a new store" in str(refused.value)
    assert refused.value.exit_code == 1
    assert "\n".join(watched.lines).count("CorruptChunk: volume phantom-002") == 1, "tried again, or another error"


def test_secrets_are_in_no_job_metadata(calm: Any, local_stack: StackInfo) -> None:
    secrets = Path(os.environ["TOMOSCALE_STATE"], "secrets")
    words = [
        line.split("=")[-1].strip() for f in secrets.iterdir() if f.is_file() for line in f.read_text().splitlines()
    ]
    words = [word for word in words if len(word) >= 16]
    assert words
    shown = str([job.to_json() for job in jobclient.list_jobs(local_stack.jobs_address)])
    shown += "".join(
        jobclient.logs(local_stack.jobs_address, j.id) for j in jobclient.list_jobs(local_stack.jobs_address)
    )
    assert not [word for word in words if word in shown]
