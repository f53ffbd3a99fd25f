"""Debian's PostgreSQL on a node of namespaces, set up as the image of docker/compose.yaml sets its own up."""

import os
import subprocess
import time
from pathlib import Path

from tests.kit.nodes import Lab

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
START_S = 300.0
NOBODY = 65534
_AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
_SERVE = """
cd "$1"
"$2/initdb" -D data -U mlflow --pwfile password -A scram-sha-256 -E UTF8 --locale=C --data-checksums
echo 'host all all all scram-sha-256' >> data/pg_hba.conf
exec "$2/postgres" -D data -h 0.0.0.0 -k "$1"
"""


def why_not() -> str:
    """Why it cannot be started; empty where it can."""
    return "" if PROGRAMS else "PostgreSQL's server is not installed"


def start_in(lab: Lab, node: str, folder: Path, password: str) -> None:
    """A server on the node's port 5432 with the user and database `mlflow`.

    Raises:
        TimeoutError: it does not answer; with its log.
    """
    folder.mkdir()
    (folder / "password").write_text(password)
    for path in (folder, folder / "password"):
        path.chmod(0o700)
        os.chown(path, NOBODY, NOBODY)
    log = folder.parent / f"{node}.log"
    command = [*_AS_NOBODY, "bash", "-ec", _SERVE, "serve", str(folder), str(PROGRAMS[-1])]
    lab.start(node, command, {"PATH": "/usr/bin:/bin"}, log)
    end = time.monotonic() + START_S
    while True:
        try:
            query(lab, node, password, "CREATE DATABASE mlflow", database="postgres")
        except (LookupError, RuntimeError) as error:
            if time.monotonic() > end:
                raise TimeoutError(f"{error}\n{log.read_text()[-3000:]}") from error
            time.sleep(1)
        else:
            return


def query(lab: Lab, node: str, password: str, statement: str, database: str = "mlflow") -> str:
    """The rows of an answer, one a line.

    Raises:
        LookupError: the node's first process is not there.
        RuntimeError: the server refused, or is not there.
    """
    command = [str(PROGRAMS[-1] / "psql"), "-h", "127.0.0.1", "-U", "mlflow", "-d", database, "-Atc", statement]
    done = subprocess.run(
        lab.inside(node, command), env={"PGPASSWORD": password}, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout
