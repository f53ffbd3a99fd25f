"""What a folder holds: volumes, their labels, and what has no counterpart.

Images and labels are paired by name and never by position in a list. Three layouts are understood, mixed or nested too:

- sibling folders `images` and `labels` (also `imagesTr`/`labelsTr`, `imagesTs`/`labelsTs`, `masks`, `segmentations`);
- one folder where labels end in `_label`, `-seg`, `_mask` and the like, and images in nothing or `_image`;
- trees of DICOM files, with or without extension or DICOMDIR: one item a series.

`case_0000`, `case_0001` in an image folder are channels of one volume. They are volumes of their own where labels bear
such numbers too, or where nothing there is numbered 0000 and no label is named `case`. A label map inside an OME-Zarr
image is its label where it holds one and no file beside it is.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from storage.errors import ConfigError, RefusedInput
from storage.ingest.items import Discovery, IngestItem, Orphan
from storage.ingest.readers.registry import FORMATS, format_of, format_of_suffix, is_volume_folder, split_name

_IMAGE_FOLDER = re.compile(r"^(image|img)s?(?P<part>Tr|Ts|Val)?$", re.IGNORECASE)
_LABEL_FOLDER = re.compile(r"^(label|mask|seg|segmentation|labelmap)s?(?P<part>Tr|Ts|Val)?$", re.IGNORECASE)
_IMAGE_SUFFIX = re.compile(r"^(?P<base>.+?)[-_. ](image|img)$", re.IGNORECASE)
_LABEL_SUFFIX = re.compile(r"^(?P<base>.+?)[-_. ](label|labels|seg|mask|segmentation|labelmap|dseg)$", re.IGNORECASE)
_CHANNEL = re.compile(r"^(?P<base>.+)_(?P<channel>\d{4})$")
_BIDS_SUBJECT = re.compile(r"(?:^|/)(sub-[A-Za-z0-9]+)")


@dataclass(slots=True)
class _Case:
    """Files that share a pairing key."""

    images: dict[str, str] = field(default_factory=dict)
    label: str | None = None
    kind: str = ""


def discover(src: str | os.PathLike[str], subject_pattern: str | None = None) -> Discovery:
    """Find the volumes under `src`.

    Args:
        src: A folder, or one volume file.
        subject_pattern: Regular expression searched in the path relative to `src`; its first group (or whole match) is
            the subject. By default `sub-XX` in the path, else each volume is its own subject. DICOM uses its PatientID.

    Raises:
        ConfigError: `src` does not exist, or the pattern is no regular expression.
        RefusedInput: nothing in it is a volume, or two files claim one name.
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
    items, orphans = _items(_pair(plain, top), top, pattern)
    for form in FORMATS:
        if rest and not form.suffixes:
            grouping = form.reader.group(rest, top)
            items += grouping.items
            orphans += grouping.orphans
            rest = grouping.rest
    ignored = [str(path.relative_to(top)) for path in rest]
    if not items:
        *titles, last = (form.title for form in FORMATS)
        raise RefusedInput(
            str(src),
            expected=f"volumes as {', '.join(titles)} or {last}",
            found="an empty folder" if not files else f"{len(files)} files, none of them an image volume",
            remedy="give the folder that holds images/ and, where there are any, labels/",
        )
    items = [replace(i, name=legible(i.name), source=legible(i.source), subject=legible(i.subject)) for i in items]
    return Discovery(
        str(top),
        tuple(sorted(_unique(items), key=lambda item: item.name)),
        tuple(Orphan(legible(o.source), legible(o.what)) for o in sorted(orphans, key=lambda o: o.source)),
        tuple(legible(path) for path in sorted(ignored)),
    )


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


def _pair(files: list[Path], top: Path) -> dict[tuple[str, str, str], _Case]:
    """Group files under (folder they belong to, base name)."""
    cases: dict[tuple[str, str, str], _Case] = {}
    claimed: dict[tuple[tuple[str, str, str], str], Path] = {}
    channelled = _channelled(files, top)
    for path in files:
        relative = PurePosixPath(path.relative_to(top).as_posix())
        stem, suffix = split_name(path.name)
        place, part, role = _role(relative.parent)
        base, channel = stem, "0000"
        imaged = role == "image" or _lies_in_images(relative, top)
        if imaged and (match := _CHANNEL.match(stem)) and (place, part, match["base"]) in channelled:
            base, channel = match["base"], match["channel"]
        elif role == "" and (match := _LABEL_SUFFIX.match(stem)):
            base, role = match["base"], "label"
        elif match := _IMAGE_SUFFIX.match(stem):
            base = match["base"]
        key = (place, part, base)
        slot = f"label of {base}" if role == "label" else f"image of {base}, channel {channel}"
        if (other := claimed.get((key, slot))) is not None:
            raise RefusedInput(
                str(relative),
                expected=f"one file for the {slot}",
                found=f"{other.relative_to(top)} as well",
                remedy="remove or rename one of them",
            )
        claimed[key, slot] = path
        case = cases.setdefault(key, _Case())
        if role == "label":
            case.label = str(path)
        else:
            case.images[channel] = str(path)
            case.kind = format_of_suffix(suffix).name
    return cases


def _channelled(files: list[Path], top: Path) -> set[tuple[str, str, str]]:
    """The keys of which four digits at the end of a name are channels, and not patients as in `amos_0001`."""
    numbers: defaultdict[tuple[str, str, str], set[str]] = defaultdict(set)
    labels: set[tuple[str, str, str]] = set()
    patients: set[tuple[str, str]] = set()
    for path in files:
        relative = PurePosixPath(path.relative_to(top).as_posix())
        place, part, role = _role(relative.parent)
        stem, _ = split_name(path.name)
        if role == "" and (label := _LABEL_SUFFIX.match(stem)):
            stem, role = label["base"], "label"
        match = _CHANNEL.match(stem)
        if role == "label":
            labels.add((place, part, stem))
            if match:
                patients.add((place, match["base"]))
        elif match and (role == "image" or _lies_in_images(relative, top)):
            numbers[place, part, match["base"]].add(match["channel"])
    unclear = {key: channels for key, channels in numbers.items() if (key[0], key[2]) not in patients}
    from_zero = {place for (place, _, _), channels in unclear.items() if "0000" in channels}
    return {key for key in unclear if key[0] in from_zero or key in labels}


def _lies_in_images(relative: PurePosixPath, top: Path) -> bool:
    """Whether a file lies in the ingested folder itself, and that is one of images, as of nnU-Net's `imagesTr`."""
    return len(relative.parts) == 1 and bool(_IMAGE_FOLDER.match(top.absolute().name))


def _role(folder: PurePosixPath) -> tuple[str, str, str]:
    """Where a folder's files belong, which part of the data (Tr, Ts, Val) they are, and whether they are images."""
    parts = list(folder.parts)
    for at in range(len(parts) - 1, -1, -1):
        for pattern, role in ((_IMAGE_FOLDER, "image"), (_LABEL_FOLDER, "label")):
            if match := pattern.match(parts[at]):
                return "/".join([*parts[:at], *parts[at + 1 :]]), match["part"] or "", role
    return "/".join(parts), "", ""


def _items(
    cases: dict[tuple[str, str, str], _Case], top: Path, pattern: re.Pattern[str] | None
) -> tuple[list[IngestItem], list[Orphan]]:
    items, orphans = [], []
    labelled = {(place, part) for (place, part, _), case in cases.items() if case.label}
    names = Counter((place, base) for (place, _, base), case in cases.items() if case.images)
    for (place, part, base), case in cases.items():
        if not case.images:
            assert case.label is not None
            orphans.append(Orphan(_relative(case.label, top), f"label without an image named {base}"))
            continue
        channels = tuple(sorted(case.images))
        images = tuple(case.images[channel] for channel in channels)
        source = _relative(images[0], top)
        form = format_of(case.kind)
        inside = form.reader.labels_inside(images[0]) if form.folder else []
        if len(inside) == 1 and case.label is None and len(images) == 1:
            case.label = inside[0]
        elif inside:
            names_inside = ", ".join(Path(label).name for label in inside)
            what = "the one beside it is used" if case.label else "none of them is used"
            orphans.append(Orphan(source, f"label maps inside the image, {names_inside}: {what}"))
        if case.label is None and (place, part) in labelled:
            orphans.append(Orphan(source, f"image without a label named {base}; kept as an unlabelled volume"))
        unclear = part if names[place, base] > 1 else ""  # the same name in imagesTr and imagesTs
        name = "/".join(word for word in (place, unclear, base) if word)
        subject = _subject(source, name, pattern)
        items.append(IngestItem(name, case.kind, images, case.label, subject, source, channels=channels))
    return items, orphans


def _subject(source: str, name: str, pattern: re.Pattern[str] | None) -> str:
    if pattern is not None:
        match = pattern.search(source)
        if match is None:
            raise ConfigError(
                source,
                expected=f"a path that matches subject_pattern {pattern.pattern!r}",
                found="no match",
                remedy="correct the pattern, or leave it out and every volume is its own subject",
            )
        return match[1] if pattern.groups and match[1] is not None else match[0]
    bids = _BIDS_SUBJECT.search(source)
    return bids[1] if bids else name


def _relative(path: str, top: Path) -> str:
    return Path(path).relative_to(top).as_posix()


def _unique(items: list[IngestItem]) -> list[IngestItem]:
    """Give items of equal name (a NIfTI and a DICOM series in one folder, say) a name each, by their source."""
    counts: Counter[str] = Counter()
    out = []
    for item in sorted(items, key=lambda i: (i.name, i.source, i.series)):
        counts[item.name] += 1
        count = counts[item.name]
        out.append(item if count == 1 else replace(item, name=f"{item.name}~{count}"))
    return out
