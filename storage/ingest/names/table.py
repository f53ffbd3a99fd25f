"""A table that says whose the scans are: one person may have several names, and only who has the key can know.

CSV or TSV with a header. The first column names a file (its path, name or stem) or a subject; a column `person` says
whose it is. A `participants.tsv` as of BIDS needs none: its participants are the people. Further columns are facts.
"""

import csv
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from storage.errors import ConfigError
from storage.format.columns import COLUMN_NOTE
from storage.ingest.items import IngestItem
from storage.ingest.readers.registry import split_name

_PERSON = ("person", "person_id", "subject", "subject_id", "patient", "patient_id", "participant_id")
_NOTHING = ("", "n/a")
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Row:
    """What the lines of one name say: whose it is, and its other columns, as far as the lines agree.

    Args:
        disputed: Columns of which lines of this name say different things.
    """

    key: str
    person: str
    columns: tuple[tuple[str, str], ...]
    disputed: tuple[str, ...] = ()


def read_table(path: Path) -> tuple[Row, ...]:
    """The rows of a table.

    Raises:
        ConfigError: it cannot be read, has no column that says whose a scan is, or says two things of one name.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"subject_table {path}",
            expected="a CSV or TSV file in UTF-8",
            found=getattr(error, "strerror", None) or "another encoding",
            remedy="save it as UTF-8"
            if isinstance(error, UnicodeDecodeError)
            else "give its path, absolute or relative to the ingested folder",
        ) from error
    first = text.partition("\n")[0]
    delimiter = max("\t,;", key=first.count)
    lines = [line for line in csv.reader(text.splitlines(), delimiter=delimiter) if any(cell.strip() for cell in line)]
    header = [cell.strip() for cell in lines[0]] if lines else []
    column = _person_column(path, [name.lower() for name in header])
    rows: dict[str, Row] = {}
    spelling: dict[str, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise ConfigError(
                f"subject_table {path}", expected=f"{len(header)} columns", found=f"{len(line)} in row {number}"
            )
        cells = [cell.strip() for cell in line]
        if cells[0] in _NOTHING or cells[column] in _NOTHING:
            raise ConfigError(
                f"subject_table {path}",
                expected=f"a name under {header[0]} and one under {header[column]} in every row",
                found=f"none in row {number}",
            )
        facts = tuple(
            (header[at], cells[at]) for at in range(1, len(cells)) if at != column and cells[at] not in _NOTHING
        )
        person = spelling.setdefault(_same_for_all_spellings(cells[column]), cells[column])
        row = Row(cells[0].removeprefix("./"), person, facts)
        if row.key in rows and rows[row.key].person != row.person:
            raise ConfigError(
                f"subject_table {path}",
                expected=f"one person for {row.key}",
                found=f"{rows[row.key].person} and {row.person}",
                remedy="correct one of the rows",
            )
        rows[row.key] = _both(rows[row.key], row) if row.key in rows else row
    return tuple(rows.values())


def _both(first: Row, second: Row) -> Row:
    """Two lines of one name, of several sessions for one, without the columns that they dispute."""
    one, other = dict(first.columns), dict(second.columns)
    disputed = {name for name in {*one, *other} if one.get(name) != other.get(name)} | {*first.disputed}
    columns = tuple((name, value) for name, value in first.columns if name not in disputed)
    return Row(first.key, first.person, columns, tuple(sorted(disputed)))


def _same_for_all_spellings(person: str) -> str:
    """Equal for names that differ in case, in the code of accents, or in the `.0` that spreadsheets add to numbers."""
    text = unicodedata.normalize("NFC", person).casefold()
    return text.removesuffix(".0") if text.removesuffix(".0").isdigit() else text


def _person_column(path: Path, header: Sequence[str]) -> int:
    header = [re.sub(r"[-. ]+", "_", name) for name in header]
    several = [name for name in header[1:] if name in _PERSON]
    if len(several) > 1 and not {"person", "person_id"} & {*several}:
        raise ConfigError(
            f"subject_table {path}",
            expected="one column that says whose a scan is",
            found=", ".join(several),
            remedy="call the one that names people `person`",
        )
    for name in _PERSON:
        if name in header[1:]:
            return header.index(name, 1)
    if header and header[0] in _PERSON:
        return 0
    raise ConfigError(
        f"subject_table {path}",
        expected="a header whose first column names files or subjects, and a column `person`",
        found=", ".join(header) or "an empty file",
        remedy="for example: file,person",
    )


def with_people(
    items: Sequence[IngestItem], rows: Sequence[Row], path: Path
) -> tuple[list[IngestItem], tuple[str, ...]]:
    """The items with the subjects that the table gives them, and what a reader should know about it.

    A row of a file counts before a row of its subject. Where rows name some scans of a subject and all of them the same
    person, the subject's other scans are that person's too.

    Raises:
        ConfigError: a row names several files, or no row names anything.
    """
    by_path: dict[str, int] = {}
    by_name: defaultdict[str, set[int]] = defaultdict(set)
    by_subject: defaultdict[str, list[int]] = defaultdict(list)
    for at, item in enumerate(items):
        by_subject[item.subject].append(at)
        by_subject[item.subject.removeprefix("sub-")].append(at)
        for file in (item.source, item.name):
            by_path[file] = by_path[split_name(file)[0]] = at
            name = file.rpartition("/")[2]
            by_name[name].add(at)
            by_name[split_name(name)[0]].add(at)
    direct: dict[int, Row] = {}
    through: dict[int, Row] = {}
    strangers = []
    for row in rows:
        files = {by_path[row.key]} if row.key in by_path else by_name.get(row.key, set())
        if len(files) > 1 and row.key not in by_subject:
            raise ConfigError(
                f"subject_table {path}",
                expected=f"one file called {row.key}",
                found=f"{len(files)}",
                remedy="give the path below the ingested folder",
            )
        if len(files) == 1:
            direct[min(files)] = row
        for at in by_subject.get(row.key, ()):
            through[at] = row
        if not files and row.key not in by_subject:
            strangers.append(row.key)
    if items and not direct and not through:
        raise ConfigError(
            f"subject_table {path}",
            expected="names of files or subjects that are here",
            found=f"none, the first is {rows[0].key}" if rows else "no rows",
            remedy=f"the first file here is {items[0].source}",
        )
    people: defaultdict[str, set[str]] = defaultdict(set)
    for at, row in direct.items():
        people[items[at].subject].add(row.person)
    out, unnamed = [], []
    for at, item in enumerate(items):
        row_of = direct.get(at) or through.get(at)
        shared = people[item.subject]
        if row_of is not None:
            columns = dict(through[at].columns if at in through else ()) | dict(row_of.columns)
            out.append(replace(item, subject=row_of.person, columns=tuple(columns.items())))
        elif len(shared) == 1:
            out.append(replace(item, subject=min(shared)))
        else:
            out.append(item)
            unnamed.append(item.source)
    notes = []
    disputed = [row for row in rows if row.disputed]
    if disputed:
        columns_ = sorted({name for row in disputed for name in row.disputed})
        notes.append(
            f"{len(disputed)} names have several rows in subject_table that say different things under "
            f"{_listing(columns_)}, which are left out for them, such as {disputed[0].key}"
        )
    if strangers:
        notes.append(f"{len(strangers)} rows of subject_table name nothing here: {_listing(strangers)}")
    if unnamed:
        notes.append(f"{len(unnamed)} volumes are not in subject_table and keep the subject of their name")
    return out, tuple(notes)


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:_EXAMPLES]) + (f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else "")


def with_columns(notes: Sequence[str], columns: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The notes of a volume with the columns of the table of this run, and of no earlier one."""
    own = (note for note in notes if not note.startswith(COLUMN_NOTE))
    return (*own, *(f"{COLUMN_NOTE}{name}={value}" for name, value in columns))
