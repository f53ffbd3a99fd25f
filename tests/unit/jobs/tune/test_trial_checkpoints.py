"""A trial that was killed goes on where it was, to the same bits, and leaves nothing when it has ended."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.configs.search import TuneConfig
from jobs.finetune import train_from
from jobs.finetune.checkpoints import StoredCheckpoints
from jobs.tune import driver, on_tune, timed
from jobs.tune.state import Search
from jobs.tune.suggest import Suggestions
from jobs.tune.timed import TimedCheckpoints
from ssl_core.config import parse, resolved
from ssl_core.train import checkpoint
from storage.objects import join, open_store
from tests.kit.phantoms import write_phantoms
from tests.kit.searches import play, search_config
from tests.kit.small_models import WINDOW, encoder_bundle

EPOCHS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TuneConfig:
    folder = tmp_path_factory.mktemp("trials")
    write_phantoms((folder / "store").as_uri(), 5)
    data = {
        "name": "s",
        "runs": (folder / "runs").as_uri(),
        "encoders": [str(encoder_bundle(folder / "encoder"))],
        "labelled": {"data": (folder / "store").as_uri(), "label": "labels", "subjects": 2, "inner": 1},
        "finetune": {"epochs": EPOCHS, "steps_per_epoch": 2, "batch": 1, "patch_DHW": list(WINDOW), "warmup_steps": 0},
    }
    return parse(TuneConfig, data)


def attempt(config: dict[str, Any], trial_id: str, reports: Path, kill_at: int) -> None:
    """An attempt of a trial as Ray's worker makes it, whose process is killed once an epoch was reported."""

    def report(values: dict[str, Any]) -> None:
        with reports.open("a") as file:
            file.write(json.dumps(values) + "\n")
        if values["epoch"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def stored(search: TuneConfig, *identity: Any) -> StoredCheckpoints:
        return StoredCheckpoints(join(timed.url_of(search), "-".join(map(str, identity))), every_s=0)

    torch.set_num_threads(1)
    settings = {"number": 0, "id": trial_id, "values": {"encoder": config["encoders"][0], "finetune.lr": 1e-3}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_tune.tune, "report", report)
        patch.setattr(timed, "of_trial", stored)
        on_tune.trial(settings, {"config": config}, train_from)


def run(config: TuneConfig, trial_id: str, folder: Path, kill_at: int = 0) -> list[dict[str, Any]]:
    """What an attempt reported; one that is killed has a process of its own."""
    reports = folder / f"{trial_id}-{kill_at}"
    arguments = resolved(config), trial_id, reports, kill_at
    if kill_at:
        process = multiprocessing.get_context("spawn").Process(target=attempt, args=arguments)
        process.start()
        process.join(600)
        assert process.exitcode == -signal.SIGKILL
    else:
        attempt(*arguments)
    return [json.loads(line) for line in reports.read_text().splitlines()]


def state_of(config: TuneConfig, trial_id: str) -> dict[str, Any]:
    stored = StoredCheckpoints(join(timed.url_of(config), f"0-{trial_id}"))
    path = stored.newest()
    assert path is not None
    return checkpoint.load(path)[0]


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Whatever a state holds, by its place."""
    if isinstance(value, dict):
        return {key: leaf for own, item in value.items() for key, leaf in leaves(item, f"{name}/{own}").items()}
    if isinstance(value, list | tuple):
        return leaves(dict(enumerate(value)), name)
    return {name: value}


def test_a_trial_that_was_killed_goes_on_to_the_same_bits(config: TuneConfig, tmp_path: Path) -> None:
    whole = run(config, "whole", tmp_path)
    first = run(config, "killed", tmp_path, kill_at=2)
    second = run(config, "killed", tmp_path)
    assert [report["epoch"] for report in first] == [1, 2]
    assert [(report["epoch"], report["again"]) for report in second] == [(1, True), (2, True), (3, False)]
    assert [report["measured"] for report in whole] == [report["measured"] for report in second]
    assert [report["seconds"] for report in second[:2]] == [report["seconds"] for report in first]
    assert second[2]["seconds"] > first[1]["seconds"], "seconds of training, those of both attempts"
    one, other = leaves(state_of(config, "whole")), leaves(state_of(config, "killed"))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key
    driver.clear_all(timed.url_of(config))
    assert not list(open_store(timed.url_of(config)).list())


def test_epochs_that_an_attempt_goes_on_from_are_spent_once() -> None:
    config = search_config(scheduler="none", trials=1)
    search = Search(config, 1, Suggestions(config))
    search.next()
    for epoch in (1, 2, 3):
        search.reported(0, epoch, {}, 0.1 * epoch, 10.0 * epoch)
    for epoch in (1, 2):  # it died in epoch 4, and its last checkpoint was of epoch 2
        search.reported(0, epoch, {}, 0.1 * epoch, 10.0 * epoch, again=True)
    for epoch in (3, 4):
        search.reported(0, epoch, {}, 0.1 * epoch, 10.0 * epoch)
    (entry,) = search.entries
    assert entry.scores == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert (entry.epochs_spent, entry.seconds_spent, entry.seconds) == (5, 50.0, 40.0)
    # A driver that died has not counted what its trial had trained.
    fresh = Search(config, 1, Suggestions(config))
    fresh.next()
    for epoch in (1, 2):
        fresh.reported(0, epoch, {}, 0.1, 10.0 * epoch, again=True)
    fresh.reported(0, 3, {}, 0.1, 30.0)
    assert (fresh.entries[0].epochs_spent, fresh.entries[0].seconds_spent) == (3, 30.0)


def test_what_a_trial_is_gone_on_from_is_removed_when_it_ends(tmp_path: Path) -> None:
    config = search_config(runs=str(tmp_path), scheduler="asha", trials=4)
    search, _ = driver.state_of(config, 2, api=None)

    def score(settings: dict[str, Any], epoch: int) -> float:
        for entry in search.entries:
            if entry.status == "running":
                kept = timed.of_trial(config, entry.number, entry.id)
                kept.save({"engine": {"step": epoch}}, {}, last=True)
        return 0.1 * epoch - settings["finetune.lr"]

    play(search, 0, score_of=score)
    assert not list(open_store(timed.url_of(config)).list())


def test_the_state_at_a_rung_is_kept_however_short_the_time_since_the_last() -> None:
    saved: list[tuple[int, bool]] = []

    class Kept:
        def newest(self) -> None:
            return None

        def save(self, state: dict[str, Any], meta: dict[str, Any], *, last: bool) -> None:
            saved.append((len(meta["seconds"]), last))

    waiting = search_config(scheduler="halving")
    checkpoints = TimedCheckpoints(Kept(), timed.rungs_of(waiting))
    for _ in range(4):
        checkpoints.save({}, {}, last=False)
    assert saved == [(1, True), (2, False), (3, True), (4, False)], "grace_epochs 1, reduction 3"
    assert timed.rungs_of(search_config(scheduler="asha")) == ()
