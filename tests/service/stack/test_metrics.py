"""A pre-training as its operators see it: Ray's exporter, Prometheus, the dashboard, and the list of jobs."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import jobclient
from cluster import state as states
from cluster.ports import find_free
from cluster.stack_info import StackInfo
from jobs import submit
from jobs.cli import main as cli
from jobs.configs import PretrainConfig
from jobs.on_ray.metrics import METRICS
from jobs.tracking import runs
from jobs.tracking.events import TAG
from ssl_core.config import parse
from tests.kit import ROOT
from tests.kit.networks import SMALL
from tests.kit.phantoms import write_phantoms

pytestmark = [pytest.mark.service, pytest.mark.timeout(1200)]
PROMETHEUS = shutil.which("prometheus")
LIMIT_S = 600.0


@pytest.fixture(scope="module")
def job(local_stack: StackInfo) -> Iterator[str]:
    """The id of a pre-training that goes on until the tests have looked."""
    data = f"s3://volumes/watched-{uuid.uuid4().hex[:8]}"  # in no node's cache, which outlives a stack
    write_phantoms(data, 8)
    crops = {"size_DHW": [16, 16, 16], "scale": [1.0, 1.2], "min_overlap": 0.3}
    engine = {"steps": 200000, "warmup_steps": 4, "log_every": 5, "checkpoint_every": 20, "probe_every": 10}
    config = parse(
        PretrainConfig,
        {
            "name": "watched",
            "data": data,
            "method": {"name": "pgl", "crops": crops, "hidden": 32, "out": 16},
            "backbone": {"name": "resenc", "arguments": SMALL["resenc"]},
            "stream": {"global_batch": 4, "lanes": 8, "cache_gib": 0.1},
            "engine": engine,
            "cluster": {"workers": 1},  # it works as long as the tests look; the other core is theirs
        },
    )
    name = submit.submit(local_stack.jobs_address, "jobs.pretrain", config, config.name)
    try:
        yield name
    finally:
        jobclient.stop(local_stack.jobs_address, name, wait_s=120)


def ask(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as answer:
        text: str = answer.read().decode()
    return text


def until(look: Any, what: str, info: StackInfo, job: str) -> Any:
    """What `look` returns once it is not empty, while the job is at work."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if (result := look()) is not None:
            return result
        state = jobclient.status(info.jobs_address, job)
        assert state.status not in jobclient.ENDED, state.message[-3000:]
        time.sleep(1.0)
    raise AssertionError(f"{what} did not come")


def exported() -> dict[str, dict[str, str]]:
    """Our metrics at Ray's exporter: a line of each, by name, with its labels."""
    state = states.load(Path(os.environ["TOMOSCALE_STATE"]))
    assert state is not None
    lines = ask(f"http://127.0.0.1:{state.services['ray'].ports['metrics']}/metrics").splitlines()
    names = [re.match(r"(ray_tomoscale_\w+)\{(.*)\} ", line) for line in lines]
    return {match[1]: dict(re.findall(r'(\w+)="([^"]*)"', match[2])) for match in names if match}


def test_every_metric_is_at_the_exporter_and_tells_nothing_but_the_jobs_name(job: str, local_stack: StackInfo) -> None:
    names = {metric.exported: set(metric.labels) for metric in METRICS if metric.name != "tomoscale_s3_retries"}

    def look() -> dict[str, dict[str, str]] | None:
        lines = exported()
        return lines if names.keys() <= lines.keys() else None

    lines = until(look, f"metrics {sorted(names)}", local_stack, job)
    assert lines.keys() <= {metric.exported for metric in METRICS}
    rays = {"Component", "JobId", "NodeAddress", "SessionName", "Version", "WorkerId", "NodeId", "IsDriver"}
    for name, labels in names.items():
        assert labels <= lines[name].keys(), name
        others = lines[name].keys() - labels
        assert others <= rays or not {key for key in others - rays if not key.startswith("otel")}, (name, others)
        assert lines[name]["job_name"] == "watched"


def test_the_list_says_how_far_the_job_is(job: str, local_stack: StackInfo, capsys: pytest.CaptureFixture[str]) -> None:
    def look() -> dict[str, Any] | None:
        assert cli.main(["jobs", "list", "--json"]) == 0
        (facts,) = [item for item in json.loads(capsys.readouterr().out) if item["id"] == job]
        return facts if facts["progress"] and facts["progress"]["left"] else None

    facts = until(look, "a progress with the time left", local_stack, job)
    assert (facts["kind"], facts["name"], facts["status"]) == ("pretrain", "watched", "RUNNING")
    assert facts["progress"]["total"] == 200000
    assert "@" in facts["owner"]
    assert cli.main(["jobs", "logs", "watched", "--tail", "3"]) == 0
    assert 1 <= len(capsys.readouterr().out.splitlines()) <= 3
    assert cli.main(["jobs", "wait", "watched", "--timeout", "0.1"]) == 4


@pytest.mark.skipif(
    PROMETHEUS is None, reason="no program `prometheus` here; Debian has it: apt-get install prometheus"
)
def test_every_query_of_the_dashboard_has_points(job: str, local_stack: StackInfo, tmp_path: Path) -> None:
    settings = (ROOT / "cluster/monitoring/prometheus.yaml").read_text()
    ray = Path(os.environ["TOMOSCALE_STATE"]) / "ray"
    settings = settings.replace("/tmp/ray/", f"{ray}/").replace("15s", "5s")
    (tmp_path / "prometheus.yaml").write_text(settings)
    (port,) = find_free(1)
    command = [str(PROMETHEUS), f"--config.file={tmp_path / 'prometheus.yaml'}"]
    command += [f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    panels = json.loads((ROOT / "cluster/monitoring/dashboard.json").read_text())["panels"]
    queries = {target["expr"] for panel in panels for target in panel["targets"]}
    empty = set(queries)
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:

            def look() -> bool | None:
                for query in sorted(empty):
                    plain = query.replace("$__rate_interval", "1m").replace("$job_name", "watched")
                    words = urllib.parse.urlencode({"query": plain})
                    try:
                        answer = json.loads(ask(f"http://127.0.0.1:{port}/api/v1/query?{words}"))
                    except OSError:
                        assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
                        return None
                    if answer["data"]["result"]:
                        empty.discard(query)
                return True if not empty else None

            until(look, f"points of {empty}", local_stack, job)
        finally:
            server.terminate()
            server.wait(60)


def is_worker_of(process: psutil.Process, info: StackInfo) -> bool:
    """Whether a process trains for this stack."""
    with contextlib.suppress(psutil.Error):
        mine = any(str(info.state_dir) in value for value in process.environ().values())
        return "ray::RayTrainWorker" in " ".join(process.cmdline()) and mine
    return False


def test_a_killed_worker_is_an_event_of_the_run_with_its_cause(job: str, local_stack: StackInfo) -> None:
    api = runs.client()
    run_id, _ = runs.find_run(api, "tomoscale", "watched")
    until(lambda: api.get_run(run_id).data.metrics.get("step"), "a point", local_stack, job)
    (*_, worker) = (process for process in psutil.process_iter() if is_worker_of(process, local_stack))
    worker.kill()

    def look() -> dict[str, str] | None:
        tags: dict[str, str] = api.get_run(run_id).data.tags
        return {key: text for key, text in tags.items() if key.startswith(TAG)} or None

    (event,) = until(look, "the event", local_stack, job).values()
    assert "a worker process was killed or crashed" in event
    assert "(1 -> 1 workers)" in event
    history = until(lambda: api.get_metric_history(run_id, runs.RESTARTS) or None, "its count", local_stack, job)
    assert [metric.value for metric in history] == [1]
    assert "restart 1 of the workers, from the checkpoint of step" in jobclient.logs(local_stack.jobs_address, job)
