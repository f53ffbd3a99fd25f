"""What all tests need of their process, and how they are dealt to the processes of `-n`."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# A shell that starts a program in the background has it, and all that it starts, ignore Ctrl-C, which tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent
# A stack fills the cores while it starts, and Ray gives its node 30 s for that: no two at a time.
STACK = "service/stack/"
# The longest first, so that all processes of `-n` end at about the same time; of those with a stack, first those whose
# stacks are their own.
FIRST = (f"{STACK}test_stack_lifecycle.py", STACK, "contract/test_methods.py", "service")
_scratch = pytest.StashKey[str]()
_state = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Several processes with a thread a core each would spend their time waiting for one another."""
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # What killed processes and libraries leave in the folder for temporary files goes with it.
        config.stash[_scratch] = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="tt-")
        tempfile.tempdir = None
    if not hasattr(config, "workerinput"):  # what an ingest keeps in the user's state folder; workers inherit it
        config.stash[_state] = os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="tt-state-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _scratch in config.stash:
        shutil.rmtree(config.stash[_scratch], ignore_errors=True)
    if _state in config.stash:
        shutil.rmtree(config.stash[_state], ignore_errors=True)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test leaves in the environment would decide over tests that happen to follow in its process."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() | before.keys():
        if name != "PYTEST_CURRENT_TEST" and os.environ.get(name) != before.get(name):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """Each file goes to one process, as what a module's fixtures start is costly; files with a stack go to the same."""
    scheduler = LoadFileScheduling(config, log)
    scheduler._split_scope = lambda nodeid: STACK if STACK in nodeid else nodeid.partition("::")[0]
    return scheduler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files are dealt in the order of collection."""
    items.sort(key=lambda item: _rank(item.path.relative_to(HERE).as_posix()))


def _rank(file: str) -> int:
    return next((number for number, prefix in enumerate(FIRST) if file.startswith(prefix)), len(FIRST))
