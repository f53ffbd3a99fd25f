"""What a search of fine-tuning settings came to: its trials and the settings that it chose."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from ssl_core.downstream.confirmation import Confirmation
from ssl_core.downstream.records import from_fields

_BEFORE = {"encoder": "encoder", "lr": "finetune.lr", "encoder_lr_scale": "finetune.encoder_lr_scale"}
"""Names of settings in results from before dotted paths."""
SCHEDULE = "finetune.schedule"
"""Setting that says what changes between epochs; see `ssl_core.downstream.settings.Change`."""


def settings_from(data: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted path, of a result of any version.

    Args:
        data: Settings as they were written, other entries beside them.
    """
    if "settings" in data:
        return dict(data["settings"])
    return {path: data[name] for name, path in _BEFORE.items() if name in data}


def written(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as results have them: under the names of before where they had one, and all by dotted path."""
    names = {name: settings[path] for name, path in _BEFORE.items() if path in settings}
    return {**names, "settings": dict(settings)}


@dataclass(frozen=True)
class Takeover:
    """A member of a population goes on from another's weights.

    Attributes:
        epoch: Epochs after which it does; the next one is trained with `settings`.
        source: Number of the trial whose weights after `epoch` epochs it took over.
        settings: All its settings from then on, by dotted path: the other's, some of them changed.
    """

    epoch: int
    source: int
    settings: Mapping[str, Any]


class Member(Protocol):
    """A trial, as far as it matters whose weights it had when."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it began with."""
        ...

    @property
    def takeovers(self) -> Sequence[Takeover]:
        """In their order."""
        ...


@dataclass(frozen=True)
class Stretch:
    """Epochs of one training with settings that did not change.

    Attributes:
        first: First epoch, from 1.
        trial: Number of the trial that trained it.
        settings: By dotted path.
    """

    first: int
    trial: int
    settings: Mapping[str, Any]


def lineage(members: Sequence[Member], number: int, epochs: int) -> tuple[Stretch, ...]:
    """What the weights that a trial had after so many epochs went through, in whichever trials.

    Args:
        members: Trials by number.
        number: Of the trial.
        epochs: 1 or more; what was taken over after them is left out.
    """
    own = [takeover for takeover in members[number].takeovers if takeover.epoch < epochs]
    if not own:
        return (Stretch(1, number, members[number].settings),)
    last = own[-1]
    return (*lineage(members, last.source, last.epoch), Stretch(last.epoch + 1, number, last.settings))


def trained_with(members: Sequence[Member], number: int, epochs: int) -> dict[str, Any]:
    """Settings that bring a training to the weights that a trial had after so many epochs, or to where it goes on.

    Those of the first epoch by dotted path, and `finetune.schedule` with what changed later, where anything did.

    Args:
        members: Trials by number.
        number: Of the trial.
        epochs: 1 or more.
    """
    first, *rest = lineage(members, number, epochs)
    before, schedule = first.settings, []
    for stretch in rest:
        new = {path: value for path, value in stretch.settings.items() if value != before[path]}
        if new:
            names = {path.removeprefix("finetune."): value for path, value in new.items()}
            schedule.append({"epoch": stretch.first, "settings": names})
        before = stretch.settings
    return dict(first.settings) | ({SCHEDULE: schedule} if schedule else {})


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        trial: Its number, in the order of creation; the same at every start of its search.
        settings: What it was trained with: values by dotted path, such as `finetune.lr`, and the `encoder`. Of a member
            of a population what it began with.
        scores: Dice of the inner split by epoch, of its last attempt, up to where it was stopped.
        stopped_early: Whether it ended before its last epoch without failing.
        error: Why it failed, in one line; None where it did not.
        id: Its id in the search's state, from its creation on; empty in results from before it was noted.
        why: What ended it early, such as `asha at epoch 2`; empty where nothing did.
        seconds: Of its training, up to its last epoch.
        epochs_spent: Epochs trained for it in all: attempts that died and epochs after its rung count.
        arm: Which search it belongs to where random weights have one of their own.
        takeovers: Of a member of a population, whose weights and settings it took over, in their order.
    """

    trial: int
    settings: Mapping[str, Any]
    scores: tuple[float, ...]
    stopped_early: bool
    error: str | None
    id: str = ""
    why: str = ""
    seconds: float = 0.0
    epochs_spent: int = 0
    arm: int = 0
    takeovers: tuple[Takeover, ...] = ()

    @property
    def encoder(self) -> str:
        """Model URI that it starts from, or `none`."""
        return str(self.settings["encoder"])

    @property
    def last(self) -> float | None:
        """Dice after the last epoch; None where there was no epoch."""
        return self.scores[-1] if self.scores else None

    @property
    def status(self) -> str:
        """`done` or `error`."""
        return "done" if self.error is None else "error"

    def to_json(self) -> dict[str, Any]:
        """One object, with what follows from the scores."""
        return {
            "trial": self.trial,
            **{name: value for name, value in written(self.settings).items() if name != "settings"},
            "epochs": len(self.scores),
            "scores": self.scores,
            "last": self.last,
            "stopped_early": self.stopped_early,
            "status": self.status,
            "error": self.error,
            "id": self.id,
            "settings": dict(self.settings),
            "why": self.why,
            "seconds": self.seconds,
            "epochs_spent": self.epochs_spent,
            "arm": self.arm,
            "takeovers": [asdict(takeover) for takeover in self.takeovers],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Trial":
        """Inverse of `to_json`; results from before dotted paths are read.

        Raises:
            RefusedInput: an entry is missing.
        """
        later = {"id": "", "why": "", "seconds": 0.0, "epochs_spent": len(data.get("scores", ())), "arm": 0}
        takeovers = tuple(from_fields(Takeover, takeover) for takeover in data.get("takeovers", ()))
        return from_fields(cls, {**later, **data, "settings": settings_from(data), "takeovers": takeovers})


@dataclass(frozen=True)
class SearchResult:
    """A search that has ended.

    Attributes:
        trials: In the order of creation.
        best: Settings of the chosen trial, by dotted path.
        choice: The choice in words.
        epochs: Epochs of a trial that is not stopped.
        run_id: MLflow run.
        seconds: Wall time, all starts of the search together.
        best_trial: Number of the chosen trial; -1 in results from before it was noted.
        best_by_arm: Number of the best trial of each arm.
        front: Numbers of the trials that no other beats in Dice and in seconds; empty with one objective.
        importance: Share of the differences in Dice that each setting explains; empty where nobody can say.
        confirmation: What the best came to on other draws and held-out subjects; None where that was not asked for.
    """

    trials: tuple[Trial, ...]
    best: Mapping[str, Any]
    choice: str
    epochs: int
    run_id: str
    seconds: float
    best_trial: int = -1
    best_by_arm: tuple[int, ...] = ()
    front: tuple[int, ...] = ()
    importance: Mapping[str, float] = field(default_factory=dict)
    confirmation: Confirmation | None = None

    def to_json(self) -> dict[str, Any]:
        """As written to `result.json`."""
        return {
            "trials": [trial.to_json() for trial in self.trials],
            "best": written(self.best),
            "chosen": self.choice,
            "epochs": self.epochs,
            "run_id": self.run_id,
            "seconds": self.seconds,
            "best_trial": self.best_trial,
            "best_by_arm": self.best_by_arm,
            "front": self.front,
            "importance": dict(self.importance),
            "confirmation": None if self.confirmation is None else self.confirmation.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SearchResult":
        """Inverse of `to_json`; results from before dotted paths are read.

        Raises:
            RefusedInput: an entry is missing.
        """
        later: dict[str, Any] = {"best_trial": -1, "best_by_arm": (), "front": (), "importance": {}}
        confirmation = data.get("confirmation")
        later["confirmation"] = None if confirmation is None else Confirmation.from_json(confirmation)
        trials = tuple(Trial.from_json(trial) for trial in data["trials"])
        best = settings_from(data["best"])
        own = {"trials": trials, "best": best, "choice": data["chosen"], "confirmation": later["confirmation"]}
        return from_fields(cls, {**later, **data, **own})
