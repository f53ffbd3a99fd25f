"""The report of a study: what it must say, that it is one file, and that both forms agree."""

import re
import uuid
from dataclasses import replace

import pytest

from jobs.pages import study as page
from jobs.pages.study_charts import cliques, colours, dash
from ssl_core.downstream.study import StudyResult
from tests.kit.phantoms import write_phantoms
from tests.kit.studies import config, go

COMMAND = "tomoscale study my.yaml --local out"


@pytest.fixture(scope="module")
def result() -> StudyResult:
    data, runs = (f"memory://study-page-{uuid.uuid4().hex}" for _ in range(2))
    write_phantoms(data, 16, shape=(8, 8, 8))
    return go(config(runs, data, primary=["pre"]))


def test_the_first_line_is_the_command_that_repeats_the_study(result: StudyResult) -> None:
    assert page.markdown(result, COMMAND).splitlines()[0] == f"Repeat with: `{COMMAND}`"
    text = re.sub(r"<[^>]+>", "", page.html(result, COMMAND, "").partition("<main>")[2])
    assert text.strip().splitlines()[0] == f"Repeat with: {COMMAND}"


def test_the_page_is_one_file_and_says_what_the_markdown_says(result: StudyResult) -> None:
    html, markdown = page.html(result, COMMAND, "name: t"), page.markdown(result, COMMAND)
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert html.count("data:image/png") == 4
    for sentence in (*result.conclusion, result.power.statement):
        assert sentence in html.replace("&lt;", "<").replace("&#39;", "'")
        assert sentence in markdown
    for cell in (*(f"{row.scores['dice'].mean:.3f}" for row in result.rows), "+0.101"):
        assert cell in markdown
        assert cell in html
    assert result.choice["digest"] in html
    assert result.choice["digest"] in markdown


@pytest.mark.parametrize(("minutes", "shown"), [(2.0, "+0.0500"), (1.02, "-"), (0.98, "-")])
def test_a_gain_by_the_minute_is_said_only_of_minutes_that_a_clock_can_tell_apart(
    result: StudyResult, minutes: float, shown: str
) -> None:
    times = {"scratch": 1.0, "same": minutes}
    rows = tuple(
        replace(
            row,
            minutes=times.get(row.start, 1.0),
            pretraining_minutes=0.0,
            gain=row.gain and replace(row.gain, mean=0.05),
        )
        for row in result.rows
    )
    head, table = page.cost_table(replace(result, rows=rows))
    assert {row[-1] for row in table if row[1] == "same"} == {shown}
    assert {row[-1] for row in table if row[1] == "scratch"} == {"-"}
    assert head[-1] == "Dice gained per extra minute"


def test_every_start_stands_beside_the_reference_and_only_the_tested_have_p(result: StudyResult) -> None:
    gains = {(row.start, row.labels): row.gain for row in result.rows}
    assert {key for key, gain in gains.items() if gain is None} == {("scratch", 1), ("scratch", 2)}
    for test in result.tests:
        gain = gains[test.a, test.labels]
        assert gain is not None
        assert (gain.mean, gain.low, gain.high) == pytest.approx((test.difference, test.low, test.high))
    assert {test.a for test in result.tests} == {"pre"}
    same = gains["same", 2]
    assert same is not None
    assert same.mean == pytest.approx(0.001), "the mean of its two seeds"
    head, rows = page.scores_table(result)
    column = [row[head.index("against the reference")] for row in rows if row[:2] == ("2", "same")]
    assert column[0].startswith("+0.001 (")
    assert page.UNTESTED in page.markdown(result, COMMAND)
    assert page.UNTESTED in page.html(result, COMMAND, "")


def test_charts_of_one_count_and_of_more_starts_than_colours_are_drawn() -> None:
    data, runs = (f"memory://study-page-{uuid.uuid4().hex}" for _ in range(2))
    write_phantoms(data, 16, shape=(8, 8, 8))
    many = {f"start {i}": {"pretrain": {"engine": {"lr": 1e-4 * (i + 1)}}} for i in range(14)}
    starts = {"scratch": {}, **many}
    settings = {"labels": [1], "draws": 2, "pretrainings": 1, "starts": starts, "primary": ["start 3"]}
    one = go(config(runs, data, search={"lr": [5e-3], "steps": [10], "draws": 1, "subjects": 1}, **settings))
    text = page.html(one, COMMAND, "")
    assert text.count("data:image/png") == 4
    names = list(starts)
    looks = {(colours(names)[name], dash(number)) for number, name in enumerate(names)}
    assert len(looks) == len(names), "none looks like another"


def test_bars_join_ranks_within_the_critical_difference() -> None:
    assert cliques([1.0, 1.4, 2.6, 3.0], 1.0) == [(1.0, 1.4), (2.6, 3.0)]
    assert cliques([1.0, 1.4, 2.0, 3.0], 1.0) == [(1.0, 2.0), (2.0, 3.0)]
    assert cliques([1.0, 3.0], 1.0) == []
