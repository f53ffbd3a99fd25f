"""One step of training for every method, and for fine-tuning.

The engine knows nothing of Ray or MLflow. It draws nothing from global random state that it has not seeded itself, so
its whole state is the method's tensors, the optimizer's and one integer.

Gradients are averaged in buckets of one flat buffer (`ssl_core.train.buckets`) rather than with
`DistributedDataParallel`. DDP lays its buckets out anew after its first step, so that with three ranks and more a
resumed run adds in another order than the undisturbed one and differs in the last bits (tried: 3 ranks, gloo). The
buckets here follow from the parameters alone. They leave during the backward pass where the collectives say so.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_core.config import LATER, Config, digest
from ssl_core.distributed import Collectives, ProcessGroup, Single
from ssl_core.methods.base import LossTerms, Method, StepContext
from ssl_core.networks import batch_norm, recompute
from ssl_core.networks.pyramid import cut_batches
from ssl_core.train import checkpoint, compiling, determinism, sharding
from ssl_core.train.gradients import FlatGradients, Outcome, Verdict
from ssl_core.train.optim import NamedOptimizer
from ssl_core.train.precision import check_convolutions, require_right_at_all, resolve_precision
from ssl_core.train.schedule import cosine, warmup_cosine
from ssl_core.views.split import split
from ssl_core.views.types import ViewBatch
from storage.errors import ConfigError, TomoscaleError

OPERATIONAL = ("checkpoint_every", "log_every", "probe_every", "micro_batch", "sharding")
"""Settings that change nothing of the result but its rounding."""


class EngineConfig(Config):
    """How a method is trained."""

    steps: int = Field(default=1000, ge=1, description="Optimizer steps of the whole run")
    optimizer: Literal["adamw", "sgd"] = Field(
        default="adamw", description="AdamW, or SGD with momentum and coupled decay"
    )
    lr: float = Field(
        default=1e-3, gt=0, description="Learning rate at the end of the warm-up; not scaled by the batch"
    )
    final_lr: float = Field(default=0.0, ge=0, description="Learning rate of the last step, reached on half a cosine")
    warmup_steps: int = Field(default=50, ge=0, description="Steps over which the learning rate rises linearly")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW's two decay rates")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="SGD's momentum")
    weight_decay: float = Field(
        default=1e-2, ge=0, description="Decay of weight matrices and kernels; never biases and norms"
    )
    final_weight_decay: float | None = Field(
        default=None, ge=0, description="Decay of the last step, on half a cosine; unset: constant"
    )
    clip: float = Field(default=1.0, ge=0, description="Largest global gradient norm; 0 does not clip")
    accumulate: int = Field(
        default=1,
        ge=1,
        description="Parts that a rank's batch is cut into, one forward and backward pass each; contrasts between "
        "samples and batch norms see one part only, which holds the same samples for any number of ranks; all other "
        "losses are those of the whole batch",
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Most samples of a rank that are in a network at once; losses, contrasts and norms of heads see "
        "all of a part as before, and a part that is cut costs one more forward pass. Empty: all of them, and in a job "
        "with `cluster.min_workers` as many as with `cluster.workers`",
        json_schema_extra=LATER,
    )
    precision: Literal["auto", "fp32", "bf16", "fp64"] = Field(
        default="auto", description="auto: bf16 autocast on CUDA devices that have it, else fp32; fp64 is for tests"
    )
    channels_last: bool = Field(default=False, description="Kernels and activations in channels_last_3d order")
    compile: bool = Field(default=False, description="Run the method's forward pass through torch.compile")
    fused: bool = Field(default=True, description="Fused optimizer kernels")
    sharding: Literal["none", "full"] = Field(
        default="none",
        description="`full`: each rank keeps a part of weights, gradients and moments (FSDP2), for networks that do "
        "not fit; more messages, the same results but for rounding",
        json_schema_extra=LATER,
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Keep only the inputs of the network's blocks and compute the rest again in the backward pass: "
        "less memory, more time",
    )
    deterministic: bool = Field(default=True, description="Deterministic kernels where torch has them; slower on CUDA")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of everything drawn inside a step")
    log_every: int = Field(default=10, ge=1, description="Steps between reports")
    checkpoint_every: int = Field(default=200, ge=1, description="Steps between checkpoints")
    probe_every: int = Field(
        default=100, ge=0, description="Steps between collapse probes, one more at the end; 0 never"
    )

    @model_validator(mode="after")
    def _shards_fit(self) -> "EngineConfig":
        if self.sharding == "full" and (self.compile or self.channels_last):
            raise ValueError("sharding none with compile or channels_last, which were not tried with shards")
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> "EngineConfig":
        if self.warmup_steps >= self.steps and self.steps > 1:
            raise ValueError(f"warmup_steps below steps ({self.steps}), not {self.warmup_steps}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas from 0 to below 1, not {self.betas}")
        return self

    def digest(self) -> str:
        """Digest of the settings that change the result by more than rounding; how often to save is not among them."""
        plain = {name: type(self).model_fields[name].default for name in OPERATIONAL}
        return digest(self.model_copy(update=plain))


class NonFiniteError(TomoscaleError, ArithmeticError):
    """A loss or a gradient is infinite or not a number. Nothing has been saved from that step.

    An ArithmeticError, so that whoever restarts jobs can tell that the same step would end so again.
    """


class Engine:
    """A method, its optimizer and how far they are.

    Args:
        method: An `nn.Module` that meets `ssl_core.methods.base.Method`; moved to `device` in place. Its `rates`
            (`ssl_core.train.optim.Rates`), where it has them, are what its parameters' learning rates differ by.
        config: Settings.
        collectives: `ssl_core.distributed.current()` in a job. Rank 0's initial weights go to all ranks, and each
            `GlobalBatchNorm` of the method normalises over all ranks.
        device: Where to train.

    Attributes:
        step_done: Optimizer steps done so far.
        dtype: Floating type in which views are wanted (float64 under `fp64`, else float32).
        stopping: Whether any rank has asked to stop; the same on all ranks.
        watch: Called with what came of each step, and whether what was not finite came from this rank's part. On the
            CPU weights are then as before the step, on CUDA up to one step later.
    """

    def __init__(
        self,
        method: nn.Module,
        config: EngineConfig,
        *,
        collectives: Collectives | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.method, self.config, self.device = method, config, torch.device(device)
        self.collectives: Collectives = collectives if collectives is not None else Single()
        self.step_done = 0
        self.stopping = False
        self.watch: Callable[[Outcome, bool], None] | None = None
        determinism.apply(config.deterministic)
        self.precision = resolve_precision(config.precision, self.device)
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32
        layout = {"memory_format": torch.channels_last_3d} if config.channels_last else {}
        method.to(device=self.device, dtype=self.dtype)
        for parameter in method.parameters() if layout else ():
            if parameter.dim() == 5:
                parameter.data = parameter.data.contiguous(**layout)
        method.train()
        batch_norm.bind(method, self.collectives)
        if not any(p.requires_grad for p in method.parameters()):
            raise ConfigError("method", expected="trainable parameters", found="none")
        self._statistics = [
            tensor
            for module in method.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for tensor in (module.running_mean, module.running_var)
            if tensor is not None
        ]
        self._share_initial_weights()
        # Ranks that are simulated, as a replay's are, share one memory: there is nothing to cut.
        self.is_sharded = config.sharding == "full" and isinstance(self.collectives, ProcessGroup)
        if self.is_sharded:
            sharding.shard(method, self.device)
        trainable = {n: p for n, p in method.named_parameters() if p.requires_grad}
        # Steps whose verdict may still be on its way while the next one is launched.
        self._lag = 1 if self.device.type == "cuda" else 0
        self._pending: list[Verdict] = []
        gradients = sharding.ShardedGradients if self.is_sharded else FlatGradients
        self._grads = gradients(trainable, self.collectives)
        self.optimizer = NamedOptimizer(
            trainable,
            config.optimizer,
            betas=config.betas,
            momentum=config.momentum,
            fused=config.fused,
            rates=getattr(method, "rates", None),
        )
        if config.activation_checkpointing:
            recompute.enable(method)
        is_rounded_on_cpu = self.precision == "bf16" and self.device.type == "cpu"
        if is_rounded_on_cpu and not config.compile:
            check_convolutions(method)
        if config.compile:
            if is_rounded_on_cpu:
                require_right_at_all()
            compiling.enable(method, self.device)

    def step(self, views: ViewBatch, *, stop: bool = False) -> dict[str, float]:
        """One optimizer step on this rank's part of the batch.

        Args:
            views: Views on the engine's device; their number is a multiple of `accumulate` and equal on all ranks.
            stop: Whether this rank wants to stop; see `stopping`.

        Returns:
            Means over ranks when the step is logged, otherwise nothing, which saves a wait for the device: `loss`,
            `loss/<term>`, `monitor/<name>`, `grad_norm` (before clipping), `lr`, `weight_decay`.

        Raises:
            NonFiniteError: names the step and the samples. On the CPU weights are as before the step; on CUDA it is
                raised up to one step later.
        """
        config = self.config
        ctx = StepContext(self.step_done, config.steps, config.seed, self.collectives)
        self._grads.zero()
        values: dict[str, Tensor] = {}
        parts = split(views, config.accumulate)
        cut_batches(self.method, 1 if config.micro_batch is None else math.ceil(len(parts[0]) / config.micro_batch))
        finite: list[Tensor] = []
        for index, part in enumerate(parts):
            determinism.seed_step(config.seed, self.step_done, self.collectives.rank, index)
            terms = self.forward(part, ctx)
            total = terms.total
            self._grads.backward(total / len(parts), last=index == len(parts) - 1)
            finite.append(torch.isfinite(total.detach()) & torch.isfinite(self._grads.norm()))
            for name, value in terms.named(total).items():
                share = value.detach().double() / len(parts)
                values[name] = values[name] + share if name in values else share
        finite_P = torch.stack(finite)
        self._grads.average(stop=stop, bad=~finite_P.all())
        norm = self._grads.norm()
        samples = [part.sample_B for part in parts]
        self._pending.append(Verdict(self.step_done, samples, finite_P, self._grads.summary(norm, values["loss"])))
        self._settle(self._lag)
        if config.clip:
            self._grads.clip(norm, config.clip)
        lr, decay = self._rates()
        self.optimizer.step(lr, decay, self.step_done)
        cast(Method, self.method).after_step(ctx)
        self._average_statistics()
        self.step_done += 1
        if not self.log_due():
            return {}
        self._settle()
        means = self.collectives.mean(torch.stack(list(values.values()))).tolist()
        return dict(zip(values, means, strict=True)) | {"grad_norm": float(norm), "lr": lr, "weight_decay": decay}

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """The method's loss terms under the engine's autocast."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            terms: LossTerms = self.method(views, ctx)
        return terms

    def log_due(self) -> bool:
        """Whether the step just done is one to report: the first, the last and every `log_every`-th."""
        done = self.step_done
        return done == 1 or done == self.config.steps or done % self.config.log_every == 0

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on: nested dicts for `ssl_core.train.checkpoint.save`.

        Tensors are the live ones: write or copy them before the next step. The same on every rank.
        """
        self._settle()  # never hand out what a bad step has made
        return {
            "method": self.weights(),
            "optimizer": {name: sharding.wholes(entry) for name, entry in self.optimizer.state_dict().items()},
            "engine": {"step": self.step_done, "config_digest": self.config.digest()},
        }

    def weights(self) -> dict[str, Tensor]:
        """The method's tensors by name, live; of one in shards all of it, as a copy. A collective call with shards."""
        return sharding.wholes(self.method.state_dict())

    def load_state_dict(self, state: Mapping[str, Any], *, allow_change: bool = False) -> None:
        """Go on from a state, bit for bit.

        Args:
            state: As from `state_dict` or `ssl_core.train.checkpoint.load`.
            allow_change: Accept a state of another `EngineConfig`, for example with more steps.

        Raises:
            ConfigError: another configuration, another method or other shapes.
        """
        own_digest, state_digest = self.config.digest(), state["engine"]["config_digest"]
        if own_digest != state_digest and not allow_change:
            raise ConfigError(
                "checkpoint's engine settings",
                expected=f"digest {own_digest}, as in this run",
                found=state_digest,
                remedy="start a new run under another name, or allow the change explicitly",
            )
        own = self.method.state_dict()
        checkpoint.require_same_tensors("method", own, state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, tensor in own.items():
                sharding.assign(tensor, state["method"][name])
        self.step_done = int(state["engine"]["step"])

    def _rates(self) -> tuple[float, float]:
        c, step = self.config, self.step_done
        lr = warmup_cosine(step, steps=c.steps, warmup=c.warmup_steps, peak=c.lr, final=c.final_lr)
        end = c.weight_decay if c.final_weight_decay is None else c.final_weight_decay
        return lr, cosine(step, steps=c.steps, start=c.weight_decay, end=end)

    def _settle(self, lag: int = 0) -> None:
        """Read all verdicts but the latest `lag`.

        On CUDA a step's verdict is read one step later, so that the host need not wait for the device; before anything
        is reported or saved, all are read. Verdicts are the same on all ranks, so all ranks raise at the same step.
        """
        while len(self._pending) > lag:
            verdict = self._pending.pop(0)
            outcome = verdict.read()
            self.stopping = self.stopping or outcome.stop
            if self.watch is not None:
                self.watch(outcome, outcome.bad and verdict.is_own())
            if not outcome.is_sound:
                self._pending.clear()
                self._raise_non_finite(verdict)

    def _raise_non_finite(self, verdict: Verdict) -> NoReturn:
        bad, samples = verdict.bad_samples(self.collectives)
        where = f"samples {bad}" if bad else f"the sum over samples {samples}"
        raise NonFiniteError(
            f"step {verdict.step + 1}",
            expected="a finite loss and gradient",
            found=f"infinity or not-a-number in {where}",
            remedy="look at these samples, lower `lr` or `clip`, or set precision to fp32; checkpoints are from before",
        )

    def _share_initial_weights(self) -> None:
        if self.collectives.world == 1:
            return
        with torch.no_grad():
            for tensor in self.method.state_dict().values():
                wide = tensor.long() if tensor.dtype == torch.bool else tensor
                share = wide if self.collectives.rank == 0 else torch.zeros_like(wide)
                tensor.copy_(self.collectives.sum(share))

    def _average_statistics(self) -> None:
        """Average batch norms' running statistics, which each rank gathers from its own samples."""
        if self.collectives.world == 1 or not self._statistics:
            return
        mean = self.collectives.mean(torch.cat([t.flatten() for t in self._statistics]))
        for tensor, part in zip(self._statistics, mean.split([t.numel() for t in self._statistics]), strict=True):
            tensor.copy_(part.view_as(tensor))
