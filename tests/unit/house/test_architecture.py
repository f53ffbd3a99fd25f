"""The shape of the house: who may import whom, and what no file may contain."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssl_core.bundle import _BORROWED

ROOT = Path(__file__).parents[3]
PACKAGES = ("storage", "ssl_core", "jobs", "cluster")
FORBIDDEN = {
    "storage": {"torch", "monai", "ray", "mlflow", "ssl_core", "jobs", "cluster"},
    "ssl_core": {"ray", "mlflow", "s3fs", "obstore", "boto3", "botocore", "jobs", "cluster"},
    "cluster": {"ssl_core", "jobs", "torch", "monai"},
    "jobs": set(),
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Top-level names that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): sorted(bad)
        for path in sources(package)
        if (bad := set(imported(path)) & FORBIDDEN[package])
    }
    assert not wrong


def test_who_only_plans_does_not_wait_for_monai() -> None:
    """Its import takes longer than that of all else together; clients, drivers and controllers have no use for it."""
    program = "import sys, jobs.pretrain_loop, jobs.tune, jobs.superpixels; print('monai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_portable_code_needs_only_what_a_bare_environment_has() -> None:
    allowed = {"numpy", "torch", "monai", "scipy"} | set(sys.stdlib_module_names)
    for path in sources("ssl_core/portable"):
        # Under some names a bundle holds the file of `storage` itself, its own imports made relative.
        held = Path(str(_BORROWED[path.name].__file__)) if path.name in _BORROWED else path
        assert not set(imported(held)) - allowed - ({"storage"} if held != path else set()), held


BANNED = {
    "bare except": re.compile(r"^\s*except\s*:", re.M),
    "pickle": re.compile(r"\bpickle\.(load|loads|dump|dumps)\b|torch\.(load|save)\("),
    "fork": re.compile(r"""(get_context|set_start_method)\(["']fork["']|\bos\.fork\("""),
    "unfinished": re.compile(r"\b(TODO|FIXME|XXX)\b"),
    "a path of one machine": re.compile(r"""["'(\s]/(home|Users|root|work)/"""),
}


@pytest.mark.parametrize("what", sorted(BANNED))
def test_nothing_banned_is_in_the_code(what: str) -> None:
    hits = [
        f"{path.relative_to(ROOT)}: {match.group(0).strip()}"
        for package in PACKAGES
        for path in sources(package)
        for match in BANNED[what].finditer(path.read_text(encoding="utf-8"))
    ]
    assert not hits


def test_load_state_dict_is_never_lenient() -> None:
    for package in PACKAGES:
        for path in sources(package):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "load_state_dict":
                    lenient = [k for k in node.keywords if k.arg == "strict" and ast.unparse(k.value) != "True"]
                    assert not lenient, f"{path}:{node.lineno}"


def test_files_stay_readable() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for package in PACKAGES
        for path in sources(package)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 460
    }
    assert not long
