"""A job that is sent from the client's machine, read line by line, and what it left on S3 and in MLflow."""

import json
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.kit.fleet import CLIENT, Fleet
from tests.kit.networks import SMALL

STEPS = 120
DATA = "s3://volumes/phantoms"
# Each kind of /etc/hosts that is met: Debian's, one that knows nobody, and one that knows all.
HOSTS = {"svc": "address", "cli": "address", "head": "debian", "w1": "none", "w2": "debian", "w3": "address"}
PYTHON = str(Path(sys.executable).parent / "python")
_STEP = re.compile(r"^(?:\([^)]*\) )?step (\d+)/\d+")


def configuration(name: str, data: str, **changes: Any) -> dict[str, Any]:
    """A pre-training of two workers; `changes` replace or extend its sections."""
    crops = {"size_DHW": [16, 16, 16], "scale": [1.0, 1.2], "min_overlap": 0.3}
    engine = {"steps": STEPS, "warmup_steps": 4, "log_every": 1, "checkpoint_every": 20, "probe_every": 0}
    job: dict[str, Any] = {
        "name": name,
        "data": data,
        "method": {"name": "pgl", "crops": crops, "hidden": 32, "out": 16},
        "backbone": {"name": "resenc", "arguments": SMALL["resenc"]},  # starts without MONAI, seconds sooner
        "stream": {"global_batch": 4, "lanes": 8},
        "engine": engine,
        "cluster": {"workers": 2},
    }
    for section, change in changes.items():
        job[section] = job.get(section, {}) | change
    return job


def publish(fleet: Fleet) -> None:
    """Write the data set, with the key of those who may."""
    command = [PYTHON, "-c", f"from tests.kit.phantoms import write_phantoms; write_phantoms({DATA!r}, 16)"]
    done = fleet.run(CLIENT, command, variables=fleet.bare | fleet.s3_variables("ingest"))
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Outcome:
    """What a job left: steps and losses of its points in MLflow, in order, and digests of its samples and weights."""

    points: list[int]
    losses: list[float]
    samples: str
    weights: str
    status: str


class Job:
    """One job at work; its lines carry the time at which the client's user read them."""

    def __init__(self, fleet: Fleet, config: dict[str, Any], kind: str = "pretrain") -> None:
        path = fleet.home(CLIENT) / f"{config['name']}.yaml"
        path.write_text(yaml.safe_dump(config))
        self._start(fleet, str(config["name"]), [kind, str(path)])

    @classmethod
    def of_words(cls, fleet: Fleet, name: str, words: Sequence[str]) -> "Job":
        """A job without a configuration file, by the words of its command."""
        job = cls.__new__(cls)
        job._start(fleet, name, words)
        return job

    def _start(self, fleet: Fleet, name: str, words: Sequence[str]) -> None:
        self.name = name
        self.lines: list[tuple[float, str]] = []
        self._fleet = fleet
        self.began = time.monotonic()
        self._process = fleet.client(words)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    @property
    def text(self) -> str:
        """All that was read so far."""
        return "\n".join(line for _, line in self.lines)

    def steps(self, since: float = 0.0) -> list[tuple[float, int]]:
        """Steps as they were read, each with its time."""
        return [(at, int(match[1])) for at, line in self.lines if at >= since and (match := _STEP.match(line))]

    def wait_for(self, pattern: str, limit_s: float = 400, after: int = 0) -> float:
        """The time of the first line with this in it, from line number `after` on.

        Raises:
            AssertionError: the job ended, or time did, without it.
        """
        end = time.monotonic() + limit_s
        number = after
        while time.monotonic() < end:
            over = not self._reader.is_alive()
            for at, line in self.lines[number:]:
                number += 1
                if re.search(pattern, line):
                    return at
            if over:
                break
            time.sleep(0.1)
        raise AssertionError(f"{pattern!r} was not read:\n{self.text[-5000:]}")

    def wait_for_step(self, step: int) -> float:
        """The time at which this step was read."""
        return self.wait_for(rf"^(?:\([^)]*\) )?step {step}/")

    def end(self, limit_s: float = 600) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        code = self._process.wait(limit_s)
        self._reader.join(30)
        return code

    def log(self) -> str:
        """All that its driver and workers said, with who said it."""
        listed = self._fleet.run(CLIENT, ["tomoscale", "jobs", "list", "--json", "--address", self._fleet.jobs_address])
        number = max(job["id"] for job in json.loads(listed.stdout) if job["id"].startswith(f"{self.name}-"))
        return self._fleet.run(
            CLIENT, ["tomoscale", "jobs", "logs", number, "--address", self._fleet.jobs_address]
        ).stdout

    def outcome(self, steps: int = STEPS) -> Outcome:
        """Read on the client's machine, as nothing else is in the network; after its last step."""
        done = self._fleet.run(CLIENT, [PYTHON, "-m", "tests.kit.fleet_outcome", self.name, str(steps)])
        assert done.returncode == 0, done.stderr[-3000:]
        return Outcome(**json.loads(done.stdout.splitlines()[-1]))
