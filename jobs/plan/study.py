"""How long a study would take here: a few real steps of each of its parts, in this process."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from jobs.configs import PretrainConfig
from jobs.configs.study import StudyConfig
from jobs.finetune import device_for, score_test, train_from
from jobs.labelled import draw
from jobs.output import duration, table
from jobs.plan.measure import WARM_UP, measure
from jobs.study import cells as kinds
from jobs.study.cells import Cell, Cells, unique
from jobs.study.prepare import prepare
from jobs.study.work import Task, perform
from jobs.tracking import registration
from ssl_core.config import parse
from ssl_core.downstream.finetune import FinetuneConfig
from storage.format.manifest import Manifest
from storage.objects import join, open_store
from storage.reading.volume_store import VolumeStore

STEPS = 20
"""That are timed of each part; our choice."""


@dataclass(frozen=True)
class Part:
    """Trainings of a study that take equally long.

    Attributes:
        title: What they are.
        cells: How many.
        seconds: One of them.
        step_s: One of its optimizer steps, seconds.
        is_possible: Whether they are only done where the search has to go on.
        segmenting_s: Those of `seconds` in which volumes are segmented and scored.
    """

    title: str
    cells: int
    seconds: float
    step_s: float
    is_possible: bool = False
    segmenting_s: float = 0.0

    @property
    def all_s(self) -> float:
        """All of them one after another, seconds."""
        return self.cells * self.seconds


@dataclass(frozen=True)
class Finetuning:
    """What a fine-tuning from random weights is made of, seconds.

    Attributes:
        begin_s: Whatever comes before its first step: weights, volumes, labels.
        step_s: An optimizer step.
        volume_s: Segmenting a volume and scoring it.
    """

    begin_s: float
    step_s: float
    volume_s: float

    def part(self, title: str, cells: int, steps: int, volumes: int, is_possible: bool = False) -> Part:
        """So many of them, each with so many steps and volumes to score."""
        segmenting_s = volumes * self.volume_s
        seconds = self.begin_s + steps * self.step_s + segmenting_s
        return Part(title, cells, seconds, self.step_s, is_possible, segmenting_s)


def measured(
    config: StudyConfig,
    *,
    say: Callable[[str], None],
    steps: int = STEPS,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Part]:
    """Take real steps of every pre-training and of a fine-tuning; no test volume is opened.

    What a study writes into its store before its first cell, a manifest without the test split and super-pixels where a
    method reads them, is written here too. Everything else lies in a folder that is removed.

    Args:
        config: The study; its store is ingested.
        say: Hears what is measured next.
        steps: To time of each part, after `WARM_UP` others.
        clock: Seconds from a fixed point.

    Raises:
        ConfigError: a setting cannot be run, or a GPU is asked for and there is none here.
        StoreError: the data cannot be read from here, or the store cannot be written.
    """
    device_for(config.gpus_per_cell > 0)
    with tempfile.TemporaryDirectory(prefix="tomoscale-plan-") as folder:
        url = Path(folder).as_uri()
        apart = config.model_copy(update={"runs": f"{url}/runs", "cache": f"{url}/pretrained"})
        place = join(apart.runs, apart.name)
        cells = Cells(apart, prepare(apart, open_store(place), say))
        with _set_threads(config):
            perform(Task(cells.network, apart.cache_url, place, _threads(config), gpu=False))
            network = Path(folder) / "pretrained" / cells.network.key / registration.FOLDER
            say(f"a fine-tuning, {steps} steps")
            finetuning = _finetuning(apart, cells, str(network), steps, clock)
        parts = []
        for cell in unique(filter(None, (cells.origin(start, 0) for start in config.starts))):
            say(f"the pre-training of {cell.start}, {steps} steps")
            parts.append(_pretraining(config, cell, finetuning, steps, clock))
        return parts + _tuned(apart, cells, finetuning)


def text(parts: list[Part], concurrent: int) -> str:
    """The parts as a table, and what they come to."""
    rows = [
        (
            part.title,
            ("up to " if part.is_possible else "") + str(part.cells),
            f"{1000 * part.step_s:.0f} ms",
            duration(part.segmenting_s) if part.segmenting_s else "-",
            duration(part.seconds),
            duration(part.all_s),
        )
        for part in parts
    ]
    least = sum(part.all_s for part in parts if not part.is_possible)
    most = sum(part.all_s for part in parts)
    lines = [
        table(("", "trainings", "a step", "segmenting", "one", "all"), rows),
        "",
        f"One after another: {_span(least, most)}.",
    ]
    if concurrent > 1:
        shared = _span(least / concurrent, most / concurrent)
        lines.append(f"{concurrent} at a time: {shared}, if they do not slow one another.")
    segmenting = sum(part.cells * part.segmenting_s for part in parts if not part.is_possible)
    if segmenting > least / 2:
        lines.append("Most of it segments volumes. At a coarser spacing, ingested to another store, it takes less.")
    return "\n".join(lines)


def _span(least: float, most: float) -> str:
    low, high = duration(least), duration(most)
    return f"about {low}" if low == high else f"about {low}, up to {high}"


def _pretraining(
    config: StudyConfig, cell: Cell, finetuning: Finetuning, steps: int, clock: Callable[[], float]
) -> Part:
    title, count = f"pre-training {cell.start}", config.seeds_of(cell.start)
    if cell.kind == kinds.SUPERVISED:
        total = _steps(cell)
        return finetuning.part(f"{title}, {total} steps", count, total, 1)
    job = parse(PretrainConfig, cell.spec["job"], title)
    share = {"cpus_per_worker": config.cpus_per_cell, "gpu": config.gpus_per_cell > 0}
    found = measure(job.model_copy(update={"cluster": job.cluster.model_copy(update=share)}), steps=steps, clock=clock)
    engine = job.engine
    probes = engine.steps // engine.probe_every if engine.probe_every else 0
    checkpoints = -(-engine.steps // engine.checkpoint_every)
    seconds = (
        found.start_s
        + engine.steps * found.step_s
        + probes * (found.probe_s + found.labels_s)
        + checkpoints * found.checkpoint_s
    )
    return Part(f"{title}, {engine.steps} steps", count, seconds, found.step_s)


def _finetuning(config: StudyConfig, cells: Cells, network: str, steps: int, clock: Callable[[], float]) -> Finetuning:
    """Timed on the first validation draw, whose further subject stands for those of the test."""
    labelled = config.labelled(config.labels[0], cells.searched[0], cells.data.without_test, further=1)
    gpu = config.gpus_per_cell > 0
    seconds = []
    # The first one imports and reads what the others find there.
    for length in (WARM_UP, WARM_UP, WARM_UP + steps):
        settings = _of_length(config, length)
        began = clock()
        trained = train_from("none", labelled, settings, seed=0, like=network, gpu=gpu)
        seconds.append(clock() - began)
        trained.store.close()
    with VolumeStore(labelled.data, trained.store.manifest) as store:
        shown = replace(trained, store=store, subjects=replace(trained.subjects, test=trained.subjects.inner))
        began = clock()
        cases = score_test(shown, labelled, settings, config.nsd_tolerance_mm)
        volume_s = (clock() - began) / len({case.volume_id for case in cases})
    _, short_s, long_s = seconds
    step_s = max(0.0, long_s - short_s) / steps
    return Finetuning(max(0.0, short_s - WARM_UP * step_s - volume_s), step_s, volume_s)


def _of_length(config: StudyConfig, steps: int) -> FinetuneConfig:
    """Fine-tuning of random weights for so many steps, which may be fewer than those of the warm-up."""
    finetune = config.finetune.model_copy(update={"warmup_steps": 0})
    return config.model_copy(update={"finetune": finetune}).settings("", config.search.lr[0], steps, points=1)


def _tuned(config: StudyConfig, cells: Cells, finetuning: Finetuning) -> list[Part]:
    """Search and test. Which length the search will choose nobody knows, so the test may take that of the longest."""
    search = config.search
    whole = cells.data.fingerprint
    subjects = draw(
        Manifest.open(config.data, whole), config.labelled(config.labels[0], cells.draws[0], whole, further=1)
    )
    scored = config.finetune.epochs * config.validation + len(subjects.test)
    parts = []
    for steps, count in sorted(Counter(_steps(cell) for cell in unique(cells.search())).items()):
        parts.append(finetuning.part(f"search, {steps} steps", count, steps, search.subjects))
        more = search.widen * count // len(search.lr) if len(search.lr) > 1 else 0
        if more:
            title = f"search of further rates, {steps} steps"
            parts.append(finetuning.part(title, more, steps, search.subjects, is_possible=True))
    tests = Counter[float]()
    for name, start in config.starts.items():
        tests[start.length] += config.seeds_of(name) * config.draws * len(config.labels)
    for length, count in sorted(tests.items()):
        least, most = (round(steps * length) for steps in (min(search.steps), max(search.steps)))
        parts.append(finetuning.part(f"test, {least} steps", count, least, scored))
        if most > least:
            title = f"test, {most} rather than {least} steps"
            seconds = (most - least) * finetuning.step_s
            parts.append(Part(title, count, seconds, finetuning.step_s, is_possible=True))
    return parts


def _steps(cell: Cell) -> int:
    settings = cell.spec["finetune"]
    return int(settings["epochs"] * settings["steps_per_epoch"])


def _threads(config: StudyConfig) -> int:
    return max(1, int(config.cpus_per_cell))


@contextmanager
def _set_threads(config: StudyConfig) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(_threads(config))
    try:
        yield
    finally:
        torch.set_num_threads(before)
