"""Says at the end what a step of each method took, and what bfloat16 changes in its gradient."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found: dict[str, dict[str, object]] = {}
    for report in terminalreporter.getreports("passed"):
        if report.user_properties:
            name = report.nodeid.rpartition("[")[2].rstrip("]")
            found.setdefault(name, {}).update(report.user_properties)
    if found:
        keys = sorted({key for facts in found.values() for key in facts})
        terminalreporter.section("one step of each method on the tiny network")
        for name, row in [("", dict(zip(keys, keys, strict=True))), *sorted(found.items())]:
            terminalreporter.write_line(f"{name:<16}" + "".join(f"{row.get(key, '')!s:>22}" for key in keys))
