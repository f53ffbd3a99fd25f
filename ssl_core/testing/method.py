"""Methods small enough for a test, and steps of them: on one rank, on several, and on a pretended device.

`ssl_core.testing.method_contract` holds every registered method to the contract with them.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import ssl_core.methods  # noqa: F401  registers every method
from ssl_core.config import parse, resolved
from ssl_core.distributed import Collectives, ProcessGroup, Single
from ssl_core.methods.base import StepContext, method_class
from ssl_core.networks import build
from ssl_core.networks.batch_norm import bind
from ssl_core.networks.pyramid import Pyramid
from ssl_core.testing.pretended_device import DEVICE, pretended_device
from ssl_core.testing.ranks import Ranks
from ssl_core.testing.views import map_tensors, synthetic_views
from ssl_core.train import buckets
from ssl_core.train.buckets import Buckets
from ssl_core.train.engine import Engine, EngineConfig
from ssl_core.views.types import ViewBatch

BACKBONE = ("dynunet", {"filters": [4, 8, 8], "strides": [1, 2, 2], "kernel_size": [3, 3, 3]})


def tiny_config(name: str) -> Any:
    """A method's configuration cut down for tests, as the method itself says."""
    return method_class(name).Config.tiny()


def tiny_backbone(seed: int = 0, **arguments: Any) -> Pyramid:
    """A DynUNet of three levels with few channels; `arguments` are more of its settings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(BACKBONE[0], **BACKBONE[1], **arguments)


def tiny_method(name: str, config: Any = None, seed: int = 0, **arguments: Any) -> Any:
    """A method on the tiny backbone with these settings, weights a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return method_class(name)(config or tiny_config(name), tiny_backbone(seed, **arguments)).train()


def context(step: int, max_steps: int = 100, collectives: Collectives | None = None) -> StepContext:
    """A step of a run with seed 7."""
    return StepContext(step, max_steps, 7, collectives or Single())


def train(
    method: Any,
    batch: ViewBatch,
    steps: range,
    optimizer: torch.optim.Optimizer,
    collectives: Collectives | None = None,
) -> list[float]:
    """Plain steps on one batch, norms and gradients over all ranks as in the engine; the mean loss of each step."""
    group = collectives or Single()
    bind(method, group)
    losses = []
    for step in steps:
        ctx = context(step, collectives=group)
        optimizer.zero_grad()
        loss = method(batch, ctx).total
        loss.backward()
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(group.mean(parameter.grad))
        optimizer.step()
        method.after_step(ctx)
        losses.append(float(group.mean(loss.detach())))
    return losses


def trained(method: Any) -> list[nn.Parameter]:
    """Parameters that the optimizer gets."""
    return [p for p in method.parameters() if p.requires_grad]


def gradient(method: Any, batch: ViewBatch, *, autocast: torch.dtype | None = None) -> tuple[float, Tensor]:
    """Loss of a first step, and its gradient over all trained parameters as one float64 vector; the method is kept."""
    method = copy.deepcopy(method)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = method(batch, context(0)).total
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.double().flatten() for p in trained(method) if p.grad is not None])


def rounded(x: Tensor) -> Tensor:
    """Float32 numbers as bfloat16 has them, in float32; others as they are."""
    return x.to(torch.bfloat16).to(x.dtype) if x.dtype == torch.float32 else x


def assert_targets_follow(method: Any, batch: ViewBatch, step: int = 50) -> None:
    """After a step every weight of a `target_X` is m times itself plus 1 - m times that of `X`, m one number in [0, 1).

    Args:
        method: In float64, with at least one target.
        batch: Its views.
        step: Of a run of 100.
    """
    every = dict(method.named_parameters(remove_duplicate=False))
    pairs = {n: every[n.replace("target_", "", 1)] for n in every if "target_" in n}
    with torch.no_grad():
        for parameter in trained(method):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    before = {n: every[n].detach().clone() for n in pairs}
    online = {n: p.detach().clone() for n, p in pairs.items()}
    method(batch, context(step))
    method.after_step(context(step))
    gap, move = (torch.cat([(new[n] - before[n]).detach().flatten() for n in pairs]) for new in (online, every))
    share = float((gap @ move) / (gap @ gap))
    assert 0 < share <= 1, f"targets moved by {share} of the way"
    assert float((move - share * gap).abs().max()) < 1e-12
    assert not any(every[n].requires_grad for n in pairs)


def steps_on_ranks(
    collectives: Collectives, name: str, each: int, steps: int, settings: Mapping[str, Any]
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and state of a float64 method after plain SGD on this rank's part of a batch of `each` a rank.

    Its network has batch norm.
    """
    tiny = tiny_config(name)
    method = tiny_method(name, parse(type(tiny), resolved(tiny) | dict(settings)), norm_name="batch").double()
    spec = type(method).view_spec(method.config)
    samples = range(collectives.rank * each, (collectives.rank + 1) * each)
    batch = synthetic_views(spec, list(samples), torch.float64)
    losses = train(method, batch, range(steps), torch.optim.SGD(trained(method), lr=1e-2), collectives)
    return losses, {k: v.detach().clone() for k, v in method.state_dict().items()}


def assert_same_on_ranks(
    ranks: Ranks, name: str, each: int = 2, steps: int = 3, tolerance: float = 1e-10, **settings: Any
) -> None:
    """Several ranks and one rank on the joined batch agree on losses, weights, targets, queues and norm statistics.

    `settings` change the method's tiny configuration.
    """
    alone_losses, alone = steps_on_ranks(_Joined(), name, each * ranks.world, steps, settings)
    for losses, state in ranks.run(steps_on_ranks, name, each, steps, settings):
        for loss, alone_loss in zip(losses, alone_losses, strict=True):
            assert abs(loss - alone_loss) < tolerance, f"loss {loss} on ranks, {alone_loss} on one"
        assert state.keys() == alone.keys()
        for key, value in state.items():
            gap = float((value.double() - alone[key].double()).abs().max()) if value.numel() else 0.0
            assert gap < tolerance, f"{key} differs by {gap:.2e} between {ranks.world} ranks and one"


def overlapped_and_not(_collectives: Collectives, name: str, steps: int = 3) -> tuple[list[str], list[int], int]:
    """What a method learns where gradients are averaged during the backward pass, and where after it.

    Args:
        name: A registered method.
        steps: Of both runs, with each parameter a bucket of its own.

    Returns:
        Tensors of its state that differ in any bit; buckets that had left at the end of each backward pass of the
        first run; how many parameters are trained.
    """
    early, states = list[int](), list[dict[str, Tensor]]()
    average = Buckets.average

    def note(self: Buckets, votes: Tensor) -> None:
        early.append(self.left)
        average(self, votes)

    with _buckets_of_one(), mock.patch.object(Buckets, "average", note):
        for overlap in (True, False):
            group, method = ProcessGroup(overlap=overlap), tiny_method(name)
            samples = [2 * group.rank, 2 * group.rank + 1]
            batch = synthetic_views(type(method).view_spec(method.config), samples)
            engine = Engine(method, EngineConfig(steps=steps, warmup_steps=0, log_every=steps), collectives=group)
            for _ in range(steps):
                engine.step(batch)
            states.append({key: value.clone() for key, value in method.state_dict().items()})
    differing = [key for key, value in states[0].items() if not torch.equal(value, states[1][key])]
    return differing, early[:steps], len(trained(method))


def faults_on_a_device(collectives: Collectives, name: str, settings: Mapping[str, Any], steps: int = 1) -> list[str]:
    """What a method does in a step that a CUDA device refuses, or that makes the host wait for it.

    On several ranks gradients are averaged during the backward pass.

    Args:
        collectives: This rank's.
        name: A registered method.
        settings: Of the engine.
        steps: Steps after the first, which is reported and therefore waited for.
    """
    method = tiny_method(name)
    batch = synthetic_views(type(method).view_spec(method.config), [2 * collectives.rank, 2 * collectives.rank + 1])
    config = EngineConfig(**{"steps": 100, "log_every": 100, "precision": "fp32", **settings})
    group = ProcessGroup(overlap=True) if collectives.world > 1 else collectives
    with _buckets_of_one(), pretended_device() as record:
        try:
            views = map_tensors(batch, lambda x: x.to(DEVICE))
            engine = Engine(method, config, collectives=group, device=DEVICE)
            engine.step(views)
            record.waits.clear()
            for _ in range(steps):
                engine.step(views)
        except Exception as error:  # noqa: BLE001  other methods are to be tried all the same
            return [f"{type(error).__name__}: {error}"]
    return [f"{wait.where} waits for the device: {wait.why}" for wait in record.waits]


@contextmanager
def _buckets_of_one() -> Iterator[None]:
    """Each parameter is a bucket of gradients, where an engine is made inside."""
    with mock.patch.object(buckets, "BUCKET_BYTES", 1), mock.patch.object(buckets, "LAST_BYTES", 0):
        yield


class _Joined(Single):
    """One rank that holds the whole batch."""
