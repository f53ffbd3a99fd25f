"""Scores of classes and numbers of whole volumes: of each test volume, and over all of a training.

Every formula is over volumes. What cannot be computed, such as AUROC of a class that no test volume has, is None and
never a number that looks like a result.

- accuracy: share of volumes whose most probable class is the true one.
- balanced accuracy: mean over the classes of the test volumes of the share of each that was found.
- AUROC: probability that a volume of the class has a higher probability of it than one of another, ties counted half
  (Mann and Whitney 1947). Of two classes that of the second; of more the mean of each class against the rest.
- log-likelihood: mean natural logarithm of the probability of the true class.
- MAE, RMSE: mean absolute and root mean square error, in the unit of the column.
- R2 = 1 - sum of squared errors / sum of squared differences from the test volumes' mean.
- Pearson's correlation of prediction and truth.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_core.downstream.heads.targets import Target
from ssl_core.downstream.records import from_fields

_LEAST_PROBABILITY = 1e-300
"""What the logarithm of a probability that rounded to 0 is taken of."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a model says of a test volume.

    Attributes:
        volume_id: The volume.
        subject: Whose it is. Two volumes of a subject are not independent.
        truth: Its class, or its value.
        prediction: The most probable class, or the predicted value.
        probabilities: Of each class, in their order; none of a regression.
        score: 1 or 0 as the class is the true one or not, or minus the absolute error; what starts are compared by.
    """

    volume_id: str
    subject: str
    truth: str | float
    prediction: str | float
    probabilities: tuple[float, ...]
    score: float

    def to_json(self) -> dict[str, Any]:
        """One flat object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Outcome":
        """Inverse of `to_json`.

        Raises:
            RefusedInput: an entry is missing.
        """
        return from_fields(cls, data)


def outcome(volume_id: str, subject: str, target: Target, index: int, row: Mapping[str, str | float]) -> Outcome:
    """The outcome of a volume from a row of results, see `Head.row`."""
    truth = target.truth(index)
    if target.classes:
        prediction: str | float = str(row["class"])
        shares = tuple(float(row[f"p({name})"]) for name in target.classes)
        return Outcome(volume_id, subject, truth, prediction, shares, float(prediction == truth))
    prediction = float(row[target.column])
    return Outcome(volume_id, subject, truth, prediction, (), -abs(prediction - float(truth)))


def overall(classes: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Scores over the test volumes of one training, by name.

    Args:
        classes: In the order of the probabilities; empty of a regression.
        outcomes: At least one.
    """
    if classes:
        truth_N = np.array([list(classes).index(str(o.truth)) for o in outcomes])
        share_NK = np.array([o.probabilities for o in outcomes])
        return _of_classes(classes, truth_N, share_NK)
    truth_N = np.array([float(o.truth) for o in outcomes])
    return _of_numbers(truth_N, np.array([float(o.prediction) for o in outcomes]))


def _of_classes(
    classes: Sequence[str], truth_N: NDArray[np.int64], share_NK: NDArray[np.float64]
) -> dict[str, float | None]:
    hit_N = share_NK.argmax(1) == truth_N
    numbers = np.unique(truth_N)
    own_N = np.maximum(share_NK[np.arange(len(truth_N)), truth_N], _LEAST_PROBABILITY)
    scores: dict[str, float | None] = {
        "accuracy": float(hit_N.mean()),
        "balanced_accuracy": float(np.mean([hit_N[truth_N == number].mean() for number in numbers])),
    }
    each = [auroc(truth_N == number, share_NK[:, number]) for number in range(len(classes))]
    if len(classes) == 2:
        scores["auroc"] = each[1]
    else:
        areas = [value for value in each if value is not None]
        scores["auroc"] = float(np.mean(areas)) if areas else None
        scores |= {f"auroc_{name}": value for name, value in zip(classes, each, strict=True)}
    return scores | {"log_likelihood": float(np.log(own_N).mean())}


def auroc(positive_N: NDArray[np.bool_], score_N: NDArray[np.float64]) -> float | None:
    """Area under the receiver's curve; None without volumes of both kinds."""
    from scipy import stats as scipy_stats  # a second to import

    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    if not positives or not negatives:
        return None
    ranks_N = scipy_stats.rankdata(score_N)
    return float((ranks_N[positive_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _of_numbers(truth_N: NDArray[np.float64], prediction_N: NDArray[np.float64]) -> dict[str, float | None]:
    error_N = prediction_N - truth_N
    around_truth, around_prediction = truth_N - truth_N.mean(), prediction_N - prediction_N.mean()
    total, spread = float(np.square(around_truth).sum()), float(np.square(around_prediction).sum())
    pearson = None
    if total > 0 and spread > 0:
        pearson = float((around_truth * around_prediction).sum() / math.sqrt(total * spread))
    return {
        "mae": float(np.abs(error_N).mean()),
        "rmse": float(np.sqrt(np.square(error_N).mean())),
        "r2": 1 - float(np.square(error_N).sum()) / total if total > 0 else None,
        "pearson": pearson,
    }
