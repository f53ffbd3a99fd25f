"""Studies whose cells nobody computes: made-up scores with known effects, for what is around the cells."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from jobs.configs.study import StudyConfig
from jobs.study import cells as kinds
from jobs.study import seal
from jobs.study.pools import Inline
from jobs.study.run import Surroundings, run
from jobs.study.work import Task
from ssl_core.config import parse
from ssl_core.downstream.scores import METRICS
from ssl_core.downstream.study import StudyResult
from storage.objects import open_store

GAIN = {"pre": 0.1, "same": 0.0, "scratch": 0.0}


def config(runs: str, data: str, **changes: Any) -> StudyConfig:
    """Three starts, two counts, six draws, two pre-trainings."""
    return parse(
        StudyConfig,
        {
            "name": "t",
            "data": data,
            "label": "labels",
            "runs": runs,
            "starts": {"scratch": {}, "pre": {"pretrain": {}}, "same": {"pretrain": {"engine": {"lr": 1e-4}}}},
            "pretrain": {"method": {"name": "simclr"}, "engine": {"steps": 5, "warmup_steps": 1}},
            "labels": [1, 2],
            "draws": 6,
            "pretrainings": 2,
            "primary_labels": [1],
            "search": {"lr": [1e-3, 5e-3], "steps": [10, 20], "draws": 3, "subjects": 2},
            "finetune": {"epochs": 2},
            "concurrent": 1,
            **changes,
        },
    )


def trainable(runs: str, data: str, **changes: Any) -> StudyConfig:
    """One count and two draws, of a tiny network whose cells can really be done."""
    network = {"n_blocks_per_stage": [1, 1], "features_per_stage": [4, 8], "n_conv_per_stage_decoder": [1]}
    crops = {"size_DHW": [8, 8, 8], "min_overlap": 0.3}
    plain = {
        "pretrain": {
            "method": {"name": "simclr", "crops": crops, "hidden": 8, "out": 4},
            "backbone": {"name": "resenc", "arguments": network},
            "stream": {"global_batch": 2, "lanes": 4},
            "engine": {"steps": 4, "warmup_steps": 1, "checkpoint_every": 2, "log_every": 1},
        },
        "starts": {"scratch": {}, "pre": {"pretrain": {}}, "labels": {"supervised": {"subjects": 2, "steps": 2}}},
        "labels": [1],
        "draws": 2,
        "pretrainings": 1,
        "search": {"lr": [5e-3], "steps": [2], "draws": 1, "subjects": 1},
        "finetune": {"epochs": 1, "batch": 1, "patch_DHW": [8, 8, 8], "warmup_steps": 0},
    }
    return config(runs, data, **plain | changes)


def pretended(task: Task) -> dict[str, Any]:
    """What a cell might have come to, written as a real one is; the tested ones pass the seal first."""
    cell, store = task.cell, open_store(task.cell.place)
    numbers = np.random.default_rng([cell.labels, cell.draw % 97])
    base = 0.5 + 0.1 * cell.labels + numbers.normal(0, 0.1)
    best = GAIN.get(cell.start, 0.0) + 0.002 * cell.seed
    result: dict[str, Any] = {
        "kind": cell.kind, "title": cell.title, "start": cell.start, "labels": cell.labels, "draw": cell.draw,
        "seed": cell.seed, "spec": cell.spec, "seconds": 0.01, "trained_s": 0.01, "peak_gb": 0.5, "subjects": ["a"],
        "environment": {},
    }  # fmt: skip
    if cell.kind == kinds.SEARCH:
        base += np.random.default_rng([cell.draw % 97, len(cell.start)]).normal(0, 0.01)
    if cell.kind in (kinds.SEARCH, kinds.TEST):
        finetune = cell.spec["finetune"]
        steps = finetune["epochs"] * finetune["steps_per_epoch"]
        value = base + best - abs(finetune["lr"] - 5e-3) + 1e-4 * steps
        result["history"] = [{"loss": 1.0, "inner_dice": value - 0.1}, {"loss": 0.5, "inner_dice": value}]
    if cell.kind == kinds.TEST:
        seal.open_test(task.study, cell.spec, cell.start, cell.labels)
        result["cases"] = [
            {"volume_id": f"v{i}", "subject": f"s{i}", "label": "ball"}
            | {metric.name: value + 0.01 * i for metric in METRICS}
            for i in range(4)
        ]
    if cell.kind == kinds.PRETRAIN:
        result["losses"] = [[1, 2.0], [5, 1.0]]
    assert store.put(f"{cell.key}.json", json.dumps(result).encode(), if_absent=True), "done twice"
    return result


def go(config: StudyConfig, work: Any = pretended, say: Any = lambda _line: None, **around: Any) -> StudyResult:
    """Run it in this process, to its end."""
    result = run(config, Surroundings(Inline(work), say=say, **around))
    assert result is not None, "its configuration ends with the search"
    return result


def drive(runs: str, data: str, log: Path) -> None:
    """A driver for tests to kill: a small study that notes each cell as it is done."""

    def slowly(task: Task) -> dict[str, Any]:
        time.sleep(0.01)
        result = pretended(task)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{task.cell.key}\n")
        return result

    go(small(runs, data), slowly)


def small(runs: str, data: str) -> StudyConfig:
    """27 cells."""
    search = {"lr": [1e-3, 5e-3], "steps": [10, 20], "draws": 1, "subjects": 2}
    return config(runs, data, draws=2, labels=[1], search=search)
