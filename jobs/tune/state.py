"""A search as a state: which trial is next, and which goes on, from what is recorded and nothing else.

It knows neither Ray nor MLflow, and no clock but the one that it is given.
"""

import itertools
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from jobs.configs.search import TuneConfig
from jobs.tune import pb2, population, rules
from jobs.tune.journal import DONE, FAILED, PAUSED, RUNNING, STOPPED, WAITING, Entry
from ssl_core.downstream.search import Trial, lineage, trained_with

Suggest = Callable[[int, int, Sequence[Entry]], dict[str, Any]]
"""Settings of a trial: its number in its arm, the arm, and the ended trials of the arm that it may know, by number."""


class Listener(Protocol):
    """Hears what becomes of trials, in order."""

    def began(self, entry: Entry, *, fresh: bool) -> None:
        """An attempt begins; `fresh` where nothing of earlier ones counts."""

    def reported(self, entry: Entry, epoch: int, metrics: dict[str, float]) -> None:
        """A new epoch has ended."""

    def ended(self, entry: Entry) -> None:
        """Nothing more will come of it."""


class Search:
    """What is recorded of a search, and what follows from it.

    Args:
        config: The search.
        concurrent: Trials at a time, now.
        suggest: Makes the settings of a trial.
        entries: Trials of earlier starts, by number.
        keep: Keeps a trial before it starts and when it changes its status.
        listener: Hears what becomes of trials.
        seconds: Since the first start of the search, its pauses left out.
    """

    def __init__(
        self,
        config: TuneConfig,
        concurrent: int,
        suggest: Suggest,
        *,
        entries: Iterable[Entry] = (),
        keep: Callable[[Entry], None] = lambda _entry: None,
        listener: Listener | None = None,
        seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.entries = list(entries)
        self._config, self._concurrent, self._suggest = config, concurrent, suggest
        self._keep, self._listener, self._seconds = keep, listener, seconds
        epochs, grace, reduction = config.finetune.epochs, config.grace_epochs, config.reduction
        self.epochs = epochs
        self._rule = rules.median(grace) if config.scheduler == "median" else rules.asha(reduction)
        self._rungs = rules.levels(config)
        self._brackets = self._dealt()
        self._in_order = config.deterministic and not config.waits
        self._ahead: dict[int, list[tuple[int, dict[str, float]]]] = {}
        self._unsaid: list[Entry] = []
        # Deterministic: of each arm and rung, how many trials are judged there, and the curves that reached it.
        self._judged = {(arm, rung): 0 for arm in range(len(config.arms)) for rung in self._rungs}
        self._curves: dict[tuple[int, int], list[list[float]]] = {key: [] for key in self._judged}
        self._settle()

    # What is next

    def next(self) -> Entry | None:
        """The trial to run now; None while there is none to start."""
        if len(self._of(RUNNING)) >= self._concurrent:
            return None
        if self.budget_spent():
            for rest in self._of(WAITING, PAUSED):
                self._end(rest, STOPPED, why=self.budget_spent())
            return None
        entry = next(iter(self._of(WAITING)), None) or self._new()
        if entry is not None:
            entry.status, entry.at = RUNNING, 0
            self._keep(entry)
            self._tell("began", entry, fresh=entry.base == 0)
        return entry

    def settings_of(self, entry: Entry) -> dict[str, Any]:
        """What a trial is trained with now: of a member of a population with all that its weights went through."""
        return trained_with(self.entries, entry.number, self.epochs)

    def source_of(self, entry: Entry) -> Entry:
        """Whose weights after `entry.base` epochs a member of a population goes on from; it may be its own."""
        last = next(reversed(entry.takeovers), None)
        return self.entries[last.source] if last is not None and last.epoch == entry.base else entry

    def is_over(self) -> bool:
        """Whether no trial runs and none will."""
        if any(not entry.has_ended for entry in self.entries):
            return False
        return len(self.entries) >= self._config.total or bool(self.budget_spent())

    def budget_spent(self) -> str:
        """Which budget is used up, in words; empty while none is."""
        config = self._config
        if config.hours is not None and self._seconds() >= 3600 * config.hours:
            return f"budget of {config.hours:g} hours"
        if config.money is not None and self.cost() >= config.money:
            return f"budget of {config.money:g} in money"
        return ""

    def cost(self) -> float:
        """Price of all trials so far; 0 where no price is set."""
        return sum(entry.seconds_spent for entry in self.entries) / 3600 * (self._config.price_per_hour or 0.0)

    def _new(self) -> Entry | None:
        number = len(self.entries)
        if number >= self._config.total:
            return None
        arms = len(self._config.arms)
        arm, position = number % arms, number // arms
        history = [entry for entry in self.entries if entry.arm == arm]
        config = self._config
        if self._in_order and config.algorithm == "tpe":
            # As if those between had not begun: then the order in which they end does not matter.
            history = history[: max(0, position - config.ahead + 1)]
            if not all(self._is_final(entry) for entry in history):
                return None
        if config.waits:
            bracket = self._bracket(number)
            history = [entry for entry in history if self._bracket(entry.number) != bracket]
            if config.deterministic and not all(entry.has_ended for entry in history):
                return None
        known_trials = [entry for entry in history if entry.has_ended]
        entry = Entry(number, secrets.token_hex(4), self._suggest(position, arm, known_trials), arm)
        self.entries.append(entry)
        return entry

    # What goes on

    def reported(
        self, number: int, epoch: int, metrics: dict[str, float], score: float, seconds: float, *, again: bool = False
    ) -> bool:
        """Record an epoch; whether the trial goes on.

        Args:
            number: Of the trial.
            epoch: From 1.
            metrics: Of the epoch.
            score: What is compared.
            seconds: Of training up to its end, as the trial counts them.
            again: Whether an earlier attempt has trained it, and this one goes on from there: it is spent once.
        """
        entry = self.entries[number]
        seconds -= entry.clock_ahead
        if entry.has_ended:
            return False
        if epoch <= entry.at:  # its machine died, and it began again
            del entry.scores[entry.base :]
            self._ahead.pop(number, None)
            self._tell("began", entry, fresh=entry.base == 0)
            entry.at, entry.seconds = 0, 0.0
        if again:  # of an attempt that this driver, or one before it, may not have heard of
            entry.epochs_spent = max(entry.epochs_spent, epoch)
            entry.seconds_spent = max(entry.seconds_spent, seconds)
        else:
            entry.epochs_spent += 1
            entry.seconds_spent += seconds - (entry.seconds if entry.at else 0.0)
        entry.at, entry.seconds = epoch, seconds
        if epoch > len(entry.scores):
            entry.scores.append(score)
            self._ahead.setdefault(number, []).append((epoch, metrics))
            self._judge(entry, epoch)
            self._say()
        if not entry.has_ended and entry.status == RUNNING and (words := self.budget_spent()):
            self._end(entry, STOPPED, why=words)
        return entry.status == RUNNING

    def ended(self, number: int, error: str | None = None) -> None:
        """The attempt of a trial is over: it failed, or ran to its end where nothing has stopped it before."""
        entry = self.entries[number]
        if entry.status != RUNNING:
            return
        if error is not None:
            self._end(entry, FAILED, error=error)
        elif not entry.scores:
            self._end(entry, FAILED, error="it ended without an epoch")
        else:  # also where the training's own early stopping ended it
            self._end(entry, DONE)
        self._settle()
        self._say()

    def _judge(self, entry: Entry, epoch: int) -> None:
        if epoch >= self.epochs or epoch not in self._rungs:
            return
        if self._config.waits:
            if epoch in self._own_rungs(entry):
                entry.status, entry.base = PAUSED, epoch
                self._keep(entry)
        elif not self._in_order:
            peers = [p.scores for p in self.entries if p is not entry and p.arm == entry.arm and len(p.scores) >= epoch]
            if self._rule(entry.scores, peers, epoch):
                self._end(entry, STOPPED, why=f"{self._config.scheduler} at epoch {epoch}")
        self._settle()

    def _settle(self) -> None:
        """Everything that follows from what is recorded by now."""
        if self._config.waits:
            for bracket in range(len(self._brackets)):
                for arm in range(len(self._config.arms)):
                    self._open_rung(bracket, arm)
        elif self._in_order:
            while any([self._advance(arm, rung) for arm, rung in self._judged]):
                pass

    # In the order of the trials

    def _advance(self, arm: int, rung: int) -> bool:
        """Judge the next trial at a rung, as far as those before it are judged; whether there was one."""
        members = [entry for entry in self.entries if entry.arm == arm]
        index = self._judged[arm, rung]
        if index >= len(members):
            return False
        entry = members[index]
        if any(self._judged[arm, lower] <= index for lower in self._rungs if lower < rung):
            return False
        if len(entry.scores) < rung:
            if not entry.has_ended:
                return False
        else:
            curve = entry.scores[:rung]
            stops = self._rule(curve, self._curves[arm, rung], rung)
            self._curves[arm, rung].append(curve)
            if stops and not (entry.status == STOPPED and len(entry.scores) == rung):
                del entry.scores[rung:]  # what it ran ahead does not count
                self._end(entry, STOPPED, why=f"{self._config.scheduler} at epoch {rung}")
        self._judged[arm, rung] = index + 1
        return True

    def _is_final(self, entry: Entry) -> bool:
        """Whether it has ended, and every rung that it reached has judged it."""
        index = entry.number // len(self._config.arms)
        judged = all(self._judged[entry.arm, r] > index for r in self._rungs if r <= len(entry.scores))
        return entry.has_ended and (judged or not self._in_order)

    # All trials of a bracket at once

    def _dealt(self) -> tuple[tuple[int, int], ...]:
        config = self._config
        if config.scheduler == "hyperband":
            return rules.brackets(config.trials, config.grace_epochs, config.reduction, self.epochs)
        return ((config.trials, config.grace_epochs),)

    def _bracket(self, number: int) -> int:
        position = number // len(self._config.arms)
        for index, (size, _) in enumerate(self._brackets):
            if position < size:
                return index
            position -= size
        return len(self._brackets) - 1

    def _own_rungs(self, entry: Entry) -> tuple[int, ...]:
        first = self._brackets[self._bracket(entry.number)][1]
        return tuple(rung for rung in self._rungs if rung >= first)

    def _open_rung(self, bracket: int, arm: int) -> None:
        """Let the best of a bracket go on from the rung that all that are left have reached.

        A driver that died in the midst has written what becomes of some: the others are judged beside these.
        """
        members = [e for e in self.entries if e.arm == arm and self._bracket(e.number) == bracket]
        rung = min((e.base for e in members if e.status == PAUSED), default=0)
        if not rung or len(members) < self._brackets[bracket][0]:
            return
        if any(e.status in (RUNNING, WAITING) and e.base < rung for e in members):
            return
        why = f"{self._config.scheduler} at epoch {rung}"
        there = [e for e in members if len(e.scores) >= rung and (not e.has_ended or e.why == why)]
        waiting = [e for e in there if e.status == PAUSED]
        if self._config.is_population:
            self._turn(there, waiting, rung)
            return
        best = rules.survivors({e.number: e.scores[rung - 1] for e in there}, self._config.reduction)
        for entry in waiting:
            if entry.number in best:
                entry.status = WAITING
                self._keep(entry)
            else:
                self._end(entry, STOPPED, why=why)

    def _turn(self, there: Sequence[Entry], waiting: Sequence[Entry], epoch: int) -> None:
        """Decide a round of a population, of which those that are written already are what they were before it."""
        config = self._config
        standings = [
            population.Standing(e.number, e.scores[epoch - 1], lineage(self.entries, e.number, epoch)[-1].settings)
            for e in there
        ]
        decided = population.takeovers(
            standings,
            epoch,
            quantile=config.population.quantile,
            seed=config.seed,
            explore=self._explore(there, epoch),
        )
        clocks = {e.number: e.seconds + e.clock_ahead for e in there}
        for entry in waiting:
            if (takeover := decided.get(entry.number)) is not None:
                entry.takeovers.append(takeover)
                entry.clock_ahead = clocks[takeover.source] - entry.seconds
            entry.status = WAITING
            self._keep(entry)

    def _explore(self, there: Sequence[Entry], epoch: int) -> population.Explore:
        config = self._config
        if config.scheduler == "pbt":
            return population.perturbed(config.changing, config.population)
        rounds = range(0, epoch + 1, config.population.interval)
        gains = [self._gain(entry, *ends) for entry in there for ends in itertools.pairwise(rounds)]
        return pb2.modelled(config.changing, gains, len(rounds) - 1)

    def _gain(self, entry: Entry, start: int, end: int) -> pb2.Gain:
        """What a member came to from one round to the next, by the score of the weights that it went on from."""
        source = next((self.entries[t.source] for t in entry.takeovers if t.epoch == start), entry)
        before = source.scores[start - 1] if start else 0.0
        settings = lineage(self.entries, entry.number, end)[-1].settings
        return pb2.Gain(start // self._config.population.interval, before, settings, entry.scores[end - 1] - before)

    # Records

    def trials(self) -> tuple[Trial, ...]:
        """What each trial was and came to, by number."""
        return tuple(
            Trial(
                trial=entry.number,
                settings=entry.settings,
                scores=tuple(entry.scores),
                stopped_early=entry.status == STOPPED,
                error=entry.error,
                id=entry.id,
                why=entry.why,
                seconds=entry.seconds,
                epochs_spent=entry.epochs_spent,
                arm=entry.arm,
                takeovers=tuple(entry.takeovers),
            )
            for entry in self.entries
        )

    def _of(self, *status: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.status in status]

    def _end(self, entry: Entry, status: str, *, why: str = "", error: str | None = None) -> None:
        if entry in self._unsaid:  # it ran to its end ahead of a rung that has now stopped it
            self._unsaid.remove(entry)
        entry.status, entry.why, entry.error = status, why, error
        self._keep(entry)
        self._unsaid.append(entry)
        self._say()

    def _say(self) -> None:
        """Tell the listener what is certain by now; what runs ahead of a rung may still be dropped."""
        for number, epochs in self._ahead.items():
            entry = self.entries[number]
            while epochs and epochs[0][0] <= min(self._certain(entry), len(entry.scores)):
                epoch, metrics = epochs.pop(0)
                self._tell("reported", entry, epoch, metrics)
            if entry.has_ended and self._is_final(entry):
                epochs.clear()
        for entry in [entry for entry in self._unsaid if self._is_final(entry)]:
            self._unsaid.remove(entry)
            self._tell("ended", entry)

    def _certain(self, entry: Entry) -> int:
        """The last epoch that no judgement can take back."""
        index = entry.number // len(self._config.arms)
        open_rungs = [rung for rung in self._rungs if self._judged[entry.arm, rung] <= index]
        return min(open_rungs, default=self.epochs) if self._in_order else self.epochs

    def _tell(self, event: str, *arguments: Any, **options: Any) -> None:
        if self._listener is not None:
            getattr(self._listener, event)(*arguments, **options)
