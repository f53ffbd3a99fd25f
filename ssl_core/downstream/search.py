"""What a search of fine-tuning settings came to: its trials and the settings that it chose."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ssl_core.downstream.records import from_fields


@dataclass(frozen=True)
class TrialSettings:
    """One point of the search space.

    Attributes:
        encoder: Model URI to start from, or `none`.
        lr: Peak learning rate.
        encoder_lr_scale: Learning rate of the encoder relative to the rest.
    """

    encoder: str
    lr: float
    encoder_lr_scale: float


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        trial: Its number, in the order of creation; the same at every start of its search.
        settings: What it was trained with.
        scores: Dice of the inner split by epoch, of its last attempt.
        stopped_early: Whether the scheduler ended it before its last epoch.
        error: Why it failed, in one line; None where it did not.
        id: Its id in the search's state, from its creation on; empty in results from before it was noted.
    """

    trial: int
    settings: TrialSettings
    scores: tuple[float, ...]
    stopped_early: bool
    error: str | None
    id: str = ""

    @property
    def last(self) -> float | None:
        """Dice after the last epoch; None where there was no epoch."""
        return self.scores[-1] if self.scores else None

    @property
    def status(self) -> str:
        """`done` or `error`."""
        return "done" if self.error is None else "error"

    def to_json(self) -> dict[str, Any]:
        """One flat object, with what follows from the scores."""
        return {
            "trial": self.trial,
            **asdict(self.settings),
            "epochs": len(self.scores),
            "scores": self.scores,
            "last": self.last,
            "stopped_early": self.stopped_early,
            "status": self.status,
            "error": self.error,
            "id": self.id,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Trial":
        """Inverse of `to_json`.

        Raises:
            RefusedInput: an entry is missing.
        """
        return from_fields(cls, {"id": "", **data, "settings": from_fields(TrialSettings, data)})


@dataclass(frozen=True)
class SearchResult:
    """A search that has ended.

    Attributes:
        trials: In the order of creation.
        best: Settings of the chosen trial.
        choice: The choice in words.
        epochs: Epochs of a trial that is not stopped.
        run_id: MLflow run.
        seconds: Wall time.
    """

    trials: tuple[Trial, ...]
    best: TrialSettings
    choice: str
    epochs: int
    run_id: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As written to `result.json`."""
        return {
            "trials": [trial.to_json() for trial in self.trials],
            "best": asdict(self.best),
            "chosen": self.choice,
            "epochs": self.epochs,
            "run_id": self.run_id,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SearchResult":
        """Inverse of `to_json`.

        Raises:
            RefusedInput: an entry is missing.
        """
        trials = tuple(Trial.from_json(trial) for trial in data["trials"])
        best = from_fields(TrialSettings, data["best"])
        return from_fields(cls, {**data, "trials": trials, "best": best, "choice": data["chosen"]})
