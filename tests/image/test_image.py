"""The image is built as the guide says and does what docker/compose.yaml has it do: `make image-test`.

It takes root, Debian's buildah and mmdebstrap, a mirror of packages, some 7 GB and, on two quiet cores, a quarter of an
hour. What it did is printed.
"""

import csv
import os
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from packaging.utils import canonicalize_name

from jobs.tracking.bundles import read_encoder
from ssl_core.portable import Predictor
from ssl_core.portable.head.assess import assess
from tests.kit import ROOT, image, nodes, postgresql, scans
from tests.kit.bundles import scan
from tests.kit.small_models import head_bundle, segmenter_bundle

if "TOMOSCALE_IMAGE_TEST" not in os.environ:
    pytest.skip("a quarter of an hour long: `make image-test` runs it", allow_module_level=True)
if reason := image.why_not() or nodes.why_not() or postgresql.why_not():
    pytest.skip(reason, allow_module_level=True)

pytestmark = [pytest.mark.service, pytest.mark.timeout(7200)]
DOCKER = ROOT / "docker"
SERVICES = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
LARGEST_B = 2_000_000_000
PATIENCE_S = 600.0
JOB = {
    "name": "image",
    "data": "s3://volumes/scans",
    "runs": "s3://runs",
    "method": {"name": "pgl", "crops": {"size_DHW": [16, 32, 16], "min_overlap": 0.3}, "hidden": 16, "out": 8},
    "backbone": {"name": "basic_unet", "arguments": {"features": [4, 4, 8, 8, 16, 4]}},
    "stream": {"global_batch": 4, "lanes": 8},
    "engine": {"steps": 6, "warmup_steps": 2, "log_every": 2, "checkpoint_every": 3, "probe_every": 0},
}


def say(text: str) -> None:
    print(f"image: {text}", flush=True)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A folder that others may enter; /tmp is often of memory, so that TMPDIR says where there is room."""
    folder = Path(tempfile.mkdtemp(prefix="image-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def buildah(scratch: Path) -> Iterator[image.Buildah]:
    """With the image built."""
    tool = image.Buildah(scratch / "storage")
    tool.folder.mkdir()
    begin = time.monotonic()
    tool.make_base()
    middle = time.monotonic()
    say(f"base of Debian {image.SUITE} from {image.mirror()} in {(middle - begin) / 60:.1f} minutes")
    tool.build(image.pip_settings(scratch / "pip"))
    say(f"docker/Dockerfile built in {(time.monotonic() - middle) / 60:.1f} minutes")
    yield tool
    tool.remove()


@pytest.fixture(scope="module")
def root(buildah: image.Buildah) -> Path:
    return buildah.root_of_image()


def test_the_image_is_small_and_says_who_runs_it_and_whether_it_is_well(buildah: image.Buildah, root: Path) -> None:
    size_B = image.size_of(root)
    say(f"{size_B / 1e6:.0f} MB of files")
    assert size_B <= LARGEST_B
    settings = buildah.config()
    assert settings["User"] == "1000:1000"
    assert settings["Entrypoint"] == ["tini", "--"]
    assert settings["Healthcheck"]["Test"][:2] == ["CMD", "wget"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert settings["Labels"]["org.opencontainers.image.version"] == version


def test_the_image_holds_the_packages_of_its_lock_and_no_others(root: Path) -> None:
    listing = "import importlib.metadata as m; print(*(d.name + '==' + d.version for d in m.distributions()))"
    variables = {"PATH": os.environ["PATH"]}
    command = ["chroot", root, "/opt/venv/bin/python", "-c", listing]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    packages = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in done.stdout.split()}
    lines = [line for line in (DOCKER / "runtime.lock").read_text().splitlines() if line[0] != "#"]
    lock = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    assert packages.keys() - lock.keys() <= {"tomoscale", "pip", "setuptools"}
    # A CPU wheel of torch calls itself 2.13.0+cpu.
    assert {name: packages[name].split("+")[0] for name in lock} == lock
    say(f"{len(packages)} packages, those of docker/runtime.lock")


class Composition:
    """The services of docker/compose.yaml, each a node of its own with the image as its read-only root."""

    def __init__(self, lab: nodes.Lab, root: Path, folder: Path, settings: dict[str, Any]) -> None:
        self.lab, self.root, self.folder = lab, root, folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.image = dict(line.split("=", 1) for line in settings["Env"]) | {"HOME": "/home/tomoscale"}
        self.entrypoint: list[str] = settings["Entrypoint"]
        self.health: list[str] = settings["Healthcheck"]["Test"]
        shutil.copy(DOCKER / "make_secrets.sh", folder)
        subprocess.run(["sh", folder / "make_secrets.sh"], check=True, capture_output=True, timeout=120)

    def environment(self, name: str) -> dict[str, str]:
        """What compose gives a service: the image's variables, those of its files, its own."""
        variables = dict(self.image)
        for file in SERVICES[name].get("env_file", []):
            path = self.folder / file if file.startswith("secrets/") else DOCKER / file
            lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
            variables |= dict(line.split("=", 1) for line in lines)
        return variables | SERVICES[name]["environment"]

    def start(self, name: str, command: Sequence[str] = (), volumes: Sequence[str] = ()) -> "subprocess.Popen[bytes]":
        own = self.folder / name
        (own / "run" / "secrets").mkdir(parents=True)
        for secret in SERVICES[name]["secrets"]:
            shutil.copy(self.folder / "secrets" / secret, own / "run" / "secrets" / secret)
        command = command or SERVICES[name]["command"]
        say(f"{name}: {' '.join(command)}")
        volumes = [volume.rpartition(":")[2] for volume in SERVICES[name]["volumes"]] + list(volumes)
        wrapped = image.in_container(self.root, own, volumes, [*self.entrypoint, *command])
        process = self.lab.start(name, wrapped, self.environment(name), self.log(name))
        self.processes[name] = process
        return process

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def run(self, name: str, command: Sequence[str], timeout: float = PATIENCE_S) -> "subprocess.CompletedProcess[str]":
        """A further command in a service at work, as its user."""
        inside = self.lab.inside(name, ["--root", "--wd", "--", *image.AS_USER, *command])
        return subprocess.run(inside, env=self.environment(name), capture_output=True, text=True, timeout=timeout)

    def wait(self, name: str, test: Sequence[str] | None = None) -> None:
        """Until the service's own health check passes."""
        kind, *command = test or SERVICES[name]["healthcheck"]["test"]
        assert kind == "CMD"
        begin = time.monotonic()
        while True:
            try:
                done = self.run(name, command, timeout=60)
            except (LookupError, subprocess.TimeoutExpired):
                done = None
            if done is not None and done.returncode == 0:
                say(f"{name} is well after {time.monotonic() - begin:.0f} s: {' '.join(command)}")
                return
            assert time.monotonic() - begin < PATIENCE_S, (done, self.log(name).read_text()[-3000:])
            time.sleep(2)


@pytest.fixture(scope="module")
def composition(buildah: image.Buildah, root: Path, scratch: Path) -> Iterator[Composition]:
    """All services but the GPU's, well; PostgreSQL is Debian's, as its own image is not built here."""
    with nodes.Lab(["s3", "postgres", "mlflow", "head", "worker", "ingest", "offline"]) as lab:
        made = Composition(lab, root, scratch, buildah.config())
        password = (scratch / "secrets" / "postgres_password").read_text()
        postgresql.start_in(lab, "postgres", scratch / "postgres", password)
        for name in ("s3", "mlflow", "head", "worker"):
            made.start(name)
            # The worker's is the image's.
            made.wait(name, None if "healthcheck" in SERVICES[name] else made.health)
        yield made


def test_nobody_writes_the_root_of_a_service_and_none_runs_as_root(composition: Composition) -> None:
    for name in ("s3", "mlflow", "head", "worker"):
        probe = 'grep -E "^(Uid|CapBnd|NoNewPrivs)" /proc/1/status; touch /opt/venv/x /home/tomoscale/x /tmp/x'
        done = composition.run(name, ["sh", "-c", probe])
        assert done.stdout.split() == ["Uid:", *["1000"] * 4, "CapBnd:", "0" * 16, "NoNewPrivs:", "1"], done
        assert "/opt/venv/x': Read-only file system" in done.stderr
        assert done.stderr.count("touch:") == 1


def test_a_data_set_is_published_and_a_job_trains_on_it(composition: Composition, scratch: Path) -> None:
    """As the head of docker/compose.yaml says: ingest with the key of `ingest`, then a job sent to the head."""
    folder = scratch / "ingest" / "data"
    scans.folder(folder, 6, shape=(20, 34, 22))
    ingest = ["tomoscale", "data", "ingest", "/data", "s3://volumes/scans", "--local"]
    assert composition.start("ingest", ingest, ["/data"]).wait(PATIENCE_S) == 0, composition.log("ingest").read_text()[
        -3000:
    ]
    doctor = composition.run("head", ["tomoscale", "doctor", "--store", "s3://runs"])
    say("doctor:\n" + doctor.stdout)
    (scratch / "head" / "tmp" / "job.yaml").write_text(yaml.safe_dump(JOB))
    command = ["tomoscale", "pretrain", "/tmp/job.yaml", "--address", "http://127.0.0.1:8265"]
    done = composition.run("head", command, timeout=2 * PATIENCE_S)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    say("pretrain: " + done.stdout.splitlines()[-1])
    password = (scratch / "secrets" / "postgres_password").read_text()
    runs = postgresql.query(composition.lab, "postgres", password, "SELECT status FROM runs")
    assert set(runs.split()) == {"FINISHED"}


def test_one_checkpoint_segments_classifies_and_measures_without_a_network(
    composition: Composition, scratch: Path
) -> None:
    """As a challenge runs an image, and `docs/how-to-use-models.md` says: a command a task, the model from a folder."""
    data = scratch / "offline" / "data"
    data.mkdir(parents=True)
    bundles = {
        "segmenter": segmenter_bundle(data / "segmenter", seed=3),
        "classifier": head_bundle(data / "classifier", seed=3),
        "regressor": head_bundle(data / "regressor", (), seed=3),
    }
    encoders = [read_encoder(path).weights for path in bundles.values()]
    assert all(torch.equal(weights[key], tensor) for weights in encoders for key, tensor in encoders[0].items())
    (data / "in").mkdir()
    source = scan(data / "in", (20, 34, 22))
    (data / "out").mkdir()
    os.chown(data / "out", 1000, 1000)
    command = image.in_container(composition.root, scratch / "offline", ["/data", "/tmp"], ["sleep", "infinity"])
    (scratch / "offline" / "run").mkdir()
    composition.lab.start("offline", command, composition.image, composition.log("offline"))
    composition.lab.cut("offline")

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        try:
            inside = composition.lab.inside("offline", ["--root", "--wd", "--", *image.AS_USER, *words])
        except LookupError as error:
            return subprocess.CompletedProcess(words, 1, "", str(error))
        return subprocess.run(inside, env=composition.image, capture_output=True, text=True, timeout=PATIENCE_S)

    end = time.monotonic() + PATIENCE_S
    while run("test", "-d", "/data/segmenter").returncode != 0:  # its own root is not there yet
        assert time.monotonic() < end, composition.log("offline").read_text()[-3000:]
        time.sleep(0.3)
    for kind, path in bundles.items():
        name = "mask.nii.gz" if kind == "segmenter" else f"{kind}.csv"
        words = ["tomoscale", "predict", f"/data/{kind}", f"/data/in/{source.name}", f"/data/out/{name}"]
        begin = time.monotonic()
        done = run(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        predictor = Predictor(path, "cpu", lambda _note: None)
        if kind == "segmenter":
            mask = np.asanyarray(nib.load(data / "out" / name).dataobj)
            assert np.mean(mask == predictor.predict(source)) > 0.999, "all but ties, which threads may decide"
        else:
            with (data / "out" / name).open(encoding="utf-8", newline="") as file:
                (row,) = csv.DictReader(file)
            for key, value in assess(predictor, source).items():
                assert (
                    row[key] == value if isinstance(value, str) else float(row[key]) == pytest.approx(value, rel=1e-4)
                )
        say(f"{kind} without a network in {time.monotonic() - begin:.1f} s")


def test_compiled_steps_are_refused_before_the_first_as_the_image_has_no_compiler(composition: Composition) -> None:
    program = (
        "import torch; from ssl_core.train.engine import Engine, EngineConfig;"
        "Engine(torch.nn.Linear(2, 2), EngineConfig(steps=2, warmup_steps=0, compile=True))"
    )
    done = composition.run("worker", ["python", "-c", program])
    last = done.stderr.splitlines()[-1]
    say(f"engine.compile: {last}")
    assert done.returncode == 1
    assert "ConfigError: engine.compile" in last
    assert "No working C++ compiler" in last


def test_a_node_that_is_told_to_stop_ends_at_once(composition: Composition) -> None:
    """tini passes SIGTERM on, which `ray start --block` as the first process would not act on."""
    begin = time.monotonic()
    composition.run("worker", ["sh", "-c", "kill -TERM 1"])
    composition.processes["worker"].wait(30)
    say(f"the worker ended {time.monotonic() - begin:.1f} s after SIGTERM")
