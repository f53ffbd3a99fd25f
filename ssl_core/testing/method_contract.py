"""What a method is held to, for this project's methods and for a newcomer's.

Subclass `MethodContract` in a test module; it runs for every registered method.
"""

import copy
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ssl_core.config import Config, parse, resolved
from ssl_core.methods.base import method_class, method_names
from ssl_core.networks.registry import architecture
from ssl_core.networks.weights import encoder_state, load_exact
from ssl_core.testing.memory import peak_of
from ssl_core.testing.method import (
    assert_same_on_ranks,
    assert_targets_follow,
    context,
    faults_on_a_device,
    gradient,
    overlapped_and_not,
    rounded,
    tiny_config,
    tiny_method,
    train,
    trained,
)
from ssl_core.testing.ranks import Ranks
from ssl_core.testing.views import DEGENERATE, degrade, map_tensors, synthetic_views, take
from ssl_core.views.types import ViewBatch


class MethodContract:
    """Every registered method, on a tiny network with synthetic views. Subclass it in a test module to run it.

    Attributes:
        steps, lr: Training that must lower the loss on two samples.
        bf16_tolerance: Largest relative difference of the loss under bfloat16 autocast, plus the same absolutely.
        bf16_gradient_factor: Autocast changes the gradient of all trained parameters together at most this many times
            as much as rounding weights and images to bfloat16 once does in float32, and `bf16_gradient_slack` of its
            length. A fixed limit would say more of an untrained network than of the method: pooled features of few
            samples are nearly alike, and a batch norm makes much of what rounding does to their differences.
    """

    steps = 20
    lr = 1e-2
    bf16_tolerance = 0.05
    bf16_gradient_factor = 3.0
    bf16_gradient_slack = 0.02

    @pytest.fixture(params=method_names())
    def name(self, request: pytest.FixtureRequest) -> str:
        """Each registered method in turn."""
        return str(request.param)

    @pytest.fixture(scope="class")
    def two_ranks(self) -> Iterator[Ranks]:
        """Two gloo processes, shared by the class."""
        with Ranks(2) as ranks:
            yield ranks

    def test_config_survives_a_round_trip_and_describes_every_field(self, name: str) -> None:
        """A config survives YAML-able values and back, and every field says what it is."""
        kind = method_class(name).Config
        config = tiny_config(name)
        assert parse(kind, resolved(config)) == config
        assert [f for f, info in kind.model_fields.items() if not info.description] == []

    def test_a_group_of_settings_given_in_part_keeps_the_rest(self, name: str) -> None:
        """Who changes the size of the crops keeps the method's own flips, overlap and intensity changes."""
        kind = method_class(name).Config
        for field, info in kind.model_fields.items():
            default = info.get_default(call_default_factory=True)
            if isinstance(default, Config):
                for key, value in resolved(default).items():
                    assert getattr(parse(kind, {field: {key: value}}), field) == default, f"{field}.{key}"

    def test_the_method_and_its_config_are_documented(self, name: str) -> None:
        """The docstring has the parts that its page is made of."""
        kind = method_class(name)
        assert all(word in (kind.__doc__ or "") for word in ("Formula", "Traps", "Cost", "Use it"))

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_loss_is_finite(self, name: str, size: int) -> None:
        """Batches of one and more."""
        method = tiny_method(name)
        terms = method(self.views(method, list(range(size))), context(0))
        assert torch.isfinite(terms.total)
        assert terms.total.dim() == 0
        terms.total.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained(method))

    @pytest.mark.parametrize("case", DEGENERATE)
    def test_degenerate_views_give_a_finite_loss_and_gradient(self, name: str, case: str) -> None:
        """In this step, and in the next one, which sees what this one left in targets and queues."""
        method = tiny_method(name)
        batch = self.views(method, [0, 1])
        degrade(batch, case)
        for step in range(2):
            method.zero_grad()
            loss = method(batch, context(step)).total
            loss.backward()
            method.after_step(context(step))
            assert torch.isfinite(loss)
            assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained(method))

    def test_gradients_reach_what_is_trained_and_nothing_else(self, name: str) -> None:
        """Trained parameters get a gradient and no other parameter does."""
        method = tiny_method(name)
        method(self.views(method, [0, 1, 2]), context(0)).total.backward()
        missing = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
        strays = [n for n, p in method.named_parameters() if not p.requires_grad and p.grad is not None]
        assert missing == []
        assert strays == []
        # Biases before a norm get a gradient of zero by design; kernels never do.
        dead = [n for n, p in method.named_parameters() if p.requires_grad and p.dim() > 1 and not p.grad.any()]
        assert dead == []

    def test_targets_follow_exactly(self, name: str) -> None:
        """Moving averages are what they are called, over all weights alike."""
        method = tiny_method(name).double()
        if not any("target_" in n for n, _ in method.named_parameters()):
            pytest.skip(f"{name} has no target")
        assert_targets_follow(method, self.views(method, [0, 1], torch.float64))

    def test_permuting_the_batch_leaves_the_loss(self, name: str) -> None:
        """The order of samples means nothing."""
        method = tiny_method(name).double()
        batch = self.views(method, [0, 1, 2], torch.float64)
        total = method(batch, context(0)).total
        permuted = copy.deepcopy(method)(take(batch, [2, 0, 1]), context(0)).total
        assert abs((permuted - total).item()) < 1e-9

    def test_two_ranks_equal_one(self, name: str, two_ranks: Ranks) -> None:
        """Losses, weights, targets, queues and norm statistics after three steps in float64."""
        assert_same_on_ranks(two_ranks, name)

    def test_averaging_gradients_in_the_backward_pass_changes_no_bit(self, name: str, two_ranks: Ranks) -> None:
        """Each leaves when it is whole, wherever the method uses its parameters; but in the first pass, all do."""
        for differing, early, parameters in two_ranks.run(overlapped_and_not, name):
            assert differing == []
            assert early == [0, parameters, parameters]

    def test_a_step_on_a_device_mixes_nothing_and_waits_for_nothing(self, name: str, two_ranks: Ranks) -> None:
        """On two ranks, each with a CUDA device of `ssl_core.testing.pretended_device`; names the lines at fault."""
        assert two_ranks.run(faults_on_a_device, name, {}) == [[], []]

    def test_a_resumed_run_is_bitwise_equal(self, name: str) -> None:
        """The state dict holds all that a method remembers, after any number of steps."""
        at, end = 1 + zlib.crc32(name.encode()) % 4, 5
        straight = tiny_method(name)
        batch = self.views(straight, [0, 1])
        optimizer = torch.optim.AdamW(trained(straight), lr=1e-3)
        train(straight, batch, range(at), optimizer)
        saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
        losses = train(straight, batch, range(at, end), optimizer)

        resumed = tiny_method(name, seed=5)
        with torch.no_grad():
            for key, tensor in resumed.state_dict().items():
                tensor.copy_(saved[0][key])
        again = torch.optim.AdamW(trained(resumed), lr=1e-3)
        again.load_state_dict(saved[1])
        assert train(resumed, batch, range(at, end), again) == losses
        for key, tensor in resumed.state_dict().items():
            assert torch.equal(tensor, straight.state_dict()[key]), key

    def test_loss_falls_on_two_samples(self, name: str) -> None:
        """It can be optimised. They lie at different heights: of two at one height PCL asks for nothing."""
        method = tiny_method(name)
        batch = self.views(method, [1, 4])
        train(method, batch, range(4), torch.optim.SGD(trained(method), lr=0.0))  # fills queues
        losses = train(method, batch, range(4, 4 + self.steps), torch.optim.AdamW(trained(method), lr=self.lr))
        assert sum(losses[-3:]) / 3 < losses[0]

    def test_the_encoder_exports_completely(self, name: str) -> None:
        """Into the stock class, all names and shapes."""
        method = tiny_method(name)
        backbone = method.encoder()
        stock = architecture(backbone.name).make(**backbone.arguments)
        report = load_exact(stock, encoder_state(backbone), backbone.encoder_keys())
        assert len(report.matched) == len(backbone.encoder_keys()) > 0

    def test_bfloat16_is_near_float32(self, name: str, record_property: Callable[[str, object], None]) -> None:
        """Autocast changes the loss little, and the gradient not much more than rounding weights and images once."""
        method = tiny_method(name)
        batch = self.views(method, [0, 1, 2])
        exact_loss, exact = gradient(method, batch)
        rough_loss, rough = gradient(method, batch, autocast=torch.bfloat16)
        assert abs(rough_loss - exact_loss) <= self.bf16_tolerance * (1 + abs(exact_loss))
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.copy_(rounded(parameter))
        _, near = gradient(method, map_tensors(batch, rounded))
        error, unavoidable = (float((other - exact).norm() / exact.norm()) for other in (rough, near))
        record_property("bf16_gradient_error", round(error, 4))
        record_property("bf16_gradient_cosine", round(float(nn.functional.cosine_similarity(rough, exact, dim=0)), 4))
        assert error <= self.bf16_gradient_factor * unavoidable + self.bf16_gradient_slack

    def test_memory_and_time_of_a_step_are_recorded(
        self, name: str, record_property: Callable[[str, object], None]
    ) -> None:
        """As properties of the test; a step holds its gradients and more, and a later one no more than the first."""
        method = tiny_method(name)
        batch = self.views(method, [0, 1])
        parameters = trained(method)

        def step() -> None:
            method.zero_grad()
            method(batch, context(0)).total.backward()
            method.after_step(context(0))

        step()
        started = time.perf_counter()
        step()
        record_property("step_ms", round(1000 * (time.perf_counter() - started), 2))
        method.zero_grad()
        peaks = [peak_of(step, torch.device("cpu")) for _ in range(2)]
        record_property("step_peak_kib", round(peaks[0] / 1024))
        assert peaks[0] > sum(p.nbytes for p in parameters)
        assert peaks[1] <= 1.05 * peaks[0]

    def views(self, method: Any, samples: list[int], dtype: torch.dtype = torch.float32) -> ViewBatch:
        """Synthetic views of these samples as the method wants them."""
        return synthetic_views(type(method).view_spec(method.config), samples, dtype)
