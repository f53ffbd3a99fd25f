"""What all tests need of their process, and how they are dealt to the processes of `-n`."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

# A shell that starts a program in the background has it, and all that it starts, ignore Ctrl-C, which tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent
# Files that share a server, or a pool of ranks, are run by one process. Else each file is dealt by itself.
SHARED = {"service": "services", "contract": "contracts", "distributed": "ranks"}
# They start servers of their own, and take minutes.
APART = {"test_pretrain_survives", "test_search_survives", "test_separate_environment"}
# The longest first, so that all processes end at about the same time; not three stacks of servers at once.
FIRST = ("test_pretrain_survives", "contracts", "services", "ranks", "test_search_survives")
_scratch = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Several processes with a thread a core each would spend their time waiting for one another."""
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # What killed processes and libraries leave in the folder for temporary files goes with it.
        config.stash[_scratch] = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="tt-")
        tempfile.tempdir = None


def pytest_unconfigure(config: pytest.Config) -> None:
    if _scratch in config.stash:
        shutil.rmtree(config.stash[_scratch], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal groups to processes; each group keeps its order."""
    groups = [_group(item.path) for item in items]
    for item, group in zip(items, groups, strict=True):
        item.add_marker(pytest.mark.xdist_group(group))
    rank = {group: number for number, group in enumerate(FIRST)}
    order = sorted(range(len(items)), key=lambda i: rank.get(groups[i], len(FIRST)))
    items[:] = [items[i] for i in order]


def _group(path: Path) -> str:
    if path.stem in APART:
        return path.stem
    folder = path.relative_to(HERE).parts[0]
    return SHARED.get(folder, str(path.relative_to(HERE)))
