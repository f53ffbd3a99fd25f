"""Names, digests and side records of an ingest."""

import fnmatch
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from storage.errors import NotFound, RefusedInput
from storage.format.manifest import LabelRecord, VolumeRecord
from storage.ingest.deidentify import Pseudonyms
from storage.ingest.discover import IngestItem
from storage.ingest.policy import IngestPolicy
from storage.ingest.readers.raw import file_digest
from storage.objects import ByteStore
from storage.reading.verify import damage

HIDDEN = "hidden/"
"""How a source begins that is a pseudonym."""
_LONGEST_ID = 100
_RECORD = tuple(VolumeRecord.__dataclass_fields__)


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
        return f"{HIDDEN}{pseudonyms.of('source', item.series or item.source)}"
    return f"{item.source}#{item.series}" if item.series else item.source


def source_digest(item: IngestItem) -> str:
    """SHA-256 of the one file a volume comes from; of several, of the lines `role sha256`."""
    lines = [f"image {file_digest(path)}" for path in _with_pixels(item.images)]
    if item.label:
        lines += [f"label {file_digest(path)}" for path in _with_pixels((item.label,))]
    if len(lines) == 1:
        return lines[0].partition(" ")[2]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def source_state(item: IngestItem) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of change of every file of an item: equal before and after reading if nobody wrote them.

    Raises:
        RefusedInput: one cannot be looked at.
    """
    found = []
    for path in _with_pixels((*item.images, *([item.label] if item.label else []))):
        root = Path(path)
        try:
            for part in [root, *(sorted(root.rglob("*")) if root.is_dir() else [])]:
                stat = part.stat()
                found.append((str(part), stat.st_size, stat.st_mtime_ns))
        except OSError as error:
            raise RefusedInput(path, expected="a readable file", found=error.strerror or "none") from error
    return tuple(found)


def _with_pixels(paths: tuple[str, ...]) -> list[str]:
    """The paths, and the pixel files that detached headers among them name or imply."""
    out: list[str] = []
    for path in paths:
        head, dot, end = path.rpartition(".")
        parts: list[str] = []
        if dot and end.lower() == "hdr":
            parts = [f"{head}.{part}" for part in ("img", "img.gz")]
        elif dot and end.lower() in ("mhd", "nhdr"):
            parts = [f"{head}.{part}" for part in ("raw", "zraw", "raw.gz", "img")]
            parts += _named_parts(Path(path))
        out += [path, *(part for part in dict.fromkeys(parts) if os.path.isfile(part))]
    return out


_DATA_FILE = re.compile(rb"^\s*(?:ElementDataFile\s*=|data ?file\s*:)\s*(.*?)\s*$", re.IGNORECASE | re.MULTILINE)


def _named_parts(header: Path) -> list[str]:
    """Files that a MetaImage or NRRD header takes its voxels from, which may be called anything."""
    try:
        text = header.read_bytes()[: 1 << 20]
    except OSError as error:
        raise RefusedInput(str(header), expected="a readable file", found=error.strerror or "none") from error
    match = _DATA_FILE.search(text)
    if match is None:
        return []
    value = match[1].decode("utf-8", "replace")
    if value.upper().startswith("LIST"):
        names = text[match.end() :].decode("utf-8", "replace").splitlines()
        return [os.path.join(header.parent, name.strip()) for name in names if name.strip()]
    if "%" in value:  # a numbered series, as in `slice%03d.raw 1 20 1`: every file that it could mean
        folder, pattern = os.path.split(os.path.join(header.parent, value.split(" ")[0]))
        if os.path.isdir(folder):
            names = fnmatch.filter(sorted(os.listdir(folder)), re.sub(r"%\d*[a-z]", "*", pattern))
            return [os.path.join(folder, name) for name in names]
    return [os.path.join(header.parent, value)]


def image_digest(record: VolumeRecord) -> str:
    """Digest of the image alone, by which duplicates are found whatever their labels."""
    for note in record.notes:
        if note.startswith("image_sha256="):
            return note.partition("=")[2]
    return record.content_sha256


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What a task leaves under `ingest/`: a claim on an id before writing, the record after.

    An id belongs to one version of one source, that is to equal bytes: who makes another version takes another id, so
    that two jobs never write different bytes under one.

    Attributes:
        forced: Whether the volume was on the disk before its record was written; if not, who finds the record has to
            read the volume before believing it, for the power may have failed in between.
    """

    volume_id: str
    source_sha256: str
    policy: str
    record: VolumeRecord | None = None
    forced: bool = True

    @property
    def version(self) -> tuple[str, str]:
        """What decides the bytes."""
        return self.source_sha256, self.policy

    def save(self, store: ByteStore, if_absent: bool = False) -> bool:
        """Write or replace it; False if it is to be the first and another is there."""
        return store.put(side_key(self.volume_id), self._bytes(), if_absent=if_absent)

    def take_over(self, store: ByteStore) -> bool:
        """Replace an empty one, which nobody writes and a power failure leaves; False if it is none."""
        key = side_key(self.volume_id)
        try:
            return not store.get(key) and store.swap(key, self._bytes(), b"")
        except NotFound:
            return False

    def _bytes(self) -> bytes:
        record = None if self.record is None else {name: getattr(self.record, name) for name in _RECORD}
        if record is not None:
            record["labels"] = [asdict(label) for label in record["labels"]]
            record["derived"] = [asdict(derived) for derived in record["derived"]]
        fields = {"volume_id": self.volume_id, "source_sha256": self.source_sha256, "policy": self.policy}
        return json.dumps({**fields, "record": record, "forced": self.forced}).encode()

    @classmethod
    def load(cls, store: ByteStore, volume_id: str) -> "Sidecar | None":
        """The side record of an id; None where there is none or it cannot be read, which costs only the work."""
        try:
            data = json.loads(store.get(side_key(volume_id)))
            record = data["record"]
            return cls(
                data["volume_id"],
                data["source_sha256"],
                data["policy"],
                record and VolumeRecord(**_tuples(record)),
                bool(data.get("forced", True)),
            )
        except (NotFound, ValueError, KeyError, TypeError):
            return None


def side_key(volume_id: str) -> str:
    """Where the side record of a volume lies."""
    return f"ingest/{volume_id}.json"


def claim(store: ByteStore, base: str, digest: str, policy: str) -> Sidecar:
    """The id that a version of a source is written under, and the record where an earlier run had written it.

    `base`, unless another version holds it: published, written or being written by another job at this moment. Then a
    name that contains the version's tag, which only equal bytes can have.
    """
    mine = Sidecar(base, digest, policy)
    tagged = replace(mine, volume_id=f"{base}-{content_tag(digest, policy)}")
    first = mine.save(store, if_absent=True) or mine.take_over(store)
    found = mine if first else Sidecar.load(store, base)
    if found is not None and found.version == mine.version:
        # Asked behind the claim: before it, another job could finish and drop its own in between.
        if _whole(store, base) in (None, mine.version):
            return found
        if first:
            store.delete(side_key(base))
    found = Sidecar.load(store, tagged.volume_id)
    if found is None or found.version != tagged.version:
        tagged.save(store)
        return tagged
    return found


def _whole(store: ByteStore, volume_id: str) -> tuple[str, str] | None:
    """The version of a volume that is written to its end; None where there is none."""
    try:
        document = store.get(f"volumes/{volume_id}/zarr.json")
        if not document:  # which nobody writes and a power failure leaves
            return None
        facts = json.loads(document)["attributes"]["tomoscale"]
        return str(facts["source_sha256"]), str(facts["policy"])
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError):
        return "", ""


def recorded(store: ByteStore, base: str, digest: str, policy: str) -> VolumeRecord | None:
    """The record of a version that an earlier run wrote and did not get to publish, or None.

    Where that run did not force the volume to the disk, it is read and compared with the record: what can be read now
    will be forced with the rest, and what a power failure took is written again.
    """
    for volume_id in (base, f"{base}-{content_tag(digest, policy)}"):
        found = Sidecar.load(store, volume_id)
        if found is None or found.version != (digest, policy) or found.record is None:
            continue
        if found.forced or not damage(store.url, found.record):
            return found.record
    return None


def content_tag(digest: str, policy: str) -> str:
    """Eight hex digits that tell versions of one volume apart."""
    return hashlib.sha256(f"{digest}|{policy}".encode()).hexdigest()[:8]


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    labels = tuple(LabelRecord(**{k: _tuple(v) for k, v in label.items()}) for label in data["labels"])
    found = {**{k: _tuple(v) for k, v in data.items()}, "labels": labels}
    if isinstance(found["stats"], dict):  # of a run that died before every channel had its own: it is done again
        raise TypeError("statistics of the first channel only")
    return found


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
