"""From a few measured steps to a whole run: hours, bytes, requests, money, and what bounds it.

Workers are taken to have a machine's share each like the one that was measured. What they do together, averaging
gradients and sharing a store, is reckoned from bytes and bandwidths.
"""

import math
from dataclasses import dataclass

from jobs.configs import PretrainConfig
from jobs.plan.measure import Measured

DATA, COMPUTE, NETWORK = "data", "compute", "network of gradients"
_FEW = 0.05
"""Share of a step up to which waiting for data bounds nothing; our choice."""
_CHECKPOINT_FILES = 4  # the tensors of method and optimizer, the tree, the manifest


@dataclass(frozen=True)
class Links:
    """Bandwidths.

    Attributes:
        gradients_gbit: Between workers, Gbit/s each way.
        store_gbit: What the store gives all workers together, Gbit/s; None: as much to each as it gave to one.
    """

    gradients_gbit: float = 10.0
    store_gbit: float | None = None


@dataclass(frozen=True)
class Prices:
    """In any currency; what has none is left out.

    Attributes:
        node_hour: Of one node.
        gigabyte: Of 10^9 bytes read from the store.
        thousand_requests: To it.
        workers_per_node: That share a node.
    """

    node_hour: float | None = None
    gigabyte: float | None = None
    thousand_requests: float | None = None
    workers_per_node: int = 1

    @property
    def any(self) -> bool:
        """Whether there is something to pay."""
        return any(price is not None for price in (self.node_hour, self.gigabyte, self.thousand_requests))


@dataclass(frozen=True)
class Estimated:
    """A whole run.

    Attributes:
        reduce_s: Seconds a step for averaging gradients over workers; no backward pass hides them.
        step_s: Seconds of a step.
        hours: Of the run, from its first step's data to its last checkpoint; a cluster's own start comes before.
        read_bytes: From the store, all workers together.
        requests: To the store, checkpoints included.
        written_bytes: Of checkpoints.
        nodes: That are paid for.
        money: None where no price is given.
        bound: What would have to be faster.
    """

    reduce_s: float
    step_s: float
    hours: float
    read_bytes: float
    requests: float
    written_bytes: float
    nodes: int
    money: float | None
    bound: str


def estimate(config: PretrainConfig, measured: Measured, links: Links, prices: Prices) -> Estimated:
    """The run that the measured steps are of.

    A ring all-reduce over W workers sends 2 (W - 1) / W of the buffer through each link (Patarasuk and Yuan,
    "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009); latencies are left out.
    """
    world, engine = measured.workers, config.engine
    reduce_s = 2 * (world - 1) / world * measured.gradient_bytes * 8 / (links.gradients_gbit * 1e9)
    alone_s = measured.step_s
    store_s = 0.0 if links.store_gbit is None else world * measured.read_bytes * 8 / (links.store_gbit * 1e9)
    step_s = max(alone_s, store_s) + reduce_s
    probes, checkpoints = _times(engine.steps, engine.probe_every), _times(engine.steps, engine.checkpoint_every)
    between_s = engine.steps * step_s + probes * measured.probe_s + checkpoints * measured.checkpoint_s
    looks_s = _times(engine.steps, config.probe.every or engine.probe_every) * measured.labels_s
    # The first look is always taken, the others while they stay below their share of the run.
    looks_s = min(looks_s, measured.labels_s + config.probe.most_share * between_s)
    hours = (measured.start_s + between_s + looks_s) / 3600
    read_bytes = engine.steps * world * measured.read_bytes
    requests = engine.steps * world * measured.requests + checkpoints * _CHECKPOINT_FILES
    nodes = math.ceil(world / prices.workers_per_node)
    money = None
    if prices.any:
        money = (prices.node_hour or 0) * nodes * hours + (prices.gigabyte or 0) * read_bytes / 1e9
        money += (prices.thousand_requests or 0) * requests / 1000
    waits = store_s > alone_s or measured.wait_s > _FEW * alone_s
    bound = DATA if waits else NETWORK if reduce_s > measured.compute_s else COMPUTE
    written = float(checkpoints * measured.checkpoint_bytes)
    return Estimated(reduce_s, step_s, hours, read_bytes, requests, written, nodes, money, bound)


def _times(steps: int, every: int) -> int:
    """How often something is done that is due every so many steps, and after the last one."""
    return math.ceil(steps / every) if every else 0
