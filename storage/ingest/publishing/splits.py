"""Which subjects train, validate and test: a function of the subject's name and a seed.

A subject falls by its own hash, whatever else is in the data set, so that volumes added later never move one. Volumes
with the same content count as one subject whatever they are called. Only a data set so small that a wanted split would
stay empty has subjects moved: those whose hash lies nearest; subjects published before keep their split for good.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from storage.errors import RefusedInput

SPLITS = ("train", "val", "test")


def position(subject: str, seed: int) -> float:
    """Where a subject falls in [0, 1): uniform over names, fixed for a name and a seed."""
    digest = hashlib.sha256(f"{seed}:{subject}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def assign(
    members: Iterable[tuple[str, str]],
    fractions: Sequence[float],
    seed: int,
    published: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The split of every subject.

    Args:
        members: (subject, content digest) of every volume.
        fractions: Shares of train, val and test, summing to 1.
        seed: Of the hash.
        published: Splits of subjects that an earlier manifest already holds; they are kept.

    Raises:
        RefusedInput: the same content was published before in two splits under two names.
    """
    published = published or {}
    groups = _groups(members)
    out: dict[str, str] = {}
    free: dict[str, float] = {}
    for root, subjects in groups.items():
        group_splits = sorted({published[s] for s in subjects if published.get(s)})
        if len(group_splits) > 1:
            raise RefusedInput(
                f"subjects {', '.join(sorted(subjects)[:4])}",
                expected="subjects with equal volumes in one split",
                found=f"published in {' and '.join(group_splits)}",
                remedy="remove the duplicate, or publish to a new store with a new seed",
            )
        if group_splits:
            out.update(dict.fromkeys(subjects, group_splits[0]))
        else:
            free[root] = position(root, seed)
    split_of = {root: _split_at(at, fractions) for root, at in free.items()}
    published_splits = set(out.values())
    _fill_empty(split_of, free, fractions, published_splits)
    for root, split in split_of.items():
        out.update(dict.fromkeys(groups[root], split))
    return out


def _groups(members: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Subjects joined by equal content, under the first name of each group."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first: dict[str, str] = {}
    for subject, content in members:
        parent.setdefault(subject, subject)
        if content in first:
            a, b = sorted((find(subject), find(first[content])))
            parent[b] = a
        else:
            first[content] = subject
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for subject in sorted(parent):
        groups[find(subject)].append(subject)
    return dict(groups)


def _split_at(at: float, fractions: Sequence[float]) -> str:
    edge = 0.0
    for split, share in zip(SPLITS, fractions, strict=True):
        edge += share
        if at < edge:
            return split
    return next(s for s, share in reversed(list(zip(SPLITS, fractions, strict=True))) if share > 0)


def _fill_empty(
    split_of: dict[str, str], at: Mapping[str, float], fractions: Sequence[float], published_splits: set[str]
) -> None:
    """Move the nearest subject into each wanted split that got none, from one that has others or matters less."""
    edges = [sum(fractions[:i]) for i in range(len(fractions) + 1)]
    for i in sorted(range(len(SPLITS)), key=lambda i: -fractions[i]):
        split = SPLITS[i]
        if fractions[i] <= 0 or split in published_splits or split in split_of.values():
            continue
        counts = {s: sum(v == s for v in split_of.values()) + (s in published_splits) for s in SPLITS}
        share = dict(zip(SPLITS, fractions, strict=True))
        movable = [root for root, s in split_of.items() if counts[s] > 1 or share[s] < fractions[i]]
        if movable:
            middle = (edges[i] + edges[i + 1]) / 2
            split_of[min(movable, key=lambda root: (abs(at[root] - middle), root))] = split
