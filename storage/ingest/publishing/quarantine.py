"""The list of refused volumes in a store, `quarantine.jsonl`: one JSON object a line, source and reason.

Where names are hidden, a source is a digest there. Whose the data are finds the files by a key file, which lies in the
state folder of the user who ingested, beside the salts, and never in the store: one JSON object a line, with the
digest, the path of the first file, the number of files and the series id.
"""

import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from storage.errors import NotFound, RefusedInput, StoreError
from storage.ingest.deidentify import state_file
from storage.ingest.discover import legible
from storage.ingest.items import IngestItem
from storage.ingest.policy import IngestPolicy
from storage.ingest.publishing.claims import HIDDEN, hides
from storage.ingest.readers.registry import format_of, split_name
from storage.objects import ByteStore

QUARANTINE = "quarantine.jsonl"
_TRIES = 50
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a refused volume lies: its first file, how many there are, and the series id of DICOM."""

    path: str
    files: int = 1
    series: str = ""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A refused volume. `source` is what the user's disk calls it, `stored` what may be written to the store.

    `origin` never leaves the machine that ingested.
    """

    source: str
    stored: str
    reason: str
    origin: Origin | None = None

    def __str__(self) -> str:
        """One line."""
        return f"{self.source}: {self.reason}"


def reason_of(error: RefusedInput, item: IngestItem, policy: IngestPolicy) -> str:
    """Why an item was refused, as it may be written down: without names where those are hidden."""
    parts = [f"expected {error.expected}" if error.expected else "", f"found {error.found}" if error.found else ""]
    reason = "; ".join(part for part in (*parts, error.remedy) if part)
    personal = format_of(item.kind).hides_identity
    thing = "" if personal else _relative_thing(error.thing, item)
    reason = legible(f"{thing}{reason}")
    return _without_names(reason, item) if not personal and hides(item, policy) else reason


def origin_of(item: IngestItem) -> Origin:
    """Where an item lies."""
    return Origin(item.images[0], len(item.files), item.series)


def by_reason(refused: Sequence[Quarantined]) -> list[str]:
    """One line a reason, with its count and the first names, the most frequent first; numbers make no other reason."""
    groups: defaultdict[str, list[Quarantined]] = defaultdict(list)
    for one in refused:
        groups[_kind(one)].append(one)
    lines = []
    for group in sorted(groups.values(), key=len, reverse=True):
        names = ", ".join(one.source for one in group[:_EXAMPLES])
        more = f" and {len(group) - _EXAMPLES} more" if len(group) > _EXAMPLES else ""
        lines.append(f"{len(group)} ({names}{more}): {group[0].reason}")
    return lines


def _kind(one: Quarantined) -> str:
    """The reason without names and numbers."""
    words = (word for word in one.reason.split() if "/" not in word and "." not in word.strip(".,;:"))
    return re.sub(r"\d+", "#", " ".join(words))


def read_quarantine(store: ByteStore) -> tuple[bytes | None, dict[str, str]]:
    """The object as it is (None: there is none), and its lines by source."""
    try:
        data = store.get(QUARANTINE)
    except NotFound:
        return None, {}
    lines = {}
    for line in data.decode("utf-8", "replace").splitlines():
        try:
            lines[str(json.loads(line)["source"])] = line
        except (ValueError, KeyError, TypeError):
            lines[line] = line  # not ours, and not ours to drop
    return data, lines


def write_quarantine(store: ByteStore, refused: Sequence[Quarantined], stale: Collection[str]) -> None:
    """List the refusals of a run; `stale` are the sources of which earlier lines are out of date. Others stay."""
    new = {q.stored: json.dumps({"source": q.stored, "reason": q.reason}, sort_keys=True) for q in refused}
    for _ in range(_TRIES):
        current, lines = read_quarantine(store)
        remaining = {source: line for source, line in lines.items() if source not in stale} | new
        data = "".join(f"{remaining[source]}\n" for source in sorted(remaining)).encode()
        if data == (current or b""):
            return
        if not remaining:
            store.delete(QUARANTINE)
            return
        if store.swap(QUARANTINE, data, current):
            return
    raise StoreError(
        f"{store.url}/{QUARANTINE}", expected="to be written", found=f"that other jobs wrote it first, {_TRIES} times"
    )


def key_file(store_url: str, environment: Mapping[str, str] | None = None) -> Path:
    """Where the paths of a store's hidden refusals are; there is no such file where there are none."""
    return state_file(store_url, "refused", ".jsonl", environment)


def write_keys(store_url: str, refused: Sequence[Quarantined], before: Collection[str]) -> None:
    """Write the key file of a store: what a run refused, and what it had for sources that were refused `before`.

    Only the user may read it (mode 0600). Where it cannot be written it is missing: the ingest matters more.
    """
    path = key_file(store_url)
    with suppress(OSError):
        lines = {source: line for source, line in _key_lines(path).items() if source in before}
        for q in refused:
            if q.origin is not None and q.stored.startswith(HIDDEN):
                lines[q.stored] = json.dumps({"source": q.stored, **asdict(q.origin)}, sort_keys=True)
        if not lines:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent)  # mode 0600
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.writelines(f"{lines[source]}\n" for source in sorted(lines))
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise


def _key_lines(path: Path) -> dict[str, str]:
    """Lines of a key file by their source; none where there is no file or it cannot be read."""
    lines = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            lines[str(json.loads(line)["source"])] = line
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return lines


def _relative_thing(thing: str, item: IngestItem) -> str:
    """The name in a message, when it is more than the file itself, without the path to the folder."""
    root = legible(item.images[0]).removesuffix(item.source)
    name = legible(thing).replace(root, "")
    return "" if name == item.source else f"{name}: "


def _without_names(reason: str, item: IngestItem) -> str:
    """A reason as it may be stored where names are hidden: file names name people, and libraries quote them too."""
    root = legible(item.images[0]).removesuffix(item.source)
    paths = [legible(path) for path in item.files]
    names = {item.name, *paths, *(path.removeprefix(root) for path in paths), *(Path(path).name for path in paths)}
    names |= {split_name(Path(path).name)[0] for path in paths}
    for name in sorted(names, key=len, reverse=True):
        if len(name) > 2:  # less names nobody, and is part of many words
            reason = reason.replace(name, "(a name)")
    return re.sub(r"\S*[/\\]\S*", "(a path)", reason)  # of other files, or cut off
