"""A study from its first cell to its report, in whatever pool."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jobs.configs.study import StudyConfig
from jobs.finetune.checkpoints import clear_all
from jobs.study import cells as kinds
from jobs.study import seal
from jobs.study.cells import Cell, Cells, Data, unique
from jobs.study.choice import beyond, choose, validation_table
from jobs.study.graph import Clock, execute
from jobs.study.pools import Pool
from jobs.study.prepare import prepare
from jobs.study.work import CHECKPOINTS, Task
from ssl_core.downstream.inference import Power, power_of
from ssl_core.downstream.study import StudyPretraining, StudyResult, cell_from_json, summarise
from storage.format.manifest import Manifest
from storage.objects import join, open_store


@dataclass
class Surroundings:
    """What a study is handed.

    Attributes:
        pool: Where cells run.
        on_done: Hears of each cell and its result, also of those of before.
        on_choice: Hears of the sealed choice.
        on_data: Hears of what is read.
        check: Raises where this driver has to stop.
        say: Hears lines.
    """

    pool: Pool
    on_done: Callable[[Cell, dict[str, Any]], None] = lambda _cell, _result: None
    on_choice: Callable[[dict[str, Any]], None] = lambda _choice: None
    on_data: Callable[[Data], None] = lambda _data: None
    check: Callable[[], None] = lambda: None
    say: Callable[[str], None] = field(default=lambda line: print(line, flush=True))


def run(config: StudyConfig, around: Surroundings) -> StudyResult | None:
    """Pre-train and search, seal the choice, test, and say what came of it.

    Args:
        config: The study; its store is ingested.
        around: Where it runs.

    Returns:
        What the tests say; None where the configuration ends with the search.

    Raises:
        TomoscaleError: a setting cannot be run, or a cell failed; what is done stays.
    """
    say, place = around.say, join(config.runs, config.name)
    store = open_store(place)
    data = prepare(config, store, say)
    around.on_data(data)
    cells = Cells(config, data)
    first = cells.before()
    total = counts(config, first)
    if config.until == "search":
        del total[kinds.TEST]
    clock = Clock(total, around.pool.size)
    assumed = power_of(config.draws, config.comparisons, config.sd, is_pilot=False)
    say(plan(config, data, clock))
    say(f"power, before anything is trained: {assumed.statement}")

    def task_of(cell: Cell) -> Task:
        return Task(cell, config.cache_url, place, max(1, int(config.cpus_per_cell)), config.gpus_per_cell > 0)

    def go(part: list[Cell]) -> dict[str, dict[str, Any]]:
        return execute(part, around.pool, task_of, clock, on_done=around.on_done, check=around.check, say=around.say)

    results = go(first)
    for _ in range(config.search.widen):
        rates = beyond(cells, results)
        if not rates:
            break
        cells.widen(rates)
        further = [cell for cell in unique(cells.search()) if cell.key not in results]
        clock.total[kinds.SEARCH] += len(further)
        named = ", ".join(f"{start}, {labels} labelled: {lr:g}" for (start, labels), lr in rates.items())
        say(f"the best learning rate lies at an end of those tried; one more of {named}")
        results |= go(further)
    if config.until == "search":
        say("\n".join(validation_table(cells, results)))
        say("the test stays shut; until=test goes on from here")
        return None
    choice = seal.seal(store, choose(cells, results))
    around.on_choice(choice)
    say(f"the choice is sealed, digest {choice['digest']}; the test is open")
    power = Power(**choice["power"])
    if power.is_pilot:
        say(f"power, from validation draws: {power.statement}")
    tests = unique(cells.tested(choice))
    clock.total[kinds.TEST] = len(tests)
    results |= go(tests)
    clear_all(join(place, CHECKPOINTS))  # a worker may have died between its result and this
    return outcome(cells, choice, results)


def outcome(cells: Cells, choice: dict[str, Any], results: dict[str, dict[str, Any]]) -> StudyResult:
    """The result of a study all of whose cells are done."""
    config, trainings = cells.config, []
    for cell in cells.tested(choice):
        # Cells with equal digests are one; each count says its own name.
        own = {"start": cell.start, "labels": cell.labels, "draw": cell.draw, "seed": cell.seed}
        trainings.append(cell_from_json(results[cell.key] | own))
    pretrainings = []
    for start in config.starts:
        for seed in range(config.pretrainings):
            origin = cells.origin(start, seed)
            if origin is not None:
                pretrainings.append(_pretraining(start, seed, results[origin.key]))
    manifest = Manifest.open(config.data, cells.data.fingerprint)
    return summarise(
        config.name,
        config.reference,
        config.compared,
        trainings,
        halved=config.halved,
        power=Power(**choice["power"]),
        choice=choice,
        pretrainings=pretrainings,
        data=str(manifest.dataset.get("name") or config.data),
    )


def _pretraining(start: str, seed: int, result: dict[str, Any]) -> StudyPretraining:
    seconds = float(result.get("trained_s", result["seconds"]))
    losses = tuple((int(step), float(loss)) for step, loss in result.get("losses", ()))
    return StudyPretraining(start, seed, seconds / 60, losses, result.get("probes", {}))


def counts(config: StudyConfig, first: list[Cell]) -> dict[str, int]:
    """Cells of each kind in all, those that wait for the choice by their most."""
    total: dict[str, int] = {}
    for cell in first:
        total[cell.kind] = total.get(cell.kind, 0) + 1
    total[kinds.TEST] = sum(map(config.seeds_of, config.starts)) * config.draws * len(config.labels)
    return total


def forecast(config: StudyConfig) -> str:
    """What a study would do and could show, from its configuration alone."""
    search, starts = config.search, config.starts.values()
    trained = sum(start.pretrain is not None or start.supervised is not None for start in starts)
    settings = len(search.lr) * len(search.steps)
    more = search.widen * len(search.steps)
    widest = f", and up to {more} more where the best rate lies at an end" if more else ""
    searched = len(starts) * len(config.searched_labels) * search.draws * settings
    power = power_of(config.draws, config.comparisons, config.sd, is_pilot=False)
    return (
        f"at most {trained * config.pretrainings} pre-trainings; {searched} trainings of the search, {settings}"
        f" settings for each start{widest}; {counts(config, [])[kinds.TEST]} tested trainings\n{power.statement}"
    )


def plan(config: StudyConfig, data: Data, clock: Clock) -> str:
    """What will be done, in numbers."""
    parts = ", ".join(f"{number} {kind}" for kind, number in clock.total.items())
    seeds = "1 pre-training" if config.pretrainings == 1 else f"{config.pretrainings} pre-trainings"
    return (
        f"study {config.name}: {len(config.starts)} starts, labels {', '.join(map(str, config.labels))}, {config.draws}"
        f" draws, {seeds} a start, of {data.labelled} labelled subjects of"
        f" {config.data}\n{sum(clock.total.values())} cells, {clock.size} at a time: {parts}"
    )


def to_json(result: StudyResult) -> str:
    """As `result.json`: everything but the cells, which are objects of their own."""
    import dataclasses

    data = dataclasses.asdict(dataclasses.replace(result, cells=()))
    return json.dumps(data, indent=1)
