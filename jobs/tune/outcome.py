"""What a search comes to: the best trial, the front of two objectives, and how much each setting matters."""

from collections.abc import Sequence

from jobs.configs.search import TuneConfig
from jobs.configs.space import ENCODER
from jobs.tune.journal import DONE, Entry
from jobs.tune.suggest import study_of
from ssl_core.downstream.search import SearchResult, Trial, trained_with
from storage.errors import StackError

_FEWEST_FOR_IMPORTANCE = 4  # complete trials; below, the share of a setting is chance


def searched(config: TuneConfig, trials: tuple[Trial, ...], *, run_id: str, seconds: float) -> SearchResult:
    """The trials and what is chosen of them.

    Args:
        config: The search.
        trials: By number.
        run_id: MLflow run.
        seconds: Of all starts.

    Raises:
        StackError: no trial came to a result.
    """
    arms = range(len(config.arms))
    best_by_arm = tuple(best.trial for arm in arms if (best := best_of([t for t in trials if t.arm == arm])))
    best = best_of(trials)
    if best is None:
        raise StackError(
            f"search {config.name}",
            expected="at least one trial with a metric",
            found=next((t.error for t in trials if t.error), "no metric"),
            remedy="the log above names each trial's error; another name tries again",
        )
    settings = trained_with(trials, best.trial, config.finetune.epochs)
    words = ", ".join(f"{path.removeprefix('finetune.')} {_text(value)}" for path, value in settings.items())
    return SearchResult(
        trials,
        settings,
        f"trial {best.trial}, {words}, inner Dice {best.scores[-1]:.3f}",
        config.finetune.epochs,
        run_id,
        seconds,
        best.trial,
        best_by_arm if len(arms) > 1 else (),
        front_of(trials) if len(config.objectives) > 1 else (),
        importance(config, trials),
    )


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The trial that ended best; None where none ended well.

    Settings that have failed would fail again, however well they began. The last epoch counts, not the best one: a
    training of the same length is what will be run with these settings.
    """
    ended = [t for t in trials if t.scores and t.error is None]
    complete = [t for t in ended if not t.stopped_early] or ended
    return max(complete, key=lambda t: (t.scores[-1], -t.trial), default=None)


def front_of(trials: Sequence[Trial]) -> tuple[int, ...]:
    """Numbers of the complete trials that no other beats in Dice without taking longer, the fastest first."""
    complete = [t for t in trials if t.scores and t.error is None and not t.stopped_early]
    front: list[Trial] = []
    for trial in sorted(complete, key=lambda t: (t.seconds, -t.scores[-1], t.trial)):
        if not front or trial.scores[-1] > front[-1].scores[-1]:
            front.append(trial)
    return tuple(trial.trial for trial in front)


def importance(config: TuneConfig, trials: Sequence[Trial]) -> dict[str, float]:
    """Share of the differences in Dice that each setting explains, by fANOVA (Hutter et al., 2014), largest first.

    Empty where too few trials ran to their end, where only one setting was searched, and of a population, whose scores
    are not of one choice each.
    """
    if config.is_population:
        return {}
    dims = [dim for dim in config.dimensions if len(dim.probes()) > 1]
    complete = [t for t in trials if t.scores and t.error is None and not t.stopped_early]
    if len(complete) < _FEWEST_FOR_IMPORTANCE or len(dims) < 2 or len({t.scores[-1] for t in complete}) < 2:
        return {}
    if config.compare_scratch:
        dims = [dim for dim in dims if dim.path != ENCODER]
    import optuna

    rows = [Entry(t.trial, t.id, dict(t.settings), status=DONE, scores=list(t.scores)) for t in complete]
    study = study_of(config.model_copy(update={"objectives": ("dice",)}), dims, rows)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=config.seed)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {path: float(share) for path, share in shares.items()}


def _text(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"of {len(value)} changes"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
