"""Which files are label maps, and of which image, by the names of public layouts.

A label map has a word of its own in its name (`segmentation-3`, `mask_p1`, `p1_gt`, `label0001`) or lies in a folder of
such a name. What is left of the name is its image's, give or take a word that says image (`volume-3`, `img0001`).
In BIDS a map has the entities of its image and some of its own.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath

_IMAGE = r"image|img|imaging|volume|vol|scan"
_LABEL = (
    r"label|lbl|mask|msk|seg|segm|segmentation|labelmap|dseg|probseg|gt|groundtruth|truth|annotation|delineation|tissuemap|"
    r"brainmask|lesionmask|manualmask"
)
_LABEL_AT_END = r"manual|tissue|aseg|aparc|wmparc|parc|parcellation|pveseg|ground"
_LABEL_OF_IMAGE = r"lesion|tumou?r|roi|contour|atlas|reference|outline|liver|organ"
_PART = "training|train|testing|test|validation|valid|val|va|tr|ts"


def _folder(words: str) -> re.Pattern[str]:
    """Folders such as `imagesTr`, `labels_val` and `TrainingImg`; their part of the data is `part` or `before`."""
    return re.compile(rf"^(?:(?:{words})s?(?:[-_ ]?(?P<part>{_PART}))?|(?P<before>{_PART})[-_ ]?(?:{words})s?)$", re.I)


IMAGE_FOLDER = _folder("image|img")
_LABEL_FOLDER = _folder(rf"{_LABEL}|ground|manual|annot|parcellation|contour")
_TARGETS = re.compile(r"^targets?(?P<part>Tr|Ts|Val)?(?P<before>)$", re.IGNORECASE)
_GROUND_TRUTH = re.compile(r"ground[-_. ]truth", re.IGNORECASE)
_WORD = re.compile(rf"(?:{_LABEL})s?", re.IGNORECASE)
_WORD_AT_END = re.compile(rf"(?:{_LABEL_AT_END})s?", re.IGNORECASE)
_WORD_OF_IMAGE = re.compile(rf"(?:{_LABEL_OF_IMAGE})s?", re.IGNORECASE)
_NUMBERED = re.compile(rf"(?:{_LABEL})s?(?P<base>\d+)", re.IGNORECASE)
_TOGETHER = re.compile(r"(?P<base>.*[a-z0-9])(?:Label|Labels|Mask|Seg|Segmentation|GT|GroundTruth|LabelMap)")
_IMAGE_BEFORE = re.compile(rf"^(?:{_IMAGE})s?(?:[-_. ]+|(?=\d|$))", re.IGNORECASE)
_IMAGE_AT_END = re.compile(r"^(?P<base>.+?)[-_. ](?:image|img)$", re.IGNORECASE)
_IMAGE_AFTER = re.compile(rf"(?:^|[-_. ]+)(?:{_IMAGE})s?$", re.IGNORECASE)
_OWN_ENTITY = re.compile(
    r"(?:label|desc|rater|seg|atlas|hemi)-.+|seg.*|[a-z]*seg|[a-z]*mask|msk|lesion.*|.*manual", re.IGNORECASE
)
_NATIVE = ("orig", "native", "individual", "scanner", "other")


def role_of(folder: PurePosixPath) -> tuple[str, str, str]:
    """Where a folder's files belong, which part of the data (Tr, Ts, Val) they are, and whether they are images."""
    parts = list(folder.parts)
    for at in range(len(parts) - 1, -1, -1):
        name = _GROUND_TRUTH.sub("groundtruth", parts[at])
        for pattern, role in ((IMAGE_FOLDER, "image"), (_LABEL_FOLDER, "label"), (_TARGETS, "label")):
            if match := pattern.match(name):
                return "/".join([*parts[:at], *parts[at + 1 :]]), _part(match["part"] or match["before"] or ""), role
    return "/".join(parts), "", ""


def _part(word: str) -> str:
    """The same word for `Tr` and `training`, `Ts` and `test`, `Va` and `val`."""
    return {"tr": "Tr", "te": "Ts", "ts": "Ts", "va": "Val"}.get(word.lower()[:2], "")


def label_base(stem: str) -> str | None:
    """What the name of a label map says beside that it is one; None for a name that does not say so.

    >>> label_base("segmentation-3"), label_base("p1_gt"), label_base("label0001"), label_base("mask"), label_base("p1")
    ('3', 'p1', '0001', '', None)
    """
    if is_bids(stem) and any(word.startswith("label-") for word in stem.split("_")[1:]):
        return "_".join(word for word in stem.split("_") if not _OWN_ENTITY.fullmatch(word))
    words = re.split(r"([-_. ]+)", _GROUND_TRUTH.sub("groundtruth", stem))
    for at in range(len(words) - 1, -1, -2):
        if _WORD.fullmatch(words[at]) or (at == len(words) - 1 and at > 0 and _WORD_AT_END.fullmatch(words[at])):
            return "".join(words[: at - 1] + words[at + 1 :]) if at else "".join(words[2:])
    match = _NUMBERED.fullmatch(stem) or _TOGETHER.fullmatch(stem)
    return match["base"] if match else None


def base_if_beside(stem: str, images: Collection[str]) -> str | None:
    """The same for words that make a label map only of a file beside its image, as `p1_lesion` beside `p1`."""
    base = re.match(r"^(?P<base>.+?)[-_. ](?P<word>[A-Za-z]+)$", stem)
    if base and _WORD_OF_IMAGE.fullmatch(base["word"]) and base["base"] in images:
        return base["base"]
    return None


def image_base(stem: str) -> str:
    """The name of an image without a word at its end that says so, which is how its label map may be called."""
    match = _IMAGE_AT_END.match(stem)
    return match["base"] if match else stem


def bare(stem: str) -> str:
    """The name of an image without any word that says so; empty where it is nothing else."""
    return _IMAGE_AFTER.sub("", _IMAGE_BEFORE.sub("", stem)).lower()


def is_bids(stem: str) -> bool:
    """Whether a name has BIDS entities."""
    return stem.startswith("sub-")


def session_of(source: str) -> str:
    """Participant and session of a BIDS path; empty where it has no session."""
    match = re.search(r"(?:^|/)(sub-[A-Za-z0-9]+)/(?:.*/)?(ses-[A-Za-z0-9]+)/", source)
    match = match or re.search(r"(?:^|/)(sub-[A-Za-z0-9]+)_(ses-[A-Za-z0-9]+)_[^/]*$", source)
    return f"{match[1]}/{match[2]}" if match else ""


def image_by_entities(label: str, images: Sequence[str]) -> str | None:
    """The image whose entities a label map has, among stems or paths of images; None where none or several have.

    >>> image_by_entities("sub-1_T2w_label-SC_mask", ["sub-1_T1w", "sub-1_T2w", "sub-2_T2w"])
    'sub-1_T2w'
    """
    own = label.split("_")
    words = {word for word in own if not _OWN_ENTITY.fullmatch(word)}
    for word in own:  # of `T2w-seg` or `T2w_seg-manual` the image's part
        words.add(word.split("-")[0] if word.split("-")[0].endswith("w") else word)
    space = next((word[6:] for word in own if word.startswith("space-")), "")
    fits: list[tuple[int, str]] = []
    loose: list[str] = []
    for image in images:
        stem = PurePosixPath(image).name.split("_")
        if stem[0] != own[0] or (space and space not in (*_NATIVE, stem[-1]) and f"space-{space}" not in stem):
            continue
        if set(stem) <= words:
            fits.append((len(stem), image))
        elif set(stem[:-1]) <= words and not any(word.endswith("w") and "-" not in word for word in words):
            loose.append(image)
    longest = max((length for length, _ in fits), default=0)
    best = [image for length, image in fits if length == longest] or loose
    return best[0] if len(best) == 1 else None
