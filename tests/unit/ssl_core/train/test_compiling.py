"""`engine.compile` on a machine without a compiler, as in the image."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_core.train.engine import Engine, EngineConfig
from storage.errors import ConfigError


def test_compile_without_a_compiler_is_refused_before_a_step_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing that was compiled before
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "g++"))}),
        pytest.raises(ConfigError) as caught,
    ):
        Engine(nn.Linear(2, 2), EngineConfig(steps=2, warmup_steps=0, compile=True))
    text = str(caught.value)
    assert "engine.compile" in text
    assert "No working C++ compiler" in text
    assert "\n" not in (caught.value.found or "")
    assert "set engine.compile=false" in text
