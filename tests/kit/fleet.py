"""A cluster on machines of namespaces, started as docs/cluster.md says: S3 and MLflow, a head, workers, and a client.

The services are those of docker/compose.yaml, with the keys that docker/make_secrets.sh makes; MLflow keeps its runs in
SQLite.
"""

import configparser
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.kit import ROOT
from tests.kit.nodes import Lab

BIN = Path(sys.executable).parent
SERVICES, HEAD, CLIENT = "svc", "head", "cli"
START_S = 300.0
# Small machines: a CPU each, and as much memory for objects as these tests need.
_HEAD_SIZE = "--object-store-memory=100000000"
_WORKER_SIZE = "--num-cpus=1 --object-store-memory=100000000"


GUIDE = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
# The guide's way to notice a lost node sooner.
HEALTH = dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", GUIDE))


def guide(mark: str) -> str:
    """The commands below a mark of docs/cluster.md."""
    (block,) = re.findall(rf"<!-- {mark} -->\n```\n(.*?)```", GUIDE, flags=re.DOTALL)
    return str(block)


@dataclass
class Fleet:
    """The machines, and what runs on them.

    Args:
        workers: Names of the workers that are started at once; `spare` are made, and started when asked.
        own_name: As of `Lab`.
        disk: As of `Lab`.
        tls: Whether all that the guide can encrypt is encrypted.
    """

    workers: Sequence[str] = ("w1", "w2")
    spare: Sequence[str] = ("w3",)
    own_name: Any = "address"
    disk: dict[str, str] = field(default_factory=dict)
    tls: bool = False

    def __post_init__(self) -> None:
        names = [SERVICES, HEAD, CLIENT, *self.workers, *self.spare]
        self.lab = Lab(names, self.own_name, self.disk)
        self._secrets: dict[str, str] = {}
        self._before: set[str] = set()  # Ray's numbers of what ran on machines that were switched on since

    def __enter__(self) -> "Fleet":
        self.lab.__enter__()
        try:
            self._write_secrets()
            if self.tls:
                self._write_certificates()
            self.start_machine(SERVICES, "sleep infinity")
            self.start_s3()
            self.start_mlflow()
            self.start_machine(CLIENT, "sleep infinity")
            self.start_node(HEAD)
            for name in self.workers:
                self.start_node(name)
            self.wait_for_nodes(1 + len(self.workers))
        except BaseException:
            self.lab.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.lab.close()

    # -- machines

    def home(self, name: str) -> Path:
        """The project's folder on a machine."""
        return self.lab.folder / name / "home"

    def start_machine(self, name: str, script: str) -> None:
        """Switch a machine on; its first process is the script."""
        log = self.lab.folder / f"{name}.log"
        self.lab.start(name, ["bash", "-c", script], self.bare, log)
        _until(lambda: self._is_on(name), f"{name} is on", log)

    def start_node(self, name: str, **changes: str) -> None:
        """Switch a node of Ray on, which starts it again whenever it ends, as `Restart=always` does.

        Args:
            name: Of the machine.
            changes: Variables of its `nodes.env` that are other than they should be.
        """
        self._before |= {number for number, address in self.nodes().items() if address == self.lab.address(name)}
        home = self.home(name)
        (home / "cluster").unlink(missing_ok=True)
        (home / "cluster").symlink_to(ROOT / "cluster")
        variables = self._variables() | changes
        (home / "nodes.env").write_text("".join(f"{key}={value}\n" for key, value in variables.items()))
        (home / "ray_token").write_text(self._secrets["token"])
        lines = guide("head" if name == HEAD else "worker").strip()
        lines += f" {_HEAD_SIZE if name == HEAD else _WORKER_SIZE}"
        health = "".join(f"export {key}={value}\n" for key, value in HEALTH.items())
        first = guide("every machine") + (guide("tls variables") if self.tls else "") + health
        if self.tls and name == HEAD:
            (home / "proxy.conf").write_text(self._placed(guide("tls proxy"), name))
            first += "stunnel proxy.conf &\n"
        self.start_machine(name, f"{first}while true; do {self._placed(lines, name)}; sleep 1; done")

    def _placed(self, text: str, name: str) -> str:
        if self.tls:
            text = text.replace("--dashboard-host=HEAD", "--dashboard-host=127.0.0.1")
            text = text.replace("http://HEAD:8265", self.jobs_address)
        return text.replace("HEAD", self.lab.address(HEAD)).replace("WORKER", self.lab.address(name))

    def wait_for_nodes(self, count: int) -> None:
        """Until the head counts so many nodes alive, of which none is what a machine ran before it was switched on.

        Raises:
            AssertionError: not within `START_S`.
        """

        def are_there() -> bool:
            nodes = self.nodes()
            return len(nodes) == count and not self._before & nodes.keys()

        _until(are_there, f"{count} nodes", self.lab.folder / f"{HEAD}.log", pause_s=1.0)

    def nodes(self) -> dict[str, str]:
        """Addresses of the nodes that Ray takes for alive, by its numbers; none while the head does not answer."""
        done = self.run(CLIENT, [str(BIN / "python"), "-c", _NODES, self.jobs_address], timeout=120)
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def kill(self, name: str, title: str) -> int:
        """SIGKILL to the processes of a machine whose command line has this in it; how many there were."""
        count = 0
        for pid in self.lab.pids(name):
            try:
                if title in " ".join(psutil.Process(pid).cmdline()):
                    os.kill(pid, signal.SIGKILL)
                    count += 1
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        return count

    def fill_disk(self, name: str) -> None:
        """Leave no byte free where a machine keeps temporary files and Ray's logs; it needs a `disk` of its own."""
        assert name in self.disk
        done = self.run(name, ["sh", "-c", "cat /dev/zero > /tmp/node/full"], variables=self.bare)
        assert "No space left" in done.stderr, done.stderr

    def free_disk(self, name: str) -> None:
        """Take that back."""
        assert self.run(name, ["rm", "/tmp/node/full"], variables=self.bare).returncode == 0

    def announce(self, name: str, seconds: int = 90) -> None:
        """Give notice that a machine of Ray will be taken away."""
        command = ["ray", "drain-node", f"--address={self.lab.address(HEAD)}:6379", f"--node-id={self.node(name)}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
        done = self.run(HEAD, [*command, f"--deadline-remaining-seconds={seconds}"])
        assert done.returncode == 0, done.stdout + done.stderr

    def node(self, name: str) -> str:
        """Ray's own number of a machine."""
        numbers = [number for number, address in self.nodes().items() if address == self.lab.address(name)]
        return next(number for number in numbers if number not in self._before)

    # -- services

    @property
    def jobs_address(self) -> str:
        """Of the job server."""
        return f"https://{self.lab.address(HEAD)}:8443" if self.tls else f"http://{self.lab.address(HEAD)}:8265"

    def _service_address(self, port: int) -> str:
        return f"{'https' if self.tls else 'http'}://{self.lab.address(SERVICES)}:{port}"

    def start_s3(self) -> None:
        """Start the object store, over the data that it has."""
        service = self._service("s3")
        (self.home(SERVICES) / "data").mkdir(exist_ok=True)
        environment = {key: value for key, value in service["environment"].items() if key.startswith("WEED_")}
        stem = self.home(SERVICES) / "machine"
        encrypted = [f"-s3.cert.file={stem}.pem", f"-s3.key.file={stem}.key"] if self.tls else []
        self._serve("s3", [str(BIN / "weed"), *service["command"][1:], *encrypted], environment)
        make = [str(BIN / "python"), "-m", "cluster.buckets", "volumes", "runs", "mlflow"]
        own = self.bare | self.s3_variables("admin")
        log = self.lab.folder / "s3.log"
        _until(lambda: self.run(SERVICES, make, variables=own, timeout=120).returncode == 0, "S3 answers", log)

    def stop_s3(self) -> None:
        """End it at once, as a power cut would."""
        assert self.kill(SERVICES, "weed") > 0

    def start_mlflow(self) -> None:
        """Start MLflow, over the runs that it has."""
        service = self._service("mlflow")
        home = self.home(SERVICES)
        changes = {
            "--backend-store-uri": f"sqlite:///{home}/mlflow.db",
            "--workers": "1",
            "--allowed-hosts": f"{self.lab.address(SERVICES)}:5000,127.0.0.1:*",
        }
        words = [word.split("=", 1)[0] for word in service["command"][2:]]
        command = [
            f"{word}={changes.get(word, full.partition('=')[2])}"
            for word, full in zip(words, service["command"][2:], strict=True)
        ]
        ini = self.home(SERVICES) / "secrets" / "mlflow_auth.ini"
        ini.write_text(re.sub(r"(?m)^database_uri.*$", f"database_uri = sqlite:///{home}/auth.db", ini.read_text()))
        environment = self.s3_variables("mlflow") | {
            "MLFLOW_S3_ENDPOINT_URL": self._service_address(8333),
            "MLFLOW_AUTH_CONFIG_PATH": str(ini),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self._secrets["token"],
        }
        if self.tls:
            command.append(f"--uvicorn-opts=--ssl-certfile={home}/machine.pem --ssl-keyfile={home}/machine.key")
        self._serve("mlflow", [str(BIN / "python"), "-m", "mlflow", "server", *command], environment)
        trust = [f"--ca-certificate={home}/ca.pem"] if self.tls else []
        look = ["wget", "-q", "-O", "/dev/null", *trust, f"{self._service_address(5000)}/health"]
        log = self.lab.folder / "mlflow.log"
        _until(lambda: self.run(SERVICES, look).returncode == 0, "MLflow answers", log)

    def stop_mlflow(self) -> None:
        """End it at once."""
        assert self.kill(SERVICES, "mlflow") > 0

    def _service(self, name: str) -> Any:
        home = self.home(SERVICES)
        text = (ROOT / "docker/compose.yaml").read_text(encoding="utf-8")
        text = text.replace("-dir=/data", f"-dir={home}/data").replace("/run/secrets", f"{home}/secrets")
        return yaml.safe_load(text)["services"][name]

    def _serve(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        with (self.lab.folder / f"{name}.log").open("ab") as log:
            subprocess.Popen(
                self.lab.inside(SERVICES, command),
                env=self.bare | environment,
                cwd=self.home(SERVICES),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    # -- secrets and variables

    def _write_secrets(self) -> None:
        folder = self.home(SERVICES)
        shutil.copy(ROOT / "docker/make_secrets.sh", folder)
        subprocess.run(["sh", folder / "make_secrets.sh"], check=True, capture_output=True, timeout=120)
        client = (folder / "secrets" / "mlflow_client.env").read_text()
        self._secrets = dict(line.split("=", 1) for line in client.splitlines()) | {"token": secrets.token_hex(32)}

    def _write_certificates(self) -> None:
        folder = self.lab.folder / "certificates"
        folder.mkdir()
        addresses = {name: self.lab.address(name) for name in self.lab.names}
        script = guide("tls certificates").replace("ADDRESSES", " ".join(addresses.values()))
        subprocess.run(["bash", "-euc", script], cwd=folder, check=True, capture_output=True, timeout=120)
        for name, address in addresses.items():
            shutil.copy(folder / "ca.pem", self.home(name))
            for kind in ("key", "pem"):
                shutil.copy(folder / f"{address}.{kind}", self.home(name) / f"machine.{kind}")

    @property
    def secrets(self) -> dict[str, str]:
        """What nobody else may learn, by name."""
        return dict(self._secrets)

    @property
    def trust(self) -> dict[str, str]:
        """Whom a program on any machine trusts beside public authorities; nothing without TLS."""
        names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE") if self.tls else ()
        return {name: str(self.home(SERVICES) / "ca.pem") for name in names}

    def s3_variables(self, name: str) -> dict[str, str]:
        """How somebody with the key of that name reaches S3."""
        keys = configparser.ConfigParser()
        keys.read(self.home(SERVICES) / "secrets" / f"aws_{name}")
        section = keys["default"]
        return {
            "AWS_ACCESS_KEY_ID": section["aws_access_key_id"],
            "AWS_SECRET_ACCESS_KEY": section["aws_secret_access_key"],
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL_S3": self._service_address(8333),
        } | self.trust

    def _variables(self) -> dict[str, str]:
        """`nodes.env`, filled in."""
        user, password = (self._secrets[f"MLFLOW_TRACKING_{part}"] for part in ("USERNAME", "PASSWORD"))
        return self.s3_variables("trainer") | {
            "MLFLOW_TRACKING_URI": self._service_address(5000),
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password,
        }

    @property
    def bare(self) -> dict[str, str]:
        """A machine's own environment: it knows the programs and nothing of the cluster."""
        prefixes = ("RAY_", "MLFLOW_", "AWS_", "TOMOSCALE_")
        own = {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
        return own | {
            "PATH": os.pathsep.join([str(BIN), own.get("PATH", os.defpath)]),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def client_variables(self) -> dict[str, str]:
        """Of the machine that jobs are sent from."""
        token = self.home(CLIENT) / "ray_token"
        if not token.exists():  # a client at work reads it
            token.write_text(self._secrets["token"])
        return self.bare | self._variables() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}

    # -- commands

    def run(
        self, name: str, command: Sequence[str], *, variables: dict[str, str] | None = None, timeout: float = 300
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command on a machine, with a client's environment unless `variables` are given."""
        return subprocess.run(
            self.lab.inside(name, command),
            env=self.client_variables() if variables is None else variables,
            cwd=self.home(name),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def client(self, words: Sequence[str]) -> "subprocess.Popen[str]":
        """Send a job as the guide says, with other words in place of `pretrain CONFIG`; what it says is in `stdout`."""
        lines = guide("client").replace("pretrain CONFIG", shlex.join(words))
        lines = f"cd {self.home(CLIENT)}\n{self._placed(lines, CLIENT)}"
        return subprocess.Popen(
            self.lab.inside(CLIENT, ["bash", "-ec", lines]),
            env=self.client_variables(),
            cwd=self.home(CLIENT),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _is_on(self, name: str) -> bool:
        try:
            return self.run(name, ["true"], variables=self.bare).returncode == 0
        except LookupError:
            return False


_NODES = """
import json, os, sys, urllib.request
token = open(os.environ["RAY_AUTH_TOKEN_PATH"]).read()
request = urllib.request.Request(sys.argv[1] + "/nodes?view=summary", headers={"Authorization": "Bearer " + token})
nodes = json.load(urllib.request.urlopen(request, timeout=30))["data"]["summary"]
print(json.dumps({n["raylet"]["nodeId"]: n["ip"] for n in nodes if n["raylet"]["state"] == "ALIVE"}))
"""


def _until(ready: Callable[[], bool], what: str, log: Path, pause_s: float = 0.3) -> None:
    end = time.monotonic() + START_S
    while not ready():
        if time.monotonic() > end:
            raise AssertionError(f"not within {START_S:.0f} s: {what}\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(pause_s)
