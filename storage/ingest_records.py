"""Names, digests and side records of an ingest."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage.bytestore import ByteStore
from storage.deidentify import Pseudonyms
from storage.errors import NotFound
from storage.ingest_policy import IngestPolicy
from storage.manifest import LabelRecord, VolumeRecord
from storage.pairing import IngestItem
from storage.readers.raw import file_digest

_LONGEST_ID = 100


def hides(item: IngestItem, policy: IngestPolicy) -> bool:
    """Whether the item's names must not reach the store."""
    return policy.identifiers == "hash" or (policy.identifiers == "auto" and item.kind == "dicom")


def base_id(item: IngestItem, policy: IngestPolicy, pseudonyms: Pseudonyms | None) -> str:
    """The volume id an item asks for: its name in safe characters, or a pseudonym."""
    if hides(item, policy) and pseudonyms is not None:
        return f"v-{pseudonyms.of('volume', item.series or item.name)}"
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", item.name).strip(".-") or "volume"
    if len(safe) > _LONGEST_ID:
        safe = f"{safe[:_LONGEST_ID]}-{hashlib.sha256(item.name.encode()).hexdigest()[:8]}"
    return safe


def record_source(item: IngestItem, policy: IngestPolicy, pseudonyms: Pseudonyms | None) -> str:
    """What the manifest calls the source: the relative path, or a pseudonym; one a volume."""
    if hides(item, policy) and pseudonyms is not None:
        return f"hidden/{pseudonyms.of('source', item.series or item.source)}"
    return f"{item.source}#{item.series}" if item.series else item.source


def source_digest(item: IngestItem) -> str:
    """SHA-256 of the one file a volume comes from; of several, of the lines `role sha256`."""
    lines = [f"image {file_digest(path)}" for path in _with_pixels(item.images)]
    if item.label:
        lines += [f"label {file_digest(path)}" for path in _with_pixels((item.label,))]
    if len(lines) == 1:
        return lines[0].partition(" ")[2]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _with_pixels(paths: tuple[str, ...]) -> list[str]:
    """The paths, and the pixel files that detached headers among them belong to."""
    out = []
    for path in paths:
        out.append(path)
        head, dot, end = path.rpartition(".")
        if dot and end.lower() in ("hdr", "mhd", "nhdr"):
            parts = ("img", "img.gz", "raw", "zraw", "raw.gz")
            out += [f"{head}.{part}" for part in parts if Path(f"{head}.{part}").is_file()]
    return out


def image_digest(record: VolumeRecord) -> str:
    """Digest of the image alone, by which duplicates are found whatever their labels."""
    for note in record.notes:
        if note.startswith("image_sha256="):
            return note.partition("=")[2]
    return record.content_sha256


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What a task leaves under `ingest/`: a claim on an id before writing, the record after."""

    volume_id: str
    source_sha256: str
    policy: str
    record: VolumeRecord | None

    def save(self, store: ByteStore, base: str) -> None:
        """Write or replace it."""
        store.put(f"ingest/{base}.json", json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, store: ByteStore, base: str) -> "Sidecar | None":
        """The side record of an id; None where there is none or it cannot be read, which costs only the work."""
        try:
            data = json.loads(store.get(f"ingest/{base}.json"))
            record = data["record"]
            return cls(
                data["volume_id"], data["source_sha256"], data["policy"], record and VolumeRecord(**_tuples(record))
            )
        except (NotFound, ValueError, KeyError, TypeError):
            return None


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    labels = tuple(LabelRecord(**{k: _tuple(v) for k, v in label.items()}) for label in data["labels"])
    return {**{k: _tuple(v) for k, v in data.items()}, "labels": labels}


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value


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
