"""`tomoscale study CONFIG --measure`: its trainings are those of the study, and its times those of real ones."""

import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import main
from jobs.configs.study import StudyConfig
from jobs.plan.study import Part, measured, text
from jobs.study import cells as kinds
from jobs.study.cells import Cells, unique
from jobs.study.prepare import prepare
from jobs.study.work import Task, perform
from ssl_core.config import dump_yaml
from storage.format.manifest import Manifest
from storage.objects import open_store
from storage.reading.volume_store import VolumeStore
from tests.kit.phantoms import write_phantoms
from tests.kit.studies import trainable

STARTS = {
    "scratch": {},
    "long": {"length": 3},
    "pre": {"pretrain": {}},
    "slower": {"pretrain": {}, "lr_scale": 0.3},
    "labels": {"supervised": {"subjects": 2, "steps": 30}},
}
TITLES = {kinds.PRETRAIN: "pre-training pre, 400 steps", kinds.SEARCH: "search, 200 steps"}


@pytest.fixture(scope="module")
def data() -> str:
    url = f"memory://study-times-{uuid.uuid4().hex}"
    write_phantoms(url, 16, shape=(16, 16, 16))
    return url


def _study(data: str, **changes: Any) -> StudyConfig:
    return trainable(f"memory://study-times-{uuid.uuid4().hex}", data, **changes)


def test_parts_are_the_trainings_of_the_study_and_leave_nothing_behind(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"lr": [1e-3, 5e-3], "widen": 1, "steps": [40, 80], "draws": 1, "subjects": 2}
    finetune = {"epochs": 1, "batch": 1, "patch_DHW": [8, 8, 8], "warmup_steps": 20}  # more than are timed
    study = _study(data, starts=STARTS, labels=[1, 2], draws=3, pretrainings=2, search=search, finetune=finetune)
    seen, lines = set[str](), list[str]()
    read = VolumeStore.read_volume

    def noted(self: VolumeStore, volume_id: str, *arguments: Any, **settings: Any) -> Any:
        seen.add(volume_id)
        return read(self, volume_id, *arguments, **settings)

    monkeypatch.setattr(VolumeStore, "read_volume", noted)
    parts = measured(study, say=lines.append, steps=2)
    found = [(part.title, part.cells, part.is_possible) for part in parts]
    assert found == [
        ("pre-training pre, 4 steps", 2, False),  # of both starts that have it
        ("pre-training labels, 30 steps", 2, False),
        ("search, 40 steps", 16, False),  # four starts, two counts, two rates
        ("search of further rates, 40 steps", 8, True),
        ("search, 80 steps", 16, False),
        ("search of further rates, 80 steps", 8, True),
        ("search, 120 steps", 4, False),  # the longer one
        ("search of further rates, 120 steps", 2, True),
        ("search, 240 steps", 4, False),
        ("search of further rates, 240 steps", 2, True),
        ("test, 40 steps", 42, False),
        ("test, 80 rather than 40 steps", 42, True),
        ("test, 120 steps", 6, False),
        ("test, 240 rather than 120 steps", 6, True),
    ]
    assert all(part.seconds > 0 for part in parts if not part.is_possible)  # two steps of a busy machine may take none
    said = ("a fine-tuning", "the pre-training of pre", "the pre-training of labels")
    assert lines == [f"{part}, 2 steps" for part in said]
    tested = {record.volume_id for record in Manifest.open(data).records() if record.split == "test"}
    assert seen
    assert not seen & tested, "no volume of the test is opened"
    segmenting_s = {part.title: part.segmenting_s for part in parts}
    volume_s = segmenting_s["pre-training labels, 30 steps"]
    assert volume_s > 0
    assert segmenting_s["search, 40 steps"] == pytest.approx(2 * volume_s)
    assert segmenting_s["test, 120 steps"] == pytest.approx((1 + len(tested)) * volume_s)
    assert segmenting_s["pre-training pre, 4 steps"] == segmenting_s["test, 80 rather than 40 steps"] == 0
    for url in (study.runs, study.cache_url):
        assert not list(open_store(url).list())


def test_times_of_a_study_are_those_of_its_trainings(data: str) -> None:
    starts = {"scratch": {}, "pre": {"pretrain": {"engine": {"steps": 400}}}}
    search = {"lr": [1e-3], "steps": [200], "draws": 1, "subjects": 2}
    study = _study(data, starts=starts, search=search)
    cells = Cells(study, prepare(study, open_store(f"{study.runs}/t"), lambda _line: None))
    tries = []
    for _ in range(3):
        # Others at work on the machine make a clock on the wall useless, and the processor time of this process not.
        is_busy = os.getloadavg()[0] > len(os.sched_getaffinity(0))
        clock = time.process_time if is_busy else time.perf_counter
        plan = {part.title: part.seconds for part in measured(study, say=lambda _line: None, clock=clock)}
        ratios = []
        for cell in unique(cells.before()):
            began = clock()
            perform(Task(cell, study.cache_url, f"{study.runs}/t", 1, False))
            if cell.kind != kinds.NETWORK:
                ratios.append(plan[TITLES[cell.kind]] / (clock() - began))
        tries.append(ratios)
        print(f"planned / real{' by processor time, as the machine is busy' if is_busy else ''}: {ratios}")
        if all(0.5 < ratio < 2 for ratio in ratios):
            return
    raise AssertionError(f"planned / real: {tries}")


def test_the_command_prints_the_table_alone(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "study.yaml"
    config.write_text(dump_yaml(_study(data)), encoding="utf-8")
    assert main(["study", str(config), "--measure", "--state", str(tmp_path / "state")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["trainings", "a", "step", "segmenting", "one", "all"]
    assert any(line.startswith("One after another: about ") for line in lines[-3:])


def test_the_table_says_what_the_parts_come_to() -> None:
    parts = [Part("pre-training", 2, 600.0, 0.2), Part("search", 4, 30.0, 0.1), Part("more", 2, 30.0, 0.1, True)]
    lines = text(parts, 1).splitlines()
    assert [part.all_s for part in parts] == [1200, 120, 60]
    assert lines[0].split() == ["trainings", "a", "step", "segmenting", "one", "all"]
    assert lines[2].split() == ["pre-training", "2", "200", "ms", "-", "10", "min", "20", "min"]
    assert lines[4].split()[:4] == ["more", "up", "to", "2"]
    assert lines[-1] == "One after another: about 22 min, up to 23 min."
    assert text(parts, 2).splitlines()[-1].startswith("2 at a time: about 11 min, up to 12 min, if")
    assert text(parts[:2], 1).splitlines()[-1] == "One after another: about 22 min."
    slow = [*parts[:2], Part("test", 10, 300.0, 0.1, segmenting_s=290.0)]
    assert text(slow, 2).splitlines()[-1].startswith("Most of it segments volumes")
    assert text(slow, 1).splitlines()[4].split()[:6] == ["test", "10", "100", "ms", "5", "min"]
