"""The driver's part in training: which deaths of Ray Train's controller it answers with another one."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ray.train.v2.api.exceptions import ControllerError

from jobs.configs import PretrainConfig
from jobs.pretrain import driver
from storage.errors import RefusedInput, StackError


class Trainer:
    """Stands for Ray's trainer: its controllers die of these errors in turn, then one succeeds."""

    errors: ClassVar[list[Exception]] = []

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def fit(self) -> Any:
        if self.errors:
            raise ControllerError(self.errors.pop(0))
        return type("Result", (), {"checkpoint": "the last checkpoint"})


def fit(monkeypatch: pytest.MonkeyPatch, folder: Path, *errors: Exception) -> Any:
    monkeypatch.setattr(Trainer, "errors", list(errors))
    monkeypatch.setattr(driver, "TorchTrainer", Trainer)
    monkeypatch.setattr(driver, "_CONTROLLER", dataclasses.replace(driver._CONTROLLER, first_s=0.01, cap_s=0.01))
    monkeypatch.setattr(driver, "patch_ray_to_share_evenly", lambda *_: None)
    config = PretrainConfig.model_validate({"name": "n", "data": "memory://d", "runs": str(folder)})
    return driver.fit(config, "run", "lease")


def test_a_controller_that_dies_of_its_store_is_started_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(monkeypatch, tmp_path, OSError("away"), OSError("away")) == "the last checkpoint"
    assert capsys.readouterr().out.count("the training controller failed (away); starting another") == 2


def test_a_controller_that_dies_each_time_ends_the_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(StackError, match="5 failures of the controller, the last: away.*submit again"):
        fit(monkeypatch, tmp_path, *[OSError("away")] * 9)
    assert len(Trainer.errors) == 4


def test_an_error_that_another_controller_would_meet_again_ends_the_job_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    damage = RefusedInput("volume 7", expected="its voxels", found="damage")
    with pytest.raises(RefusedInput, match="volume 7"):
        fit(monkeypatch, tmp_path, damage, OSError("away"))
    assert len(Trainer.errors) == 1
