"""Facts of a data set as a whole, from the `dataset.json` that comes with it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """Facts of a whole data set, for the manifest."""

    dataset: dict[str, Any]
    modality: str


def dataset_facts(root: str, name: str) -> DatasetFacts:
    """Name, label names, licence and modality, as far as a `dataset.json` in the folder gives them.

    Both the Medical Segmentation Decathlon's form (`"labels": {"1": "liver"}`) and nnU-Net's (`{"liver": 1}`) are read.
    """
    facts: dict[str, Any] = {"name": name}
    try:
        data = json.loads((Path(root) / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return DatasetFacts(facts, "")
    if not isinstance(data, dict):
        return DatasetFacts(facts, "")
    labels = data.get("labels")
    if isinstance(labels, dict):
        pairs = [(str(v), str(k)) if str(v).isdigit() else (str(k), str(v)) for k, v in labels.items()]
        facts["labels"] = {value: text for value, text in sorted(pairs) if value.isdigit() and value != "0"}
    for key in ("licence", "license", "reference", "description", "simulated"):
        if isinstance(data.get(key), (str, bool)):
            facts[key] = data[key]
    channels = data.get("channel_names") or data.get("modality") or {}
    first = str(next(iter(channels.values()), "")) if isinstance(channels, dict) else ""
    return DatasetFacts(facts, {"MRI": "MR", "MR": "MR", "CT": "CT"}.get(first.strip().upper().split(" ")[0], ""))
