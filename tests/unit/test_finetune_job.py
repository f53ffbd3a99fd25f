"""The fine-tuning job around the trainer."""

import pytest
import torch

from jobs.finetune import device_for
from storage.errors import ConfigError


def test_a_training_takes_a_gpu_only_when_it_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (device_for(False).type, device_for(True).type) == ("cpu", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for(False).type == "cpu"
    with pytest.raises(ConfigError, match="CUDA"):
        device_for(True)
