"""Studies around their cells: pairing, nesting, the search, the seal, and going on after a death at any point."""

import hashlib
import itertools
import json
import multiprocessing
import random
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jobs.configs.study import StudyConfig
from jobs.labelled import draw
from jobs.study import cells as kinds
from jobs.study import seal
from jobs.study.cells import Cells, unique
from jobs.study.pools import Inline
from jobs.study.prepare import prepare
from jobs.study.run import Surroundings, run
from jobs.study.work import Task
from ssl_core.config import LATER, parse, resolved
from ssl_core.downstream.finetune import FinetuneConfig
from ssl_core.methods.aligned import Aligned
from storage.errors import ConfigError, NotFound, RefusedInput
from storage.format.manifest import Manifest
from storage.objects import open_store
from storage.reading.volume_store import VolumeStore
from tests.kit.phantoms import write_phantoms
from tests.kit.studies import config, drive, go, pretended, small


def _choice(study: StudyConfig) -> dict[str, object]:
    return seal.read(open_store(f"{study.runs}/{study.name}"))


def test_draws_are_nested_in_the_count_and_the_same_for_all_starts(data: str, runs: str) -> None:
    study = config(runs, data, labels=[1, 2, 5])
    manifest = Manifest.open(data)
    for number in range(4):
        drawn = [
            draw(manifest, study.labelled(labels, number, manifest.fingerprint, further=1)) for labels in study.labels
        ]
        for fewer, more in itertools.pairwise(drawn):
            assert set(fewer.train) < set(more.train)
            assert fewer.inner == more.inner
            assert fewer.test == more.test
        assert [len(subjects.train) for subjects in drawn] == [1, 2, 5]


def test_starts_are_paired_on_draw_weights_and_crops(data: str, runs: str) -> None:
    study = config(runs, data)
    go(study)
    facts = prepare(study, open_store(f"{study.runs}/t"), lambda _line: None)
    cells = Cells(study, facts).tested(_choice(study))
    assert len(cells) == (1 + 2 + 2) * 6 * 2
    for cell in cells:
        pairs = [c for c in cells if (c.labels, c.draw) == (cell.labels, cell.draw)]
        assert {json.dumps(c.spec["labelled"]) for c in pairs} == {json.dumps(cell.spec["labelled"])}
        assert {c.spec["seed"] for c in pairs} == {cell.draw}
        assert {c.spec["network"] for c in pairs} == {cell.spec["network"]}


def test_every_start_is_searched_with_the_same_grid_and_tested_with_its_best(data: str, runs: str) -> None:
    study = config(runs, data)
    result = go(study)
    grids = result.choice["grids"]
    assert len(grids) == 3 * 2
    assert {len(grid) for grid in grids.values()} == {4}
    assert {len(scores) for grid in grids.values() for _, _, scores in grid} == {3}
    assert {(row.lr, row.steps) for row in result.rows} == {(5e-3, 20)}
    assert result.choice["settings"]["pre"]["1"]["at_the_edge"] == ["lr", "steps"]
    assert result.power.is_pilot


@pytest.mark.parametrize(
    ("lr", "tried", "best"),
    [
        ([1e-3, 2e-3], [1e-3, 2e-3, 4e-3, 8e-3], 4e-3),  # upwards, twice
        ([8e-3, 2e-2], [8e-3, 2e-2, 3.2e-3, 1.28e-3], 3.2e-3),  # downwards, twice
        ([4e-3, 5e-3, 6e-3], [4e-3, 5e-3, 6e-3], 5e-3),
        ([1e-4, 2e-4], [1e-4, 2e-4, 4e-4, 8e-4], 8e-4),  # no further than was said
        ([1e-3], [1e-3], 1e-3),  # one rate is what its user wants
    ],
)
def test_no_best_rate_lies_at_an_end_while_the_search_may_widen(
    data: str, runs: str, lr: list[float], tried: list[float], best: float
) -> None:
    study = config(runs, data, search={"lr": lr, "widen": 2, "steps": [10, 20], "draws": 3, "subjects": 2})
    result = go(study)
    for grid in result.choice["grids"].values():
        assert sorted({rate for rate, _, _ in grid}) == sorted(tried)
        assert len(grid) == 2 * len(tried)
    for counts in result.choice["settings"].values():
        assert {one["lr"] for one in counts.values()} == {best}
        at_the_end = len(tried) > 1 and best in (min(tried), max(tried))
        assert all(("lr" in one["at_the_edge"]) == at_the_end for one in counts.values())
    assert go(study).choice == result.choice, "gone on with, from what is stored"


def test_a_search_of_random_weights_alone_widens_where_they_want_more(data: str, runs: str) -> None:
    """Each start by its own scores: one that is content is not tried further, nor is one that is not held back."""

    def work(task: Task) -> dict[str, object]:
        content = task.cell.start == "pre" and task.cell.kind == kinds.SEARCH
        result = pretended(task)
        if content:  # best at 2e-3
            lr = task.cell.spec["finetune"]["lr"]
            result["history"] = [{"loss": 1.0, "inner_dice": 0.5 - abs(lr - 2e-3)}]
        return result

    lines = list[str]()
    search = {"lr": [1e-3, 2e-3, 3e-3], "widen": 1, "steps": [10], "draws": 2, "subjects": 2, "labels": [1]}
    result = go(config(runs, data, search=search), work, lines.append)
    tried = {key: sorted(rate for rate, _, _ in grid) for key, grid in result.choice["grids"].items()}
    wider = [1e-3, 2e-3, 3e-3, 4.5e-3]
    assert tried == {"scratch, 1 labels": wider, "same, 1 labels": wider, "pre, 1 labels": [1e-3, 2e-3, 3e-3]}
    assert any("one more of scratch, 1 labelled: 0.0045, same, 1 labelled: 0.0045" in line for line in lines)


def test_a_difference_is_told_with_what_it_generalises_to(data: str, runs: str) -> None:
    result = go(config(runs, data))
    assert [(t.a, t.labels, t.draws, t.pretrainings, t.subjects) for t in result.tests] == [
        ("pre", 1, 6, 2, 4),
        ("same", 1, 6, 2, 4),
    ]
    assert result.tests[0].difference == pytest.approx(0.101)
    assert result.conclusion[0].startswith("These draws are too few"), "six draws cannot carry two comparisons"
    assert "6 draws of labelled subjects, 2 pre-trainings a start, and 4 test subjects" in result.conclusion[-1]
    assert "not of other data" in result.conclusion[-1]
    one = go(config(f"{runs}/one", data, primary=["pre"]))
    halved = go(config(f"{runs}/halved", data, primary=["pre"], halves=True))
    assert "halved" not in one.choice, "which a version without halves wrote so too"
    assert halved.choice["halved"] == [["pre", 1]]
    assert halved.power.comparisons == len(halved.tests) == 2
    assert halved.tests[1].labels_of_b == 2
    assert one.conclusion[1].startswith("With 1 label pre scores higher than scratch: +0.101 Dice")
    few = go(config(f"{runs}/few", data, draws=5, primary=["pre"]))
    assert not any("higher" in line for line in few.conclusion)
    assert "so few draws cannot show" in few.conclusion[1]


def test_no_manifest_before_the_seal_has_a_test_volume(data: str, runs: str) -> None:
    """Pre-training, search and draws open one in which the test split does not exist."""
    study = config(runs, data)
    facts = prepare(study, open_store(f"{study.runs}/t"), lambda _line: None)
    whole, sealed = Manifest.open(data), Manifest.open(data, facts.without_test)
    assert whole.fingerprint == facts.fingerprint, "what is published stays"
    assert len(whole.select(split="test")) == 6
    assert len(sealed) == 18
    assert not len(sealed.select(split="test"))
    for cell in Cells(study, facts).before():
        text = json.dumps(cell.spec)
        assert facts.fingerprint not in text
        assert cell.kind == kinds.NETWORK or facts.without_test in text
        if cell.kind == kinds.SEARCH:
            subjects = draw(sealed, study.labelled(cell.labels, cell.draw, facts.without_test, further=2))
            assert not subjects.test
    tested = whole.record(int(whole.select(split="test")[0])).volume_id
    with VolumeStore(data, sealed) as store, pytest.raises(NotFound):
        store.read_volume(tested)


def test_the_test_opens_only_behind_a_recorded_choice_that_stays(data: str, runs: str) -> None:
    study = config(runs, data)
    url = f"{study.runs}/t"
    store = open_store(url)
    spec = {"finetune": {"lr": 5e-3, "epochs": 2, "steps_per_epoch": 10}, "labelled": {"fingerprint": "f"}}
    with pytest.raises(NotFound, match="before a test volume is read"):
        seal.open_test(url, spec, "pre", 1)
    go(study)
    facts = prepare(study, store, lambda _line: None)
    choice = _choice(study)
    cell = next(c for c in Cells(study, facts).tested(choice) if c.start == "pre")
    assert seal.open_test(url, cell.spec, "pre", 1).fingerprint == facts.fingerprint
    with pytest.raises(ConfigError, match="recorded settings"):
        seal.open_test(url, cell.spec | {"finetune": {**cell.spec["finetune"], "lr": 1e-3}}, "pre", 1)
    other = {**choice, "settings": {"pre": {"1": {"lr": 1.0}}}}
    other.pop("digest")
    with pytest.raises(RefusedInput, match="proves nothing"):
        seal.seal(store, other)
    assert _choice(study) == choice
    store.put(seal.KEY, json.dumps({**other, "digest": choice["digest"]}).encode())
    with pytest.raises(RefusedInput, match="changed after it was recorded"):
        seal.open_test(url, cell.spec, "pre", 1)


def test_a_sealed_choice_of_an_earlier_version_stays_the_choice(data: str, runs: str) -> None:
    """It lacks settings that came later; that is no other choice, and what it does have may not change."""
    study = config(runs, data)
    first, store = go(study), open_store(f"{study.runs}/t")
    choice = {key: value for key, value in _choice(study).items() if key != "digest"}
    del choice["study"]["search"]["widen"]  # type: ignore[index]
    digest = hashlib.sha256(json.dumps(choice, sort_keys=True).encode()).hexdigest()[:16]
    store.put(seal.KEY, json.dumps({**choice, "digest": digest}).encode())
    again = go(study)
    assert again.choice["digest"] == digest != first.choice["digest"]
    assert (again.rows, again.tests) == (first.rows, first.tests)
    with pytest.raises(RefusedInput, match="proves nothing"):
        seal.seal(store, {**choice, "study": choice["study"] | {"validation": 2}})  # type: ignore[operator]


def test_a_study_that_ends_with_its_search_leaves_the_test_shut_and_can_go_on(data: str, runs: str) -> None:
    done: Counter[str] = Counter()

    def counted(task: Task) -> dict[str, object]:
        done[task.cell.kind] += 1
        return pretended(task)

    lines: list[str] = []
    search = config(runs, data, until="search")
    assert run(search, Surroundings(Inline(counted), say=lines.append)) is None
    with pytest.raises(NotFound, match="before a test volume is read"):
        _choice(search)
    assert kinds.TEST not in done
    table = next(line for line in lines if line.startswith("| labels"))
    rows = [[part.strip() for part in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    assert len(rows) == 2 * 3 * 4, "counts x starts x settings"
    assert [row[-1] for row in rows if row[1] == "scratch" and row[0] == "1"].count("the best") == 1
    gains = [row[-1] for row in rows if row[:4] == ["1", "pre", "0.005", "20"]]
    assert gains[0].startswith("+0.1"), "what the made-up scores of this start gain"
    assert len(gains[0].split()) == 1 + 3, "a mean, and each draw"
    searched = Counter(done)
    go(config(runs, data), counted)
    assert _choice(search)
    assert done[kinds.SEARCH] == searched[kinds.SEARCH], "the search was not done again"


def test_a_start_says_which_parts_are_trained_from_when_on(data: str, runs: str) -> None:
    parts = {"parts": "decoder_first", "steps": 15}
    starts = {"scratch": {}, "pre": {"pretrain": {}, "trained": parts}}
    study = config(runs, data, starts=starts, search={"steps": [20]})
    assert resolved(study.settings("pre", 5e-3, 20))["trained"] == {**parts, "layer_decay": 1.0}
    assert study.settings("scratch", 5e-3, 20).trained.parts == "full"
    with pytest.raises(ConfigError, match=r"trained\.steps \(15\) below all 10 steps"):
        config(runs, data, starts=starts, search={"steps": [20, 10]})


def test_a_study_of_other_settings_needs_another_name(data: str, runs: str) -> None:
    study = config(runs, data)
    store = open_store(f"{study.runs}/t")
    prepare(study, store, print)
    prepare(config(runs, data, concurrent=7), store, print)
    note = json.loads(store.get("study.json"))
    del note["config"]["search"]["widen"], note["config"]["finetune"]["head"]  # as a version without them wrote it
    store.put("study.json", json.dumps(note).encode())
    prepare(study, store, print)
    with pytest.raises(ConfigError, match=r"found draws=7 \(was 6\);"):
        prepare(config(runs, data, draws=7), store, print)


def test_pretrainings_are_shared_by_studies_of_equal_digests(data: str, runs: str) -> None:
    done: list[str] = []

    def counting(task: Task) -> dict[str, object]:
        done.append(task.cell.kind)
        return pretended(task)

    go(config(runs, data), counting)
    assert Counter(done)[kinds.PRETRAIN] == 4
    done.clear()
    go(config(runs, data, name="other", labels=[2], primary_labels=[]), counting)
    assert Counter(done)[kinds.PRETRAIN] == 0
    assert Counter(done)[kinds.NETWORK] == 0
    assert Counter(done)[kinds.SEARCH] == 3 * 3 * 4


def test_a_setting_that_came_later_leaves_the_cells_of_before_what_they_were(data: str, runs: str) -> None:
    study = config(runs, data, pretrain={"method": {"name": "aligned"}, "engine": {"steps": 5, "warmup_steps": 1}})
    facts = prepare(study, open_store(f"{study.runs}/{study.name}"), lambda _line: None)
    cells = Cells(study, facts).before()
    specs = json.dumps([cell.spec for cell in cells])
    for kind in (Aligned.Config, FinetuneConfig):
        later = [name for name, field in kind.model_fields.items() if field.json_schema_extra == LATER]
        assert later
        assert not [name for name in later if f'"{name}"' in specs]


def test_what_does_not_vary_is_done_once(data: str, runs: str) -> None:
    """An upper bound on all labels is the same training whatever the count."""
    study = config(runs, data, starts={"scratch": {}, "all": {"all_labels": True}})
    result = go(study)
    facts = prepare(study, open_store(f"{study.runs}/t"), lambda _line: None)
    cells = [c for c in Cells(study, facts).tested(_choice(study)) if c.start == "all"]
    assert (len(cells), len(unique(cells))) == (12, 6)
    assert len([row for row in result.rows if row.start == "all"]) == 2


def test_a_study_whose_driver_is_killed_anywhere_repeats_no_cell(tmp_path: Path) -> None:
    """SIGKILL at three points; the fourth start finishes, and its result is that of a study nobody killed."""
    log, runs, data = tmp_path / "log", (tmp_path / "runs").as_uri(), (tmp_path / "volumes").as_uri()
    log.touch()
    write_phantoms(data, 12, shape=(8, 8, 8))
    context = multiprocessing.get_context("forkserver")  # which imports torch once for all four
    context.set_forkserver_preload(["tests.kit.studies"])
    moments = random.Random(0)

    def start() -> multiprocessing.process.BaseProcess:
        driver = context.Process(target=drive, args=(runs, data, log))
        driver.start()
        return driver

    for _ in range(3):
        driver, before = start(), len(log.read_text().split())
        while len(log.read_text().split()) < before + moments.randint(2, 8) and driver.is_alive():
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.02))
        assert driver.is_alive()
        driver.kill()
        driver.join()
        assert driver.exitcode == -signal.SIGKILL
    driver = start()
    driver.join()
    assert driver.exitcode == 0
    times = Counter(log.read_text().split())
    # A cell whose result was written as the driver died may be missing in the log; none is in it twice.
    assert set(times.values()) == {1}
    assert len(times) >= 27 - 3
    resumed = go(small(runs, data), lambda _task: pytest.fail("a cell is repeated"))
    undisturbed = go(small("memory://study-undisturbed", data))
    assert resumed.rows == undisturbed.rows
    assert resumed.tests == undisturbed.tests


def test_a_death_between_any_two_writes_loses_nothing(data: str, runs: str) -> None:
    """After each cell in turn, by an error in this process."""
    study, done = config(runs, data, draws=1, pretrainings=1, labels=[1]), Counter[str]()

    class Killed(BaseException):
        pass

    def dying(task: Task) -> dict[str, object]:
        done[task.cell.key] += 1
        pretended(task)
        raise Killed

    starts = 0
    while True:
        try:
            result = go(study, dying)
            break
        except Killed:
            starts += 1
    assert starts == len(done)
    assert set(done.values()) == {1}
    assert np.isfinite([row.scores["dice"].mean for row in result.rows]).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"starts": {"scratch": {}}}, "two starts"),
        ({"reference": "none"}, "reference"),
        ({"labels": [2, 1]}, "ascending"),
        ({"draws": 21}, "20"),
        ({"finetune": {"lr": 0.1}}, "finetune.lr"),
        ({"finetune": {"transfer": "encoder_decoder"}}, "finetune.transfer"),
        ({"pretrain": {"name": "x"}}, "no name in pretrain"),
        ({"pretrain": {"method": {"name": "nonesuch"}}}, "nonesuch"),
        ({"starts": {"scratch": {"transfer": "encoder_decoder"}, "b": {}}}, "nothing to transfer"),
        ({"starts": {"scratch": {"trained": {"parts": "frozen_encoder"}}, "b": {}}}, "nothing to transfer"),
        ({"finetune": {"trained": {"parts": "frozen_encoder"}}}, "finetune.trained"),
        ({"starts": {"scratch": {}, "b": {"model": "models:/a/1", "pretrain": {}}}}, "one of model"),
        ({"search": {"labels": [3]}}, "search.labels"),
        ({"labels": [1, 3], "primary_labels": [], "halves": True}, "halves"),
        (
            {"finetune": {"warmup_steps": 20}, "search": {"steps": [300, 20]}},
            "fine-tuning of scratch; expected warmup_steps",
        ),
        ({"finetune": {"warmup_steps": "many"}}, "warmup_steps"),
        ({"finetune": {"warmup_steps": 50, "batch": 0}}, "batch"),
    ],
)
def test_what_no_study_could_be_is_refused_before_anything_runs(
    data: str, runs: str, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        config(runs, data, **changes)


def test_a_warmup_is_held_to_the_length_that_is_searched_and_not_to_another(data: str, runs: str) -> None:
    study = config(runs, data, finetune={"epochs": 2, "warmup_steps": 150}, search={"steps": [300]})
    assert study.finetune.warmup_steps == study.settings("pre", 5e-3, 300).warmup_steps == 150
    assert study.finetune.steps == 20
    assert parse(StudyConfig, resolved(study)) == study
