"""The fine-tuning job around the trainer."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jobs.configs import FinetuneJobConfig
from jobs.finetune import compared, device_for
from jobs.finetune.driver import _registered
from jobs.tracking import models, registration
from jobs.tracking.bundles import write_segmenter
from ssl_core.config import parse
from ssl_core.downstream.comparison import ONE_START, Comparison, Training, paired_test_of
from ssl_core.downstream.finetune import Subjects, TrainedSegmenter, build_segmenter
from ssl_core.downstream.scores import CaseScore
from ssl_core.views.intensity import IntensityPolicy
from storage.errors import ConfigError, RefusedInput
from storage.reading.volume_store import VolumeStore
from tests.kit.phantoms import write_phantoms
from tests.kit.scores import scores


def test_a_training_takes_a_gpu_only_when_it_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (device_for(False).type, device_for(True).type) == ("cpu", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for(False).type == "cpu"
    with pytest.raises(ConfigError, match="CUDA"):
        device_for(True)


def test_scores_that_promotions_compare_are_of_subjects_and_name_what_was_segmented(tmp_path: Path) -> None:
    url = "memory://finetune-job"
    manifest = write_phantoms(url, 4)
    labelled = {"data": url, "label": "organs", "subjects": 2, "inner": 1}
    job = {"name": "n", "starts": {"a": "models:/e/1"}, "labelled": labelled, "finetune": {"patch_DHW": [16, 16, 16]}}
    with VolumeStore(url, manifest) as store:
        trained = TrainedSegmenter(
            network=build_segmenter("unet", {"channels": [8, 16], "strides": [2], "norm": "instance"}, 3, 0, None),
            store=store,
            subjects=Subjects(train=(0,), inner=(1,), test=(2, 3)),
            labels={1: "liver", 3: "spleen"},
            intensity=IntensityPolicy(),
            history=(),
            device=torch.device("cpu"),
        )
        by_volume = {("s1", "v1"): 0.2, ("s1", "v2"): 0.4, ("s2", "v3"): 0.9}
        cases = [
            CaseScore(volume, subject, label, scores(dice=dice))
            for (subject, volume), dice in by_volume.items()
            for label in trained.labels.values()
        ]
        target = tmp_path / "bundle"
        config = parse(FinetuneJobConfig, job)
        bundle = write_segmenter(config, trained, target, run_id="r", cases=cases, parent="models:/e/1")
    evaluation = json.loads((bundle / "evaluation.json").read_text())
    assert evaluation["cases"] == pytest.approx({"s1": 0.3, "s2": 0.9})
    assert evaluation["split"] == f"{manifest.fingerprint} test, organs 1 3"


JOB = {
    "name": "n",
    "starts": {"pre": "models:/e/1", "none": "none"},
    "seeds": [3, 1],
    "labelled": {"data": "memory://x"},
}
# Two volumes of subject 0, which must not count twice.
VOLUMES = [("s0", "v0a"), ("s0", "v0b"), *((f"s{i}", f"v{i}") for i in range(1, 7))]


def training(start: str, seed: int) -> Training:
    gain = {("pre", 3): 0.2, ("pre", 1): 0.4}.get((start, seed), 0.0)
    cases = [CaseScore(v, s, "l", scores(dice=0.5 + (gain if v != "v0b" else -gain))) for s, v in VOLUMES]
    version = "7" if (start, seed) == ("pre", 3) else None
    return Training(start, seed, ({"loss": 1.0, "inner_dice": 0.5},), tuple(cases), version, 1.0)


def comparison(**changes: object) -> Comparison:
    config = parse(FinetuneJobConfig, JOB | changes)
    ended = [training(start, seed) for start in reversed(config.starts) for seed in reversed(config.seeds)]
    return compared(config, ended, run_id="r", seconds=2.0)


def test_the_test_pairs_subjects_whatever_ended_first() -> None:
    result = comparison().to_json()
    assert (result["test"]["n"], result["test"]["n_seeds"]) == (7, 2)
    assert result["test"]["difference"] == pytest.approx(6 * 0.3 / 7)
    assert result["test"]["by_seed"] == pytest.approx([6 * 0.2 / 7, 6 * 0.4 / 7]), "seed 3 first, as configured"
    assert [(r["start"], r["seed"]) for r in result["runs"]] == [("pre", 3), ("pre", 1), ("none", 3), ("none", 1)]
    assert result["cases"][0]["start"] == "pre"
    assert [(r["start"], r["cases"], r["seeds"]) for r in result["rows"]] == [("pre", 8, 2), ("none", 8, 2)]
    assert result["version"] == "7"


def test_a_result_has_the_keys_that_it_always_had() -> None:
    """They are read by the demo, by scripts of users, and by a job that goes on under its name."""
    result = comparison().to_json()
    assert list(result) == [
        "rows", "cases", "test", "model", "version", "registered_start", "nsd_tolerance_mm", "runs",
        "run_id", "seconds",
    ]  # fmt: skip
    case = ["start", "seed", "volume_id", "subject", "label", "dice", "hd95_mm", "nsd"]
    assert list(result["cases"][0])[: len(case)] == case
    row = ["start", "label", "seeds", "cases", "dice_mean", "dice_sd", "hd95_mean", "hd95_sd", "nsd_mean", "nsd_sd"]
    assert list(result["rows"][0])[: len(row)] == row
    assert list(result["runs"][0]) == ["start", "seed", "history", "seconds"]
    assert list(training("pre", 3).to_json()) == ["start", "seed", "history", "cases", "version", "seconds"]
    alone = comparison(starts={"pre": "models:/e/1"}).to_json()
    assert alone["test"] == {"statement": ONE_START}


def test_a_rerun_under_another_model_name_registers_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"one": "4", "other": "1"}
    monkeypatch.setattr(models, "register", lambda bundle, name, run_id: versions[name])
    config = parse(FinetuneJobConfig, JOB | {"runs": f"file://{tmp_path}"})
    ended = [replace(training(start, seed), version=None) for start in config.starts for seed in config.seeds]
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text("{}")
    registration.store_bundle(tmp_path / "bundle", f"file://{tmp_path}/n")
    for name, version in versions.items():
        one = config.model_copy(update={"model": name})
        result = compared(one, _registered(one, ended, "r"), run_id="r", seconds=1.0)
        assert (result.model, result.version) == (name, version)
        assert [(t.start, t.seed) for t in result.trainings if t.version] == [("pre", 3)]


def test_a_job_of_before_keeps_the_name_that_its_segmenter_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """It registered while it trained, and stored nothing that could be registered again."""
    runs = {"models:/one/7": "r", "models:/other/7": "of another job"}
    monkeypatch.setattr(models, "resolve", lambda uri: SimpleNamespace(run_id=runs[uri]))
    config = parse(FinetuneJobConfig, JOB | {"runs": "memory://finetune-before", "model": "one"})
    ended = [training(start, seed) for start in config.starts for seed in config.seeds]
    assert _registered(config, ended, "r") == ended
    with pytest.raises(ConfigError, match="'other'.*leave the name as it was"):
        _registered(config.model_copy(update={"model": "other"}), ended, "r")


def test_a_result_of_before_is_read_and_says_what_its_trainings_can_show() -> None:
    """Its test was over subjects alone, and called chance a gain."""
    data = json.loads(json.dumps(comparison().to_json()))
    new = data["test"]
    data["test"] = {
        "n": 7, "difference": 0.257, "low": 0.2, "high": 0.3, "p": 0.0078, "better": 1.0, "effect": 1.0,
        "significant": True, "statement": "pre scored higher than none on these cases: +0.257 Dice.",
    }  # fmt: skip
    again = Comparison.from_json(data)
    assert again.statement == new["statement"]
    assert again.statement.startswith("In these 2 trainings of each start, pre minus none was ")
    assert again.test is not None
    assert not again.test.significant


def test_trainings_that_do_not_pair_are_refused() -> None:
    pre, other = training("pre", 3), training("none", 1)
    with pytest.raises(ConfigError, match="same seeds and test subjects"):
        paired_test_of([pre, other], ["pre", "none"])


@pytest.mark.parametrize("changes", [{}, {"starts": {"pre": "models:/e/1"}}])
def test_what_is_written_is_read_back(changes: dict[str, object]) -> None:
    result = comparison(**changes)
    data = json.loads(json.dumps(result.to_json()))
    again = Comparison.from_json(data)
    assert again.to_json() == result.to_json()
    assert (again.rows, again.test, again.statement) == (result.rows, result.test, result.statement)
    one = training("pre", 3)
    stored = json.loads(json.dumps(one.to_json()))
    assert Training.from_json(stored) == one
    del stored["cases"][0]["nsd"]
    with pytest.raises(RefusedInput, match="no nsd"):
        Training.from_json(stored)
