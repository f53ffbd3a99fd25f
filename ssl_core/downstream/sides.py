"""Labels that name a side, of which a mirrored image would be of the other one."""

import re
from collections.abc import Iterable

_WORDS = {"left", "right", "lt", "rt", "l", "r", "lh", "rh", "lv", "rv", "la", "ra"}
_WORDS |= {"sinister", "dexter", "sinistra", "dextra"}


def sided(labels: Iterable[str]) -> str | None:
    """The first label whose name says left or right, as a word of it or by its letter (`kidney_L`); None without.

    A name that says no side, such as `label-2`, cannot be told to have one.
    """
    return next((name for name in labels if _words(name) & _WORDS), None)


def _words(name: str) -> set[str]:
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)  # LeftKidney, kidneyL
    return set(re.split(r"[^a-z0-9]+", apart.lower()))
