"""A few real steps of a job, timed and counted: the loop that the job runs, in this process, without Ray."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jobs.configs import PretrainConfig
from jobs.plan import memory
from jobs.plan.one_rank import OneRank, device_of
from jobs.pretrain.loop import Hooks, Take, run
from jobs.tracking.runs import Point
from ssl_core.distributed import Single
from storage.errors import ConfigError
from storage.objects import ByteStore, open_store
from storage.objects.tally import Count, Tally, counted
from storage.stream.crop_stream import HostBatch

WARM_UP = 3
"""Steps before those that count: the first ones allocate, compile and find nothing read ahead."""


@dataclass(frozen=True)
class Measured:
    """What one worker of `workers` did.

    Attributes:
        workers: Size of the group that it stood for.
        device: Where it trained.
        samples: Of its batch.
        steps: That were timed, after `WARM_UP` others.
        compute_s: Mean seconds of a step, views included, waits for data left out.
        wait_s: Mean seconds that a step waited for data.
        start_s: Seconds until it stepped at that speed.
        read_bytes: Mean bytes a step from the store of volumes.
        requests: Mean requests a step to it.
        gradient_bytes: Of the buffer that is averaged over workers each step.
        parameters: Trainable ones.
        checkpoint_s: Seconds for which a checkpoint holds up training.
        checkpoint_bytes: Of its tensors.
        probe_s: Seconds of a collapse probe; 0 where the job has none.
        labels_s: Seconds of a look at labels; 0 where there are none to look at.
        resident_bytes: Most memory of the process, its libraries included.
        gpu_bytes: Most memory of torch on the GPU; None on a CPU.
    """

    workers: int
    device: str
    samples: int
    steps: int
    compute_s: float
    wait_s: float
    start_s: float
    read_bytes: float
    requests: float
    gradient_bytes: int
    parameters: int
    checkpoint_s: float
    checkpoint_bytes: int
    probe_s: float
    labels_s: float
    resident_bytes: int
    gpu_bytes: int | None

    @property
    def step_s(self) -> float:
        """Seconds from one step to the next, without other workers."""
        return self.compute_s + self.wait_s


def measure(config: PretrainConfig, *, steps: int, clock: Callable[[], float] = time.perf_counter) -> Measured:
    """Take real steps as one worker of the job, on real data, and write nothing.

    Args:
        config: The job; its `cluster.workers` is the group that the worker stands for.
        steps: To time, after `WARM_UP` others.
        clock: Seconds from a fixed point.

    Raises:
        ConfigError: the job asks for a GPU and there is none here.
        StoreError: the data cannot be read from here.
    """
    device = device_of(config)
    if config.cluster.gpu and device.type != "cuda":
        raise ConfigError(
            "cluster.gpu",
            expected="a GPU on the machine that measures",
            found="none",
            remedy="run `plan` on a node that has one, or with cluster.gpu=false for training on CPUs",
        )
    world = config.cluster.workers
    watch = _Watch(device, steps, clock)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))  # as Ray sets them for a worker
    memory.forget_peaks(device)
    try:
        collectives = Single() if world == 1 else OneRank(world)
        run(_shortened(config, watch.last), watch.hooks(), restore=None, device=device, collectives=collectives)
        return watch.result(world)
    finally:
        torch.set_num_threads(threads)


def _shortened(config: PretrainConfig, last: int) -> PretrainConfig:
    """The job with its probe at the last step that is taken; how the learning rate falls costs no time."""
    probes = last if config.engine.probe_every else 0
    engine = {"steps": max(config.engine.steps, last + 1), "probe_every": probes, "checkpoint_every": last + 1}
    return config.model_copy(
        update={
            "engine": config.engine.model_copy(update=engine),
            "probe": config.probe.model_copy(update={"every": None}),
        }
    )


@dataclass
class _Watch:
    """The clock and the counts of a short run. Batch k, from 0, is that of step k + 1."""

    device: torch.device
    steps: int
    clock: Callable[[], float]
    tally: Tally = field(default_factory=Tally)
    began: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    samples: int = 0
    probed: float | None = None
    labels_s: float = 0.0
    checkpoint_s: float = 0.0
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """Steps to take: the last one is probed, and only begins when the others are timed."""
        return WARM_UP + self.steps + 1

    def hooks(self) -> Hooks:
        self.began = self.clock()
        return Hooks(
            publish=self._publish,
            on_point=self._on_point,
            is_recorded=lambda _step: True,
            stop=lambda: len(self.arrivals) >= self.last,
            on_batch=self._on_batch,
            open_store=self._open_store,
        )

    def _open_store(self, url: str) -> ByteStore:
        return counted(open_store(url), self.tally)

    def _on_batch(self, batch: HostBatch) -> None:
        if self.device.type == "cuda" and len(self.arrivals) in (WARM_UP, self.last - 1):
            torch.cuda.synchronize(self.device)  # else the steps that are queued would count as taken
        self.arrivals.append(self.clock())
        self.waits.append(batch.wait_s)
        self.counts.append(self.tally.now())
        self.samples = len(batch.sample_B)

    def _on_point(self, item: Point) -> None:
        if item.step == self.last and any(name.startswith("probe/") for name in item.metrics):
            self.probed = self.clock()
            self.labels_s = item.metrics.get("time/knn_s", 0.0)

    def _publish(self, _step: int, take: Take | None, _metrics: dict[str, float]) -> None:
        assert take is not None, "rank 0 takes the checkpoint"
        began = self.clock()
        self.state = dict(take().state)
        self.checkpoint_s = self.clock() - began

    def result(self, world: int) -> Measured:
        first, last, n = WARM_UP, WARM_UP + self.steps, self.steps
        step_s = (self.arrivals[last] - self.arrivals[first]) / n
        wait_s = sum(self.waits[first + 1 : last + 1]) / n
        before, after = self.counts[first], self.counts[last]
        probe_s = 0.0 if self.probed is None else self.probed - self.arrivals[last] - (step_s - wait_s) - self.labels_s
        averaged = trained(self.state)
        return Measured(
            workers=world,
            device=_name(self.device),
            samples=self.samples,
            steps=n,
            compute_s=step_s - wait_s,
            wait_s=wait_s,
            start_s=max(0.0, self.arrivals[first] - self.began - first * step_s),
            read_bytes=(after.read_bytes - before.read_bytes) / n,
            requests=(after.requests - before.requests) / n,
            gradient_bytes=sum(tensor.nbytes for tensor in averaged),
            parameters=sum(tensor.numel() for tensor in averaged),
            checkpoint_s=self.checkpoint_s,
            checkpoint_bytes=_tensor_bytes(self.state),
            probe_s=max(0.0, probe_s),
            labels_s=self.labels_s,
            resident_bytes=memory.peak_resident_bytes(),
            gpu_bytes=memory.peak_gpu_bytes(self.device),
        )


def trained(state: Mapping[str, Any]) -> list[Tensor]:
    """Parameters that an optimizer steps, of an engine's state after a step."""
    return [state["method"][name] for name in state["optimizer"]]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_tensor_bytes(item) for item in value.values())
    return value.nbytes if isinstance(value, Tensor) else 0
