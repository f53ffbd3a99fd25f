"""Cells of a study: pieces of work that a digest of everything that determines them names.

A cell's result is one JSON object, written once, so a study that was killed goes on with the cells that lack one. Cells
with equal digests are one cell: networks pre-trained for one study serve the next.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jobs.configs.study import VALIDATION, StudyConfig
from jobs.pretrain.inputs import reads_labels
from ssl_core.config import digested
from storage.objects import ByteStore, join, open_store

FORMAT = 1
"""Counted up when cells of before would come out otherwise."""
NETWORK, PRETRAIN, SUPERVISED, SEARCH, TEST = "network", "pretrain", "supervised", "search", "test"


@dataclass(frozen=True)
class Cell:
    """A piece of work.

    Attributes:
        kind: What is done.
        spec: Everything that determines its result, as JSON.
        place: URL of the folder of its result.
        needs: Keys of cells that have to be done before.
        start: Name of its start; empty where several share it.
        labels: Labelled subjects, as the study counts them; 0 where none are used.
        draw: Number of the draw.
        seed: Pre-training seed.
    """

    kind: str
    spec: dict[str, Any]
    place: str
    needs: tuple[str, ...] = ()
    start: str = ""
    labels: int = 0
    draw: int = 0
    seed: int = 0

    @cached_property
    def key(self) -> str:
        """Digest of what determines the result."""
        text = json.dumps({"format": FORMAT, "kind": self.kind, **self.spec}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def title(self) -> str:
        """For a log and for the name of a run."""
        if self.kind == NETWORK:
            return "network"
        if self.kind in (PRETRAIN, SUPERVISED):
            return f"pre-training {self.start} seed {self.seed}"
        labels = f"{self.labels} label" if self.labels == 1 else f"{self.labels} labels"
        if self.kind == SEARCH:
            settings = self.spec["finetune"]
            steps = settings["epochs"] * settings["steps_per_epoch"]
            draw = self.draw - VALIDATION
            return f"search {self.start} {labels} validation draw {draw} lr {settings['lr']:g} {steps} steps"
        return f"test {self.start} {labels} draw {self.draw} seed {self.seed}"


@dataclass(frozen=True)
class Data:
    """What a study reads.

    Attributes:
        fingerprint: Of the whole manifest.
        without_test: Of the same one without its test split: all that exists for pre-training and search.
        labelled: Labelled subjects of the train split.
        models: Version of the model behind each start that has one.
        simulated: Whether its subjects are.
        draws: Seed of each draw of labelled subjects: no two train on the same ones. A study of before had as many
            from 0 on, whatever they drew.
        searched: The same of validation draws.
        unscored: Of `without_test` without the subjects that settings are scored on: all that exists for a start that
            learns from labels, or its settings would be chosen by scores on what it has learned. Empty where there is
            no such start, and in a study of before.
    """

    fingerprint: str
    without_test: str
    labelled: int
    models: dict[str, str]
    simulated: bool
    draws: list[int] = field(default_factory=list)
    searched: list[int] = field(default_factory=list)
    unscored: str = ""


class Cells:
    """The cells of a study.

    Args:
        config: The study.
        data: What it reads.
    """

    def __init__(self, config: StudyConfig, data: Data) -> None:
        self.config, self.data = config, data
        self.network = _network(config)
        self.draws = data.draws or list(range(config.draws))
        self.searched = data.searched or [VALIDATION + draw for draw in range(config.search.draws)]
        # Once each: thousands of cells ask for them.
        seeds = range(config.pretrainings)
        self._origins = {(start, seed): self._origin(start, seed) for start in config.starts for seed in seeds}
        self._settings: dict[Any, dict[str, Any]] = {}
        points = itertools.product(config.starts, config.searched_labels)
        self._rates = {point: [*config.search.lr] for point in points}

    def origin(self, start: str, seed: int) -> Cell | None:
        """The cell that trains what a start begins with; None for random weights and for a model that there is."""
        return self._origins[start, seed]

    def widen(self, rates: Mapping[tuple[str, int], float]) -> None:
        """Search one more learning rate, by start and searched count."""
        for point, lr in rates.items():
            self._rates[point].append(lr)

    def search(self) -> list[Cell]:
        """Every setting of the grid for each start, searched count and validation draw, with the first pre-training."""
        config = self.config
        return [
            self._tuned(SEARCH, start, labels, draw, 0, lr, steps)
            for labels in config.searched_labels
            for start in config.starts
            for draw in self.searched
            for lr in self._rates[start, labels]
            for steps in config.search.steps
        ]

    def before(self) -> list[Cell]:
        """All that do not need the choice: the network, what starts begin with, and the search; each once."""
        origins = [cell for cell in self._origins.values() if cell is not None]
        return unique([self.network, *origins, *self.search()])

    def tested(self, choice: Mapping[str, Any]) -> list[Cell]:
        """Each start with each count, draw and pre-training seed, with the settings that the sealed choice says.

        Args:
            choice: From `jobs.study.seal`.
        """
        config, cells = self.config, list[Cell]()
        for labels in config.labels:
            for draw in self.draws:
                for start in config.starts:
                    settings = choice["settings"][start][str(labels)]
                    for seed in range(config.seeds_of(start)):
                        cells.append(self._tuned(TEST, start, labels, draw, seed, settings["lr"], settings["steps"]))
        return cells

    def _origin(self, start: str, seed: int) -> Cell | None:
        config, origin = self.config, self.config.starts[start]
        with_labels = self.data.unscored or self.data.without_test
        if origin.pretrain is not None:
            job = config.pretraining(start, seed)
            if job.data == config.data:  # of its own data, a study shows pre-training what has no test
                fingerprint = with_labels if reads_labels(job) else self.data.without_test
                job = job.model_copy(update={"fingerprint": fingerprint})
            pretrain = {
                "job": {key: value for key, value in digested(job).items() if key not in ("runs", "experiment")}
            }
            return Cell(PRETRAIN, pretrain, config.cache_url, start=start, seed=seed)
        if origin.supervised is not None:
            supervised = origin.supervised
            labelled = config.labelled(supervised.subjects, VALIDATION - 1, with_labels, further=1)
            spec: dict[str, Any] = {
                "network": self.network.key,
                "labelled": digested(labelled),
                "finetune": digested(config.settings("", supervised.lr, supervised.steps, points=1)),
                "seed": seed,
            }
            return Cell(SUPERVISED, spec, config.cache_url, (self.network.key,), start=start, seed=seed)
        return None

    def _tuned(self, kind: str, start: str, labels: int, draw: int, seed: int, lr: float, steps: int) -> Cell:
        """A fine-tuning. Its own seed is that of the draw, so that starts share new weights and crops."""
        config, data, origin = self.config, self.data, self.origin(start, seed)
        searching = kind == SEARCH
        further = config.search.subjects if searching else config.validation
        count = data.labelled - further if config.starts[start].all_labels else labels
        point = (start, lr, steps, 1 if searching else None)
        if point not in self._settings:
            self._settings[point] = digested(config.settings(start, lr, steps, points=point[3]))
        fingerprint = data.without_test if searching else data.fingerprint
        spec: dict[str, Any] = {
            "network": self.network.key,
            "origin": origin.key if origin is not None else data.models.get(start, "none"),
            "labelled": digested(config.labelled(count, draw, fingerprint, further=further)),
            "finetune": self._settings[point],
            "seed": draw,
        }
        if not searching:
            spec["nsd_tolerance_mm"] = config.nsd_tolerance_mm
        needs = (self.network.key, *([origin.key] if origin is not None else []))
        return Cell(kind, spec, join(config.runs, config.name, "cells"), needs, start, labels, draw, seed)


def _network(config: StudyConfig) -> Cell:
    """The untrained network that random weights take, as a bundle."""
    shared = config.pretraining(None, 0)
    spec = {
        "backbone": digested(shared.backbone),
        "intensity": digested(shared.intensity),
        "patch_DHW": list(config.finetune.patch_DHW),
    }
    return Cell(NETWORK, spec, config.cache_url)


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """The first of each key, in order."""
    return list({cell.key: cell for cell in reversed(list(cells))}.values())[::-1]


def stored(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Results that are there, by key."""
    places: dict[str, ByteStore] = {cell.place: open_store(cell.place) for cell in cells}
    present = {place: set(store.list()) for place, store in places.items()}
    return {
        cell.key: json.loads(places[cell.place].get(f"{cell.key}.json"))
        for cell in cells
        if f"{cell.key}.json" in present[cell.place]
    }
