"""What a folder holds: volumes, their labels, whose they are, and what has no counterpart.

Which files are volumes is said here; `pairing` says which is a label map of which, `names` what names mean. Trees of
DICOM files, with or without extension or DICOMDIR, are one item a series.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from storage.errors import ConfigError, RefusedInput
from storage.ingest.items import Discovery, IngestItem, Orphan
from storage.ingest.names.pairing import paired
from storage.ingest.names.subjects import subjects_by_name
from storage.ingest.names.table import read_table, with_people
from storage.ingest.readers.registry import FORMATS, is_volume_folder, split_name

_FIRST_FOLDER = "^([^/]+)"


def discover(
    src: str | os.PathLike[str], subject_pattern: str | None = None, subject_table: str | None = None
) -> Discovery:
    """Find the volumes under `src`.

    Args:
        src: A folder, or one volume file.
        subject_pattern: Regular expression searched in the path relative to `src`; its first group (or whole match) is
            the subject. By default scans whose names share a stem are of one (`names.subjects`). DICOM uses its
            PatientID where it has one.
        subject_table: Path of a table that says whose the scans are (`names.table`), absolute or relative to `src`.

    Raises:
        ConfigError: `src` does not exist, the pattern is no regular expression, or the table cannot be followed.
        RefusedInput: nothing in it is a volume that can be told from others.
    """
    root = Path(src).expanduser()
    if not root.exists():
        raise ConfigError(
            str(src), expected="a folder of volumes", found="no such file or folder", remedy="check the path"
        )
    try:
        pattern = re.compile(subject_pattern) if subject_pattern else None
    except re.error as error:
        raise ConfigError(
            "subject_pattern", expected="a regular expression", found=f"{subject_pattern!r}: {error}"
        ) from error
    files = [root] if root.is_file() or is_volume_folder(root.name) else list(_walk(root))
    top = root.parent if files == [root] else root
    plain: list[Path] = []
    unknown: list[Path] = []
    for path in files:
        (plain if split_name(path.name)[1] else unknown).append(path)
    headers = {path.parent / split_name(path.name)[0] for path in plain}
    rest = [path for path in unknown if not _is_pixel_part(path, headers)]
    pairing = paired(plain, top)
    items, orphans = list(pairing.items), list(pairing.orphans)
    for form in FORMATS:
        if rest and not form.suffixes:
            grouping = form.reader.group(rest, top)
            items += grouping.items
            orphans += grouping.orphans
            rest = grouping.rest
    ignored = [str(path.relative_to(top)) for path in rest]
    if not items:
        raise _nothing(str(src), len(files), [*pairing.refused, *orphans])
    items, notes = _with_subjects(items, pattern, top)
    if subject_table is not None:
        table = top / Path(subject_table).expanduser()
        items, more = with_people(items, read_table(table), table)
        notes += more
    items = [replace(i, name=legible(i.name), source=legible(i.source), subject=legible(i.subject)) for i in items]
    return Discovery(
        str(top),
        tuple(sorted(_unique(items), key=lambda item: item.name)),
        tuple(Orphan(legible(o.source), legible(o.what)) for o in sorted(orphans, key=lambda o: o.source)),
        tuple(legible(path) for path in sorted(ignored)),
        tuple(Orphan(legible(o.source), legible(o.what)) for o in sorted(pairing.refused, key=lambda o: o.source)),
        tuple(legible(note) for note in notes),
    )


def _nothing(src: str, files: int, leftover: list[Orphan]) -> RefusedInput:
    *titles, last = (form.title for form in FORMATS)
    examples = "; ".join(str(orphan) for orphan in leftover[:3])
    return RefusedInput(
        src,
        expected=f"volumes as {', '.join(titles)} or {last}",
        found="an empty folder"
        if not files
        else f"{files} files, none of them an image volume" + (f" that can be used: {examples}" if leftover else ""),
        remedy="give the folder that holds images/ and, where there are any, labels/",
    )


def _with_subjects(
    items: list[IngestItem], pattern: re.Pattern[str] | None, top: Path
) -> tuple[list[IngestItem], tuple[str, ...]]:
    """The items with the subjects that a pattern or their names give; formats with patients in their headers have them.

    Raises:
        ConfigError: a path does not match the pattern.
    """
    spelling: dict[str, str] = {}
    for subject in sorted({i.subject for i in items if i.subject and not _is_nobodys(i)}):
        spelling.setdefault(subject.casefold(), subject)
    items = [replace(i, subject=spelling.get(i.subject.casefold(), i.subject)) for i in items]
    if pattern is not None:
        nameless = [not i.subject or _is_nobodys(i) for i in items]
        return [
            replace(i, subject=_match(i.source, pattern)) if own else i for i, own in zip(items, nameless, strict=True)
        ], ()
    notes = []
    studies = {i.subject for i in items if _is_nobodys(i)}
    if len(studies) > 1:
        notes.append(
            f"series of {len(studies)} studies have no patient id, and each study counts as another subject: if one "
            f"person has several, set subject_pattern, such as '{_FIRST_FOLDER}', or a subject_table, or it may be in "
            "training and test"
        )
    subjects = subjects_by_name([i.name for i in items if not i.subject], top.absolute().name)
    items = [i if i.subject else replace(i, subject=subjects.of[i.name]) for i in items]
    return items, (*subjects.notes, *notes)


def _is_nobodys(item: IngestItem) -> bool:
    """Whether a series of files that say whose they are has no patient: its study or itself stands for one."""
    return bool(item.series) and item.subject in (item.study, item.series)


def _match(source: str, pattern: re.Pattern[str]) -> str:
    match = pattern.search(source)
    if match is None:
        raise ConfigError(
            source,
            expected=f"a path that matches subject_pattern {pattern.pattern!r}",
            found="no match",
            remedy="correct the pattern, or leave it out and the file's name says whose it is",
        )
    return match[1] if pattern.groups and match[1] is not None else match[0]


def legible(text: str) -> str:
    """A text with file names in it that can be written: bytes that are no UTF-8 are spelt out."""
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _walk(root: Path) -> Iterable[Path]:
    """Files and folders that are volumes below `root`, hidden ones left out, in a stable order."""

    def failed(error: OSError) -> None:  # else what it holds would be missing without a word
        raise RefusedInput(
            str(error.filename),
            expected="a readable folder",
            found=error.strerror or type(error).__name__,
            remedy="make it readable, or give the folder that holds the scans alone",
        ) from error

    for folder_path, folders, names in os.walk(root, onerror=failed, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not _is_loop(Path(folder_path, f)))
        for folder in [f for f in folders if is_volume_folder(f)]:
            folders.remove(folder)
            yield Path(folder_path, folder)
        yield from (Path(folder_path, name) for name in sorted(names) if not name.startswith("."))


def _is_loop(folder: Path) -> bool:
    """Whether it is a link to a folder on the way to it, whose files would be found again and again."""
    if not folder.is_symlink():
        return False
    target = folder.resolve()
    return any(above.resolve().is_relative_to(target) for above in folder.parents)


def _is_pixel_part(path: Path, headers: set[Path]) -> bool:
    """Whether the file is the pixel half of a header that is read: `.hdr` + `.img`, `.mhd` or `.nhdr` + `.raw`."""
    name = path.name.removesuffix(".gz")
    stem, dot, end = name.rpartition(".")
    return bool(dot) and end.lower() in ("img", "raw", "zraw", "bin") and path.parent / stem in headers


def _unique(items: list[IngestItem]) -> list[IngestItem]:
    """Give items of equal name (a NIfTI and a DICOM series in one folder, say) a name each, by their source."""
    counts: Counter[str] = Counter()
    out = []
    for item in sorted(items, key=lambda i: (i.name, i.source, i.series)):
        counts[item.name] += 1
        count = counts[item.name]
        out.append(item if count == 1 else replace(item, name=f"{item.name}~{count}"))
    return out
