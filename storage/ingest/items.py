"""What discovery hands on: volumes to ingest, files without a counterpart, and what no reader takes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class IngestItem:
    """One volume to ingest.

    Args:
        name: Unique within the folder and stable; the source of the volume's id.
        kind: Name of its format in `readers.registry`.
        images: Absolute paths: one a channel, or every file of a DICOM series.
        label: Absolute path of the label map or DICOM segmentation, if any.
        subject: What the split is made by. Of a DICOM series, the PatientID as found: never written anywhere as it is.
        source: Path of the first image relative to the ingested folder, or of the folder that holds the series.
        study, series: DICOM instance UIDs as found; of BIDS, participant and session as the study; empty otherwise.
        columns: What a subject table says of it beside the person.
        channels: The four digits in the names of `images` that are channels; a volume that lacks one is refused.
    """

    name: str
    kind: str
    images: tuple[str, ...]
    label: str | None
    subject: str
    source: str
    study: str = ""
    series: str = ""
    channels: tuple[str, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The images, then the label where there is one."""
        return self.images if self.label is None else (*self.images, self.label)


@dataclass(frozen=True, slots=True)
class Orphan:
    """A file without the counterpart that its folder promises."""

    source: str
    what: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.source}: {self.what}"


@dataclass(frozen=True, slots=True)
class Discovery:
    """What `discover` found, in the order of the names.

    `orphans` name images without a label (they are items all the same, unlabelled) and labels without an image (they
    are not). `ignored` are the files that no reader knows, `refused` those that cannot be told apart by their names,
    `notes` what was in doubt about whose a scan is.
    """

    root: str
    items: tuple[IngestItem, ...]
    orphans: tuple[Orphan, ...]
    ignored: tuple[str, ...]
    refused: tuple[Orphan, ...] = ()
    notes: tuple[str, ...] = ()
