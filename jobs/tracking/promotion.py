"""Which version has an alias: `champion` moves only to one that beat it on the same held-out cases, or back."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.tracking import runs as tracking
from jobs.tracking.models import (
    CHAMPION,
    Version,
    alias_history,
    list_models,
    note_history,
    pull,
    resolve,
    set_alias,
)
from ssl_core.downstream.paired_test import compare
from storage.errors import ConfigError, NotFound


@dataclass(frozen=True)
class Evidence:
    """Scores of a version on held-out cases.

    Attributes:
        split: Names the data, the split and what was segmented, such as a manifest's fingerprint, `test` and labels.
        measure: What the scores are; higher is better.
        cases: Case to score; a case is a subject, since the paired test takes cases for independent.
    """

    split: str
    measure: str
    cases: Mapping[str, float]


def evidence_of(uri: str) -> Evidence:
    """The evaluation that a version carries in its bundle.

    Raises:
        NotFound: it carries none.
    """
    with tempfile.TemporaryDirectory(prefix="tomoscale-evidence-") as folder:
        path = pull(uri, Path(folder) / "bundle") / "evaluation.json"
        if not path.is_file():
            raise NotFound(
                f"evaluation of {uri}",
                expected="scores of held-out cases in its bundle",
                found="none",
                remedy="promote segmenters that `tomoscale finetune` registered; it scores them and keeps the scores",
            )
        data = json.loads(path.read_text(encoding="utf-8"))
    return Evidence(data["split"], data["measure"], {str(k): float(v) for k, v in data["cases"].items()})


def promote(
    name: str, version: str, evidence: Evidence | None = None, champion_evidence: Evidence | None = None
) -> str:
    """Give a version the alias `champion`, if it beat the current one on the same cases; returns the reason.

    Args:
        name: Registered model.
        version: Version to promote.
        evidence: Its scores; those in its bundle when None.
        champion_evidence: The current champion's scores on the same split; those in its bundle when None.

    Raises:
        ConfigError: another split, other cases, or no significant gain. The alias stays where it is.
        NotFound: no such version, or no evaluation.
    """
    target = resolve(f"models:/{name}/{version}")
    scores = evidence_of(target.uri) if evidence is None else evidence
    current = next((v for v in list_models(name) if CHAMPION in v.aliases), None)
    if not scores.cases or not np.isfinite(list(scores.cases.values())).all():
        raise ConfigError(
            f"evidence for {target.uri}",
            expected="finite scores of at least one case",
            found=str(dict(scores.cases)),
            remedy="score it again",
        )
    if current is None:
        mean = float(np.mean(list(scores.cases.values())))
        reason = f"first champion: mean {scores.measure} {mean:.3f} over {len(scores.cases)} cases of {scores.split}"
    elif current.version == target.version:
        return "it is the champion already"
    else:
        champion_scores = evidence_of(current.uri) if champion_evidence is None else champion_evidence
        reason = _beats(scores, champion_scores, target, current)
    api = tracking.client()
    api.set_model_version_tag(name, target.version, "tomoscale.promotion", reason)
    api.set_model_version_tag(name, target.version, "tomoscale.promotion_split", scores.split)
    set_alias(api, name, CHAMPION, target.version)
    return reason


def rollback(name: str, alias: str) -> tuple[Version, Version]:
    """Move an alias back to the version that it had before; returns that one and the one that it leaves.

    Again, it goes back one more. A move is undone by `promote`.

    Raises:
        NotFound: no such model, or it has no such alias.
        ConfigError: no earlier version is noted that is still there. The alias stays where it is.
    """
    now = resolve(f"models:/{name}@{alias}")
    api = tracking.client()
    history, _ = alias_history(api, name, alias)
    there_are = {version.version: version for version in list_models(name)}
    earlier = [number for number in history if number in there_are]
    while earlier and earlier[-1] == now.version:
        earlier.pop()
    if not earlier:
        others = ", others were deleted" if set(history) - set(there_are) else ""
        raise ConfigError(
            f"rollback of models:/{name}@{alias}",
            expected="a version that it had before",
            found=f"none on record but version {now.version}{others}",
            remedy=f"`tomoscale models promote {name}/VERSION` makes a version the champion",
        )
    target = there_are[earlier[-1]]
    note_history(api, name, alias, earlier)  # first: a death before the move leaves the same thing to do
    api.set_model_version_tag(name, now.version, f"tomoscale.rolled_back.{alias}", f"to version {target.version}")
    api.set_registered_model_alias(name, alias, target.version)
    return target, now


def _beats(challenger: Evidence, champion: Evidence, target: Version, current: Version) -> str:
    both = (challenger, champion)
    if len({(item.split, item.measure, frozenset(item.cases)) for item in both}) > 1:
        raise ConfigError(
            f"promotion of {target.uri}",
            expected=f"{champion.measure} on the {len(champion.cases)} cases of {champion.split}, as the champion has",
            found=f"{challenger.measure} on {len(challenger.cases)} cases of {challenger.split}",
            remedy="fine-tune both with one `labelled.data`, `labelled.fingerprint` and `labelled.label`",
        )
    cases = sorted(challenger.cases)
    result = compare(
        np.array([challenger.cases[c] for c in cases]),
        np.array([champion.cases[c] for c in cases]),
        a=f"version {target.version}",
        b=f"champion {current.version}",
        measure=challenger.measure,
    )
    if not result.significant or result.difference <= 0:
        raise ConfigError(
            f"promotion of {target.uri}",
            expected=f"a version that beats the champion {current.uri} in a paired test",
            found=result.statement,
            remedy="keep the champion, or fine-tune both again with more test cases (`labelled.test_limit`)",
        )
    return result.statement
