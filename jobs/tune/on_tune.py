"""The search inside Ray Tune: its searcher and its scheduler, which ask `jobs.tune.state`, and the trial itself.

Ray Tune starts trials, moves their reports and tries again where machines die. Each attempt, and each stretch between
two rungs where trials wait for others, is one trial of Ray's.
"""

import json
import math
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from jobs.configs.search import TuneConfig
from jobs.configs.space import with_settings
from jobs.finetune import train_from
from jobs.on_ray.filesystem import storage_for
from jobs.on_ray.patches import patch_tune_to_stop_at_final_errors
from jobs.output import last_line
from jobs.tune.live import METRIC
from jobs.tune.state import Search
from jobs.tune.timed import of_attempt
from ssl_core.config import parse, resolved
from ssl_core.train.engine import NonFiniteError

FOLDER = "ray"
"""Of Ray Tune's own files below `<runs>/<name>`; nothing is read from them again."""
_TRIES_AGAIN = 2
_MEASURED, _AGAIN = "measured", "again"


def trial(settings: dict[str, Any], payload: dict[str, Any], train: Callable[..., Any]) -> None:
    """One attempt of a trial: fine-tune with its settings, reporting each epoch, those of earlier attempts too.

    Args:
        settings: Its number, its id, its values by dotted path, and where it goes on; see `jobs.tune.timed.of_attempt`.
        payload: The search's configuration.
        train: `jobs.finetune.train_from`, or what stands for it.
    """
    config = parse(TuneConfig, payload["config"])
    number, values = settings["number"], settings["values"]
    checkpoints = of_attempt(config, settings)

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        score = metrics[METRIC]
        if not math.isfinite(score):
            raise NonFiniteError(f"epoch {epoch}", expected=f"a finite {METRIC}", found=f"{score}")
        again = epoch <= checkpoints.restored
        words = ", as before" if again else ""
        print(f"trial {number} epoch {epoch}: loss {metrics['loss']:.3f}  inner Dice {score:.3f}{words}", flush=True)
        # The metric on its own too, for which Ray Tune looks; all as one text, since it takes groups apart.
        facts = {"epoch": epoch, "seconds": checkpoints.seconds(epoch), _AGAIN: again}
        tune.report({**facts, METRIC: score, _MEASURED: json.dumps(metrics)})

    train(
        values["encoder"],
        config.labelled,
        with_settings(config.finetune, values, f"settings of trial {number}"),
        seed=config.seed,
        like=next(uri for uri in config.encoders if uri != "none"),
        on_epoch=on_epoch,
        gpu=config.gpus_per_trial > 0,
        checkpoints=checkpoints,
    )


class _Attempts:
    """Which trial each of Ray's trials is an attempt of."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.numbers: dict[str, int] = {}

    def begin(self, trial_id: str) -> dict[str, Any] | None:
        """The trial that Ray's trial is to run; None while there is none."""
        entry = self.search.next()
        if entry is None:
            return None
        self.numbers[trial_id] = entry.number
        source = self.search.source_of(entry)
        facts = {"number": entry.number, "id": entry.id, "base": entry.base, "source": [source.number, source.id]}
        return {**facts, "values": self.search.settings_of(entry)}

    def end(self, trial_id: str, error: str | None = None) -> None:
        """Ray's trial is over; nothing more is heard of it."""
        number = self.numbers.pop(trial_id, None)
        if number is not None:
            self.search.ended(number, error)


class Suggester(Searcher):
    """Ray Tune's searcher: hands out what the search wants to run next.

    Its state is not Ray's to save: `save` and `restore` do nothing.
    """

    def __init__(self, attempts: _Attempts) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._attempts = attempts

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """The metric and the space are the search's own."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """Settings of the next trial; None while none may start; `FINISHED` when none will."""
        settings = self._attempts.begin(trial_id)
        if settings is None and self._attempts.search.is_over():
            return Searcher.FINISHED
        return settings

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """An attempt is over; the scheduler has heard of its error."""
        self._attempts.end(trial_id, "it ended without a word" if error else None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal has everything."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""


class Judge(FIFOScheduler):
    """Ray Tune's scheduler: passes reports on, and stops what the search stops."""

    def __init__(self, attempts: _Attempts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._attempts = attempts

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on after an epoch."""
        number = self._attempts.numbers.get(trial.trial_id)
        if number is None or result.get("done") or _MEASURED not in result:
            return str(TrialScheduler.CONTINUE)
        metrics = json.loads(result[_MEASURED])
        goes_on = self._attempts.search.reported(
            number,
            int(result["epoch"]),
            metrics,
            float(metrics[METRIC]),
            float(result["seconds"]),
            again=bool(result.get(_AGAIN)),
        )
        if goes_on:
            return str(TrialScheduler.CONTINUE)
        del self._attempts.numbers[trial.trial_id]
        return str(TrialScheduler.STOP)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """An attempt failed; Ray tries again where it may."""
        if trial.status == trial.ERROR or not trial.should_recover():
            error = trial.get_pickled_error() or trial.get_error()
            self._attempts.end(trial.trial_id, "no reason" if error is None else last_line(error))


def run(config: TuneConfig, search: Search, *, start: str, train: Callable[..., Any] = train_from) -> None:
    """Run the search until it is over.

    Args:
        config: The search.
        search: Its state.
        start: Names this start among those of the search.
        train: What a trial does.
    """
    patch_tune_to_stop_at_final_errors()
    path, filesystem = storage_for(config.runs)
    attempts = _Attempts(search)
    function = tune.with_resources(
        tune.with_parameters(trial, payload={"config": resolved(config)}, train=train),
        {"CPU": config.cpus_per_trial, "GPU": config.gpus_per_trial},
    )
    tuner = tune.Tuner(
        function,
        tune_config=tune.TuneConfig(
            num_samples=-1,
            search_alg=Suggester(attempts),
            scheduler=Judge(attempts),
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=start,
            storage_path=f"{path}/{config.name}/{FOLDER}",
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=_TRIES_AGAIN),
            verbose=0,
        ),
    )
    tuner.fit()


def _name(trial: Any) -> str:
    return f"trial-{trial.config['number']}-{trial.trial_id}"
