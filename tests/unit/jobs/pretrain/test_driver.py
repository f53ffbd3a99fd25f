"""The driver's part in training: which deaths of Ray Train's controller it answers with another one."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from ray.train.v2.api.exceptions import ControllerError

from jobs.configs import PretrainConfig
from jobs.pretrain import driver
from storage.errors import RefusedInput, StackError


class Trainer:
    """Stands for Ray's trainer: its controllers end so in turn, by an error or after a step, then one succeeds."""

    ends: ClassVar[list[Exception | int]] = []

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def fit(self) -> Any:
        end = self.ends.pop(0) if self.ends else 9
        if isinstance(end, Exception):
            raise ControllerError(end)
        return SimpleNamespace(checkpoint=f"checkpoint {end}", metrics={"step": end})


def fit(monkeypatch: pytest.MonkeyPatch, folder: Path, *ends: Exception | int) -> Any:
    monkeypatch.setattr(Trainer, "ends", list(ends))
    monkeypatch.setattr(driver, "TorchTrainer", Trainer)
    monkeypatch.setattr(driver, "_CONTROLLER", dataclasses.replace(driver._CONTROLLER, first_s=0.01, cap_s=0.01))
    monkeypatch.setattr(driver, "patch_ray_to_share_evenly", lambda *_: None)
    config = PretrainConfig.model_validate(
        {"name": "n", "data": "memory://d", "runs": str(folder), "engine": {"steps": 9, "warmup_steps": 1}}
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
