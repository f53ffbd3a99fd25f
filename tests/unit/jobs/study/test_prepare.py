"""What a study fixes before its first cell: draws that differ, labels that stay unseen, subjects enough of each."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from jobs.configs import LabelledConfig
from jobs.labelled import draw
from jobs.study.cells import Cells
from jobs.study.prepare import prepare
from ssl_core.config import parse
from storage.errors import ConfigError, RefusedInput
from storage.format.manifest import Manifest
from storage.objects import open_store
from tests.kit.phantoms import write_phantoms
from tests.kit.studies import config, go

LEARNS_LABELS = {"pretrain": {"method": {"name": "supervised", "label": "labels"}}}


def test_too_few_labelled_subjects_are_refused_before_anything_runs(data: str, runs: str) -> None:
    with pytest.raises(RefusedInput, match="labelled subjects"):
        go(config(runs, data, labels=[1, 18]), lambda _task: pytest.fail("something ran"))


def test_no_two_draws_train_on_the_same_subjects(data: str, runs: str) -> None:
    """Of 18 subjects, twelve draws of one by chance alone would show some of them twice."""
    study = config(runs, data, labels=[1, 2], draws=12, search={"draws": 12, "subjects": 2, "steps": [4]})
    manifest = Manifest.open(data)
    fixed = prepare(study, open_store(f"{runs}/{study.name}"), print)

    def different(seeds: Iterable[int], labels: int, further: int) -> int:
        drawn = (
            draw(manifest, study.labelled(labels, seed, manifest.fingerprint, further=further)).train for seed in seeds
        )
        return len({frozenset(train) for train in drawn})

    assert different(range(12), 1, study.validation) < 12, "chance alone repeats none here: take another set"
    cells = Cells(study, fixed)
    for labels in study.labels:
        assert different({cell.draw for cell in cells.search()}, labels, study.search.subjects) == 12
        assert different(cells.draws, labels, study.validation) == 12
    again = prepare(study, open_store(f"{runs}/{study.name}"), print)
    assert (again.draws, again.searched) == (fixed.draws, fixed.searched)
    before = replace(fixed, draws=[], searched=[])  # as a study of before wrote it down
    assert Cells(study, before).draws == list(range(12))


def test_more_draws_than_differ_are_refused_before_anything_runs(data: str, runs: str) -> None:
    with pytest.raises(
        RefusedInput, match=r"20 \(draws\) that train on different subjects.*found 18, of 18.*lower draws"
    ):
        go(config(runs, data, labels=[1], draws=20), lambda _task: pytest.fail("something ran"))
    searched = config(runs, data, labels=[1], search={"draws": 30, "subjects": 2, "steps": [4]})
    with pytest.raises(RefusedInput, match=r"\(search.draws\).*lower search.draws"):
        go(searched, lambda _task: pytest.fail("something ran"))


def test_no_start_learns_the_labels_that_its_settings_are_scored_on(data: str, runs: str) -> None:
    starts = {"scratch": {}, "pre": {"pretrain": {}}, "few": {"supervised": {"subjects": 4, "steps": 2}}}
    study = config(runs, data, starts=starts | {"all": LEARNS_LABELS})
    facts = prepare(study, open_store(f"{study.runs}/t"), lambda _line: None)
    cells = Cells(study, facts)

    def seen(start: str) -> set[str]:
        origin = cells.origin(start, 0)
        assert origin is not None
        if "labelled" in origin.spec:
            config = parse(LabelledConfig, origin.spec["labelled"])
            manifest = Manifest.open(data, config.fingerprint)
            drawn = draw(manifest, config)
            return {manifest.record(row).subject for row in (*drawn.train, *drawn.inner)}
        return set(Manifest.open(data, origin.spec["job"]["fingerprint"]).subjects())

    scored = set()
    for cell in cells.search():
        labelled = parse(LabelledConfig, cell.spec["labelled"])
        manifest = Manifest.open(data, labelled.fingerprint)
        scored |= {manifest.record(row).subject for row in draw(manifest, labelled).inner}
    assert len(scored) > study.search.subjects
    assert len(seen("few")) == 5
    assert not seen("few") & scored
    assert not seen("all") & scored
    assert len(seen("all") | scored) == len(seen("pre")) == 18, "a start without labels may see every image"
    before = replace(facts, unscored="")  # as a study of before goes on
    assert {str(cell.spec).count(facts.unscored) for cell in Cells(study, before).before()} == {0}


def test_a_start_that_would_learn_them_is_refused_before_anything_runs(data: str, runs: str) -> None:
    starts: dict[str, object] = {"scratch": {}, "few": {"supervised": {"subjects": 14, "steps": 2}}}
    words = r"15 in the train split, for starts.few.*found 1\d of 18: 3 search.draws of 2.*lower search.draws"
    with pytest.raises(RefusedInput, match=words):
        go(config(runs, data, starts=starts), lambda _task: pytest.fail("something ran"))
    pool = f"{runs}/pool"
    Manifest.from_records([record for record in Manifest.open(data).records() if record.split == "train"]).write(
        open_store(pool)
    )
    pretrain = {**LEARNS_LABELS["pretrain"], "data": pool}
    with pytest.raises(RefusedInput, match="nor with labels one that settings are scored on"):
        go(
            config(runs, data, starts={"scratch": {}, "pool": {"pretrain": pretrain}}),
            lambda _task: pytest.fail("something ran"),
        )


def test_a_pool_with_subjects_of_the_test_is_refused(data: str, runs: str) -> None:
    pool = f"{runs}/pool"
    write_phantoms(pool, 4, shape=(8, 8, 8))
    manifest = Manifest.open(pool)
    moved = [replace(record, split="train") for record in manifest.records()]
    Manifest.from_records(moved).write(open_store(pool))
    starts = {"scratch": {}, "pre": {"pretrain": {"data": pool}}}
    with pytest.raises(RefusedInput, match="subject-003"):
        go(config(runs, data, starts=starts), lambda _task: pytest.fail("something ran"))
    starts["pre"] = {"pretrain": {"stream": {"split": "test"}}}
    with pytest.raises(ConfigError, match="must not see"):
        go(config(runs, data, starts=starts), lambda _task: pytest.fail("something ran"))
