"""What ingest asks of the reader of a format."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from storage.ingest.items import IngestItem, Orphan
from storage.ingest.readers.raw import RawVolume, ReadPolicy


@dataclass(frozen=True, slots=True)
class Grouping:
    """Files of a format that is told by content, put together.

    Args:
        items: One for each volume.
        orphans: Files without the counterpart that they need, and damaged ones.
        rest: Files that are none of the format's images; other readers are asked for them.
    """

    items: list[IngestItem]
    orphans: list[Orphan]
    rest: list[Path]


class Reader(Protocol):
    """A format: which files belong together, and what they hold. `FileReader` has the usual answers.

    Every method raises `RefusedInput` where a file cannot be read as what it should be; the error names the file.
    """

    def group(self, files: list[Path], top: Path) -> Grouping:
        """The volumes among files that no suffix claims; asked only where the format has no suffix.

        Args:
            files: Paths below `top`, in a stable order.
            top: The ingested folder.
        """

    def parts(self, path: str) -> list[str]:
        """Other files that hold voxels of the volume at `path`, whether they exist or not."""

    def labels_inside(self, path: str) -> list[str]:
        """Paths of label maps inside the volume at `path`, sorted; asked only where volumes are folders."""

    def read(self, files: Sequence[str], policy: ReadPolicy, thing: str) -> RawVolume:
        """Read one volume, with scale and offset applied.

        Args:
            files: The one file (or folder), or what `group` put together.
            thing: What errors call the volume.
        """

    def read_label(self, path: str, policy: ReadPolicy, image: RawVolume) -> RawVolume:
        """Read a label map.

        Args:
            image: What it labels, as read.
        """


class FileReader:
    """A format whose volumes are single files, told by their suffix. A subclass gives `read_file`."""

    def read_file(self, path: str, policy: ReadPolicy) -> RawVolume:
        """Read one file."""
        raise NotImplementedError

    def group(self, files: list[Path], top: Path) -> Grouping:
        """See `Reader`: nothing is told by content."""
        return Grouping([], [], files)

    def parts(self, path: str) -> list[str]:
        """See `Reader`: a file holds all of a volume."""
        return []

    def labels_inside(self, path: str) -> list[str]:
        """See `Reader`: a volume holds no label maps."""
        return []

    def read(self, files: Sequence[str], policy: ReadPolicy, thing: str) -> RawVolume:
        """See `Reader`."""
        return self.read_file(files[0], policy)

    def read_label(self, path: str, policy: ReadPolicy, image: RawVolume) -> RawVolume:
        """See `Reader`: a label map is a volume like others."""
        return self.read_file(path, policy)
