"""The demo around its stages."""

from pathlib import Path

import pytest

from cluster import stack
from jobs.demo.run import Demo
from storage.errors import ConfigError


def test_a_reader_that_went_away_leaves_no_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Ctrl-C in `make demo | tee`, which ends `tee` first."""
    stopped = []

    def say(line: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(stack, "down", lambda state, progress: stopped.append(state))
    with pytest.raises(BrokenPipeError):
        Demo(out=tmp_path / "out", state=tmp_path / "state", say=say).run()
    assert stopped == [tmp_path / "state"]


def test_what_is_no_model_of_a_demo_is_not_replaced_and_said_at_once(tmp_path: Path) -> None:
    mine = tmp_path / "model" / "thesis.txt"
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(ConfigError, match="another --out"):
        Demo(out=tmp_path, state=tmp_path / "state").run()
    assert mine.exists()
