"""Writes `docs/coverage.md` from what `make coverage` measured: `python docs/coverage_page.py`."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import coverage

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/coverage.md"
TOPS = ("storage", "ssl_core", "jobs", "cluster")
LARGEST = 12
HEAD = """# Coverage

Lines and branches that the tests run, by `make coverage`. Only what runs in the processes of the tests themselves
counts. What they start does not: ranks, drivers and workers of Ray, the command line as a program. So code that only
runs there is tested by the service and distributed tests, and counts as not run here.

"""


def measured() -> dict[str, Any]:
    """The report of `coverage`, read from `.coverage`."""
    data = coverage.Coverage(data_file=str(ROOT / ".coverage"), config_file=str(ROOT / "pyproject.toml"))
    data.load()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        data.json_report(outfile=str(path))
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def page(report: dict[str, Any]) -> str:
    """Markdown: a row a top folder, and the functions with most lines that no test runs."""
    rows = ["| folder | lines | branches | lines that no test runs |", "|---|---|---|---|"]
    for top in TOPS:
        parts = [f["summary"] for name, f in report["files"].items() if name.startswith(f"{top}/")]
        total = {key: sum(part[key] for part in parts) for key in parts[0] if isinstance(parts[0][key], int)}
        lines = 100 * total["covered_lines"] / total["num_statements"]
        branches = 100 * total["covered_branches"] / max(1, total["num_branches"])
        rows.append(f"| `{top}` | {lines:.1f} % | {branches:.1f} % | {total['missing_lines']} |")
    pieces = [
        (function["summary"]["missing_lines"], function["summary"]["num_statements"], name, path)
        for path, file in report["files"].items()
        for name, function in file["functions"].items()
        if name
    ]
    rows += ["", "The largest pieces that no test runs:", "", "| function | lines not run, of |", "|---|---|"]
    for missing, statements, name, path in sorted(pieces, reverse=True)[:LARGEST]:
        rows.append(f"| `{name}` in [`{path}`](../{path}) | {missing} of {statements} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(measured()), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE.relative_to(ROOT)}\n")
