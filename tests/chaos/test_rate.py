"""What Ray Train costs beside torchrun where two workers are on two machines: the same job, in turns."""

import re
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.kit.fleet import Fleet
from tests.kit.fleet_jobs import DATA, PYTHON, Job, configuration

pytestmark = [pytest.mark.chaos, pytest.mark.service, pytest.mark.timeout(1200)]
STEPS, FROM, ROUNDS = 240, 40, 3
ENGINE = {"steps": STEPS, "checkpoint_every": STEPS}
_STEP = re.compile(r"^step (\d+)/")


def per_step(times: dict[int, float]) -> float:
    """Seconds a step, between two that are far apart."""
    return (times[STEPS] - times[FROM]) / (STEPS - FROM)


def by_ray(fleet: Fleet, name: str) -> float:
    job = Job(fleet, configuration(name, DATA, engine=ENGINE))
    assert job.end() == 0, job.text[-5000:]
    return per_step({step: at for at, step in job.steps()})


def by_torchrun(fleet: Fleet, name: str, folder: Path) -> float:
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(configuration(name, DATA, engine=ENGINE)))
    first = fleet.workers[0]
    ranks = []
    for rank, node in enumerate(fleet.workers):
        command = [PYTHON, "-m", "torch.distributed.run", "--nnodes", str(len(fleet.workers)), "--nproc-per-node", "1"]
        command += ["--node-rank", str(rank), "--master-addr", fleet.lab.address(first), "--master-port", "29500"]
        command += ["-m", "jobs.torchrun", str(config), "--out", str(folder / "out")]
        variables = fleet.bare | fleet.s3_variables("trainer") | {"GLOO_SOCKET_IFNAME": f"e{node}"}
        inside = fleet.lab.inside(node, command)
        ranks.append(
            subprocess.Popen(inside, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    times, lines = {}, []
    assert ranks[0].stdout is not None
    for line in ranks[0].stdout:
        lines.append(line)
        if match := _STEP.match(line):
            times[int(match[1])] = time.monotonic()
    rest = ranks[1].communicate(timeout=120)[0]
    assert [rank.wait(120) for rank in ranks] == [0, 0], "".join(lines)[-3000:] + rest[-3000:]
    return per_step(times)


def test_a_step_of_ray_train_takes_as_long_as_one_of_torchrun(
    fleet: Fleet, tmp_path: Path, rates: dict[str, object]
) -> None:
    seconds: dict[str, list[float]] = {"ray": [], "torchrun": []}
    for number in range(ROUNDS):
        seconds["torchrun"].append(by_torchrun(fleet, f"twin-{number}", tmp_path))
        seconds["ray"].append(by_ray(fleet, f"rate-{number}"))
    ratios = [ray / torchrun for ray, torchrun in zip(seconds["ray"], seconds["torchrun"], strict=True)]
    rates |= {"ms_a_step": {kind: [round(1e3 * s, 2) for s in values] for kind, values in seconds.items()}}
    rates |= {"ratios": [round(ratio, 3) for ratio in ratios], "ratio": round(statistics.median(ratios), 3)}
    print(rates)
    assert statistics.median(ratios) < 1.2, "more than a busy machine explains"
