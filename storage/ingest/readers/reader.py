"""What ingest asks of the reader of a format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from storage.ingest.items import IngestItem, Orphan
from storage.ingest.readers.raw import RawVolume, ReadPolicy, VolumeHeader


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
    """A format: which files belong together, and what they hold. `FileReader` is one made of functions.

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

    def header(self, files: Sequence[str], policy: ReadPolicy, thing: str) -> VolumeHeader:
        """What `read` would return, without voxels where the format allows that. Arguments and errors as of `read`."""

    def read_label(self, path: str, policy: ReadPolicy, image: RawVolume) -> RawVolume:
        """Read a label map.

        Args:
            image: What it labels, as read.
        """


def _none(path: str) -> list[str]:
    """Paths beside or inside a volume that is whole and holds no label maps."""
    return []


@dataclass(frozen=True, slots=True)
class FileReader:
    """A `Reader` of a format whose volumes are single files (or folders), told by their suffix.

    Args:
        read_file: Reads one file.
        parts_of: See `Reader.parts`; by default a file holds all of a volume.
        labels_in: See `Reader.labels_inside`; by default a volume holds no label maps.
        label_of: See `Reader.read_label`; by default a label map is a volume like others.
        header_of: Reads the header of one file alone; by default the file is read whole.
    """

    read_file: Callable[[str, ReadPolicy], RawVolume]
    parts_of: Callable[[str], list[str]] = _none
    labels_in: Callable[[str], list[str]] = _none
    label_of: Callable[[str, ReadPolicy, RawVolume], RawVolume] | None = None
    header_of: Callable[[str, ReadPolicy], VolumeHeader] | None = None

    def group(self, files: list[Path], top: Path) -> Grouping:
        """See `Reader`: nothing is told by content."""
        return Grouping([], [], files)

    def parts(self, path: str) -> list[str]:
        """See `Reader`."""
        return self.parts_of(path)

    def labels_inside(self, path: str) -> list[str]:
        """See `Reader`."""
        return self.labels_in(path)

    def read(self, files: Sequence[str], policy: ReadPolicy, thing: str) -> RawVolume:
        """See `Reader`."""
        return self.read_file(files[0], policy)

    def header(self, files: Sequence[str], policy: ReadPolicy, thing: str) -> VolumeHeader:
        """See `Reader`."""
        if self.header_of is not None:
            return self.header_of(files[0], policy)
        raw = self.read_file(files[0], policy)
        return VolumeHeader(raw.shape_CDHW, raw.affine, raw.modality, tuple(raw.notes))

    def read_label(self, path: str, policy: ReadPolicy, image: RawVolume) -> RawVolume:
        """See `Reader`."""
        return self.read_file(path, policy) if self.label_of is None else self.label_of(path, policy, image)
