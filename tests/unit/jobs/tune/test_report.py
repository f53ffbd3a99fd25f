"""The report of a search, and its best configuration as a file."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.cli import main as cli
from jobs.configs import FinetuneJobConfig
from jobs.configs.search import TuneConfig
from jobs.pages import search as page
from jobs.tune import driver
from jobs.tune.live import _facts_of
from jobs.tune.outcome import searched as outcome
from ssl_core.config import load
from ssl_core.downstream.search import SearchResult, lineage
from storage.objects import join, open_store
from tests.kit.searches import score, search_config, searched

NASTY = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TuneConfig:
    runs = str(tmp_path_factory.mktemp("runs"))
    return search_config(runs=runs, encoders=["models:/e/1", "none"], compare_scratch=True, name="v1.5", trials=7)


@pytest.fixture(scope="module")
def result(config: TuneConfig) -> SearchResult:
    search = searched(config)
    search.entries[3].error, search.entries[3].status = NASTY, "failed"
    return outcome(config, search.trials(), run_id="r", seconds=90.0)


@pytest.fixture(scope="module")
def folder(config: TuneConfig, result: SearchResult) -> Path:
    """Of the search, after its end."""
    sent: list[Any] = []
    driver.publish(SimpleNamespace(log_text=lambda *parts: sent.append(parts)), config, result)
    assert [(run, name) for run, _, name in sent] == [("r", "best.yaml"), ("r", "report.html")]
    return Path(config.runs, config.name)


def test_the_report_shows_every_trial_and_needs_nothing_else(folder: Path, result: SearchResult) -> None:
    html = (folder / "report.html").read_text()
    assert not re.search(r"<(script|link|iframe)|https?://", html)
    assert NASTY not in html
    assert "alert(1)" in html, "why a trial failed"
    assert html.count("<img") >= 2, "curves and parallel coordinates"
    for trial in result.trials:
        assert f"<td>{trial.trial}</td>" in html
    assert "Best of random weights" in html
    assert "Best of the pre-trained starts" in html
    assert result.choice in html


def test_the_best_configuration_is_one_that_finetune_takes(
    folder: Path, result: SearchResult, capsys: pytest.CaptureFixture[str]
) -> None:
    job = load(FinetuneJobConfig, folder / "best.yaml")
    assert job.finetune.lr == result.best["finetune.lr"]
    assert job.finetune.batch == result.best["finetune.batch"]
    assert job.starts["best"] == result.best["encoder"]
    assert job.register_start == "best"
    assert cli.main(["plan", "finetune", str(folder / "best.yaml")]) == 0
    assert "register_start: best" in capsys.readouterr().out


def test_the_best_from_random_weights_keeps_its_network(config: TuneConfig, result: SearchResult) -> None:
    scratch = result.trials[result.best_by_arm[1]]
    job = driver.best_job(config, SearchResult(result.trials, scratch.settings, "", 9, "r", 1.0))
    assert job.starts == {"best": "none", "pre-trained": "models:/e/1"}


def test_two_objectives_have_a_front_on_the_page() -> None:
    config = search_config(objectives=["dice", "seconds"], scheduler="none", trials=8)
    result = outcome(config, searched(config).trials(), run_id="r", seconds=1.0)
    assert result.front
    html = page.render(result, name="s", best_yaml="", config_yaml="", facts={"price": "3"})
    assert "Dice against seconds" in html
    assert score(dict(result.best), 9) == max(t.scores[-1] for t in result.trials)


def test_the_report_of_a_population_shows_whose_weights_the_best_had_when() -> None:
    space = {"finetune.lr": {"loguniform": [1e-5, 5e-2]}}
    own = search_config(scheduler="pbt", space=space, trials=6, population={"interval": 3, "quantile": 0.5})
    trials = searched(own).trials()
    taker = next(t for t in trials if len(t.takeovers) == 2)
    best = dataclasses.replace(taker, scores=(*taker.scores[:-1], 1.0))
    result = outcome(own, tuple(best if t is taker else t for t in trials), run_id="r", seconds=1.0)
    html = page.render(result, name="s", best_yaml="", config_yaml="", facts={})
    assert "The schedule of the best" in html
    stretches = lineage(trials, best.trial, 9)
    assert stretches[-1].first == 7
    assert "7 to 9" in html
    for stretch in stretches:
        assert page.setting_text(stretch.settings["finetune.lr"]) in html
    assert f"schedule of {len(stretches) - 1} changes" in result.choice
    assert not result.importance
    facts = _facts_of(best.trial, best)
    assert facts.tags["tomoscale.exploited"].endswith(f"trial {best.takeovers[-1].source} at epoch 6")
    assert json.loads(facts.tags["tomoscale.settings.now"]) == best.takeovers[-1].settings
    assert facts.settings == best.settings, "what it began with, as parameters of a run stay"


def test_a_resume_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(
        f"{{name: n, runs: {tmp_path}, encoders: ['models:/e/1'], labelled: {{data: 'memory://d'}}}}"
    )
    command = ["tune", str(tmp_path / "c.yaml"), "--resume", "--address", "http://127.0.0.1:1"]
    assert cli.main(command) == 2
    assert "a search that has begun" in capsys.readouterr().err
    assert not open_store(join(str(tmp_path), "n")).exists("job.json")
