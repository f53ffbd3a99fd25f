"""Drawing labelled subjects: no subject in two uses, the same draw again, clear refusals."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jobs.configs import LabelledConfig
from jobs.labelled import absent_classes, draw, value_names
from ssl_core.config import parse
from ssl_core.downstream.finetune import Subjects
from storage.errors import ConfigError, RefusedInput
from storage.format.manifest import Manifest
from storage.format.volume import Membership, Provenance, Volume
from storage.format.volume_writer import write_volume
from storage.objects import open_store

Maker = Callable[..., Manifest]


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """Ten training subjects with two visits each, the last two without labels, and three test subjects."""
    store = open_store("memory://labelled-subjects")
    values = np.arange(64, dtype=np.int16).reshape(1, 4, 4, 4)
    records = []
    for i in range(13):
        for visit in "ab":
            records.append(
                write_volume(
                    store,
                    f"s{i:02d}{visit}",
                    Volume(
                        values,
                        spacing_mm=(1.0, 1.0, 1.0),
                        affine=np.eye(4),
                        labels={} if i in (8, 9) else {"label": (values[0] > 30).astype(np.uint8)},
                    ),
                    membership=Membership(subject=f"s{i:02d}", split="test" if i >= 10 else "train"),
                    provenance=Provenance(source=f"s{i:02d}{visit}"),
                )
            )
    return Manifest.from_records(records, {"name": "t"})


def config(**changes: Any) -> LabelledConfig:
    return parse(LabelledConfig, {"data": "memory://labelled-subjects", "subjects": 6, "inner": 2, **changes})


def names(manifest: Manifest, indices: tuple[int, ...]) -> set[str]:
    return {manifest.record(i).subject for i in indices}


def uses(manifest: Manifest, found: Subjects) -> list[set[str]]:
    return [names(manifest, part) for part in (found.train, found.inner, found.test)]


@pytest.mark.parametrize("seed", range(6))
def test_no_subject_has_two_uses_and_all_visits_go_together(manifest: Manifest, seed: int) -> None:
    found = draw(manifest, config(subjects_seed=seed))
    train, inner, test = uses(manifest, found)
    assert (len(train), len(inner), len(test)) == (4, 2, 3)
    assert not train & inner
    assert not (train | inner) & test
    assert test == {"s10", "s11", "s12"}
    assert [len(part) for part in (found.train, found.inner, found.test)] == [8, 4, 6]
    indices = [*found.train, *found.inner, *found.test]
    assert len(set(indices)) == len(indices)
    assert all(manifest.record(i).labels for i in indices)


def test_the_draw_is_a_function_of_its_seed(manifest: Manifest) -> None:
    again = [draw(manifest, config(subjects_seed=3)) for _ in range(2)]
    assert again[0] == again[1]
    assert len({draw(manifest, config(subjects_seed=seed)).train for seed in range(8)}) > 1


def test_more_subjects_keep_the_inner_ones(manifest: Manifest) -> None:
    """A study over the number of labelled subjects steers by the same inner split throughout."""
    few, many = (draw(manifest, config(subjects=n)) for n in (4, 8))
    assert few.inner == many.inner
    assert set(few.train) < set(many.train)


def test_the_test_subjects_may_be_limited(manifest: Manifest) -> None:
    assert len(draw(manifest, config(test_limit=3)).test) == 3
    assert draw(manifest, config(test_limit=99)).test == draw(manifest, config()).test


def test_too_few_labelled_subjects_are_counted(manifest: Manifest) -> None:
    with pytest.raises(RefusedInput) as caught:
        draw(manifest, config(subjects=9))
    text = str(caught.value)
    assert "memory://labelled-subjects" in text
    assert "9 with label 'label'" in text
    assert "found 8" in text
    assert "labelled.subjects" in text


def test_subjects_of_another_split_are_counted_there(manifest: Manifest) -> None:
    with pytest.raises(RefusedInput, match=r"found 8 \(by split: test 3, train 8\)"):
        draw(manifest, config(subjects=9))
    tests = Manifest.from_records([r for r in manifest.records() if r.split == "test"], {"name": "t"})
    with pytest.raises(RefusedInput, match=r"found 0 \(by split: test 3\).*other split fractions"):
        draw(tests, config())


def test_another_label_is_named(manifest: Manifest) -> None:
    with pytest.raises(RefusedInput, match="'tumour'.*found 0; its labels are 'label'"):
        draw(manifest, config(label="tumour"))


def test_a_store_without_a_test_split_is_refused(manifest: Manifest) -> None:
    records = [r for r in manifest.records() if r.split == "train"]
    with pytest.raises(RefusedInput, match="test split of memory://labelled-subjects.*larger test fraction"):
        draw(Manifest.from_records(records, {"name": "t"}), config())


def test_an_inner_split_that_leaves_nothing_to_train_on_is_a_wrong_setting(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match="inner"):
        config(subjects=4, inner=4)


@pytest.mark.parametrize(
    ("described", "names"),
    [
        ({"1": "liver", "2": "tumour", "9": "other"}, {1: "liver", 2: "tumour"}),
        ({"1": "liver"}, {1: "organ-1", 2: "organ-2"}),
        ({"1": "liver", "2": "liver"}, {1: "organ-1", 2: "organ-2"}),
        (None, {1: "organ-1", 2: "organ-2"}),
    ],
)
def test_values_are_called_what_the_data_set_calls_them(
    described: dict[str, str] | None, names: dict[int, str]
) -> None:
    """Scores are joined by name, so a partial or ambiguous description is not used at all."""
    facts = {"name": "n", **({} if described is None else {"labels": described})}
    assert value_names(Manifest.from_records([], facts), "organ", [1, 2]) == names


def test_a_class_that_training_or_test_lacks_is_said() -> None:
    """Else a mean Dice rises by the 1 of a class that is nowhere, or falls by one that nobody could learn."""
    store = open_store("memory://absent-classes")
    classes = {"train": [1, 2], "inner": [1, 4], "test": [1, 3]}
    records = [
        write_volume(
            store,
            use,
            Volume(
                np.arange(8, dtype=np.int16).reshape(1, 2, 2, 2),
                spacing_mm=(1.0, 1.0, 1.0),
                affine=np.eye(4),
                labels={"label": np.resize(np.array([0, *values], np.uint8), (2, 2, 2))},
            ),
            membership=Membership(subject=use, split="test" if use == "test" else "train"),
            provenance=Provenance(source=use),
        )
        for use, values in classes.items()
    ]
    manifest = Manifest.from_records(records, {"name": "t", "labels": {str(v): f"organ {v}" for v in range(1, 5)}})
    at = {manifest.record(i).subject: (i,) for i in range(3)}
    lines = absent_classes(manifest, "label", Subjects(train=at["train"], inner=at["inner"], test=at["test"]))
    assert [line.split(":")[0] for line in lines] == [
        "class 'organ 3' is in no training volume",
        "class 'organ 4' is in no training volume",
        "class 'organ 2' is in no test volume",
        "class 'organ 4' is in no test volume",
    ]
    assert not absent_classes(manifest, "label", Subjects(train=at["train"], inner=(), test=at["train"]))
