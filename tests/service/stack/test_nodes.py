"""Ray nodes beside the head on one machine: `tomoscale up --nodes N`."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import processes, stack
from cluster import state as states

pytestmark = pytest.mark.service
# Names of the nodes that two tasks ran on, each a whole node wide.
ASK = """
import json, ray
from ray.util.state import list_nodes
ray.init(address="auto", log_to_driver=False)
@ray.remote(num_cpus=2)
def where():
    import time
    time.sleep(3)
    return ray.get_runtime_context().get_node_id()
names = {node.node_id: node.node_name for node in list_nodes()}
print("ran on", json.dumps(sorted(names[n] for n in ray.get([where.remote(), where.remote()]))))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tn-", dir="/tmp"))
    yield path
    stack.down(path, purge=True)
    shutil.rmtree(path, ignore_errors=True)


def test_a_second_node_works_is_missed_comes_back_and_goes(folder: Path, tmp_path: Path) -> None:
    info = stack.up(folder, nodes=2, cpus=2)
    assert [service.name for service in info.services] == ["s3", "mlflow", "ray", "node-2"]
    assert info.healthy
    (tmp_path / "ask.py").write_text(ASK)
    shell = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "TOMOSCALE_STATE": str(folder)}
    line = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", str(tmp_path)]
    line += ["--submission-id", "ask", "--address", info.jobs_address, "--", "python", "ask.py"]
    done = subprocess.run(line, env=shell, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (words,) = [row for row in done.stdout.splitlines() if row.startswith("ran on")]
    nodes = json.loads(words.removeprefix("ran on"))
    assert len(set(nodes)) == 2
    assert "node-2" in nodes

    pids = {service.name: service.pid for service in info.services}
    state = states.load(folder)
    assert state is not None
    members = stack._all(state, "node-2")
    node = psutil.Process(pids["node-2"])
    node.kill()
    node.wait(120)
    assert [service.detail for service in stack.status(folder).services if not service.healthy] == ["no process"]
    again = stack.up(folder)
    assert again.healthy
    kept = {service.name: service.pid for service in again.services}
    assert {name: pid for name, pid in kept.items() if name != "node-2"} == {
        name: pid for name, pid in pids.items() if name != "node-2"
    }
    assert [process for process in members if processes.alive(process)] == []

    fewer = stack.up(folder, nodes=1)
    assert [service.name for service in fewer.services] == ["s3", "mlflow", "ray"]
    assert fewer.healthy
    assert {service.pid for service in fewer.services} <= set(kept.values())
    assert stack.down(folder)
    assert processes.marked(state.stack) == []
