"""Notes of volumes, put together by kind, for a person who reads what ingest assumed and changed."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_EXAMPLES = 3
_FACT = re.compile(r"^\w+=")
"""An acquisition parameter or a digest, which the records hold among their notes."""
_QUOTED = re.compile(r"'[^']*'")
_NUMBER = re.compile(r"(?<![A-Za-z0-9])-?\d+(?:[.,]\d+)*(?:e[+-]?\d+)?", re.IGNORECASE)
_LIST = re.compile(r"N(?:, N)+")
_OTHER_VOLUME = re.compile(r"^(same content as) .*$")


@dataclass(frozen=True, slots=True)
class NoteKind:
    """A note that some volumes have, in these words or with other numbers.

    Args:
        note: The words; N stands for what differs between the volumes.
        volumes: How many have it.
        examples: The first of them: volume id, and the note as it stands there.
    """

    note: str
    volumes: int
    examples: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        differ = any(note != self.note for _, note in self.examples)
        names = [f"{name} ({note})" if differ and i == 0 else name for i, (name, note) in enumerate(self.examples)]
        more = ", ..." if self.volumes > len(names) else ""
        return f"{self.volumes:,} x {self.note}: {', '.join(names)}{more}"


@dataclass(slots=True)
class _Group:
    texts: set[str] = field(default_factory=set)
    volumes: set[str] = field(default_factory=set)
    examples: list[tuple[str, str]] = field(default_factory=list)


def remarks(notes: Sequence[str]) -> tuple[str, ...]:
    """The notes of a volume without acquisition parameters and digests."""
    return tuple(note for note in notes if not _FACT.match(note))


def note_kinds(volumes: Iterable[tuple[str, Sequence[str]]]) -> tuple[NoteKind, ...]:
    """Kinds of notes, the most frequent first; acquisition parameters and digests left out.

    Args:
        volumes: Volume id and notes of each.
    """
    groups: dict[str, _Group] = {}
    for volume_id, notes in volumes:
        for note in remarks(notes):
            group = groups.setdefault(_kind(note), _Group())
            if len(group.texts) < 2:
                group.texts.add(note)
            if volume_id not in group.volumes:
                group.volumes.add(volume_id)
                if len(group.examples) < _EXAMPLES:
                    group.examples.append((volume_id, note))
    kinds = [
        NoteKind(kind if len(group.texts) > 1 else min(group.texts), len(group.volumes), tuple(group.examples))
        for kind, group in groups.items()
    ]
    return tuple(sorted(kinds, key=lambda k: (-k.volumes, k.note)))


def _kind(note: str) -> str:
    """The note without what differs between volumes."""
    text = _NUMBER.sub("N", _QUOTED.sub("N", _OTHER_VOLUME.sub(r"\1 N", note)))
    return _LIST.sub("N", text)
