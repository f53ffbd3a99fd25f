"""`tomoscale evaluate`: what a model says of a split of a store, beside what the store knows."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from jobs.output import Progress, table
from ssl_core.downstream.heads.scores import outcome, overall
from ssl_core.downstream.heads.targets import target_of_model
from ssl_core.downstream.scores import METRICS, CaseScore, mean_scores, score_case
from ssl_core.portable import Predictor
from ssl_core.portable.head.assess import assess_values, head_of
from storage.errors import ConfigError
from storage.format.columns import column_names, column_value
from storage.format.manifest import Manifest
from storage.format.records import VolumeRecord
from storage.reading.slabs import StoredSlabs
from storage.reading.volume_store import VolumeStore

Result = tuple[dict[str, Any], str]
"""An object for JSON, and the text for a person."""


def opened(data: str, split: str, label: str | None) -> Manifest:
    """The manifest of a store, after what nothing can be scored by is refused: before a model is fetched.

    Args:
        data: URL of the store.
        split: Of its manifest.
        label: Name of a label map that was asked for.

    Raises:
        ConfigError: the split has no volume, or none with the label.
    """
    what = "volumes" if label is None else f"volumes with label {label!r}"
    manifest = Manifest.open(data)
    if not manifest.select(split=split, labelled=label).size:
        raise _nothing(data, split, what, "`tomoscale data show URL` lists splits and labels")
    return manifest


def of_masks(
    predictor: Predictor, data: str, manifest: Manifest, split: str, label: str, tolerance_mm: float, *, force: bool
) -> Result:
    """Scores of a segmenter, case by case and label by label.

    Args:
        predictor: The segmenter.
        data: URL of the store.
        manifest: Of it.
        split: Of the manifest.
        label: Name of the label map.
        tolerance_mm: Of the normalised surface Dice.
        force: Take what is far from all that it learned from.

    Raises:
        ConfigError: no volume of the split has the label.
        RefusedInput: a volume is not one that the model was made for.
    """
    indices = manifest.select(split=split, labelled=label).tolist()
    if not indices:
        raise _nothing(
            data, split, f"volumes with label {label!r}", "`tomoscale data show URL` lists splits and labels"
        )
    names = {value: name for value, name in predictor.plan.labels if value != 0}
    cases: list[CaseScore] = []
    with VolumeStore(data, manifest) as store:
        for record, slabs in _volumes(store, indices):
            mask = predictor.segment(slabs, _affine(record), record.stats, **_named(record), force=force)
            truth = store.read_volume(record.volume_id, label=label)[0]
            scores = score_case(mask, truth, labels=names, spacing_mm=record.spacing_mm, tolerance_mm=tolerance_mm)
            cases += [CaseScore(record.volume_id, record.subject, one, s) for one, s in scores.items()]
    groups = [("mean", one, mean_scores([c for c in cases if c.label == one])) for one in names.values()]
    rows = [(c.volume_id, c.label, c.scores) for c in cases] + groups
    header = ("case", "label", *(metric.heading(tolerance_mm) for metric in METRICS))
    return (
        {
            "split": f"{manifest.fingerprint} {split}",
            "cases": [{"volume_id": c.volume_id, "label": c.label, **asdict(c.scores)} for c in cases],
        },
        table(header, [(case, one, *(scores.of(metric) for metric in METRICS)) for case, one, scores in rows]),
    )


def of_heads(predictor: Predictor, data: str, manifest: Manifest, split: str, *, force: bool) -> Result:
    """Scores of a classifier or a regressor over the volumes that have a value in the column that it learned.

    Args:
        predictor: The classifier or regressor.
        data: URL of the store.
        manifest: Of it.
        split: Of the manifest.
        force: Take what is far from all that it learned from.

    Raises:
        ConfigError: no volume of the split has a value, or one has a class that the model does not know.
        RefusedInput: a volume is not one that the model was made for.
    """
    head = head_of(predictor)
    ids, notes = manifest.column("volume_id"), manifest.column("notes")
    values = {i: column_value(ids[i], notes[i], head.column) for i in manifest.select(split=split).tolist()}
    text_of = {i: text for i, text in values.items() if text}
    if not text_of:
        names = ", ".join(map(repr, column_names(notes))) or "none"
        raise _nothing(
            data,
            split,
            f"volumes with a value in column {head.column!r}, which the model learned",
            f"ingest it with a subject_table that has it (columns there are: {names})",
        )
    target = target_of_model(head.column, head.classes, text_of, dict(enumerate(ids)))
    cases = []
    with VolumeStore(data, manifest) as store:
        for index, (record, slabs) in zip(text_of, _volumes(store, list(text_of)), strict=True):
            row = assess_values(predictor, slabs, _affine(record), record.stats, **_named(record), force=force)
            cases.append(outcome(record.volume_id, record.subject, target, index, row))
    scores = overall(head.classes, cases)
    rows: list[tuple[object, ...]] = [(c.volume_id, c.truth, c.prediction) for c in cases]
    rows += [(name, "", value) for name, value in scores.items()]
    return (
        {
            "split": f"{manifest.fingerprint} {split}",
            "column": head.column,
            "scores": scores,
            "cases": [case.to_json() for case in cases],
            "without_value": [ids[i] for i, text in values.items() if not text],
        },
        table(("case", f"{head.column}, truth", "model"), rows),
    )


def _volumes(store: VolumeStore, indices: Sequence[int]) -> Iterator[tuple[VolumeRecord, StoredSlabs]]:
    """Each volume as a model reads it, with progress."""
    bar = Progress("evaluate", len(indices), "cases")
    for done, index in enumerate(indices, 1):
        record = store.manifest.record(index)
        yield record, StoredSlabs(store, record.volume_id)
        bar.update(done)


def _affine(record: VolumeRecord) -> Any:
    return np.array(record.affine).reshape(4, 4)


def _named(record: VolumeRecord) -> dict[str, str]:
    return {"name": record.volume_id, "modality": record.modality}


def _nothing(data: str, split: str, expected: str, remedy: str) -> ConfigError:
    return ConfigError(f"split {split!r} of {data}", expected=expected, found="none", remedy=remedy)
