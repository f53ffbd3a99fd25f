"""bf16 on a processor whose kernels may be wrong: right gradients or a refusal, never noise."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_core.train import precision
from ssl_core.train.precision import check_convolutions, require_right
from storage.errors import ConfigError

SIZES = [(2, 2, 2), (2, 8, 8), (1, 4, 4), (3, 3, 3), (8, 8, 8)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_gradient_in_bf16_is_right_or_refused(size: tuple[int, ...], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv3d(16, 16, 3, padding=1).to(memory_format=layout)
    x_BCDHW = torch.randn(2, 16, *size).contiguous(memory_format=layout)

    def gradient(*, is_bf16: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            y = convolution(x_BCDHW)
        return torch.autograd.grad(y.float().square().mean(), [convolution.weight])[0]

    exact = gradient(is_bf16=False)
    words = ""
    try:
        require_right(convolution, x_BCDHW)
    except ConfigError as error:
        words = str(error)
    if words:
        assert f"a kernel of 3 x 3 x 3 on maps of {' x '.join(map(str, size))}" in words
        assert "fp32" in words
        return
    for _ in range(5):
        precision._dirty()
        assert float((gradient(is_bf16=True) - exact).abs().max() / exact.abs().max()) < 0.05


def test_what_is_wrong_is_refused_once_and_what_is_right_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    real = precision.weight_gradient

    def gradient(convolution: nn.Conv3d, x_BCDHW: Tensor, *, is_bf16: bool) -> Tensor:
        asked.append(tuple(x_BCDHW.shape))
        exact = real(convolution, x_BCDHW, is_bf16=False)
        return exact * float("nan") if is_bf16 and x_BCDHW.shape[2] == 2 else exact

    monkeypatch.setattr(precision, "weight_gradient", gradient)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 3, stride=2, padding=1))
    check_convolutions(network)
    network[0].requires_grad_(False)
    state = torch.get_rng_state()
    network(torch.ones(2, 1, 8, 8, 8))
    network(torch.ones(2, 1, 8, 8, 8))
    with torch.no_grad():
        network(torch.ones(2, 1, 2, 8, 8))
    assert len(asked) == 2, "the frozen one is not trained"
    network[0].requires_grad_(True)
    network(torch.ones(2, 1, 8, 8, 8))
    assert len(asked) == 2 * 2, "from now on it is"
    assert torch.equal(torch.get_rng_state(), state), "no random number is drawn"
    with pytest.raises(ConfigError, match=r"kernel of 3 x 3 x 3 on maps of 2 x 8 x 8.*fp32"):
        network(torch.ones(2, 1, 2, 8, 8))


def test_a_training_in_bf16_on_a_cpu_tries_its_convolutions_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit.jobs.bench.test_step import small

    seen: list[Any] = []
    monkeypatch.setattr("ssl_core.train.precision.require_right", lambda convolution, x: seen.append(x.shape))
    small(steps=1, variant="plain")
    assert not seen
    small(steps=1, variant="bf16")
    assert seen


def test_compiled_code_in_bf16_is_refused_on_a_processor_that_is_wrong_anywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.unit.jobs.bench.test_step import small

    def refuse() -> None:
        raise ConfigError("precision", expected="fp32", found="bf16")

    monkeypatch.setattr("ssl_core.train.engine.require_right_at_all", refuse)
    with pytest.raises(ConfigError, match="found bf16"):
        small(steps=1, variant="plain", engine_settings={"precision": "bf16", "compile": True})
