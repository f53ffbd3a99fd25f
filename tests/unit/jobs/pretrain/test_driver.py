"""The driver's part in training: which deaths of Ray Train's controller it answers with another one."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from ray.train import CheckpointConfig as RayCheckpoints
from ray.train._internal.checkpoint_manager import _CheckpointManager
from ray.train.v2.api.exceptions import ControllerError

from jobs.configs import PretrainConfig
from jobs.configs.groups import CheckpointConfig
from jobs.pretrain import driver
from jobs.pretrain.worker import UNMEASURED, unmeasured
from storage.errors import RefusedInput, StackError


class Trainer:
    """Stands for Ray's trainer: its controllers end so in turn, by an error or after a step, then one succeeds."""

    ends: ClassVar[list[Exception | int]] = []
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, *_: Any, **settings: Any) -> None:
        Trainer.settings = settings

    def fit(self) -> Any:
        end = self.ends.pop(0) if self.ends else 9
        if isinstance(end, Exception):
            raise ControllerError(end)
        return SimpleNamespace(checkpoint=f"checkpoint {end}", metrics={"step": end})


def fit(monkeypatch: pytest.MonkeyPatch, folder: Path, *ends: Exception | int, **groups: Any) -> Any:
    monkeypatch.setattr(Trainer, "ends", list(ends))
    monkeypatch.setattr(driver, "TorchTrainer", Trainer)
    monkeypatch.setattr(driver, "_CONTROLLER", dataclasses.replace(driver._CONTROLLER, first_s=0.01, cap_s=0.01))
    monkeypatch.setattr(driver, "patch_ray_to_share_evenly", lambda *_: None)
    config = PretrainConfig.model_validate(
        {"name": "n", "data": "memory://d", "runs": str(folder), "engine": {"steps": 9, "warmup_steps": 1}} | groups
    )
    return driver.fit(config, "run", "lease").checkpoint


def test_a_controller_that_dies_of_its_store_is_started_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(monkeypatch, tmp_path, OSError("away"), OSError("away")) == "checkpoint 9"
    assert capsys.readouterr().out.count("the training controller failed (away); starting another") == 2


def test_a_controller_that_dies_each_time_ends_the_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(StackError, match="5 failures of the controller, the last: away.*submit again"):
        fit(monkeypatch, tmp_path, *[OSError("away")] * 9)
    assert len(Trainer.ends) == 4


def test_an_error_that_another_controller_would_meet_again_ends_the_job_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    damage = RefusedInput("volume 7", expected="its voxels", found="damage")
    with pytest.raises(RefusedInput, match="volume 7"):
        fit(monkeypatch, tmp_path, damage, OSError("away"))
    assert len(Trainer.ends) == 1


def test_training_that_ended_early_for_a_node_that_goes_is_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(monkeypatch, tmp_path, 4, OSError("away"), 7) == "checkpoint 9"
    text = capsys.readouterr().out
    assert "saved at step 4, as a node will be taken away" in text
    assert "saved at step 7" in text


def test_placement_labels_and_what_stays_reach_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    labels, best = {"ray.io/market-type": "!spot"}, {"keep": 3, "best_by": "loss", "best_is": "min"}
    fit(monkeypatch, tmp_path, cluster={"placement": "SPREAD", "labels": labels}, checkpoints=best)
    scaling, kept = Trainer.settings["scaling_config"], Trainer.settings["run_config"].checkpoint_config
    assert (scaling.placement_strategy, scaling.label_selector) == ("SPREAD", labels)
    assert (kept.num_to_keep, kept.checkpoint_score_attribute, kept.checkpoint_score_order) == (3, "loss", "min")
    fit(monkeypatch, tmp_path)
    assert Trainer.settings["scaling_config"].label_selector is None
    assert Trainer.settings["run_config"].checkpoint_config.num_to_keep == 2


@pytest.mark.parametrize(("best_is", "step"), [("max", 4), ("min", 2)])
def test_the_best_checkpoint_is_registered_where_that_is_asked_for(
    best_is: Any, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    retention = CheckpointConfig(best_by="probe/knn_dice", best_is=best_is, register_best=True)
    scores = {1: unmeasured(retention)["probe/knn_dice"], 2: 0.3, 4: 0.6, 6: 0.5}
    best = [(f"step {at}", {"step": at, "probe/knn_dice": score}) for at, score in scores.items()]
    assert abs(scores[1]) == UNMEASURED
    config = PretrainConfig.model_validate({"name": "n", "data": "memory://d", "checkpoints": retention.model_dump()})
    assert driver.best_checkpoint(config, SimpleNamespace(best_checkpoints=best)) == f"step {step}"
    assert f"registering step {step}, whose probe/knn_dice of" in capsys.readouterr().out
    assert driver.best_checkpoint(config, SimpleNamespace(best_checkpoints=best[:1])) is None
    assert "no checkpoint has probe/knn_dice; registering the last one" in capsys.readouterr().out
    plain = PretrainConfig.model_validate({"name": "n", "data": "memory://d"})
    assert driver.best_checkpoint(plain, SimpleNamespace(best_checkpoints=best)) is None


def test_a_checkpoint_without_the_metric_is_the_worst_for_ray() -> None:
    """Ray takes one that has none for the best of `min`."""
    assert unmeasured(CheckpointConfig()) == {}
    for order, score in (("max", 0.1), ("min", 9.0)):
        retention = CheckpointConfig(best_by="loss", best_is=order)
        manager = _CheckpointManager(RayCheckpoints(checkpoint_score_attribute="loss", checkpoint_score_order=order))
        scores = [
            manager._get_checkpoint_score(SimpleNamespace(metrics={"step": 1, **unmeasured(retention), **more}))
            for more in ({}, {"loss": score})
        ]
        assert scores[0] < scores[1]
