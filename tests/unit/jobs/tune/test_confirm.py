"""The best of a search on other draws of labelled subjects: what is compared, kept, said and registered."""

import json
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jobs.configs.search import TuneConfig
from jobs.pages import search as page
from jobs.tracking import registration
from jobs.tune import confirm as confirming
from jobs.tune import driver
from jobs.tune.confirm import BEST, REFERENCE, Work
from ssl_core.config import parse
from ssl_core.downstream.comparison import Training
from ssl_core.downstream.confirmation import Confirmation, Scored, confirmed
from ssl_core.downstream.scores import CaseScore, Scores
from ssl_core.downstream.search import SearchResult, Trial
from ssl_core.portable.predictor import check_bundle
from storage.errors import ConfigError, NotFound
from storage.objects import open_store
from tests.kit.phantoms import write_phantoms
from tests.kit.small_models import WINDOW, encoder_bundle, segmenter_bundle

DATA = "memory://confirm-data"


def search(runs: Path, encoder: str = "models:/e/1", **changes: Any) -> TuneConfig:
    data: dict[str, Any] = {
        "name": "s",
        "runs": str(runs),
        "encoders": [encoder],
        "labelled": {"data": DATA, "label": "labels", "subjects": 3, "inner": 1, "test_limit": 1},
        "finetune": {"epochs": 1, "steps_per_epoch": 1, "batch": 1, "patch_DHW": list(WINDOW), "warmup_steps": 0},
        "space": {"finetune.lr": {"loguniform": [1e-4, 1e-2]}},
        "trials": 2,
        "confirm": {"draws": 2},
    }
    return parse(TuneConfig, data | changes)


def result(encoder: str = "models:/e/1", scratch: bool = False) -> SearchResult:
    best = {"encoder": encoder, "finetune.lr": 1e-3}
    other = {"encoder": "none" if scratch else encoder, "finetune.lr": 5e-3}
    trials = (Trial(0, best, (0.7,), False, None), Trial(1, other, (0.6,), False, None, arm=int(scratch)))
    return SearchResult(trials, best, "trial 0", 1, "r", 1.0, 0)


def simulated(works: list[Work], url: str, dice: dict[str, float]) -> confirming.Pool:
    """Trainings whose Dice is known; the one to register leaves a bundle."""

    def pool(todo: Sequence[Work]) -> Generator[tuple[Work, Training], None, None]:
        for work in todo:
            works.append(work)
            if work.keep:
                registration.store_bundle(Path(url), work.url)
            level = dice[work.side] + 0.01 * work.draw
            scores = [Scores(level + 0.001 * n, 1.0, 1.0) for n in range(3)]
            cases = tuple(CaseScore(f"v{n}", f"subject{n}", "ball", of) for n, of in enumerate(scores))
            yield work, Training(work.side, work.seed, ({"loss": 1.0, "inner_dice": 0.5},), cases, None, 1.0)

    return pool


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was registered: cards, texts and tags; no server."""
    seen: list[Any] = []

    def register(bundle: Path, name: str, **_: Any) -> str:
        seen.append((name, check_bundle(bundle), (bundle / "MODEL_CARD.md").read_text()))
        return "7"

    monkeypatch.setattr(registration, "register", register)
    tags = SimpleNamespace(set_model_version_tag=lambda *parts: seen.append(parts))
    monkeypatch.setattr(confirming.tracking, "client", lambda: tags)
    monkeypatch.setattr(confirming, "_log", lambda *_: None)
    return seen


def run(config: TuneConfig, outcome: SearchResult, pool: confirming.Pool) -> Confirmation:
    job = driver.best_job(config, outcome)
    return confirming.confirm(config, outcome, job, pool, api=None, check=lambda: None)


def test_what_is_registered_says_its_mean_and_spread_over_draws(tmp_path: Path, registered: list[Any]) -> None:
    config = search(tmp_path, confirm={"draws": 6, "seeds": 2, "model": "liver"}, compare_scratch=True)
    works: list[Work] = []
    bundle = segmenter_bundle(tmp_path / "bundle")
    outcome = run(config, result(scratch=True), simulated(works, str(bundle), {BEST: 0.7, REFERENCE: 0.6}))
    assert {work.draw for work in works} == set(range(1, 7)), "none is the draw of the search"
    assert len(works) == len({(w.side, w.draw, w.seed) for w in works}) == 24
    assert [(w.side, w.draw, w.seed) for w in works if w.keep] == [(BEST, 1, 0)]
    assert {w.job["finetune"]["lr"] for w in works if w.side == REFERENCE} == {5e-3}, "the best of random weights"
    assert {w.job["starts"][w.side] for w in works if w.side == REFERENCE} == {"none"}
    assert all({w.draw} == {w.job["labelled"]["subjects_seed"]} for w in works)
    assert outcome.best.mean == pytest.approx(0.7 + 0.035 + 0.001)
    assert outcome.best.sd == pytest.approx(np.std([0.01 * d for d in range(1, 7)], ddof=1))
    assert (outcome.best.trials, outcome.reference.trials, outcome.version) == (1, 1, "7")
    for words in ("Over 6 draws of 2 labelled subjects", "random weights, best of 1 trials", "+0.100", "higher"):
        assert words in outcome.statement
    (name, card, text), *tags = registered
    assert name == "liver"
    assert card["metrics"]["mean test Dice over 6 draws"] == outcome.best.mean
    assert card["metrics"]["SD of test Dice over 6 draws"] == outcome.best.sd
    assert outcome.statement in text
    assert dict(tag[2:] for tag in tags)["tomoscale.confirmed.mean"] == f"{outcome.best.mean:.6f}"
    html = page.render(replace(result(), confirmation=outcome), name="s", best_yaml="", config_yaml="", facts={})
    assert "models:/liver/7" in html
    assert Confirmation.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome


def test_a_confirmation_that_died_goes_on_and_registers_the_same(tmp_path: Path, registered: list[Any]) -> None:
    config, works = search(tmp_path), list[Work]()
    pool = simulated(works, str(segmenter_bundle(tmp_path / "bundle")), {BEST: 0.7, REFERENCE: 0.6})

    def mortal(todo: Sequence[Work]) -> Generator[tuple[Work, Training], None, None]:
        for count, item in enumerate(pool(todo)):
            if count == 2:
                raise SystemExit
            yield item

    with pytest.raises(SystemExit):
        run(config, result(), mortal)
    before = len(works)
    run(config, result(), pool)
    again = works[before:]
    assert len(again) == 2
    assert not {(w.side, w.draw) for w in works[:2]} & {(w.side, w.draw) for w in again}
    run(config, result(), pool)
    assert len(works) == before + 2, "nothing is trained again"
    cards = [entry[1] for entry in registered if len(entry) == 3]
    assert cards[0] == cards[1], "the same bundle, which is one version"


def test_draws_are_not_added_until_a_difference_shows(tmp_path: Path, registered: list[Any]) -> None:
    pool = simulated([], str(segmenter_bundle(tmp_path / "bundle")), {BEST: 0.7, REFERENCE: 0.7})
    outcome = run(search(tmp_path), result(), pool)
    assert "so few draws show no difference, whatever it is; 6 could" in outcome.statement
    with pytest.raises(ConfigError, match=r"confirm; expected the confirmation that this search began.*'draws': 2"):
        run(search(tmp_path, confirm={"draws": 9}), result(), pool)
    assert run(search(tmp_path, confirm={"draws": 2, "model": "other"}), result(), pool).model == "other"


def test_starts_are_compared_after_searches_of_equal_size_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="searches of equal size"):
        search(tmp_path, encoders=["models:/e/1", "none"])
    config = search(tmp_path, compare_scratch=True)
    assert [len(arm) for arm in config.arms] == [1, 1]
    assert config.total == 2 * config.trials
    box = np.array([[0.7, 0.6], [0.8, 0.7]])
    uneven = [Scored("random weights", {}, trials, box) for trials in (8, 5)]
    outcome = confirmed(*uneven, labels=2, draws=(1, 2), seeds=1, model="m", version="1")
    assert "unequal size" in outcome.statement


def test_without_random_weights_the_reference_is_what_was_not_searched(tmp_path: Path, registered: list[Any]) -> None:
    works: list[Work] = []
    pool = simulated(works, str(segmenter_bundle(tmp_path / "bundle")), {BEST: 0.7, REFERENCE: 0.6})
    outcome = run(search(tmp_path), result(), pool)
    assert outcome.reference.trials == 0
    assert "the same start with the settings as they were" in outcome.statement
    (reference, *_) = [work for work in works if work.side == REFERENCE]
    assert reference.job["finetune"]["lr"] == search(tmp_path).finetune.lr
    assert reference.job["starts"] == {REFERENCE: "models:/e/1"}


def test_a_training_of_a_confirmation_scores_held_out_subjects_of_its_draw(tmp_path: Path) -> None:
    write_phantoms(DATA, 8)
    encoder = str(encoder_bundle(tmp_path / "encoder"))
    config = search(tmp_path, encoder)
    job = driver.best_job(config, result(encoder))
    own = confirming._job(config, job, BEST, result(encoder).best, 3)
    url = (tmp_path / "s/confirm").as_uri()
    work = Work(BEST, 3, 0, own.model_dump(mode="json"), keep=True, url=url, run_id="r")
    training = confirming.train(work)
    assert {case.subject for case in training.cases} == {"subject-003"}, "the test split"
    assert registration.is_stored(url)
    with pytest.raises(NotFound):
        open_store(url).get(work.key)
