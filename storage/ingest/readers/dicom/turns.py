"""Slices of several acquisitions that take turns along one series, where only their order tells it.

The order is that of instance numbers and of clocks. In a series of one scan both follow the position, or instance
numbers do and times have passes: 2-D MR measures every second slice first. Where images are numbered in blocks whose
slices lie between each other's, or each number is given several times, several scans were put into one series.
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence

from storage.errors import RefusedInput
from storage.ingest.readers.dicom.dimensions import Value, value_of
from storage.ingest.readers.dicom.file import Slice

_CLOCKS = ("AcquisitionDateTime", "AcquisitionTime")
_LEAST = 3
"""Slices of a block; fewer are chance. Our choice."""
_LONGEST_PASS_S = 900.0
"""Between the passes of one scan; our choice."""


def check_order(thing: str, planes: Sequence[Slice], facts: dict[int, dict[str, Value]]) -> list[str]:
    """Refuse slices of one image a position that were numbered or taken as several scans which take turns.

    Args:
        thing: What messages call the series.
        planes: One image a position, in order along the normal. Frames of one object are not looked at.
        facts: What `dimensions.attributes` returned.

    Returns:
        A note where the passes of one scan and several scans look alike.

    Raises:
        RefusedInput: names the attribute that tells the scans apart.
    """
    if any(len(s.groups) > 1 for s in planes) or len(planes) < 2 * _LEAST:
        return []
    numbers = [value_of(s.header, "InstanceNumber") for s in planes]
    clocks = {name: [facts[id(s)].get(name) for s in planes] for name in (*_CLOCKS, "ContentTime")}
    clocks = {name: values for name, values in clocks.items() if all(isinstance(v, str) for v in values)}
    if any(name in clocks for name in _CLOCKS):
        clocks.pop("ContentTime", None)  # of when an image was made
    in_order = any(_is_monotonic(values) for values in clocks.values())
    if None not in numbers and not in_order:
        counts = Counter(numbers)
        repeats = counts.most_common(1)[0][1]
        if repeats > 1 and set(counts.values()) == {repeats} and len(counts) >= _LEAST:
            raise _refusal(thing, f"InstanceNumber has each value {repeats} times", "InstanceNumber and position")
        blocks = _blocks(numbers)
        if repeats == 1 and blocks:
            raise _refusal(thing, f"InstanceNumber counts through them {blocks} times", "InstanceNumber")
    for name, values in clocks.items():
        if blocks := _blocks(values):
            what = f"{name} of slices goes through them {blocks} times"
            first = planes[0].header
            passes = value_of(first, "Modality") == "MR" and value_of(first, "MRAcquisitionType") != "3D"
            if not passes or _longest_pause_s(values) > _LONGEST_PASS_S:
                raise _refusal(thing, what, name)
            return [f"{what}: passes of one scan, or several scans in one series"]
    return []


def _refusal(thing: str, what: str, name: str) -> RefusedInput:
    return RefusedInput(
        thing,
        expected="slices of one acquisition",
        found=f"several that take turns: {what}",
        remedy=f"they share a series id: separate them by {name}; if they are one scan, number its images along it",
    )


def _is_monotonic(values: Sequence[Value]) -> bool:
    return len(set(values)) > 1 and list(values) in (sorted(values), sorted(values, reverse=True))


def _blocks(values: Sequence[Value]) -> int:
    """How often slices, in the order of their values, pass along the scan; 0 for once, or in no order.

    Args:
        values: Of slices in order of position.
    """
    order = sorted(range(len(values)), key=lambda at: (values[at], at))
    runs = [[order[0]]]
    for at in order[1:]:
        run = runs[-1]
        if len(run) > 1 and (at > run[-1]) != (run[1] > run[0]):
            runs.append([at])
        else:
            run.append(at)
    apart = [max(min(a), min(b)) > min(max(a), max(b)) for a, b in itertools.pairwise(runs)]
    return len(runs) if len(runs) > 1 and min(map(len, runs)) >= _LEAST and not any(apart) else 0


def _longest_pause_s(values: Sequence[Value]) -> float:
    """Between one time and the next; infinite between days."""
    days, seconds = set(), []
    for value in sorted(set(values)):
        match = re.search(r"(\d{8})? ?(\d\d)(\d\d)(\d\d(?:\.\d+)?)", str(value))
        if match is None:
            return 0.0
        days.add(match[1])
        seconds.append(int(match[2]) * 3600 + int(match[3]) * 60 + float(match[4]))
    if len(days) > 1:
        return float("inf")
    return max((b - a for a, b in itertools.pairwise(seconds)), default=0.0)
