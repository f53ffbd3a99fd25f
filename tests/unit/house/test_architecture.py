"""The shape of the house: who may import whom, and what no file may contain."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssl_core.bundle import _BORROWED
from tests.kit import house
from tests.kit.house import breaches

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


def test_the_rules_of_the_rooms_hold() -> None:
    assert breaches(house.sources()) == []


CODE = {  # a planted breach of each rule, and what is said of it
    "a room that may not be entered": (
        "storage.objects.planted",
        "from storage.format import manifest",
        "storage.objects.planted -> storage.format.manifest: objects may not enter format",
    ),
    "a late import": (
        "ssl_core.losses.planted",
        "def late() -> None:\n    from ssl_core.networks import registry",
        "ssl_core.losses.planted -> ssl_core.networks.registry: losses may not enter networks",
    ),
    "a room without a line in the table": (
        "jobs.utils.planted",
        "",
        "jobs.utils.planted: room jobs.utils is not in the table",
    ),
    "a top folder that may not be imported": (
        "storage.format.planted",
        "import ssl_core.config",
        "storage.format.planted -> ssl_core.config: storage may not import ssl_core",
    ),
    "stream enters ingest": (
        "storage.stream.planted",
        "from storage.ingest import policy",
        "storage.stream.planted -> storage.ingest.policy: stream may not enter ingest",
    ),
    "ingest enters stream": (
        "storage.ingest.planted",
        "import storage.stream.order",
        "storage.ingest.planted -> storage.stream.order: ingest may not enter stream",
    ),
    "product code enters a kit": (
        "jobs.demo.x",
        "from storage.testing import stores",
        "jobs.demo.x -> storage.testing.stores: only tests, jobs.bench, ssl_core.testing may enter storage.testing",
    ),
    "product code enters the benchmarks": (
        "jobs.pages.planted",
        "from jobs.bench import measure",
        "jobs.pages.planted -> jobs.bench.measure: only tests, jobs.cli may enter jobs.bench",
    ),
    "a file of too many lines": (
        "ssl_core.train.planted",
        "x = 1\n" * 401,
        "ssl_core.train.planted: 401 lines, at most 400",
    ),
}


@pytest.mark.parametrize("rule", CODE)
def test_a_planted_breach_of_each_rule_is_told(rule: str) -> None:
    module, text, expected = CODE[rule]
    assert expected in breaches(house.sources() | {module: text})


def test_a_planted_circle_of_files_is_told() -> None:
    planted = {
        "ssl_core.train.one": "from ssl_core.train import two",
        "ssl_core.train.two": "from ssl_core.train.three import x",
        "ssl_core.train.three": "def late() -> None:\n    import ssl_core.train.one",
    }
    circle = "circle of files: ssl_core.train.one, ssl_core.train.three, ssl_core.train.two"
    assert circle in breaches(house.sources() | planted)


def test_a_planted_crowd_of_files_is_told() -> None:
    planted = {f"storage.datasets.planted_{i}": "" for i in range(17)}
    crowd = [line for line in breaches(house.sources() | planted) if line.startswith("storage.datasets: ")]
    assert crowd == [
        f"storage.datasets: {17 + len(list((ROOT / 'storage/datasets').glob('[!_]*.py')))} files, at most 16"
    ]


def test_every_room_says_in_one_sentence_what_it_is_for() -> None:
    for path in (p for top in PACKAGES for p in sorted((ROOT / top).rglob("__init__.py"))):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert re.match(r"[A-Z`][^\n]{20,}\.( |$)", text.partition("\n")[0]), path


def test_variables_are_named_after_what_they_hold() -> None:
    """Words such as `found` or `mine` tell a value's story; fewer than one binding in 500 may."""
    names = [(module, *binding) for module, text in house.sources().items() for binding in house.bindings(text)]
    nameless = [f"{module}:{line} {name}" for module, name, line in names if name in house.NAMELESS]
    assert len(nameless) <= len(names) / 500, nameless


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


def test_who_only_plans_does_not_wait_for_monai_scipy_and_shards() -> None:
    """Their imports take longer than those of all else; clients, drivers and controllers have no use for them."""
    program = "import sys, jobs.pretrain.driver, jobs.tune.driver, jobs.superpixels; "
    program += "print({'monai', 'scipy', 'torch.distributed.fsdp'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_loop_of_pre_training_needs_no_ray() -> None:
    program = "import sys, jobs.pretrain.loop, jobs.torchrun; print({'ray', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_ray_shows_every_line_of_a_job() -> None:
    """It reads what to do with lines that are alike when it is imported, so a job says so before."""
    program = "import jobs.ingest; from ray._private.ray_constants import RAY_DEDUP_LOGS; print(RAY_DEDUP_LOGS)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("storage, ssl_core", ("ray", "mlflow")),
        ("storage", ("torch", "monai", "ray", "mlflow")),
        ("jobs.cli.main, jobs.ingest_config, jobs.ingestion", ("torch", "monai", "ray", "mlflow", "nibabel")),
    ],
)
def test_what_is_below_imports_nothing_of_what_is_above(imported: str, absent: tuple[str, ...]) -> None:
    program = f"import sys, {imported}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_module_of_storage_brings_torch_or_ray() -> None:
    modules = [name.removesuffix(".__init__") for name in house.sources() if name.startswith("storage.")]
    product = [name for name in modules if not name.startswith("storage.testing")]  # kits need pytest
    program = f"""
import importlib, sys
for name in {product}:
    importlib.import_module(name)
print([name for name in ("torch", "monai", "ray", "mlflow") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


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

# Reads PyTorch's files with its restricted reader only: tests/unit/jobs/exchange/test_torch_files.py.
ALLOWED = {("pickle", "jobs/exchange/torch_files.py")}


@pytest.mark.parametrize("what", sorted(BANNED))
def test_nothing_banned_is_in_the_code(what: str) -> None:
    hits = [
        f"{path.relative_to(ROOT)}: {match.group(0).strip()}"
        for package in PACKAGES
        for path in sources(package)
        if (what, path.relative_to(ROOT).as_posix()) not in ALLOWED
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
