"""The rows of `jobs.bench.learning.learn`: what several runs of a method say together, and in words."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jobs.bench.measure import table
from ssl_core.downstream.paired_test import LEAST_SEEDS, PairedTrainings, compare_trainings
from storage.errors import ConfigError

RANDOM = "random"
_CHECKS = {"falls": "loss falls", "no_collapse": "no collapse", "beats_random": "beats random"}


@dataclass(frozen=True)
class Run:
    """One pre-training and its read-out.

    Attributes:
        loss: Median of the total loss over the first and over the last tenth of the steps. Where a queue is filled at
            first, the first tenth is that after the queue is full: until then ever more negatives raise the loss.
        terms: The same of every term.
        fixed: Total loss (`loss`), its terms (`loss/NAME`) and monitors (`monitor/NAME`) on the same views, before the
            first step and after the last; see `jobs.bench.learning.learn.on_fixed_views`. Empty in results from before
            it was measured, whose loss is judged in training.
        rank: Effective rank of the deepest features trained; `std` their spread, as a share of 1/sqrt(C).
        dice: Mean over the labelled classes, by subject.
        steps_per_s: Views included.
    """

    seed: int
    loss: tuple[float, float] | None
    terms: dict[str, tuple[float, float]]
    fixed: dict[str, tuple[float, float]]
    rank: float | None
    std: float | None
    collapsed: bool
    dice: dict[str, float]
    steps_per_s: float | None


def joined(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One result of several that differ in their seeds alone: measured in pieces, or on several machines.

    Args:
        results: As from `bench_learn`.

    Raises:
        ConfigError: they differ in more, or have a seed in common.
    """
    first = results[0]
    runs: dict[str, list[Run]] = {name: [] for name in first["runs"]}
    for number, result in enumerate(results, 1):
        for part in ("data", "settings", "size"):
            expected, actual = (
                json.dumps({k: v for k, v in r[part].items() if k != "seeds"}, sort_keys=True) for r in (first, result)
            )
            if actual != expected:
                raise ConfigError(f"result {number}: {part}", expected="what the first has", found="something else")
        for name, entries in result["runs"].items():
            runs[name] += [Run(**run) for run in entries]
    seeds = [run.seed for run in runs[RANDOM]]
    if len(set(seeds)) != len(seeds):
        raise ConfigError("seeds of the results", expected="each once", found=str(seeds))
    return {
        **first,
        "machine": [result["machine"] for result in results],
        "size": {**first["size"], "seeds": seeds},
        "seconds": sum(result["seconds"] for result in results),
        "rows": [summary(name, entries, runs[RANDOM]) for name, entries in runs.items()],
        "ablations": ablations(runs),
        "runs": {name: [asdict(run) for run in entries] for name, entries in runs.items()},
    }


def summary(name: str, runs: Sequence[Run], random: Sequence[Run]) -> dict[str, Any]:
    """One row: medians over seeds, Dice as mean and deviation over seeds, and the gain over trainings and subjects.

    `beats_random` is None with fewer trainings than can show it.
    """
    means = [statistics.fmean(run.dice.values()) for run in runs]
    row: dict[str, Any] = {
        "method": name,
        "seeds": len(runs),
        "dice": statistics.fmean(means),
        "dice_sd": statistics.stdev(means) if len(means) > 1 else None,
    }
    trained = [run for run in runs if run.loss is not None]
    if not trained:
        return row
    paired = _paired(name, runs, "random features", random)
    losses = [run.loss for run in trained if run.loss is not None]
    fixed = [run.fixed["loss"] for run in trained if run.fixed]
    row |= {
        "loss_first": statistics.median(first for first, _ in losses),
        "loss_last": statistics.median(last for _, last in losses),
        "effective_rank": statistics.median(run.rank or 0.0 for run in trained),
        "feature_std": statistics.median(run.std or 0.0 for run in trained),
        "steps_per_s": statistics.median(run.steps_per_s or 0.0 for run in trained),
        "difference": paired.difference,
        "low": paired.low,
        "high": paired.high,
        "p": paired.p,
        "statement": paired.statement,
        "falls": all(last < first for first, last in fixed or losses),
        "no_collapse": not any(run.collapsed for run in trained),
        "beats_random": paired.significant and paired.difference > 0 if paired.n_seeds >= LEAST_SEEDS else None,
    }
    if fixed:
        row["fixed_before"] = statistics.median(before for before, _ in fixed)
        row["fixed_after"] = statistics.median(after for _, after in fixed)
    return row


def ablations(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """Each method beside what is left without one of its parts, where both were measured: a sentence each."""
    pairs = [(name.partition(":")[0], name) for name in runs if ":" in name]
    return [_paired(whole, runs[whole], part, runs[part]).statement for whole, part in pairs if whole in runs]


def format_learn(result: Mapping[str, Any]) -> str:
    """The table, and in words which rows do not do what they should."""
    rows = [
        {
            "method": row["method"],
            "seeds": row["seeds"],
            "loss": f"{row['loss_first']:.3f} to {row['loss_last']:.3f}" if "loss_first" in row else "",
            "fixed": f"{row['fixed_before']:.3f} to {row['fixed_after']:.3f}" if "fixed_before" in row else "",
            "rank": f"{row['effective_rank']:.1f}" if "effective_rank" in row else "",
            "dice": f"{row['dice']:.3f}" + (f" ± {row['dice_sd']:.3f}" if row["dice_sd"] is not None else ""),
            "difference": _gain(row) if "p" in row else "",
            "p": f"{row['p']:.1g}" if row.get("p") is not None else "",
            "speed": f"{row['steps_per_s']:.1f}" if "steps_per_s" in row else "",
            **{key: {True: "yes", False: "NO", None: ""}[row.get(key)] for key in _CHECKS},
        }
        for row in result["rows"]
    ]
    columns = {"method": "method", "seeds": "seeds", "fixed": "loss on the same views, before to after"}
    columns |= {"loss": "in training, first to last tenth", "rank": "effective rank", "dice": "probe Dice"}
    columns |= {"difference": "against random (95 %)", "p": "p", "speed": "steps/s"} | _CHECKS
    words = [f"{row['method']}: not {', not '.join(_failed(row))}." for row in result["rows"] if _failed(row)]
    data = result["data"]
    what = f"{data['name']}{' (SIMULATED)' if data['simulated'] else ''}: pre-trained on {data['pretrained_on']}"
    what += f" volumes; read-out fitted on {data['fitted']} subjects, scored on {len(data['scored'])}"
    what += f" of split {data['part']}"
    judged = [row for row in result["rows"] if "p" in row]
    if any(row["beats_random"] is None for row in judged):
        words.append(f"Fewer than {LEAST_SEEDS} trainings of a row cannot show that it beats random features.")
    words = words or ["Every row does all three."]
    return "\n".join([table(rows, columns), "", what + ".", *words, *result["ablations"]])


def _gain(row: Mapping[str, Any]) -> str:
    interval = "" if row["low"] is None else f" ({row['low']:+.3f} to {row['high']:+.3f})"
    return f"{row['difference']:+.3f}{interval}"


def _paired(a: str, runs_a: Sequence[Run], b: str, runs_b: Sequence[Run]) -> PairedTrainings:
    """Over trainings, paired by seed, and subjects."""
    dice_b = {run.seed: run.dice for run in runs_b}
    subjects = sorted(runs_a[0].dice)
    differences = [[run.dice[subject] - dice_b[run.seed][subject] for subject in subjects] for run in runs_a]
    return compare_trainings(np.array(differences), a=a, b=b)


def _failed(row: Mapping[str, Any]) -> list[str]:
    words = {
        "falls": "a falling loss",
        "no_collapse": "free of collapse",
        "beats_random": "better than random features",
    }
    return [text for key, text in words.items() if row.get(key) is False]
