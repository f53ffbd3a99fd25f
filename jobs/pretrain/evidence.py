"""What a run keeps of itself as it goes: the chain of its steps, and captures of those that went wrong."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from jobs.certificate.captures import Captures
from jobs.certificate.code import environment
from jobs.certificate.document import CHAIN
from jobs.configs import PretrainConfig
from jobs.pinning import SETTINGS, decisive
from ssl_core.config import resolved
from ssl_core.train.chain import Chain, canonical_digest, weights_digest
from ssl_core.train.checkpoint import Snapshot
from ssl_core.train.engine import Engine
from ssl_core.train.gradients import Outcome
from ssl_core.train.spikes import Spikes
from storage.stream.crop_stream import HostBatch


class Evidence:
    """The chain (rank 0) and the captures of one rank; neither draws, nor changes a sample or a weight.

    Args:
        config: The job.
        fingerprint: Of its manifest.
        engine: Stands at the step from which the run goes on.
        before: State of the checkpoint that it goes on from; None at the beginning.
        order: Digest of the order of samples.
        captures: Where bad steps go.
        say: Takes a line for the log.
    """

    def __init__(
        self,
        config: PretrainConfig,
        fingerprint: str,
        engine: Engine,
        before: Mapping[str, Any] | None,
        *,
        order: str,
        captures: Captures | None,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._fingerprint, self._engine = config, fingerprint, engine
        # No rank has the whole state of a step alone.
        self._captures = None if engine.is_sharded else captures
        self._spikes, self._batches = Spikes(), dict[int, HostBatch]()
        self._quiet_until = 0
        engine.watch = self._outcome
        ranks = engine.collectives
        self._chain: Chain | None = None
        if ranks.rank and not engine.is_sharded:  # with shards all ranks have to know when weights are gathered
            return
        if before is None:
            what = {"configuration": canonical_digest(decisive(resolved(config))), "manifest": fingerprint}
            self._chain = Chain(what)
        elif CHAIN in before:
            self._chain = Chain.from_state(before[CHAIN])
        else:
            say("the checkpoint is of a version that kept no chain of steps; this run will have no certificate")
        if self._chain is not None:
            parts = {"micro_batch": engine.config.micro_batch, "order": order}  # the first decides the rounding
            if engine.is_sharded:
                parts["sharding"] = engine.config.sharding
            self._chain.start({**environment(engine.device, engine.precision, ranks.world), **parts})

    def drawn(self, batch: HostBatch, samples: str) -> None:
        """Take note of a batch before its step: its crops, and the digest of all samples up to it."""
        self._weigh()
        step = self._engine.step_done + 1
        # On CUDA a step is judged while the next one is under way.
        self._batches = {number: item for number, item in self._batches.items() if number == step - 1} | {step: batch}
        if self._chain is not None:
            self._chain.sampled(step, samples)

    def state(self) -> dict[str, Any]:
        """What a checkpoint has of it."""
        self._weigh()
        return {} if self._chain is None else {CHAIN: self._chain.state()}

    def close(self) -> None:
        """Wait for captures that are being written."""
        if self._captures is not None:
            self._captures.close()

    def _weigh(self) -> None:
        engine = self._engine
        if self._chain is not None and self._chain.is_due(engine.step_done, engine.config.steps):
            self._chain.weights[engine.step_done] = weights_digest(engine.weights())

    def _outcome(self, outcome: Outcome, is_own: bool) -> None:
        """Called by the engine, on the CPU before the weights change."""
        threshold, rank = self._spikes.threshold(), self._engine.collectives.rank
        if not outcome.is_sound:
            # A sum over ranks can overflow where no part did.
            if is_own or (not outcome.bad and rank == 0):
                self._capture(outcome, "not finite", threshold)
            return
        if self._spikes.is_spike(outcome.loss) and outcome.step > self._quiet_until:
            self._quiet_until = outcome.step + 100  # the steps after a spike are often as high
            self._capture(outcome, "spike", threshold)
        if self._chain is not None:
            self._chain.stepped(outcome.step, outcome.loss, outcome.norm)

    def _capture(self, outcome: Outcome, reason: str, threshold: float | None) -> None:
        if self._captures is None or outcome.step not in self._batches:
            return
        engine = self._engine
        state = {
            "method": dict(engine.method.state_dict()),
            "optimizer": engine.optimizer.state_dict(),
            "engine": {"step": outcome.step - 1, "config_digest": engine.config.digest()},
            "batch": batch_state(self._batches[outcome.step]),
        }
        facts = {
            SETTINGS: resolved(self._config),
            "fingerprint": self._fingerprint,
            "step": outcome.step,
            "rank": engine.collectives.rank,
            "world": engine.collectives.world,
            "device": engine.device.type,
            "precision": engine.precision,
            "threads": torch.get_num_threads(),
            "reason": reason,
            "loss": repr(outcome.loss),
            "norm": repr(outcome.norm),
            "threshold": threshold,
        }
        self._captures.put(Snapshot.of(state, facts), wait=not math.isfinite(outcome.norm) or outcome.bad)


def batch_state(batch: HostBatch) -> dict[str, Any]:
    """A batch for a checkpoint; arrays become tensors."""
    values = {item.name: getattr(batch, item.name) for item in fields(batch)}
    maps = {name: torch.from_numpy(array) for name, array in values.pop("maps_BDHW").items()}
    plain = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in values.items()}
    return {**plain, "maps_BDHW": maps}


def batch_from(state: Mapping[str, Any]) -> HostBatch:
    """Inverse of `batch_state`."""
    values: dict[str, Any] = {
        name: v.numpy() if isinstance(v, torch.Tensor) else v for name, v in state.items() if name != "maps_BDHW"
    }
    return HostBatch(**values, maps_BDHW={name: tensor.numpy() for name, tensor in state["maps_BDHW"].items()})
