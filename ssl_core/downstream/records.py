"""Frozen dataclasses of a result, read back from JSON by the names of their fields."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from storage.errors import RefusedInput

R = TypeVar("R")


def from_fields(kind: type[R], data: Mapping[str, Any]) -> R:
    """A `kind` from the entries of `data` that bear its fields' names; other entries are left out.

    Args:
        kind: A dataclass.
        data: As read from JSON; lists become tuples.

    Raises:
        RefusedInput: a field has no entry, and no default.
    """
    members = fields(kind)  # type: ignore[arg-type]
    names = [member.name for member in members]
    missing = [
        member.name
        for member in members
        if member.name not in data and member.default is MISSING and member.default_factory is MISSING
    ]
    if missing:
        raise RefusedInput(
            f"result, {kind.__name__}",
            expected=f"the fields {', '.join(names)}",
            found=f"no {', '.join(missing)}",
            remedy="it was written by another version: run that job again under another name",
        )
    known = {name: data[name] for name in names if name in data}
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in known.items()})
