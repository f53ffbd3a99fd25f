"""What is carried into a fork is an error there at once; unrefused, it waits for threads that are not there."""

import subprocess
import sys
from pathlib import Path

from storage.testing.phantoms import publish_phantoms
from tests.kit.httpserver import served

# A process of its own, since a fork of this one would carry the tests' threads into its end.
_SCRIPT = """
import os, signal, sys
from storage.objects import open_store
from storage.errors import StoreError
from storage.stream.crop_stream import CropStream, StreamSpec
from storage.reading.volume_store import Crop, VolumeStore

url, http = sys.argv[1:]
remote, crop = open_store(http), Crop("phantom-000", (0, 0, 0), (40, 40, 40))
remote.get("latest")
store = VolumeStore(url)
store.read(crop)
stream = CropStream(store, StreamSpec(seed=0, global_batch=2, crop_DHW=(8, 8, 8), lanes=2))
next(stream)
child = os.fork()
if child == 0:
    signal.alarm(60)
    calls = (
        lambda: store.read(crop),
        lambda: next(stream),
        lambda: remote.get("latest"),
        lambda: remote.get_ranges("latest", [(0, 1), (1, 2)]),
        lambda: open_store(http).get("latest"),
    )
    for call in calls:
        try:
            print("answered", call(), flush=True)
        except StoreError as error:
            print(error, flush=True)
    stream.close()
    with VolumeStore(url) as own:
        print("read", own.read(crop).shape, flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
next(stream)
stream.close()
store.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_what_is_carried_into_a_fork_is_refused_there(tmp_path: Path) -> None:
    publish_phantoms(tmp_path.as_uri(), [(40, 40, 40)])
    with served(tmp_path) as http:
        ran = subprocess.run(
            [sys.executable, "-c", _SCRIPT, tmp_path.as_uri(), http],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=Path(__file__).parents[3],
        )
    assert ran.returncode == 0, ran.stderr
    *refused, last = ran.stdout.splitlines()
    assert len(refused) == 5
    assert all("a fork of that process" in line and "spawn or forkserver" in line for line in refused), refused
    assert last == "read (1, 40, 40, 40)", "what it opens itself works"
