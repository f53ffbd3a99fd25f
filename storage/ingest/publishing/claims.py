"""Under which names volumes are written, and the side records by which jobs claim them."""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from storage.errors import NotFound
from storage.format.records import DerivedRecord, LabelRecord, VolumeRecord
from storage.ingest.deidentify import Pseudonyms
from storage.ingest.items import IngestItem
from storage.ingest.policy import IngestPolicy
from storage.ingest.readers.registry import format_of
from storage.objects import ByteStore
from storage.reading.verify import damage

HIDDEN = "hidden/"
"""How a source begins that is a pseudonym."""
_LONGEST_ID = 100
_RECORD = tuple(VolumeRecord.__dataclass_fields__)
_PARTS = {"labels": tuple(LabelRecord.__dataclass_fields__), "derived": tuple(DerivedRecord.__dataclass_fields__)}


def hides(item: IngestItem, policy: IngestPolicy) -> bool:
    """Whether the item's names must not reach the store."""
    return policy.identifiers == "hash" or (policy.identifiers == "auto" and format_of(item.kind).hides_identity)


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
            for name, parts in _PARTS.items():  # `asdict` would copy each of some hundred positions by itself
                record[name] = [{part: getattr(entry, part) for part in parts} for entry in record[name]]
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
    plain = Sidecar(base, digest, policy)
    tagged = replace(plain, volume_id=f"{base}-{content_tag(digest, policy)}")
    first = plain.save(store, if_absent=True) or plain.take_over(store)
    sidecar = plain if first else Sidecar.load(store, base)
    if sidecar is not None and sidecar.version == plain.version:
        # Asked behind the claim: before it, another job could finish and drop its own in between.
        if _whole(store, base) in (None, plain.version):
            return sidecar
        if first:
            store.delete(side_key(base))
    sidecar = Sidecar.load(store, tagged.volume_id)
    if sidecar is None or sidecar.version != tagged.version:
        tagged.save(store)
        return tagged
    return sidecar


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
        sidecar = Sidecar.load(store, volume_id)
        if sidecar is None or sidecar.version != (digest, policy) or sidecar.record is None:
            continue
        if sidecar.forced or not damage(store.url, sidecar.record):
            return sidecar.record
    return None


def content_tag(digest: str, policy: str) -> str:
    """Eight hex digits that tell versions of one volume apart."""
    return hashlib.sha256(f"{digest}|{policy}".encode()).hexdigest()[:8]


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    labels = tuple(LabelRecord(**{k: _tuple(v) for k, v in label.items()}) for label in data["labels"])
    fields = {**{k: _tuple(v) for k, v in data.items()}, "labels": labels}
    if isinstance(fields["stats"], dict):  # of a run that died before every channel had its own: it is done again
        raise TypeError("statistics of the first channel only")
    return fields


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value
