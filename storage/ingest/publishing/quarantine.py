"""The list of refused volumes in a store, `quarantine.jsonl`: one JSON object a line, source and reason."""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from storage.errors import NotFound, StoreError
from storage.objects import ByteStore

QUARANTINE = "quarantine.jsonl"
_TRIES = 50
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A refused volume. `source` is what the user's disk calls it, `stored` what may be written to the store."""

    source: str
    stored: str
    reason: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.source}: {self.reason}"


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
