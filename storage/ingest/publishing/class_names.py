"""Names of label values of a data set: those of its own description, and those that all its volumes agree on."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from storage.format.records import VolumeRecord
from storage.ingest.label_tables import noted_names, same_name

_EXAMPLES = 3


def with_class_names(
    facts: Mapping[str, Any], records: Sequence[VolumeRecord], described: Mapping[str, Any], warnings: list[str]
) -> dict[str, Any]:
    """Facts of a data set whose `labels` name each value that the volumes or a description name.

    A value to which volumes give several names has none, unless the description of this run's source names it. Where
    description and volumes differ, the description is kept. Both are said.

    Args:
        facts: Of the data set.
        records: Its volumes; their notes hold what their tables say.
        described: `labels` of the `dataset.json` of this run's source.
        warnings: What a reader should know is added.
    """
    volumes: defaultdict[str, dict[str, list[str]]] = defaultdict(dict)
    for record in records:
        for value, name in noted_names(record.notes).items():
            same = next((other for other in volumes[value] if same_name(other, name)), name)
            volumes[value].setdefault(same, []).append(record.volume_id)
    labels = dict(facts.get("labels") or {})
    for value in sorted(volumes, key=int):
        names = volumes[value]
        listing = ", ".join(f"{name!r} in {_listing(ids)}" for name, ids in sorted(names.items()))
        if len(names) > 1:
            if value not in described and any(same_name(str(labels.get(value, "")), name) for name in names):
                del labels[value]  # as the volumes of an earlier run, which agreed, had it
            outcome = f"kept as {labels[value]!r}" if value in labels else "it has no name in the data set"
            warnings.append(
                f"label value {value} is {listing}: {outcome}; correct the tables, or name it in dataset.json if it is "
                "one structure"
            )
            continue
        name = next(iter(names))
        if not same_name(str(labels.setdefault(value, name)), name):
            warnings.append(
                f"label value {value} is {labels[value]!r} in the description of the data set, which was kept, and "
                f"{listing}; correct one of them"
            )
    return {**facts, "labels": labels} if labels else dict(facts)


def _listing(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_EXAMPLES]) + (f" and {len(ids) - _EXAMPLES} more" if len(ids) > _EXAMPLES else "")
