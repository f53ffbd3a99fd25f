"""Whose a scan is, as far as its name says: scans that share a stem are of one person.

What is left out of a name is what tells scans of a person apart: frames, visits, dates, sides, series (see `words`),
words behind the number that names the person, and a small number at the end of several such names. Where nothing is
left, the folder names the person. In doubt scans are put together, for two people that count as one cost a few
subjects, and one that counts as two is in training and test. What was in doubt is said, with a pattern that decides it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from storage.ingest.names.people import (
    A_FEW,
    Paths,
    before_date,
    below_people,
    kinds_of_folders,
    known_person,
    with_folders_that_names_repeat,
)
from storage.ingest.names.words import Word, joined, key_of, person_end, visit_number, words_of

LEAST_PERSON = 100
"""No visit has so high a number: where nothing else names anybody, it is a person's. Our choice."""
_UID = re.compile(r"\d+(\.\d+){3,}")
EACH_FILE = "([^/.]+)[^/]*$"
EACH_FOLDER = "([^/]+)/[^/]*$"
_BEFORE_NUMBER = "([^/]*?)[-_. ][0-9]+[.][^/]*$"


@dataclass(frozen=True, slots=True)
class Subjects:
    """Subjects by the names of volumes, and what was in doubt."""

    of: dict[str, str]
    notes: tuple[str, ...]


def subjects_by_name(names: Sequence[str], top: str) -> Subjects:
    """The subject of each volume.

    Args:
        names: Relative paths without suffix and without folders such as `images`; unique.
        top: Name of the ingested folder: the person, where all names say nothing but which series they are.
    """
    out: dict[str, str] = {}
    notes: list[str] = []
    paths: Paths = {}
    spelling: dict[tuple[str, ...], str] = {}
    for name in names:
        if person := known_person(name):
            out[name] = spelling.setdefault((person.lower(),), person)
        else:
            paths[name] = before_date(tuple(name.split("/")))
    kinds = kinds_of_folders(paths)
    paths = {name: _identity(path, kinds) for name, path in paths.items()}
    paths |= _numbered_people(paths)
    paths = with_folders_that_names_repeat(paths, notes)
    for name, path in _folders_first(paths, kinds, notes).items():
        paths[name] = path
    paths = below_people(paths)
    cores = {name: _core(path[-1]) if path else () for name, path in paths.items()}
    cores = _numbered(paths, cores)
    cores = _without_giants(paths, cores, notes)
    cores = _without_numbers(paths, cores, notes)
    cores = _without_numbers(paths, cores, notes)  # as of `1001_2_1`, a visit and a scan
    for name in sorted(paths):
        path, core = paths[name], cores[name]
        if not path:
            out[name] = top if len(paths) > 1 else name
            continue
        folders = tuple(s for s in path[:-1] if not all(w.may_qualify for w in words_of(s)))
        if folders and key_of(_core(folders[-1])) == key_of(core):
            folders = folders[:-1]
        text = joined(core) if core and len(core) < len(words_of(path[-1])) else path[-1]
        key = (*(s.lower() for s in folders), key_of(core) or path[-1].lower())
        out[name] = spelling.setdefault(key, "/".join((*folders, text)))
    notes += _suspicions(out)
    return Subjects(out, tuple(notes))


def _identity(path: tuple[str, ...], kinds: Collection[str]) -> tuple[str, ...]:
    """The path up to the segment that names the person; empty where nothing does.

    Args:
        path: Of a file or a folder.
        kinds: Names of folders, in lower case, that say what lies in them.
    """
    last = len(path) - 1
    for at in range(last - 1, -1, -1):
        words = words_of(path[at])
        # A folder that is called a person's holds that person, unless the file names another one.
        if person_end(words) and not person_end(words_of(path[last])):
            return path[: at + 1]
    whole = len(path)
    while path and (
        all(word.qualifies for word in words_of(path[-1])) or (1 < len(path) < whole and path[-1].lower() in kinds)
    ):
        path = path[:-1]
    return path


def _numbered_people(paths: Paths) -> Paths:
    """Paths of names such as `followup_1009` that end in a person's number: one that another file of the folder has
    behind something else, as `visit1_1009`, or, where nothing else names anybody, one that no visit has.
    """
    people = {(path[:-1], joined(core)) for path in paths.values() if path and len(core := _core(path[-1])) == 1}
    out = {}
    for name, path in paths.items():
        *folders, last = name.split("/")
        number = visit_number(words_of(last)) if len(path) <= len(folders) else ""
        if number and ((tuple(folders), number) in people or (not path and int(number) >= LEAST_PERSON)):
            out[name] = (*folders, number)
    return out


def _folders_first(paths: Paths, kinds: Collection[str], notes: list[str]) -> Paths:
    """Paths cut to their folder where several folders hold files of the same few names: series of a person each."""
    inside: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, path in paths.items():
        if len(path) > 1 and len(path) == name.count("/") + 1:
            inside[path[:-1]].append(name)
    people = {folder: names for folder, names in inside.items() if len(names) <= A_FEW and _names_people(folder)}
    folders_of: Counter[str] = Counter(_series_key(paths[name][-1]) for names in people.values() for name in names)
    out: Paths = {}
    doubtful = []
    for folder, names in people.items():
        words = [words_of(paths[name][-1]) for name in names]
        weak = all(all(word.may_qualify for word in one) for one in words)
        again = all(folders_of[_series_key(paths[name][-1])] > 1 for name in names)
        numbers = all(one[-1:] and one[-1].text.isdigit() and int(one[-1].text) <= A_FEW for one in words)
        if any(person_end(one) for one in words):
            continue
        if weak or (len(people) > 1 and (again or (numbers and all(len(one) == 1 for one in words)))):
            out.update(dict.fromkeys(names, _identity((*folder, ""), kinds)))
            if len(names) > 1 and not (weak and any(word.numbered for word in words_of(folder[-1]))):
                doubtful.append(names[0])
    if doubtful:
        notes.append(
            f"folders with the same few names in each are taken for a person each, {len(doubtful)} of them with "
            f"several scans, such as {_folder(doubtful[0])}: if their files are different people, set "
            f"subject_pattern='{EACH_FILE}' or a subject_table"
        )
    return out


def _names_people(folder: tuple[str, ...]) -> bool:
    path = _identity(folder, ())
    if not path:
        return False
    words = words_of(path[-1])
    numbers = {at for at in range(1, len(words)) if words[at].text.isdigit() and words[at - 1].groups}  # `Batch 1`
    return not all(word.groups or word.may_qualify or at in numbers for at, word in enumerate(words))


def _series_key(segment: str) -> str:
    return key_of(words_of(segment))


def _core(segment: str) -> tuple[Word, ...]:
    """The words that name the person."""
    words = words_of(segment)
    if _UID.fullmatch(segment):
        return words
    rest = tuple(word for word in words if not word.qualifies)
    sure = tuple(word for word in rest if not word.may_qualify)
    rest = sure or rest
    if not rest:
        rest = tuple(word for word in words if not word.qualifies) or words
    if end := person_end(rest):
        return rest[:end]
    numbered = [at for at, word in enumerate(rest) if word.numbered]
    return rest[: numbered[-1] + 1] if numbered else rest


def _numbered(paths: Paths, cores: dict[str, tuple[Word, ...]]) -> dict[str, tuple[Word, ...]]:
    """With the number of `scan_1_abdomen` and `scan_2_abdomen`, where the word behind it is the same in all."""
    whole: dict[str, tuple[Word, ...]] = {}
    for name, core in cores.items():
        words = tuple(word for word in words_of(paths[name][-1]) if not word.qualifies) if paths[name] else ()
        if len(words) > len(core) and not any(w.numbered for w in core) and words[0].numbered:
            whole[name] = words
    if len(whole) == len(cores) and len({key_of(cores[name]) for name in whole}) == 1:
        return cores | whole
    return cores


def _without_giants(paths: Paths, cores: dict[str, tuple[Word, ...]], notes: list[str]) -> dict[str, tuple[Word, ...]]:
    """Words behind a number tell people apart where too many share the number, as in `study1_smith`."""
    members: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, core in cores.items():
        if paths[name] and not person_end(core):
            members[(*paths[name][:-1], key_of(core))].append(name)
    out = dict(cores)
    for names in members.values():
        whole = {name: tuple(w for w in words_of(paths[name][-1]) if not w.qualifies) for name in names}
        dropped = {key_of(words[len(cores[name]) :]) for name, words in whole.items()}
        if len(names) > A_FEW and len(dropped) > A_FEW:
            out.update(whole)
            notes.append(
                f"{len(names)} names begin like {joined(cores[names[0]])} and count as different subjects, such as "
                f"{names[0]}: if they are one person's, set subject_pattern or a subject_table"
            )
    return out


def _without_numbers(paths: Paths, cores: dict[str, tuple[Word, ...]], notes: list[str]) -> dict[str, tuple[Word, ...]]:
    """A number at the end counts scans of a person where it is small, or one of few, behind other numbers."""
    shapes: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, core in cores.items():
        numbers = [word for word in core if word.numbered]
        if (
            len(numbers) > 1
            and core[-1].number is not None
            and not person_end(core)
            and not _UID.fullmatch(joined(core))
        ):
            shape = tuple("#" if w.text.isdigit() else (w.number or (w.text.lower(), ""))[0] for w in core)
            shapes[(*paths[name][:-1], *shape)].append(name)
    out = dict(cores)
    doubtful: list[str] = []
    for names in shapes.values():
        ends = [cores[name][-1].number or ("", "0") for name in names]
        stems = Counter(key_of(cores[name][:-1]) for name in names)
        values = {end[1] for end in ends}
        small = all(len(value) <= 3 and int(value) <= A_FEW for value in values)
        if len(stems) == 1 and len(names) > 1:
            counts_scans = small and all(len(value) < 3 for value in values)
        else:  # patients of few centres have numbers of four digits too, and there are more of them than of centres
            few = len(values) <= len(stems) and all(int(value) <= A_FEW for value in values)
            counts_scans = small or few or 2 * len(values) <= len(stems)
        if all(_places_only(cores[name][:-1]) for name in names):
            counts_scans = False
        if counts_scans:
            out.update({name: cores[name][:-1] for name in names})
            doubtful += [name for name in names if stems[key_of(cores[name][:-1])] > 1]
    if doubtful:
        notes.append(
            f"the number at the end of {len(doubtful)} names is taken to count scans of one person, such as "
            f"{', '.join(doubtful[:2])}: if they are different people, set subject_pattern='{EACH_FILE}' or a "
            "subject_table"
        )
    return out


def _places_only(words: Iterable[Word]) -> bool:
    return all(word.places or word.text.isalpha() for word in words)


def _suspicions(subjects: dict[str, str]) -> list[str]:
    """What may be one person's and counts as different ones: folders of a few, names that differ in a number."""
    notes = []
    alone = [name for name, count in Counter(subjects.values()).items() if count == 1]
    single = set(alone)
    folders: defaultdict[str, list[str]] = defaultdict(list)
    stems: defaultdict[str, list[str]] = defaultdict(list)
    for name, subject in subjects.items():
        if subject not in single:
            continue
        if "/" in name:
            folders[_folder(name)].append(name)
        core = words_of(subject.rpartition("/")[2])
        if len(core) == 2 and core[0].text.isalpha() and _counts(core[1].text) and not person_end(core):
            stems[core[0].text.lower()].append(name)
    spread: defaultdict[str, set[str]] = defaultdict(set)
    for subject in set(subjects.values()):
        spread[subject.rpartition("/")[2].lower()].add(subject)
    again = sorted(name for name, people in spread.items() if len(people) > 1)
    if again:
        first, second = sorted(spread[again[0]])[:2]
        notes.append(
            f"{len(again)} names are in several folders and count as different subjects there, such as {first} and "
            f"{second}: if they are one person, set subject_pattern='{EACH_FILE}' or a subject_table, or it may be in "
            "training and test"
        )
    several = {folder: names for folder, names in folders.items() if len(names) > 1}
    if len(several) >= 2 and max(map(len, several.values())) <= A_FEW:
        folder, names = min(several.items())
        notes.append(
            f"{len(several)} folders hold several volumes that count as different subjects, such as {folder} with "
            f"{len(names)}: if a folder is one person's, set subject_pattern='{EACH_FOLDER}' or a subject_table, or it "
            "may be in training and test"
        )
    counted = {stem: names for stem, names in stems.items() if len(names) > 1}
    if len(counted) >= 2 and max(map(len, counted.values())) <= A_FEW:
        stem, names = min(counted.items())
        notes.append(
            f"names that differ in a number alone count as different subjects, such as {', '.join(names[:2])}: if "
            f"{stem} is one person, set subject_pattern='{_BEFORE_NUMBER}' or a subject_table"
        )
    return notes


def _counts(text: str) -> bool:
    return text.isdigit() and not text.startswith("0") and int(text) <= A_FEW


def _folder(name: str) -> str:
    return name.rpartition("/")[0]
