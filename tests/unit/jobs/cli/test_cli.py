"""The command line: every verb works and explains itself, reads as JSON where asked, and ends as a program should."""

import argparse
import errno
import json
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main as cli
from ssl_core.config import dump_yaml
from tests.kit.phantoms import write_phantoms
from tests.kit.pretraining import config

ROOT = Path(__file__).parents[4]
pytestmark = pytest.mark.usefixtures("nothing_configured")


def leaves(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """Every verb with its parser and the line that its parent's help has for it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            lines = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, child in action.choices.items():
                below = list(leaves(child, (*path, name)))
                yield from below or [((*path, name), child, lines.get(name, ""))]


VERBS = list(leaves(cli.parser()))
NAMES = [" ".join(path) for path, _, _ in VERBS]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"file://{tmp_path_factory.mktemp('store')}"
    write_phantoms(url, 4, shape=(8, 9, 10))
    return url


def start(*arguments: str, **changes: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli.main", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **changes,
    )


def test_the_verbs_are_those_that_are_promised() -> None:
    for verb in (
        *("demo", "up", "down", "status", "env", "doctor", "methods", "plan", "pretrain", "tune", "finetune"),
        *("data check", "data ingest", "data append", "data verify", "data show", "data fetch", "evaluate", "predict"),
        *("models list", "models show", "models promote", "models pull"),
        *("jobs list", "jobs status", "jobs logs", "jobs stop", "bench reads", "bench overhead"),
    ):
        assert verb in NAMES


@pytest.mark.parametrize(("path", "parser", "line"), VERBS, ids=NAMES)
def test_every_verb_runs_something_and_explains_itself(
    path: tuple[str, ...], parser: argparse.ArgumentParser, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(parser.get_default("run")), path
    assert line, f"{path} has no line in the help"
    with pytest.raises(SystemExit) as ended:
        cli.main([*path, "--help"])
    assert ended.value.code == 0
    assert f"tomoscale {' '.join(path)}" in capsys.readouterr().out
    for action in parser._actions:
        if action.option_strings and not isinstance(action, argparse._HelpAction):
            assert len(max(action.option_strings, key=len)) > 3


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["data"],
        ["data", "fly"],
        ["data", "show"],
        ["methods", "--nope"],
        ["up", "--s3-port", "x"],
        ["up", "--s3-port", "65536"],
        ["up", "--cpus", "0"],
        ["plan", "nothing", "c.yaml"],
        ["methods", "pgl", "a=1"],
        ["pretrain", "c.yaml", "--dry-run", "no-key"],
        ["bench", "overhead", "memory://x", "--steps", "5"],
        ["bench", "losses", "--out", "/no/such/folder/x.json"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2_with_a_hint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(arguments)
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.strip()


def test_reading_verbs_print_json(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: n\ndata: memory://x\n")

    def read(*arguments: str) -> Any:
        assert cli.main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert read("data", "show", store)["volumes"] == 4
    checked = read("data", "verify", store)
    assert checked["volumes"] == 4
    assert checked["problems"] == checked["strangers"] == []
    methods = {item["name"]: item["text"] for item in read("methods")}
    assert {"pgl", "simclr"} <= set(methods)
    assert all(methods.values())
    page = read("methods", "pgl")
    assert {item["name"] for item in page["settings"]} >= {"hidden"}
    plan = read("plan", "pretrain", str(path), "engine.steps=90")
    assert plan["config"]["engine"]["steps"] == 90
    assert len(plan["digest"]) == 16


def test_status_without_a_stack_is_json_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["running"] is False
    assert cli.main(["status"]) == 1
    assert "tomoscale up" in capsys.readouterr().out
    assert cli.main(["down"]) == 0
    capsys.readouterr()
    assert cli.main(["env"]) == 1
    assert capsys.readouterr().out == "", "a shell that evaluates it stays as it is"


def test_the_table_says_what_the_json_says(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "show", store]) == 0
    text = capsys.readouterr().out
    assert "8..8 (median 8)" in text
    assert "train 3" in text
    assert "test 1" in text


@pytest.mark.parametrize("options", [["--dry-run", "engine.steps=90"], ["engine.steps=90", "--dry-run"]])
def test_settings_may_stand_before_and_after_options(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(dump_yaml(config("memory://x", "simclr")))
    assert cli.main(["pretrain", str(path), *options]) == 0
    assert "steps: 90" in capsys.readouterr().out


def test_settings_of_super_pixels_may_stand_after_options_too(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--local", "scle=5"], ["scle=5", "--local"]):
        assert cli.main(["data", "superpixels", store, *arguments]) == 2
        assert "did you mean 'scale'" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["append=true", "source=/scans"])
def test_what_a_verb_says_is_no_setting_of_a_policy(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Once it was `unknown key 'append'; did you mean 'append'?`."""
    assert cli.main(["data", "ingest", "simulated", "memory://x", setting]) == 2
    err = capsys.readouterr().err
    assert f"setting '{setting.partition('=')[0]}'; expected one of the policy; found what the command itself" in err
    assert "`tomoscale data --help` lists the verbs" in err


@pytest.mark.parametrize("verb", ["data ingest", "data append", "pretrain"])
def test_settings_are_not_called_required(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(verb.split())
    assert capsys.readouterr().err.splitlines()[-1].endswith(("required: source, data", "required: config"))


def test_a_traceback_is_printed_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = f"file://{tmp_path}/absent"
    assert cli.main(["data", "show", absent]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("tomoscale: ")
    monkeypatch.setenv("TOMOSCALE_TRACEBACK", "1")
    assert cli.main(["data", "show", absent]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_exit_code_130_and_no_traceback(number: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(240)
        process = start("jobs", "list", "--address", f"http://127.0.0.1:{silent.getsockname()[1]}")
        try:
            with silent.accept()[0]:  # it waits for an answer that does not come
                process.send_signal(number)
                _, err = process.communicate(timeout=240)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130, err
    assert err == "tomoscale: interrupted\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [0, 1])
def test_a_reader_that_goes_away_is_met_with_silence(
    lines: int, unbuffered: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    process = start("data", "show", store)
    assert process.stdout is not None
    assert process.stderr is not None
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=240) in (0, 141), err  # 0 where a whole page fits into the pipe before it closes
    assert err == ""
    if not lines:
        assert process.returncode == 141


def test_output_that_nobody_can_take_leaves_no_traceback(tmp_path: Path) -> None:
    """Closed before the start, an encoding without the letter, a reader that is gone before the help is written."""
    program = [sys.executable, "-m", "jobs.cli.main"]
    scan = str(tmp_path / "J\u00fcrgen.nii.gz")
    cases = {
        "closed": ('exec "$@" >&-', ["--help"], 0),
        "both closed": ('exec "$@" >&- 2>&-', ["data", "show", f"file://{tmp_path}/absent"], 1),
        "full": ('exec "$@" >/dev/full', ["methods"], 1),
        "reader gone": ('"$@" | true; exit ${PIPESTATUS[0]}', ["--help"], None),
        "ascii": ('PYTHONIOENCODING=ascii:strict exec "$@" 2>&1', ["predict", "model", scan, "mask.nii.gz"], 2),
        "ascii page": ('LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 exec "$@"', ["methods", "pgl"], 0),
    }
    for name, (shell, words, code) in cases.items():
        done = subprocess.run(
            ["bash", "-c", shell, "bash", *program, *words], cwd=ROOT, capture_output=True, check=False, timeout=240
        )
        text = (done.stdout + done.stderr).decode()
        assert "Traceback" not in text, name
        assert "Exception ignored" not in text, name
        assert done.returncode in ((0, 141) if code is None else (code,)), (name, text)
        if name == "ascii":
            assert "J\\xfcrgen" in text


def test_a_broken_connection_is_no_broken_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error of a socket has the same class; it must not pass for a reader that went away."""

    def fail(arguments: argparse.Namespace) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("jobs.cli.verbs.train._methods", fail)
    assert cli.main(["methods"]) == 1
    assert capsys.readouterr().err == "tomoscale: Broken pipe\n"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b; expected room on its disk; found No space"),
        (OSError(errno.ENOSPC, "No space left on device"), "a file of this command; expected room on its disk"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b; expected the right to use it; found"),
    ],
)
def test_an_error_of_the_system_says_what_to_do(
    error: OSError, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("jobs.cli.verbs.train._methods", fail)
    assert cli.main(["methods"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"tomoscale: {text}")
    assert "give another place" in err


def test_what_mlflow_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow.exceptions import RestException

    def fail(arguments: argparse.Namespace) -> int:
        raise RestException({"error_code": "PERMISSION_DENIED", "message": "no right to\nset an alias"})

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setattr("jobs.cli.verbs.train._methods", fail)
    assert cli.main(["methods"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("tomoscale: MLflow at http://mlflow:5000; expected")
    assert "PERMISSION_DENIED: no right to set an alias" in err
    assert err.count("\n") == 1


def test_an_error_of_the_system_is_one_line_with_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.NamedTemporaryFile(dir="/tmp") as file:  # short: the folder of a stack may not be longer
        assert cli.main(["up", "--state", f"{file.name}/below"]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert file.name in err
