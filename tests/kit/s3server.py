"""A real S3 server (SeaweedFS) for tests: on loopback, with credentials, in a temporary directory."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ADMIN = ("admin-key", "admin-secret-for-tests")
READER = ("reader-key", "reader-secret-for-tests")
START_S = 240.0
# The server is tied to the life of this process, so that a killed test run leaves nothing behind.
_TIED = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


class S3Server:
    """One SeaweedFS server. `stop` and `start` keep data and ports."""

    def __init__(self) -> None:
        binary = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if binary is None:
            raise FileNotFoundError("weed; install the extra 'local'")
        self._binary = binary
        self._folder = Path(tempfile.mkdtemp(prefix="s3-"))
        self._ports = free_ports(8)
        self._process: subprocess.Popen[bytes] | None = None
        self.bucket = "volumes"
        self.endpoint = f"http://127.0.0.1:{self._ports[0]}"
        self.environment = {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ADMIN[0],
            "AWS_SECRET_ACCESS_KEY": ADMIN[1],
        }
        self.write_identities()

    def write_identities(self, *, reader: bool = True, others: list[dict[str, object]] | None = None) -> None:
        """Write the server's credentials, with or without those of the reader; read by it when it starts."""
        identities = [
            {
                "name": "admin",
                "credentials": [{"accessKey": ADMIN[0], "secretKey": ADMIN[1]}],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            }
        ]
        if reader:
            identities.append(
                {
                    "name": "reader",
                    "credentials": [{"accessKey": READER[0], "secretKey": READER[1]}],
                    "actions": [f"Read:{self.bucket}", f"List:{self.bucket}"],
                }
            )
        (self._folder / "s3.json").write_text(json.dumps({"identities": [*identities, *(others or [])]}))

    def start(self) -> None:
        """Start the server and wait until it takes writes."""
        assert self._process is None
        s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = self._ports
        (self._folder / "data").mkdir(exist_ok=True)
        (self._folder / "tmp").mkdir(exist_ok=True)
        command = [
            *("server", f"-dir={self._folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-master.port={master}", f"-master.port.grpc={master_grpc}", f"-volume.port={volume}"),
            *(f"-volume.port.grpc={volume_grpc}", "-filer", "-filer.disableHttp", f"-filer.port={filer}"),
            *(f"-filer.port.grpc={filer_grpc}", "-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}"),
            f"-s3.config={self._folder / 's3.json'}",
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=64", "-volume.max=32"),
            # A restarted master waits a whole election before it leads again; the default is 10 s.
            *("-master.telemetry=false", "-master.electionTimeout=1s", "-master.heartbeatInterval=100ms"),
        ]
        with (self._folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _TIED, str(os.getpid()), self._binary, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=self._environment(),
                start_new_session=True,
            )
        self._wait()

    def _environment(self) -> dict[str, str]:
        # The server makes an administrator of any AWS keys that it finds in its environment.
        own = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        return {**own, "TMPDIR": str(self._folder / "tmp"), "HOME": str(self._folder)}

    def _wait(self) -> None:
        client = self.client()
        end = time.monotonic() + START_S
        while True:
            assert self._process is not None
            if self._process.poll() is not None:
                raise RuntimeError(f"weed ended with {self._process.returncode}:\n{self.log()}")
            try:
                if self.bucket not in [b["Name"] for b in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=self.bucket)
                client.put_object(Bucket=self.bucket, Key="ready", Body=b"ready")
                client.delete_object(Bucket=self.bucket, Key="ready")
                return
            except (ClientError, BotoCoreError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def client(self):  # type: ignore[no-untyped-def]
        """A boto3 client with the admin's keys."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=ADMIN[0],
            aws_secret_access_key=ADMIN[1],
            config=Config(retries={"max_attempts": 1}, connect_timeout=20, read_timeout=60),
        )

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Stop the server; data and ports stay for `start`."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(2)  # its servers would wait longer for idle connections to end
            self._process = None
        except subprocess.TimeoutExpired:
            self.kill()

    def remove(self) -> None:
        """End everything and delete what it left."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        # The server puts its sockets into the temporary folder of the machine whatever TMPDIR says.
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)

    def log(self) -> str:
        """The last lines the server wrote."""
        return "\n".join((self._folder / "weed.log").read_text(errors="replace").splitlines()[-30:])


def free_ports(count: int) -> list[int]:
    """Different free ports, apart from those of a local stack and of another test process that starts just now."""
    # Below the range from which outgoing connections take theirs, too.
    first = 10000 + os.getpid() % 100 * 100
    found: list[int] = []
    for port in random.SystemRandom().sample(range(first, first + 100), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports from {first} on")
