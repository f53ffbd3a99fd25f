"""What Ray Train costs beside torchrun where two workers are on two machines: the same job, in turns."""

import contextlib
import os
import re
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.kit.fleet import Fleet
from tests.kit.fleet_jobs import DATA, PYTHON, Job, configuration

pytestmark = [pytest.mark.chaos, pytest.mark.service, pytest.mark.timeout(1200)]
STEPS, FROM, UNTIL, ROUNDS = 240, 40, 230, 3
ENGINE = {"steps": STEPS, "checkpoint_every": STEPS, "log_every": 10}
_STEP = re.compile(r"^step (\d+)/")


@dataclass(frozen=True)
class Cost:
    """Of a step: milliseconds of the clock, of a worker's processor, and the share of all cores that was busy."""

    ms: float
    cpu_ms: float
    busy: float


class Meter:
    """Clocks from step `FROM` to step `UNTIL`, both reported, of a job whose ranks are the processes of a title."""

    def __init__(self, fleet: Fleet, title: str, without: str = "\0") -> None:
        self._fleet, self._title, self._without = fleet, title, without
        self._marks: list[tuple[float, float, float]] = []

    def mark(self) -> None:
        """Read them."""
        machine = psutil.cpu_times()
        self._marks.append((time.monotonic(), self._ranks(), sum(machine) - machine.idle - machine.iowait))

    def cost(self) -> Cost:
        """Between the two marks."""
        clock, ranks, busy = (after - before for before, after in zip(*self._marks, strict=True))
        steps = UNTIL - FROM
        share = busy / clock / (os.cpu_count() or 1)
        return Cost(1e3 * clock / steps, 1e3 * ranks / steps / len(self._fleet.workers), share)

    def _ranks(self) -> float:
        """Processor seconds of all ranks."""
        total, found = 0.0, 0
        for name in self._fleet.workers:
            for pid in self._fleet.lab.pids(name):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process = psutil.Process(pid)
                    words = " ".join(process.cmdline())
                    if self._title in words and self._without not in words:
                        times = process.cpu_times()
                        total, found = total + times.user + times.system, found + 1
        assert found == len(self._fleet.workers), f"{found} processes called {self._title}"
        return total


def by_ray(fleet: Fleet, name: str) -> Cost:
    job, meter = Job(fleet, configuration(name, DATA, engine=ENGINE)), Meter(fleet, "ray::RayTrainWorker")
    for step in (FROM, UNTIL):
        job.wait_for_step(step)
        meter.mark()
    assert job.end() == 0, job.text[-5000:]
    return meter.cost()


def by_torchrun(fleet: Fleet, name: str, folder: Path) -> Cost:
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
    meter, lines = Meter(fleet, "jobs.torchrun", "torch.distributed.run"), []
    assert ranks[0].stdout is not None
    for line in ranks[0].stdout:
        lines.append(line)
        if (match := _STEP.match(line)) and int(match[1]) in (FROM, UNTIL):
            meter.mark()
    rest = ranks[1].communicate(timeout=120)[0]
    assert [rank.wait(120) for rank in ranks] == [0, 0], "".join(lines)[-3000:] + rest[-3000:]
    return meter.cost()


def test_a_step_of_ray_train_takes_as_long_as_one_of_torchrun(
    fleet: Fleet, tmp_path: Path, rates: dict[str, Any]
) -> None:
    costs: dict[str, list[Cost]] = {"ray": [], "torchrun": []}
    for number in range(ROUNDS):
        costs["torchrun"].append(by_torchrun(fleet, f"twin-{number}", tmp_path))
        costs["ray"].append(by_ray(fleet, f"rate-{number}"))
    for key in ("ms", "cpu_ms"):
        pairs = [(getattr(a, key), getattr(b, key)) for a, b in zip(costs["ray"], costs["torchrun"], strict=True)]
        rates[key] = {
            "ray": [round(ray, 1) for ray, _ in pairs],
            "torchrun": [round(torchrun, 1) for _, torchrun in pairs],
            "ratios": [round(ray / torchrun, 3) for ray, torchrun in pairs],
        }
    rates["busy"] = {kind: [round(cost.busy, 2) for cost in of_kind] for kind, of_kind in costs.items()}
    print(rates)
    assert statistics.median(rates["ms"]["ratios"]) < 1.2, "more than a busy machine explains"
