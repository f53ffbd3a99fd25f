"""Tables, JSON and progress."""

import io
import json
from pathlib import Path

import pytest

from jobs.output import Progress, _blocks, emit, table


def test_a_table_aligns_words_left_and_numbers_right() -> None:
    lines = table(("name", "n", "x"), [("a", 1, 0.5), ("longer", 100, None)]).splitlines()
    assert lines == ["name      n    x", "------  ---  ---", "a         1  0.5", "longer  100    -"]


def test_a_table_may_be_empty_and_shows_flags_and_none() -> None:
    assert table(("a", "bb"), []).splitlines() == ["a  bb", "-  --"]
    assert table(("", "x"), [("ok", None), ("no", True)]).splitlines()[2:] == ["ok     -", "no  True"]


def test_a_long_float_is_shortened() -> None:
    assert table(("x",), [(0.123456789,)]).splitlines()[2] == "0.1235"


def test_json_is_json_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"path": Path("/a"), "text": 'ü "quoted"', "none": None, "items": [1, 2.5]}
    emit(data, True, "never")
    assert json.loads(capsys.readouterr().out) == {**data, "path": "/a"}
    emit(data, False, "plain")
    assert capsys.readouterr().out == "plain\n"


def test_a_value_that_is_no_number_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"x": float("nan"), "y": [float("inf"), 1.0]}, True, "")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == {"x": None, "y": [None, 1.0]}


def test_progress_in_a_log_says_the_start_and_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress("ingest", 50, "volumes")
    for done in range(1, 51):
        bar.update(done, "3 MB/s")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("ingest: 1/50 volumes")
    assert lines[1].startswith("ingest: 50/50 volumes")
    assert all(line.endswith("3 MB/s") for line in lines)
    assert "\r" not in err


def test_progress_of_nothing_does_not_divide_by_zero(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("verify", 0).update(0)
    assert "0/0" in capsys.readouterr().err


def test_a_bar_is_drawn_with_what_the_terminal_has() -> None:
    assert _blocks("utf-8") == "█░"
    assert _blocks("ascii") == "#-"


def test_progress_goes_into_a_stream_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()  # it has no encoding
    monkeypatch.setattr("sys.stderr", stream)
    Progress("verify", 2).update(2)
    assert stream.getvalue().startswith("verify: 2/2")
