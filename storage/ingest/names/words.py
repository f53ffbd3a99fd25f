"""Words of file names that tell scans of one person apart, and words that name people. Lists are our choice."""

import re
from dataclasses import dataclass
from functools import lru_cache

_COUNTED = (
    "frame|fr|visit|vis|session|sess|ses|timepoint|time|tp|followup|fu|day|week|month|year|run|rep|repeat|retest|echo|"
    "phase|te|ti"
)
"""What a number follows, as in `visit_2`."""
_WHEN = (
    "baseline|bl|follow|up|pre|post|preop|postop|intraop|date|ed|es|diastole|systole|insp|exp|inspiration|expiration|"
    "inhale|exhale|rest|stress|breathhold"
)
_SIDE = "left|right|lt|rt|lh|rh|bilateral|side|hemi|od|os|sin|dex"
_SERIES = (
    "t1|t2|t1w|t2w|t1c|t1ce|t1gd|t1n|t2f|t2fs|t2star|pd|pdw|flair|dwi|adc|swi|dti|dsc|dce|asl|bold|func|anat|cbf|cbv|"
    "mtt|tmax|ttp|tof|mra|mprage|mp2rage|spgr|stir|ct|cta|ctp|cect|ncct|cbct|ldct|hrct|pet|suv|mr|mri|spect|fdg|hbv|"
    "axial|ax|coronal|cor|sagittal|sag|tra|transverse|contrast|noncontrast|ce|gd|plain|arterial|venous|portal|delayed|"
    "water|fat|inphase|outphase|opp|mag|magnitude|real|imag|2d|3d|4d|3dct|4dct|4dmr|orig|raw|resampled|reg|registered|"
    "norm|normalized|n4|stripped|bet|preproc|processed|cropped|defaced|denoised|mpr"
)
_PLAIN = "scans?|series|image|img|imaging|volume|vol|acq|acquisition|rec|recon|study|exam"
_PERSON = "patient|pat|pt|subject|subj|sub|sbj|case|person|pid|id|participant|proband|p"
_PLACE = "site|center|centre|hospital|fold|batch|group|cohort|dataset|set"
_GROUP = f"{_PLACE}|data|train|training|tr|test|testing|ts|val|validation|part|release"

_I = re.IGNORECASE
_QUALIFIER = re.compile(rf"(?:{_COUNTED}|{_WHEN}|{_SIDE}|[lr])(?:[-_. ]?\d+)?|{_SERIES}", _I)
_WEAK = re.compile(rf"(?:{_PLAIN})(?:[-_. ]?\d+)?|[vtmwyd]\d{{1,5}}", _I)
_BEFORE_NUMBER = re.compile(rf"{_COUNTED}|{_PLAIN}", _I)
_PERSON_NUMBER = re.compile(rf"(?:{_PERSON})\d+", _I)
_PERSON_WORD = re.compile(_PERSON, _I)
_PLACE_WORD = re.compile(rf"(?:{_PLACE})(?:\d+|[a-z])?|[a-z]+(?:19|20)\d\d", _I)
_GROUP_WORD = re.compile(rf"(?:{_GROUP})(?:\d+|[a-z])?", _I)
_DATE = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d[-_.]?(?:0[1-9]|1[0-2])[-_.]?(?:0[1-9]|[12]\d|3[01])"
    r"|(?:0[1-9]|[12]\d|3[01])[-_.](?:0[1-9]|[12]\d|3[01])[-_.](?:19|20)\d\d)(?!\d)"  # month or day first
)
_AFTER_NUMBER = re.compile(rf"([A-Za-z]*\d+)((?:{_COUNTED}|{_WHEN}|{_SIDE}|{_SERIES}|{_PLAIN}|[vtmwy](?=\d))\d*)", _I)
_AFTER_LOWER = re.compile(r"(.*[a-z])([A-Z][A-Za-z]+\d*)")
_LETTER = re.compile(r"([A-Za-z]*\d+)([A-Za-z])")
_NUMBER = re.compile(r"([A-Za-z]*)(\d+)")


_VISIT_NUMBER = re.compile(
    r"(?:visit|vis|session|sess|ses|timepoint|tp|followup|fu|run|rep|repeat|retest)[-_. ](\d+)", _I
)


@dataclass(frozen=True, slots=True)
class Word:
    """A part of a name, with what stands before it."""

    before: str
    text: str

    @property
    def qualifies(self) -> bool:
        """Whether it says when, which side or which series, whatever the name."""
        return bool(_QUALIFIER.fullmatch(self.text) or _DATE.fullmatch(self.text))

    @property
    def may_qualify(self) -> bool:
        """Whether it does where something else names the person: `scan_2`, `v1`."""
        return self.qualifies or bool(_WEAK.fullmatch(self.text))

    @property
    def numbered(self) -> bool:
        """Whether it holds a digit."""
        return any(c.isdigit() for c in self.text)

    @property
    def groups(self) -> bool:
        """Whether it names a part of a data set, as `train` or `site2`."""
        return bool(_GROUP_WORD.fullmatch(self.text))

    @property
    def places(self) -> bool:
        """Whether it names where many people were scanned, so that a number behind it is a person's."""
        return bool(_PLACE_WORD.fullmatch(self.text))

    @property
    def number(self) -> tuple[str, str] | None:
        """Letters and digits of a word that is nothing else."""
        match = _NUMBER.fullmatch(self.text)
        return (match[1].lower(), match[2]) if match else None


@lru_cache(maxsize=1 << 16)  # each folder is asked about for each of its files, and each name several times
def words_of(name: str) -> tuple[Word, ...]:
    """The words of one path segment.

    >>> [word.text for word in words_of("patient001_frame01-Left")]
    ['patient001', 'frame01', 'Left']
    """
    out: list[Word] = []
    at = 0
    dates = {match.start(): match for match in _DATE.finditer(name)}
    while at < len(name):
        start = at
        while at < len(name) and at not in dates and (name[at] == "_" or not name[at].isalnum()):
            at += 1
        before, begin = name[start:at], at
        if at in dates:
            at = dates[at].end()
            out.append(Word(before, name[begin:at]))
            continue
        while at < len(name) and name[at] != "_" and name[at].isalnum() and (at == begin or at not in dates):
            at += 1
        if at > begin:
            parts = _parts(name[begin:at])
            out.append(Word(before, parts[0]))
            out += [Word("", part) for part in parts[1:]]
    return _counted(out)


def _counted(words: list[Word]) -> tuple[Word, ...]:
    """Words with the number that belongs to them: `visit` and `2` are one."""
    out: list[Word] = []
    for word in words:
        if out and word.text.isdigit() and not _DATE.fullmatch(word.text) and _BEFORE_NUMBER.fullmatch(out[-1].text):
            out[-1] = Word(out[-1].before, f"{out[-1].text}{word.before}{word.text}")
        else:
            out.append(word)
    return tuple(out)


def _parts(text: str) -> list[str]:
    """Words that are written together: `p1left`, `kneeLeft`, `P001v2`, `12R`."""
    if _QUALIFIER.fullmatch(text) or _WEAK.fullmatch(text) or _DATE.fullmatch(text):
        return [text]
    if match := _AFTER_NUMBER.fullmatch(text):
        return [match[1], match[2]]
    if (match := _AFTER_LOWER.fullmatch(text)) and _QUALIFIER.fullmatch(match[2]):
        return [match[1], match[2]]
    if match := _LETTER.fullmatch(text):
        return [match[1], match[2]]
    return [text]


def person_end(words: tuple[Word, ...]) -> int:
    """How many words name a person who is called so, as in `site2_patient001_x`; 0 where none is."""
    for at, word in enumerate(words):
        if _PERSON_NUMBER.fullmatch(word.text):
            return at + 1
        following = words[at + 1] if at + 1 < len(words) else None
        if following is not None and _PERSON_WORD.fullmatch(word.text) and following.text.isdigit():
            return at + 2
    return 0


def visit_number(words: tuple[Word, ...]) -> str:
    """The number of the last word such as `followup_1009`, which may be a person's; empty where there is none."""
    numbers = [match[1] for word in words if (match := _VISIT_NUMBER.fullmatch(word.text))]
    return numbers[-1] if numbers else ""


def begins_with_date(segment: str) -> bool:
    """Whether a path segment says first when, as `08-13-2005-NA-PET-CT-56839` and `2006-04-18_08_20_30.0`."""
    return bool(_DATE.match(segment))


def joined(words: tuple[Word, ...]) -> str:
    """The words as they are written, from the first one on."""
    return "".join(word.text if at == 0 else word.before + word.text for at, word in enumerate(words))


def key_of(words: tuple[Word, ...]) -> str:
    """The same for names that differ in case and separators."""
    return "_".join(word.text for word in words).lower()
