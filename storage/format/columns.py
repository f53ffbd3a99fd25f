"""Columns of the subject table, which a volume's record holds among its notes.

Ingest writes `subject table: NAME=VALUE`, one note a column, and leaves empty cells and `n/a` out.
"""

from collections.abc import Iterable, Sequence

from storage.errors import RefusedInput

COLUMN_NOTE = "subject table: "
NOTHING = frozenset({"na", "n/a", "nan", "null"})
"""Spellings of a value that is none, in small letters; beside the empty cell, which ingest leaves out. Our choice."""


def column_value(volume_id: str, notes: Sequence[str], name: str) -> str:
    """The value of a column; empty where the volume has none.

    Args:
        volume_id: What a message calls the volume.
        notes: Of its record.
        name: Of the column.

    Raises:
        RefusedInput: several values: another column's name begins with this one and `=`.
    """
    start = f"{COLUMN_NOTE}{name}="
    values = [note.removeprefix(start) for note in notes if note.startswith(start)]
    if len(values) > 1:
        raise RefusedInput(
            f"column {name!r} of volume {volume_id}",
            expected="one value",
            found=", ".join(map(repr, values)),
            remedy="give the column a name without `=` in the subject table, and ingest again",
        )
    return "" if not values or values[0].casefold() in NOTHING else values[0]


def column_names(notes: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Columns that some volume has, sorted.

    Args:
        notes: Of each volume.
    """
    own = (note.removeprefix(COLUMN_NOTE) for of_one in notes for note in of_one if note.startswith(COLUMN_NOTE))
    return tuple(sorted({note.partition("=")[0] for note in own}))
