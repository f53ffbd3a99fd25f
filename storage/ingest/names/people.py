"""People that names say beyond doubt: identifiers of public archives, and folders that hold one person each."""

import re
from collections import Counter, defaultdict

from storage.ingest.names.words import begins_with_date, key_of, words_of

Paths = dict[str, tuple[str, ...]]
A_FEW = 20
"""Scans that one person may have."""
_BIDS = re.compile(r"(?:^|/)(sub-[A-Za-z0-9]+)")
_ARCHIVE = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?P<id>"
    r"\d{3}_S_\d{4,5}"  # ADNI
    r"|OAS[12]_\d{4}|OAS[34]\d{4}"  # OASIS
    r"|BraTS-[A-Z]{2,6}-\d{5}|UPENN-GBM-\d{5}|UCSF-PDGM-\d{4}"
    r"|TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}|C3[LN]-\d{5}"
    r"|LIDC-IDRI-\d{4}|ProstateX-\d{4}|PETCT_[0-9a-f]{10}"
    r")|(?P<biobank>\d{7})_2\d{4}_\d_\d"  # UK Biobank: person, field, visit, array
    r")(?![A-Za-z0-9])",
    re.IGNORECASE,
)
"""What names a person in the file names of a public archive. What follows it is a visit, a finding or a series."""


def known_person(name: str) -> str:
    """The person whom a path names as BIDS or a public archive does; empty where it does not.

    >>> known_person("ADNI/002_S_0295/2006-04-18/I118671/x"), known_person("BraTS-GLI-00002-001/t1c")
    ('002_S_0295', 'BraTS-GLI-00002')
    """
    if bids := _BIDS.search(name):
        return bids[1]
    match = _ARCHIVE.search(name)
    return (match["id"] or match["biobank"]) if match else ""


def before_date(path: tuple[str, ...]) -> tuple[str, ...]:
    """The path up to a folder that begins with a date, where the folder above it bears a number: one person's visit."""
    for at in range(1, len(path)):
        if begins_with_date(path[at]) and any(word.numbered for word in words_of(path[at - 1])):
            return path[:at]
    return path


def with_folders_that_names_repeat(paths: Paths, notes: list[str]) -> Paths:
    """Paths cut to a folder with a number whose whole name begins those of its files, as `10000/10000_1000001`.

    A folder of a whole data set is called so too: then it stands alone, or holds more names than a person has scans.
    """
    inside: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
    numbers: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
    others: set[tuple[str, ...]] = set()
    for path in paths.values():
        if len(path) < 2:
            continue
        folder, words = words_of(path[-2]), words_of(path[-1])
        repeats = key_of(words[: len(folder)]) == key_of(folder)
        if repeats and any(w.numbered for w in folder) and not all(w.places or w.text.isalpha() for w in folder):
            inside[path[:-1]].add(path[-1])
            rest = words[len(folder) :]
            numbers[path[:-1]].add(key_of(tuple(w for w in rest if w.numbered and not w.may_qualify)))
        else:
            others.add(path[:-1])
    beside = Counter(folder[:-1] for folder in inside)
    people = {f for f, names in inside.items() if len(names) <= A_FEW and beside[f[:-1]] > 1 and f not in others}
    doubtful = sorted(f for f in people if len(numbers[f]) > 1)
    if doubtful:
        notes.append(
            f"folders whose name begins the names of their files are taken for a person each, {len(doubtful)} of them "
            f"with several numbers, such as {'/'.join(doubtful[0])}: if their files are different people, set "
            "subject_pattern or a subject_table"
        )
    return {name: path[:-1] if path[:-1] in people else path for name, path in paths.items()}


def kinds_of_folders(paths: Paths) -> set[str]:
    """Names of folders that say what lies in them and not whose it is: without a number at the end, below several."""
    above: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for name in paths:
        folders = tuple(name.split("/")[:-1])
        for at in range(1, len(folders)):
            above[folders[at].lower()].add(folders[:at])
    return {name for name, parents in above.items() if len(parents) > 1 and words_of(name)[-1:] and _says_kind(name)}


def _says_kind(name: str) -> bool:
    return all(word.number is None or word.qualifies for word in words_of(name)[-1:])


def below_people(paths: Paths) -> Paths:
    """Paths cut to a folder above them that another scan shows to be a person's, with such folders beside it."""
    folders = {path for name, path in paths.items() if path and len(path) < name.count("/") + 1}
    beside = Counter(folder[:-1] for folder in folders)
    people = {folder for folder in folders if beside[folder[:-1]] > 1}
    out = {}
    for name, path in paths.items():
        segments = tuple(name.split("/"))
        ends = (at for at in range(1, len(path)) if segments[:at] in people)
        out[name] = path[: next(ends, len(path))]
    return out
