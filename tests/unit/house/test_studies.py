"""Published studies: their tests follow from their published scores, and what pages say of them is what they found."""

import csv
import itertools
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ssl_core.downstream.inference import DrawTest, corrected, draw_test, estimate
from ssl_core.downstream.records import from_fields
from ssl_core.downstream.scores import CaseScore
from ssl_core.downstream.study import Box, StudyCell, difference, sentence
from tests.kit.scores import scores

DOCS = Path(__file__).parents[3] / "docs"
STUDIES = sorted(path.parent for path in (DOCS / "benchmarks/studies").glob("*/result.json"))
NUMBER = r"[+-]\d\.\d{3}"
INTERVAL = re.compile(rf"({NUMBER})\**,? \(({NUMBER}) to ({NUMBER})\)")
HALF_DIGIT = 5.01e-4
"""How far a number may be from its three decimals."""


@cache
def _result(study: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((study / "result.json").read_text(encoding="utf-8"))
    return result


@cache
def _cells(study: Path) -> tuple[StudyCell, ...]:
    """The tested trainings, from the published scores of their cases."""
    cases: dict[tuple[str, int, int, int], list[CaseScore]] = {}
    with (study / "cases.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["start"], int(row["labels"]), int(row["draw"]), int(row["seed"])
            score = CaseScore(row["volume_id"], row["subject"], row["label"], scores(dice=float(row["dice"])))
            cases.setdefault(key, []).append(score)
    return tuple(StudyCell(*key, (), tuple(found), (), 1, 1.0, 1.0) for key, found in cases.items())


def _differences(study: Path) -> Iterator[Box]:
    """Of all pairs of starts and counts."""
    cells = _cells(study)
    groups = sorted({(cell.start, cell.labels) for cell in cells})
    for (a, labels), (b, labels_of_b) in itertools.permutations(groups, 2):
        yield difference(cells, a, b, labels, labels_of_b=labels_of_b)


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_published_tests_follow_from_the_published_scores(study: Path) -> None:
    published = _result(study)["tests"]
    again = corrected(
        [
            draw_test(
                difference(_cells(study), test["a"], test["b"], test["labels"], labels_of_b=test.get("labels_of_b")),
                a=test["a"],
                b=test["b"],
                labels=test["labels"],
            )
            for test in published
        ]
    )
    for one, test in zip(again, published, strict=True):
        for key in ("difference", "low", "high", "p", "corrected"):
            assert getattr(one, key) == pytest.approx(test[key], rel=1e-3, abs=1e-5), key
        assert (one.draws, one.pretrainings, one.subjects) == (test["draws"], test["pretrainings"], test["subjects"])


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_published_report_says_what_its_tests_say(study: Path) -> None:
    result, report = _result(study), (study / "report.md").read_text(encoding="utf-8")
    tests = [from_fields(DrawTest, test) for test in result["tests"]]
    assert tests
    for line in map(sentence, tests):
        assert line in result["conclusion"]
        assert f"- {line}\n" in report
    assert sorted(f"- {line}" for line in result["conclusion"]) == sorted(re.findall(r"^- .*", report, re.MULTILINE))


def test_intervals_on_the_pages_are_those_of_published_studies() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    page = (DOCS / "benchmarks-studies.md").read_text(encoding="utf-8")
    known = [estimate(box) for study in STUDIES for box in _differences(study)]
    # The runs of the demo are no studies, and are said to be no evidence.
    current = readme.partition("Pre-training helps with")[2].partition("Four runs of the demo")[0]
    shown = INTERVAL.findall(current) + INTERVAL.findall(page)
    assert len(shown) > 40
    for text in shown:
        values = [float(number) for number in text]
        near = [
            one
            for one in known
            if one.low is not None
            and one.high is not None
            and max(abs(a - b) for a, b in zip(values, (one.mean, one.low, one.high), strict=True)) < HALF_DIGIT
        ]
        assert near, f"{' '.join(text)} is in no published study"


def test_rows_of_the_page_are_those_of_their_reports() -> None:
    """Scores and p values of each row that names a study, or follows one that does."""
    page = (DOCS / "benchmarks-studies.md").read_text(encoding="utf-8")
    study, checked = None, 0
    for line in page.splitlines():
        fields = [field.strip().strip("*") for field in line.strip("|").split("|")]
        if named := re.search(r"\(benchmarks/studies/([\w-]+)/report.md\)", fields[0]):
            study = _result(DOCS / "benchmarks/studies" / named[1])
        interval = INTERVAL.search(line)
        if study is None or len(fields) != 8 or interval is None:
            continue
        labels, dice, reference, p = int(fields[1]), float(fields[4]), float(fields[5]), fields[7]
        (test,) = (
            test
            for test in study["tests"]
            if test["labels"] == labels and abs(test["difference"] - float(interval[1])) < HALF_DIGIT
        )
        means = {row["start"]: row["scores"]["dice"]["mean"] for row in study["rows"] if row["labels"] == labels}
        assert means[test["a"]] == pytest.approx(dice, abs=HALF_DIGIT), line
        assert means[study["reference"]] == pytest.approx(reference, abs=HALF_DIGIT), line
        assert float(p) == pytest.approx(test["corrected"], abs=0.51 * 10.0 ** -len(p.partition(".")[2])), line
        assert fields[2] == f"{test['draws']} x {test['pretrainings']}", line
        checked += 1
    assert checked > 15
