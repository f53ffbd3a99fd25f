"""Images and labels, paired by name and never by position in a list.

Layouts, mixed or nested too:

- sibling folders `images` and `labels` (also `imagesTr`/`labelsTr`, `imagesTs`/`labelsTs`, `masks`, `ground_truth`);
- one folder where label maps have a word of their own in their names (`layouts`);
- BIDS, where a map below `derivatives` has the entities of its image.

`case_0000`, `case_0001` in an image folder are channels of one volume. They are volumes of their own where labels bear
such numbers too, or where nothing there is numbered 0000 and no label is named `case`. A label map inside an OME-Zarr
image is its label where it holds one and no file beside it is. Files that claim one name are refused, each of them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from storage.ingest.items import IngestItem, Orphan
from storage.ingest.names.layouts import (
    IMAGE_FOLDER,
    bare,
    base_if_beside,
    image_base,
    image_by_entities,
    is_bids,
    label_base,
    role_of,
    session_of,
)
from storage.ingest.readers.registry import format_of, format_of_suffix, split_name

_CHANNEL = re.compile(r"^(?P<base>.+)_(?P<channel>\d{4})$")
Key = tuple[str, str, str]
"""The folder that files belong to, the part of the data (Tr, Ts, Val), and their base name."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """Items without subjects, what has no counterpart, and files that cannot be told apart."""

    items: tuple[IngestItem, ...]
    orphans: tuple[Orphan, ...]
    refused: tuple[Orphan, ...]


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    relative: PurePosixPath
    stem: str
    place: str
    part: str
    role: str
    in_images: bool


@dataclass(slots=True)
class _Case:
    """Files that share a pairing key."""

    images: dict[str, str] = field(default_factory=dict)
    label: str | None = None
    kind: str = ""


def paired(files: Sequence[Path], top: Path) -> Pairing:
    """The volumes among files whose suffix a reader knows, with their labels.

    Args:
        files: Paths below `top`, in a stable order.
    """
    cases, refused = _cases(_told(files, top), top)
    orphans = _pair_the_rest(cases, top)
    items, more = _items(cases, top)
    return Pairing(tuple(items), (*orphans, *more), tuple(refused))


def _told(files: Sequence[Path], top: Path) -> list[_File]:
    """The files with what their folder and name say they are."""
    out = []
    beside: defaultdict[Path, set[str]] = defaultdict(set)
    for path in files:
        beside[path.parent].add(split_name(path.name)[0])
    for path in files:
        relative = PurePosixPath(path.relative_to(top).as_posix())
        place, part, role = role_of(relative.parent)
        stem = split_name(path.name)[0]
        in_images = role == "image" or (len(relative.parts) == 1 and bool(IMAGE_FOLDER.match(top.absolute().name)))
        base = label_base(stem) if role != "label" else None
        if role == "image" and base not in beside[path.parent]:  # a folder says more than a name
            base = None
        if base is None and role != "label":
            base = base_if_beside(stem, beside[path.parent])
        if base is not None:
            role, stem = "label", base
        out.append(_File(path, relative, stem, place, part, role, in_images))
    return out


def _cases(files: Iterable[_File], top: Path) -> tuple[dict[Key, _Case], list[Orphan]]:
    """Files by key, and those of which several claim one place."""
    files = list(files)
    channelled = _channelled(files)
    claims: defaultdict[tuple[Key, str, str], list[_File]] = defaultdict(list)
    for file in files:
        base, channel = file.stem, "0000"
        if file.role == "label":
            claims[(file.place, file.part, base), "label", ""].append(file)
            continue
        match = _CHANNEL.match(base) if file.in_images else None
        if match and (file.place, file.part, match["base"]) in channelled:
            base, channel = match["base"], match["channel"]
        else:
            base = image_base(base)
        claims[(file.place, file.part, base), "image", channel].append(file)
    cases: dict[Key, _Case] = {}
    refused: list[Orphan] = []
    clashing = {key for (key, role, _), several in claims.items() if role == "image" and len(several) > 1}
    for (key, role, channel), several in claims.items():
        if len(several) > 1 or (role == "image" and key in clashing):
            what = "label map" if role == "label" else "image"
            for file in several:
                others = ", ".join(sorted(o.path.name for o in several if o is not file)) or "others of its channels"
                refused.append(
                    Orphan(
                        file.relative.as_posix(),
                        f"expected one file for one {what}; found {others} as well; remove or rename one of them",
                    )
                )
            continue
        (file,) = several
        case = cases.setdefault(key, _Case())
        if role == "label":
            case.label = str(file.path)
        else:
            case.images[channel] = str(file.path)
            case.kind = format_of_suffix(split_name(file.path.name)[1]).name
    return cases, refused


def _channelled(files: Iterable[_File]) -> set[Key]:
    """The keys of which four digits at the end of a name are channels, and not patients as in `amos_0001`."""
    numbers: defaultdict[Key, set[str]] = defaultdict(set)
    labels: set[Key] = set()
    patients: set[tuple[str, str]] = set()
    for file in files:
        match = _CHANNEL.match(file.stem)
        if file.role == "label":
            labels.add((file.place, file.part, file.stem))
            if match:
                patients.add((file.place, match["base"]))
        elif match and file.in_images:
            numbers[file.place, file.part, match["base"]].add(match["channel"])
    unclear = {key: channels for key, channels in numbers.items() if (key[0], key[2]) not in patients}
    from_zero = {place for (place, _, _), channels in unclear.items() if "0000" in channels}
    return {key for key in unclear if key[0] in from_zero or key in labels}


def _pair_the_rest(cases: dict[Key, _Case], top: Path) -> list[Orphan]:
    """Give label maps that no image is named like to the one image that they can be of, where it is one."""
    images = {key: case for key, case in cases.items() if case.images}
    labels = {key: case for key, case in cases.items() if not case.images}
    by_place: defaultdict[str, list[Key]] = defaultdict(list)
    by_participant: defaultdict[str, dict[str, Key]] = defaultdict(dict)
    for key in images:
        by_place[key[0]].append(key)
        stem = split_name(Path(next(iter(images[key].images.values()))).name)[0]
        if is_bids(stem):
            by_participant[stem.split("_")[0]][_relative(next(iter(images[key].images.values())), top)] = key
    of: defaultdict[Key, list[Key]] = defaultdict(list)
    for key, case in labels.items():
        assert case.label is not None
        stem = split_name(Path(case.label).name)[0]
        if is_bids(stem):
            target = _by_entities(stem, by_participant[stem.split("_")[0]])
        else:
            target = _by_name(key, images, by_place)
        if target is not None:
            of[target].append(key)
    orphans = []
    for target, keys in of.items():
        if len(keys) == 1 and images[target].label is None:
            images[target].label = labels[keys[0]].label
            del cases[keys[0]]
            continue
        for key in keys:
            label = labels[key].label
            assert label is not None
            what = "another is beside it" if images[target].label else f"{len(keys)} are, and none of them is used"
            orphans.append(Orphan(_relative(label, top), f"label map of {'/'.join(w for w in target if w)}: {what}"))
            del cases[key]
    return orphans


def _by_entities(stem: str, images: dict[str, Key]) -> Key | None:
    if stem.endswith("probseg"):  # shares of a tissue, and no label map
        return None
    raw = [stem for stem in images if not stem.startswith("derivatives/")]
    paths = {
        str(PurePosixPath(path).with_name(split_name(PurePosixPath(path).name)[0])): path for path in raw or images
    }
    best = image_by_entities(stem, list(paths))
    return None if best is None else images[paths[best]]


def _by_name(label: Key, images: dict[Key, _Case], by_place: dict[str, list[Key]]) -> Key | None:
    """The image that a label map is of, if names leave one."""
    place, part, base = label
    near = [key for key in by_place.get(place, ()) if key[1] == part]
    word = label_base(base)  # in a folder of labels the name may say so too
    own = (base if word is None else word).lower()
    for candidates in (near, [key for other in _below(place, by_place) for key in by_place[other] if key[1] == part]):
        same = [key for key in candidates if bare(key[2]) in (own, base.lower(), bare(base))]
        if len(same) == 1:
            return same[0]
    if not own:
        return near[0] if len(near) == 1 else None
    longer = [key for key in near if re.match(re.escape(own) + r"[-_. ]", key[2].lower())]
    return longer[0] if len(longer) == 1 else None


def _below(place: str, places: Iterable[str]) -> list[str]:
    """Folders one level below, as `scans` beside `masks`."""
    return [other for other in places if other != place and other.rpartition("/")[0] == place]


def _items(cases: dict[Key, _Case], top: Path) -> tuple[list[IngestItem], list[Orphan]]:
    items, orphans = [], []
    labelled = {(place, part) for (place, part, _), case in cases.items() if case.label}
    names = Counter((place, base) for (place, _, base), case in cases.items() if case.images)
    for (place, part, base), case in cases.items():
        if not case.images:
            assert case.label is not None
            what = f"label without an image named {base}" if base else "label without an image that is its alone"
            orphans.append(Orphan(_relative(case.label, top), what))
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
        study = session_of(source)
        items.append(IngestItem(name, case.kind, images, case.label, "", source, study=study, channels=channels))
    return items, orphans


def _relative(path: str, top: Path) -> str:
    return Path(path).relative_to(top).as_posix()
