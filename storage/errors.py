"""Errors that a person can act on: the thing, what was expected, what was found, what to do.

Exit codes of the command line: 0 done, 1 failed, 2 usage or configuration, 3 refused input, 4 a job goes on unwatched.
"""


class TomoscaleError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        thing: The file, key, setting or service that the message is about.
        expected: What would have been right.
        found: What was there instead.
        remedy: What the reader can do about it.
    """

    exit_code = 1

    def __init__(self, thing: str, *, expected: str = "", found: str = "", remedy: str = "") -> None:
        self.thing, self.expected, self.found, self.remedy = thing, expected, found, remedy
        super().__init__(thing, expected, found, remedy)

    def __str__(self) -> str:
        parts = [self.thing]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.found:
            parts.append(f"found {self.found}")
        if self.remedy:
            parts.append(self.remedy)
        return "; ".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive pickling by default, and Ray pickles them.
        return _rebuild, (type(self), self.thing, self.expected, self.found, self.remedy)


def _rebuild(kind: type[TomoscaleError], thing: str, expected: str, found: str, remedy: str) -> TomoscaleError:
    return kind(thing, expected=expected, found=found, remedy=remedy)


class ConfigError(TomoscaleError):
    """A setting or an argument is wrong."""

    exit_code = 2


class RefusedInput(TomoscaleError):
    """A volume, a label or a data set is refused. Nothing of it is published."""

    exit_code = 3


class StoreError(TomoscaleError):
    """The object store did not give what was asked for, retries included."""


class NotFound(StoreError):
    """The object is not there."""


class NotOffered(StoreError):
    """The store cannot do what was asked of it at all: write or list over plain HTTP, for one."""


class CorruptChunk(StoreError):
    """A stored chunk, shard index or manifest does not match its checksum, size or layout."""


class StackError(TomoscaleError):
    """A local service did not start, answer or stop as it should."""
