"""Cells that are really done: a tiny network on phantoms."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from jobs.configs.study import StudyConfig
from jobs.finetune import train_from
from jobs.pages.study import pictured
from jobs.study import cells as kinds
from jobs.study import pretraining
from jobs.study import work as working
from jobs.study.cells import Cells
from jobs.study.prepare import prepare
from jobs.study.report import examples, fetch, files, publish, write
from jobs.study.work import Murmur, Task, perform
from ssl_core.config import load
from ssl_core.downstream import finetune as finetuning
from ssl_core.downstream.study import StudyResult
from storage.objects import open_store
from storage.reading.volume_store import VolumeStore
from tests.kit.phantoms import write_phantoms
from tests.kit.studies import go, trainable

SHAPE = (16, 16, 16)
READ: list[tuple[str, str, bool]] = []
"""Kind of the cell, volume, and whether the choice was recorded by then."""


@pytest.fixture(scope="module")
def data() -> str:
    url = f"memory://study-work-{uuid.uuid4().hex}"
    write_phantoms(url, 12, shape=SHAPE)
    return url


@pytest.fixture(scope="module")
def study(data: str) -> StudyConfig:
    return trainable(f"memory://study-work-{uuid.uuid4().hex}", data)


@pytest.fixture(scope="module")
def result(study: StudyConfig) -> StudyResult:
    """Of every cell really done, with each read of voxels noted."""
    store, kind = open_store(f"{study.runs}/{study.name}"), [""]
    read = VolumeStore.read_volume

    def noted(self: VolumeStore, volume_id: str, *arguments: Any, **settings: Any) -> Any:
        READ.append((kind[0], volume_id, store.exists("choice.json")))
        return read(self, volume_id, *arguments, **settings)

    def work(task: Task) -> dict[str, Any]:
        kind[0] = task.cell.kind
        return perform(task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VolumeStore, "read_volume", noted)
        return go(study, work)


def _cells(study: StudyConfig, result: StudyResult) -> Sequence[kinds.Cell]:
    cells = Cells(study, prepare(study, open_store(f"{study.runs}/{study.name}"), lambda _line: None))
    return [*cells.before(), *cells.tested(result.choice)]


def test_every_cell_of_a_study_is_done_and_scored(study: StudyConfig, result: StudyResult) -> None:
    assert [(row.start, row.labels, len(row.by_draw)) for row in result.rows] == [
        ("scratch", 1, 2),
        ("pre", 1, 2),
        ("labels", 1, 2),
    ]
    assert all(len(cell.subjects) == 1 and len(cell.cases) == 3 for cell in result.cells)
    pairs = {(cell.draw, cell.subjects) for cell in result.cells}
    assert len(pairs) == 2, "all starts of a draw learn from the same subject"
    assert result.rows[1].pretraining_minutes > 0
    assert result.rows[0].pretraining_minutes == 0


def test_no_voxel_of_the_test_is_read_before_the_choice_is_recorded(result: StudyResult) -> None:
    tested = {case.volume_id for cell in result.cells for case in cell.cases}
    read = {volume for _, volume, _ in READ}
    assert tested <= read
    assert {(kind, sealed) for kind, volume, sealed in READ if volume in tested} == {(kinds.TEST, True)}
    assert (kinds.SEARCH, False) in {(kind, sealed) for kind, _, sealed in READ}


def test_a_cell_done_again_comes_out_the_same(study: StudyConfig, result: StudyResult) -> None:
    cell = next(c for c in _cells(study, result) if c.kind == kinds.TEST and c.start == "pre")
    store = open_store(cell.place)
    before = store.get(f"{cell.key}.json")
    store.delete(f"{cell.key}.json")
    again = perform(Task(cell, study.cache_url, f"{study.runs}/{study.name}", 1, False))
    (first,) = [c for c in result.cells if (c.start, c.draw) == ("pre", cell.draw)]
    assert [case["dice"] for case in again["cases"]] == [case.scores.dice for case in first.cases]
    assert again["history"] == [dict(point) for point in first.history]
    store.put(f"{cell.key}.json", before)


def test_a_pretraining_goes_on_from_its_last_checkpoint(
    study: StudyConfig,
    result: StudyResult,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Killed(BaseException):
        pass

    put = pretraining._put

    def dying(*arguments: Any) -> None:
        put(*arguments)
        raise Killed

    other = trainable(tmp_path.as_uri(), data)
    cell = next(c for c in _cells(other, result) if c.kind == kinds.PRETRAIN)
    task = Task(cell, other.cache_url, f"{other.runs}/{other.name}", 1, False)
    monkeypatch.setattr(pretraining, "_put", dying)
    with pytest.raises(Killed):
        perform(task)
    monkeypatch.setattr(pretraining, "_put", put)
    monkeypatch.setattr(working, "Murmur", partial(Murmur, every_s=0))
    capsys.readouterr()
    resumed = perform(task)
    assert f"  {cell.title}: step 4/4" in capsys.readouterr().out
    assert (resumed["resumed_at"], resumed["steps"]) == (2, 4)
    stored = open_store(study.cache_url)
    whole = json.loads(stored.get(f"{cell.key}.json"))
    assert resumed["losses"] == whole["losses"]
    assert resumed["samples"] == whole["samples"]
    weights = f"{cell.key}/bundle/weights.safetensors"
    one, two = (safetensors.torch.load(store.get(weights)) for store in (open_store(other.cache_url), stored))
    assert one.keys() == two.keys()  # in any order
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not list(open_store(f"{other.cache_url}/{cell.key}").list("step-")), "checkpoints are cleared away"


def test_the_report_lies_whole_in_a_folder_with_every_score(
    study: StudyConfig, result: StudyResult, tmp_path: Path
) -> None:
    pages = write(study, result, tmp_path / "report", "tomoscale study x.yaml")
    assert [page.name for page in pages] == ["report.html", "report.md"]
    assert all(page.stat().st_size for page in pages)
    rows = (tmp_path / "report/cases.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 2 * 3
    stored = json.loads((tmp_path / "report/result.json").read_text())
    assert stored["conclusion"] == list(result.conclusion)
    assert load(StudyConfig, tmp_path / "report/config.yaml") == study
    publish(study, result)
    (again, _) = fetch(study, tmp_path / "fetched", "tomoscale study x.yaml")
    assert again.read_text() == pages[0].read_text()


def test_the_report_shows_what_each_start_made_of_the_cases_that_differ_most(
    study: StudyConfig, result: StudyResult
) -> None:
    shown = examples(study, result)
    assert 0 < len(shown) <= 3
    pairs = pictured(result)
    with VolumeStore(study.data) as store:
        for pair, one in zip(pairs, shown, strict=True):
            name = pair.case.volume_id
            truth = store.read_volume(name, study.label)[0]
            at = pair.cell.slices[name].at
            assert at == int((truth != 0).sum((1, 2)).argmax())
            assert (one.truth_HW == truth[at]).all()
            assert (one.image_HW == store.read_volume(name)[0, at]).all()
            assert [mask.shape for _, mask in one.predictions] == [truth[at].shape] * 2
    page = files(study, result, "tomoscale study x.yaml")["report.html"]
    assert page.count("data:image/png") == 5
    assert "Pre-trainings" in page
    old = replace(result, cells=tuple(replace(cell, slices={}) for cell in result.cells))
    assert examples(study, old) == []
    without = study.model_copy(update={"slices": False})
    assert examples(without, result) == []
    assert files(without, result, "tomoscale study x.yaml")["report.html"].count("data:image/png") == 4


def test_a_fine_tuning_that_died_is_gone_on_with_and_leaves_nothing(
    study: StudyConfig, result: StudyResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That it comes to the same bits is `test_a_trial_that_was_killed_goes_on_to_the_same_bits`'s to show."""

    class Killed(BaseException):
        pass

    def die(_epoch: int, _metrics: dict[str, float]) -> None:
        raise Killed

    place = f"{study.runs}/{study.name}"
    checkpoints = open_store(f"{place}/{working.CHECKPOINTS}")
    assert not list(checkpoints.list())
    cell = next(c for c in _cells(study, result) if c.kind == kinds.TEST and c.start == "pre")
    store, task = open_store(cell.place), Task(cell, study.cache_url, place, 1, False)
    before = json.loads(store.get(f"{cell.key}.json"))
    store.delete(f"{cell.key}.json")
    with monkeypatch.context() as patch:
        patch.setattr(working, "train_from", lambda *a, **settings: train_from(*a, **settings | {"on_epoch": die}))
        with pytest.raises(Killed):
            perform(task)
    assert {key.partition("/")[0] for key in checkpoints.list()} == {cell.key}
    with monkeypatch.context() as patch:
        patch.setattr(finetuning.Engine, "step", lambda *_: pytest.fail("it was trained again"))
        patch.setattr(working, "Murmur", partial(Murmur, every_s=0))
        capsys.readouterr()
        again = perform(task)
    assert f"  {cell.title}: epoch 1 of 1, loss " in capsys.readouterr().out
    assert (again["history"], again["cases"]) == (before["history"], before["cases"])
    assert not list(checkpoints.list())
