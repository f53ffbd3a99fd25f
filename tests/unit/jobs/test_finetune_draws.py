"""A fine-tuning over several draws of labelled subjects."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.configs import FinetuneJobConfig
from jobs.configs.search import TuneConfig
from jobs.finetune import compared
from jobs.finetune.driver import Task, registered_task, tasks, training_task
from jobs.finetune.previews import EXAMPLES
from jobs.labelled import draw, draws
from jobs.tracking import registration
from ssl_core.bundle import write_bundle
from ssl_core.bundle_card import BundleFacts
from ssl_core.config import digest, parse, resolved
from ssl_core.downstream.comparison import ONE_DRAW, Comparison, Training, paired_test_of
from ssl_core.downstream.inference import MOST_DRAWS, DrawTest, draw_test
from ssl_core.downstream.scores import CaseScore
from ssl_core.networks import build
from ssl_core.views.intensity import IntensityPolicy
from storage.errors import ConfigError
from tests.kit.phantoms import write_phantoms
from tests.kit.scores import scores

DRAWS = [4, 1, 9, 2, 7, 5]
JOB: dict[str, Any] = {
    "name": "n",
    "starts": {"pre": "models:/e/1", "none": "none"},
    "seeds": [3, 1],
    "labelled": {"data": "memory://x", "subjects_seed": DRAWS},
}


def config(**labelled: Any) -> FinetuneJobConfig:
    return parse(FinetuneJobConfig, JOB | {"labelled": JOB["labelled"] | labelled})


def training(task: Task, gain: float = 0.05) -> Training:
    """Where `pre` gains `gain`, a little more on later draws and subjects."""
    of_start = (gain + 0.01 * DRAWS.index(task.draw or 4)) if task.start == "pre" else 0.0
    cases = [CaseScore(f"v{i}", f"s{i}", "l", scores(dice=0.5 + of_start * (1 + i / 8))) for i in range(7)]
    return Training(task.start, task.seed, ({"loss": 1.0},), tuple(cases), None, 1.0, task.draw)


def comparison(gain: float = 0.05) -> Comparison:
    return compared(config(), [training(task, gain) for task in reversed(tasks(config()))], run_id="r", seconds=2.0)


def test_each_start_is_trained_with_each_seed_on_each_draw() -> None:
    every = tasks(config())
    assert {(task.start, task.seed, task.draw) for task in every} == {
        (start, seed, number) for start in ("pre", "none") for seed in (3, 1) for number in DRAWS
    }
    assert len({task.key for task in every}) == 24
    assert registered_task(config()) == Task("pre", 3, 4), "of the first draw, whatever its scores"
    one = config(subjects_seed=4)
    assert [task.key for task in tasks(one)] == ["pre-3.json", "none-3.json", "pre-1.json", "none-1.json"], "as before"
    assert config(subjects_seed=[4]) == one
    assert [task.draw for task in tasks(one)] == [None] * 4


def test_the_test_is_the_one_over_draws_seeds_and_subjects() -> None:
    result = comparison()
    test = result.test
    assert isinstance(test, DrawTest)
    box = np.array([[[(0.05 + 0.01 * d) * (1 + i / 8) for i in range(7)]] * 2 for d in range(6)])
    expected = draw_test(box, a="pre", b="none", labels=8)
    assert test.p == pytest.approx(expected.p)
    assert (test.low, test.high) == pytest.approx((expected.low, expected.high))
    assert test.by_draw == pytest.approx(expected.by_draw)
    assert (test.draws, test.pretrainings, test.subjects) == (6, 2, 7)
    assert test.significant
    assert "pre scores higher than none" in result.statement
    assert "6 draws of labelled subjects, 2 trainings of each start on each, and 7 test subjects" in result.statement
    assert ONE_DRAW not in result.statement
    assert "No difference" not in result.statement
    flat = comparison(gain=-0.025)  # the draws go either way
    assert "no difference between pre and none is shown" in flat.statement


def test_a_result_over_draws_is_read_back_and_names_each_draw() -> None:
    result = comparison()
    data = json.loads(json.dumps(result.to_json()))
    assert data["test"]["significant"] is True
    assert data["test"]["statement"] == result.statement
    assert [(run["start"], run["draw"], run["seed"]) for run in data["runs"]][:3] == [
        ("pre", 4, 3), ("pre", 4, 1), ("pre", 1, 3)
    ]  # fmt: skip
    assert data["cases"][0]["draw"] == 4
    again = Comparison.from_json(data)
    assert again == result
    one = result.trainings[0]
    assert Training.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert [(row.start, row.seeds, row.cases) for row in result.rows] == [("pre", 12, 7), ("none", 12, 7)]


@pytest.mark.parametrize("fault", ["a draw", "a seed", "a subject"])
def test_trainings_that_do_not_pair_over_draws_are_refused(fault: str) -> None:
    every = [training(task) for task in tasks(config())]
    last = every[-1]
    every[-1:] = [replace(last, cases=last.cases[1:])] if fault == "a subject" else []
    if fault == "a draw":
        every = [one for one in every if (one.start, one.draw) != ("none", DRAWS[-1])]
    with pytest.raises(ConfigError, match="every draw with the same seeds and test subjects"):
        paired_test_of(every, ["pre", "none"], 8)


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ([], "one seed or several different ones"),
        ([1, 2, 1], "one seed or several different ones"),
        ([1, -1], "from 0 on"),
        ([1, 2**63], "from 0 on"),
        (list(range(MOST_DRAWS + 1)), f"{MOST_DRAWS} draws at most"),
        ([1.5, 2], "subjects_seed"),
        ("x", "subjects_seed"),
    ],
)
def test_lists_of_draws_that_mean_nothing_are_refused(seeds: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        config(subjects_seed=seeds)
    assert "labelled.subjects_seed" in str(caught.value)


def test_a_search_is_on_one_draw_and_a_draw_is_one() -> None:
    search = {"name": "n", "encoders": ["models:/e/1"], "labelled": JOB["labelled"]}
    with pytest.raises(ConfigError, match="one labelled.subjects_seed"):
        parse(TuneConfig, search)
    manifest = write_phantoms("memory://draws-of-a-list", 4)
    with pytest.raises(ConfigError, match="labelled.subjects_seed"):
        draw(manifest, config(subjects=2, inner=1).labelled)
    assert digest(config(subjects_seed=0)) == digest(
        parse(FinetuneJobConfig, JOB | {"labelled": {"data": "memory://x"}})
    )


def test_a_training_learns_from_its_own_draw_and_the_first_draws_segmenter_is_kept(tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    manifest = write_phantoms(url, 10, label="labels")
    network = build("resenc", n_blocks_per_stage=(1, 1, 1), features_per_stage=(4, 4, 4))
    bundle = write_bundle(tmp_path / "b", "encoder", network, BundleFacts("m", (16, 16, 16), IntensityPolicy()))
    job = parse(
        FinetuneJobConfig,
        {
            "name": "n",
            "runs": (tmp_path / "runs").as_uri(),
            "starts": {"pre": str(bundle)},
            "seeds": [0],
            "labelled": {"data": url, "label": "labels", "subjects": 2, "inner": 0, "subjects_seed": [0, 2]},
            "finetune": {"epochs": 1, "steps_per_epoch": 2, "batch": 2, "patch_DHW": [16, 16, 16], "warmup_steps": 0},
        },
    )
    first, second = tasks(job)
    drawn = [set(draw(manifest, job.labelled.of_draw(number)).train) for number in (0, 2)]
    assert drawn[0] != drawn[1]
    assert list(draws(manifest, job.labelled)) == [0, 2]
    same = job.labelled.model_copy(update={"subjects_seed": (0, 2, 1)})
    with pytest.raises(ConfigError, match=r"labelled.subjects_seed.*the same with 0 and with 1"):
        draws(manifest, same)
    other = training_task(resolved(job), "r", second)
    assert not registration.is_stored((tmp_path / "runs/n").as_uri())
    assert not (tmp_path / "runs/n" / EXAMPLES).exists(), "of a training whose segmenter is not registered"
    one = training_task(resolved(job), "r", first)
    assert registration.is_stored((tmp_path / "runs/n").as_uri())
    assert (tmp_path / "runs/n" / EXAMPLES).read_bytes()[:4] == b"\x89PNG"
    assert (one.draw, other.draw) == (0, 2)
    assert one.history != other.history
    assert {case.subject for case in one.cases} == {case.subject for case in other.cases}, "tested on the same subjects"
