"""The audit in CI: a finding fails, and what was not looked up is never called sound."""

import http.server
import importlib.util
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SOUND = {"name": "numpy", "version": "2.4.6", "vulns": []}
BAD = {
    "name": "jinja2",
    "version": "3.1.2",
    "vulns": [
        {"id": "GHSA-h5c8-rqwp-cp95", "fix_versions": ["3.1.3"], "aliases": ["CVE-2024-22195"], "description": "XSS"},
        {"id": "PYSEC-0", "fix_versions": [], "aliases": [], "description": ""},
    ],
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_audit", ROOT / ".ci/audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that knows of no vulnerability."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("PIP_AUDIT_OSV_URL", f"http://127.0.0.1:{server.server_port}/v1/query")
    yield
    server.shutdown()
    server.server_close()
    thread.join()


def _tool(folder: Path, monkeypatch: pytest.MonkeyPatch, report: object, code: int) -> None:
    """Stands for pip-audit: its report, its last line and its exit code."""
    tool = folder / "pip-audit"
    tool.write_text(f"#!/bin/sh\necho 'Found some' >&2\ncat <<'END'\n{json.dumps(report)}\nEND\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_a_vulnerability_fails_and_names_package_id_and_remedy(
    script: ModuleType, data: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tool(tmp_path, monkeypatch, {"dependencies": [SOUND, BAD], "fixes": []}, 1)
    lock = tmp_path / "lock"
    lock.write_text("# a==1 is a remark\nnumpy==2.4.6\njinja2==3.1.2\n")
    code, lines = script.audit(lock)
    assert code == 1
    assert lines == [
        "jinja2 3.1.2: GHSA-h5c8-rqwp-cp95, fixed in 3.1.3",
        "jinja2 3.1.2: PYSEC-0, fixed in no version yet",
        "audited 2 of 2 packages: known vulnerabilities: 2",
    ]


def test_without_findings_the_audit_passes(
    script: ModuleType, data: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tool(tmp_path, monkeypatch, {"dependencies": [SOUND], "fixes": []}, 0)
    (tmp_path / "lock").write_text("numpy==2.4.6\n")
    assert script.audit(tmp_path / "lock") == (0, ["audited 1 of 1 packages: known vulnerabilities: none"])


def test_without_data_nothing_is_audited_and_it_says_so(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_AUDIT_OSV_URL", "http://127.0.0.1:1/v1/query")
    code, (line,) = script.audit(tmp_path / "not read")
    assert code == 0
    assert line.startswith("not audited: no data from http://127.0.0.1:1/v1/query: ")


def test_what_pip_audit_leaves_out_is_said(script: ModuleType) -> None:
    skipped = {"name": "ours", "skip_reason": "no such package"}
    report = json.dumps({"dependencies": [SOUND, skipped], "fixes": []})
    assert script.verdict(report, "", 3) == (
        0,
        [
            "not audited: ours: no such package",
            "not audited: 1 of 3 packages, of which pip-audit says nothing",
            "audited 1 of 3 packages: known vulnerabilities: none",
        ],
    )


def test_an_audit_that_came_to_no_end_is_none(script: ModuleType) -> None:
    assert script.verdict("", "Traceback\n  ...\nReadTimeout: no answer\n", 2) == (
        0,
        ["not audited: ReadTimeout: no answer"],
    )
