"""Scores of heads against scikit-learn and scipy, and what cannot be computed."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as theirs

from ssl_core.downstream.heads.scores import Outcome, outcome, overall
from ssl_core.downstream.heads.targets import Target

RANDOM = np.random.default_rng(4)


def of_classes(classes: list[str], count: int, decimals: int = 2) -> tuple[list[Outcome], np.ndarray, np.ndarray]:
    """Outcomes with ties of probabilities, their true numbers, and the shares."""
    truth = np.concatenate([np.arange(len(classes)), RANDOM.integers(0, len(classes), count - len(classes))])
    share = RANDOM.dirichlet(np.ones(len(classes)), count).round(decimals) + 1e-3
    share[np.arange(count), truth] += 0.2
    share /= share.sum(1, keepdims=True)
    target = Target("c", "classification", tuple(classes), {i: float(t) for i, t in enumerate(truth)})
    rows = [
        {"class": classes[int(s.argmax())], **{f"p({name})": float(x) for name, x in zip(classes, s, strict=True)}}
        for s in share
    ]
    return [outcome(f"v{i}", f"s{i}", target, i, row) for i, row in enumerate(rows)], truth, share


def of_numbers(truth: np.ndarray, prediction: np.ndarray) -> list[Outcome]:
    target = Target("age", "regression", (), {i: float(x) for i, x in enumerate(truth)}, 50.0, 9.0)
    return [outcome(f"v{i}", f"s{i}", target, i, {"age": float(x)}) for i, x in enumerate(prediction)]


def test_scores_of_two_classes_are_scikit_learns() -> None:
    outcomes, truth, share = of_classes(["no", "yes"], 41)
    scores = overall(("no", "yes"), outcomes)
    guess = share.argmax(1)
    assert scores["accuracy"] == pytest.approx(theirs.accuracy_score(truth, guess))
    assert scores["balanced_accuracy"] == pytest.approx(theirs.balanced_accuracy_score(truth, guess))
    assert scores["auroc"] == pytest.approx(theirs.roc_auc_score(truth, share[:, 1]))
    assert scores["log_likelihood"] == pytest.approx(-theirs.log_loss(truth, share))
    assert [o.score for o in outcomes] == (guess == truth).astype(float).tolist()


def test_scores_of_several_classes_are_scikit_learns() -> None:
    classes = ["a", "b", "c", "d"]
    outcomes, truth, share = of_classes(classes, 57)
    scores = overall(classes, outcomes)
    assert scores["auroc"] == pytest.approx(theirs.roc_auc_score(truth, share, multi_class="ovr", average="macro"))
    assert scores["auroc_c"] == pytest.approx(theirs.roc_auc_score(truth == 2, share[:, 2]))
    assert scores["balanced_accuracy"] == pytest.approx(theirs.balanced_accuracy_score(truth, share.argmax(1)))


def test_scores_of_numbers_are_scikit_learns_and_scipys() -> None:
    truth = RANDOM.normal(60, 12, 33)
    prediction = 0.7 * truth + RANDOM.normal(20, 6, 33)
    outcomes = of_numbers(truth, prediction)
    scores = overall((), outcomes)
    assert scores["mae"] == pytest.approx(theirs.mean_absolute_error(truth, prediction))
    assert scores["rmse"] == pytest.approx(theirs.root_mean_squared_error(truth, prediction))
    assert scores["r2"] == pytest.approx(theirs.r2_score(truth, prediction))
    assert scores["pearson"] == pytest.approx(stats.pearsonr(truth, prediction).statistic)
    assert np.mean([o.score for o in outcomes]) == pytest.approx(-theirs.mean_absolute_error(truth, prediction))


def test_what_cannot_be_computed_is_none_and_no_number() -> None:
    outcomes, _, _ = of_classes(["a", "b", "c"], 30)
    one_class = [o for o in outcomes if o.truth == "a"]
    scores = overall(("a", "b", "c"), one_class)
    assert [scores[name] for name in ("auroc", "auroc_a", "auroc_b")] == [None, None, None]
    assert scores["balanced_accuracy"] == scores["accuracy"]
    without_c = overall(("a", "b", "c"), [o for o in outcomes if o.truth != "c"])
    assert without_c["auroc_c"] is None
    assert without_c["auroc"] == pytest.approx(np.mean([without_c["auroc_a"], without_c["auroc_b"]]))
    flat = overall((), of_numbers(np.full(3, 5.0), np.array([4.0, 5.0, 6.0])))
    assert (flat["r2"], flat["pearson"]) == (None, None)
    assert flat["mae"] == pytest.approx(2 / 3)
    assert overall((), of_numbers(np.array([1.0, 2.0]), np.array([3.0, 3.0])))["pearson"] is None
