"""Asks whether known vulnerabilities are in the packages of `requirements.lock`: `python .ci/audit.py [LOCK]`.

pip-audit asks OSV. It is no dependency of the product: where it is not installed, it goes into a temporary environment.
Nothing is taken for sound that was not looked up. Exit 1: a vulnerability, with package, id and the versions that fix
it. Exit 0: none, or `not audited:` with the reason. Each part has a limit, so that CI never hangs.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TOOL = "pip-audit==2.10.1"
URL = "https://api.osv.dev/v1/query"
"""`PIP_AUDIT_OSV_URL`, pip-audit's own variable, says another."""
PROBE_S, INSTALL_S, AUDIT_S = 15, 60, 300
"""Limits of what is done in turn; without data the first is all there is."""
# In a process of its own, since looking up a name has no time limit.
_PROBE = """
import sys, urllib.request
body = b'{"package": {"name": "pip", "ecosystem": "PyPI"}, "version": "26.0"}'
urllib.request.urlopen(urllib.request.Request(sys.argv[1], body), timeout=5).read()
"""


def verdict(report: str, errors: str, packages: int) -> tuple[int, list[str]]:
    """Exit code and lines.

    Args:
        report: pip-audit's standard output, JSON where it came to an end.
        errors: Its standard error.
        packages: In the lock file.
    """
    try:
        dependencies = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return 0, [f"not audited: {_last(errors)}"]
    lines = [f"not audited: {item['name']}: {item['skip_reason']}" for item in dependencies if "skip_reason" in item]
    audited = [item for item in dependencies if "skip_reason" not in item]
    missing = packages - len(dependencies)
    if missing:
        lines.append(f"not audited: {missing} of {packages} packages, of which pip-audit says nothing")
    bad = []
    for item in audited:
        for vuln in item["vulns"]:
            fixes = ", ".join(vuln["fix_versions"]) or "no version yet"
            bad.append(f"{item['name']} {item['version']}: {vuln['id']}, fixed in {fixes}")
    total = f"audited {len(audited)} of {packages} packages: known vulnerabilities: {len(bad) or 'none'}"
    return int(bool(bad)), [*lines, *bad, total]


def audit(lock: Path) -> tuple[int, list[str]]:
    """Audit a lock file; as `verdict`."""
    url = os.environ.get("PIP_AUDIT_OSV_URL", URL)
    _, errors = _run([sys.executable, "-c", _PROBE, url], PROBE_S)
    if errors is not None:
        return 0, [f"not audited: no data from {url}: {_last(errors)}"]
    packages = len([line for line in lock.read_text(encoding="utf-8").splitlines() if "==" in line and line[0] != "#"])
    with tempfile.TemporaryDirectory(prefix="audit-") as folder:
        tool = shutil.which("pip-audit")
        if tool is None:
            for command in (["-m", "venv", folder], ["-m", "pip", "--python", folder, "install", "--quiet", TOOL]):
                _, errors = _run([sys.executable, *command], INSTALL_S)
                if errors is not None:
                    return 0, [f"not audited: pip-audit cannot be installed: {_last(errors)}"]
            tool = str(Path(folder) / "bin" / "pip-audit")
        options = ["--no-deps", "--disable-pip", "--vulnerability-service", "osv", "--osv-url", url]
        options += ["--format", "json", "--progress-spinner", "off", "--cache-dir", folder]
        report, errors = _run([tool, "--requirement", str(lock), *options], AUDIT_S)
    return verdict(report, errors or "no report", packages)


def _run(command: list[str], limit_s: float) -> tuple[str, str | None]:
    """Standard output, and what went wrong: None where the command ended well."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return "", f"no end within {limit_s:g} s"
    except OSError as error:
        return "", str(error)
    return ended.stdout, None if ended.returncode == 0 else ended.stderr or f"exit code {ended.returncode}"


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    code, words = audit(Path(sys.argv[1]) if len(sys.argv) > 1 else root / "requirements.lock")
    print("\n".join(words))
    sys.exit(code)
