"""A bounded on-disk cache of decoded chunks, shared by the processes of a node."""

from pathlib import Path


class NodeCache:
    """See the module."""

    def __init__(self, path: str | Path, max_bytes: int) -> None:
        self.path, self.max_bytes = Path(path), max_bytes
