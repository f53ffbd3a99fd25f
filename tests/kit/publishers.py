"""Processes that publish to one store at the same moment."""

import subprocess
import sys
from dataclasses import replace

from storage.format.records import VolumeRecord
from storage.ingest.policy import IngestPolicy
from storage.ingest.publishing.publish import publish
from storage.objects import open_store
from tests.kit.records import record


def appended(process: int, number: int) -> VolumeRecord:
    """The volume that a process appends by its publication of that number."""
    name = f"p{process}-{number}"
    digest = f"{process:02d}{number:02d}" * 16
    return replace(
        record(2), volume_id=name, subject=name, source=name, source_sha256=digest, content_sha256=digest, notes=()
    )


def append(url: str, process: int, each: int) -> None:
    """Publish `each` times, one more volume a time, once all processes are ready."""
    store = open_store(url)
    policy = IngestPolicy(split=(0.5, 0.0, 0.5), min_subjects=1)
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(each):
        publish(store, [appended(process, number)], policy, {"name": "x"}, append=True)


def together(url: str, *, processes: int, each: int) -> None:
    """Run `append` in so many processes, begun together; raises with what a failed one said."""
    code = (
        "import sys; from tests.kit.publishers import append; append(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, url, str(p), str(each)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for p in range(processes)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(process.communicate()[1])
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in running:
            _, said = process.communicate(timeout=300)
            if process.returncode:
                raise RuntimeError(said)
    finally:
        for process in running:
            process.kill()
            process.wait()
