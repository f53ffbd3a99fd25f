import re
from pathlib import Path

import pytest

from jobs.cli import main as cli
from jobs.pages import methods as method_pages
from ssl_core.methods.base import method_class, method_names

PAGES = Path(__file__).parents[4] / "docs/methods"


def test_the_pages_are_those_that_the_code_makes() -> None:
    made = method_pages.markdown_pages()
    assert {path.name for path in PAGES.iterdir()} == set(made)
    stale = [name for name, text in made.items() if (PAGES / name).read_text(encoding="utf-8") != text]
    assert stale == [], "run `tomoscale methods --markdown --out docs/methods`"


@pytest.mark.parametrize("name", method_names())
def test_a_page_has_all_parts_and_every_setting(name: str) -> None:
    page = method_pages.markdown_page(name)
    heads = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert heads == ["Idea", "Formula", "Traps", "Cost", "When", "Settings"]
    rows = [line.split(" | ") for line in page.replace("\\|", "/").splitlines() if line.startswith("| `")]
    assert {row[0].strip("|` ") for row in rows} >= set(method_class(name).Config.model_fields)
    assert all(len(row) == 3 and len(row[2]) > 4 for row in rows)


OURS = r"our choice|\bours?\b"
THEIRS = r"code|paper|re-implemented|example|nnssl|CVA|DetCon|BYOL|SimCLR|MoCo|PGL|LRC|iBOT"


@pytest.mark.parametrize("name", method_names())
def test_every_default_says_whose_it_is(name: str) -> None:
    found = method_pages.settings(name)
    silent = [
        key for key, default, text in found if default != "as follows" and not re.search(f"{OURS}|{THEIRS}", text)
    ]
    assert silent == []


@pytest.mark.parametrize("name", method_names())
def test_a_page_leads_to_measured_memory_and_time(name: str) -> None:
    cost = method_pages.markdown_page(name).partition("## Cost")[2].partition("## ")[0]
    target, _, anchor = re.findall(r"\[Measured\]\(([^)]*)\)", cost)[0].partition("#")
    steps = (PAGES / target).read_text(encoding="utf-8").partition(f"## {anchor.title()}\n")[2].partition("\n## ")[0]
    assert f"| {name} " in steps
    assert f"tomoscale bench step --methods {name}" in cost
    assert f"tomoscale bench step --methods {name}" in " ".join(method_pages.text_page(name, 100).split())


def test_the_index_says_of_each_method_when_to_use_it() -> None:
    rows = [line.split(" | ") for line in method_pages.markdown_index().splitlines() if line.startswith("| [")]
    assert len(rows) == len(method_names())
    for _, _, use in rows:
        assert use.split()[0] in ("as", "for", "first", "to", "where", "on")


@pytest.mark.parametrize("name", [*method_names(), ""])
def test_a_terminal_of_100_columns_shows_all_of_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["methods", *([name] if name else [])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    wanted = method_pages.description(name) if name else method_names()[0]
    assert " ".join(wanted.split()) in " ".join(" ".join(lines).split())


def test_settings_within_settings_are_listed_with_this_methods_defaults() -> None:
    found = {key: default for key, default, _ in method_pages.settings("pgl")}
    assert found["crops.scale"] == "[1.1, 1.4]"
    assert found["feature_level"] == "unset"


def test_writing_the_pages_writes_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "--out", str(tmp_path / "new")]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(method_pages.markdown_pages())
    assert str(tmp_path / "new" / "index.md") in capsys.readouterr().out
