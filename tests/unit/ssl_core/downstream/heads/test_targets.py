"""Values of a column as classes and numbers, and what is refused before anything is trained."""

from typing import Any

import numpy as np
import pytest

from ssl_core.downstream.heads.targets import Target, absent_classes, target_of
from storage.errors import ConfigError
from storage.format.columns import column_names, column_value


def target(task: Any, *texts: str, train: tuple[int, ...] = (0, 1, 2), subjects: str = "abcdefgh") -> Target:
    numbers = range(len(texts))
    return target_of(
        "age", task, dict(enumerate(texts)), dict(enumerate(subjects)), train, {i: f"v{i}" for i in numbers}
    )


def test_classes_are_the_values_in_order_numbers_by_size() -> None:
    assert target("classification", "10", "9", "old", "9").classes == ("9", "10", "old")
    learned = target("classification", "yes", "no", "yes")
    assert learned.classes == ("no", "yes")
    assert learned.value_of == {0: 1.0, 1: 0.0, 2: 1.0}
    assert learned.truth(2) == "yes"


def test_numbers_are_standardised_by_training_subjects_of_whom_one_with_two_scans_counts_once() -> None:
    learned = target("regression", "10", "20", "60", "999", subjects="aabc")
    assert learned.mean == pytest.approx(np.mean([15, 60]))
    assert learned.sd == pytest.approx(np.std([15, 60]))
    assert learned.truth(3) == 999.0


@pytest.mark.parametrize(
    ("task", "texts", "words"),
    [
        ("regression", ("1", "2", "about 40"), "labelled.column 'age'.*'about 40' of v2.*finetune.task=classification"),
        ("regression", ("1", "2", "4_0"), "'4_0' of v2"),
        ("regression", ("1", "2", "43,5"), "'43,5' of v2.*with a point"),
        ("regression", ("1", "2", "inf"), "'inf' of v2"),
        ("regression", ("1", "2", "1e999"), "finite numbers"),
        ("regression", ("5", "5", "5.0"), "training subjects whose values differ"),
        ("classification", ("yes", "yes", "yes"), "2 to 100 classes.*found 1: yes"),
        ("classification", ("yes", "Yes", "no"), "one spelling of each class.*'Yes' and 'yes'"),
        ("classification", ("1", "1.0", "0"), "one spelling of each class.*'1' and '1.0'"),
        ("classification", tuple(map(str, range(101))), "found 101"),
    ],
)
def test_a_column_that_cannot_be_learned_is_refused_with_its_key(task: Any, texts: Any, words: str) -> None:
    subjects = {i: f"s{i}" for i in range(len(texts))}
    with pytest.raises(ConfigError, match=words):
        target_of("age", task, dict(enumerate(texts)), subjects, (0, 1, 2), {i: f"v{i}" for i in subjects})


def test_classes_that_training_or_test_lack_are_said() -> None:
    learned = target("classification", "a", "b", "c", "a")
    assert absent_classes(learned, (0, 1), (2, 3)) == [
        "class 'c' of 'age' is of no training volume: nothing of it is learned",
        "class 'b' of 'age' is of no test volume: balanced accuracy and AUROC leave it out",
    ]


def test_a_column_is_read_from_the_notes_and_a_spelling_of_nothing_is_none() -> None:
    notes = (
        "resampled from 1x1x1 to 2x2x2",
        "subject table: age=43",
        "subject table: group=NaN",
        "subject table: b=x=y",
    )
    assert [column_value("v", notes, name) for name in ("age", "group", "b", "ag")] == ["43", "", "x=y", ""]
    assert column_names([notes]) == ("age", "b", "group")
