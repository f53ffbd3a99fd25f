"""The study of two minutes: any study's, and the built-in one from the command line to its report."""

from pathlib import Path

import pytest

from jobs.cli import main as cli
from jobs.configs.study import StudyConfig
from jobs.study.smoke import shrunk
from ssl_core.config import load, resolved

EXAMPLES = sorted((Path(__file__).parents[4] / "examples/configs").glob("study_*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("changes", [[], ["labels=[2,5,10]", "primary_labels=[5]", "halves=true"]], ids=["", "halves"])
def test_a_smaller_study_is_a_study(path: Path, changes: list[str]) -> None:
    study = load(StudyConfig, path, changes)
    small = shrunk(study)
    assert small.name == f"{study.name}-smoke"
    assert len(small.starts) == 2
    assert small.labels == study.labels[:2]
    assert small.data == study.data
    assert load(StudyConfig, resolved(small), []) == small


def test_the_built_in_study_ends_with_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", "--smoke", "--local", str(tmp_path / "out"), "labels=[1]", "draws=2", "concurrent=1"]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    report = tmp_path / "out/smoke/report.md"
    assert f"report: {report}" in first
    assert "`tomoscale study" in report.read_text(encoding="utf-8").splitlines()[0]
    assert "These draws are too few to show any difference" in first
    assert cli.main(command) == 0
    again = capsys.readouterr().out
    assert "cells were done before" in again
    assert " s (" not in again.partition("cells were done before")[2], "no cell is done twice"
