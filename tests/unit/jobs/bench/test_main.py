"""`python -m jobs.bench`: every benchmark without Ray and MLflow, but for the one that measures Ray."""

import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import bench
from jobs.bench.__main__ import main

ROOT = Path(__file__).parents[4]
MODULES = sorted(module.name for module in pkgutil.walk_packages(bench.__path__, "jobs.bench."))
PAGES = sorted((ROOT / "docs").glob("benchmarks*.md"))


def run(program: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_benchmark_but_those_of_jobs_needs_ray_or_mlflow() -> None:
    """None in `sys.modules` makes an import fail. MONAI by itself imports MLflow where it can, and goes on without."""
    of_jobs = {"jobs.bench.overhead", "jobs.bench.nnunet.compare"}  # a job of Ray, and fine-tuning
    assert of_jobs <= set(MODULES)
    names = ", ".join(name for name in MODULES if name not in of_jobs)
    run(f"import sys; sys.modules.update(ray=None, mlflow=None, cluster=None)\nimport {names}")


def test_the_verbs_and_their_help_import_no_service_and_no_torch() -> None:
    program = """
import contextlib, runpy, sys
import jobs.bench.verbs
sys.argv = ["bench", "--help"]
with contextlib.suppress(SystemExit):
    runpy.run_module("jobs.bench", run_name="__main__")
print("imported:", [name for name in ("ray", "mlflow", "cluster", "torch", "monai") if name in sys.modules])
"""
    assert run(program).splitlines()[-1] == "imported: []"


def test_every_benchmark_is_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    words = capsys.readouterr().out.split()
    assert {"reads", "loader", "ingest", "layout", "step", "losses", "views", "learn", "overhead"} <= set(words)


def test_the_benchmark_of_ray_asks_for_a_job_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overhead", "memory://x"]) == 2
    assert "--address URL" in capsys.readouterr().err


def test_a_result_is_printed_as_json_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, out = ROOT / "docs/benchmarks/learning.json", tmp_path / "again.json"
    assert main(["learn", "--join", str(runs), "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert [row["method"] for row in printed["rows"]] == [row["method"] for row in json.loads(runs.read_text())["rows"]]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[]", "list"),
        ("{}", "no keys"),
        ('{"a": 1}', "found a"),
    ],
)
@pytest.mark.parametrize("verb", ["join", "stopping"])
def test_a_file_that_is_no_result_is_named(
    verb: str, text: str | None, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    search = ["stopping", str(ROOT / "docs/benchmarks/finetuning/search.yaml"), str(path)]
    assert main(["learn", "--join", str(path)] if verb == "join" else search) == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert found in said


def test_the_search_of_the_page_can_be_played_again(capsys: pytest.CaptureFixture[str]) -> None:
    places = [str(ROOT / "docs/benchmarks/finetuning" / name) for name in ("search.yaml", "search.json")]
    assert main(["stopping", *places, "--orders", "2"]) == 0
    assert re.search(r"halving +12 +24 %", capsys.readouterr().out)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_modules_that_the_pages_run_exist(page: Path) -> None:
    for name in re.findall(r"python -m ([\w.]+)", page.read_text(encoding="utf-8")):
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        runnable = f"{name}.__main__" if spec.submodule_search_locations is not None else name
        assert importlib.util.find_spec(runnable) is not None, name
