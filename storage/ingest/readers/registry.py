"""The formats that can be read: one line each. A reader's module is imported when it is first used.

Format libraries cost start-up time, so a line holds what has to be known before any file is opened.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module

from storage.errors import ConfigError
from storage.ingest.readers.reader import Reader


@dataclass(frozen=True, slots=True)
class Format:
    """A format and its reader.

    Args:
        name: What `IngestItem.kind` calls it.
        title: What messages call it.
        module, factory: The class or function that makes its `Reader`, and where it is.
        suffixes: Endings of its files, in lower case. A format without any is told by content.
        headers: Those of `suffixes` whose files are headers of other files, which `Reader.parts` names.
        folder: Whether a volume is a folder.
        hides_identity: Whether headers and paths name people: then they reach neither store nor messages, unless
            `IngestPolicy.identifiers` says so, and subjects come from the headers.
    """

    name: str
    title: str
    module: str
    factory: str
    suffixes: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    folder: bool = False
    hides_identity: bool = False

    @property
    def reader(self) -> Reader:
        """The reader; imports its module."""
        return _reader(self.module, self.factory)


_ROOM = "storage.ingest.readers"
FORMATS: tuple[Format, ...] = (
    Format("nifti", "NIfTI", f"{_ROOM}.nifti", "nifti_reader", (".nii", ".nii.gz", ".hdr"), headers=(".hdr",)),
    Format("dicom", "DICOM", f"{_ROOM}.dicom.reader", "DicomReader", hides_identity=True),
    Format("nrrd", "NRRD", f"{_ROOM}.itk", "itk_reader", (".nrrd", ".nhdr"), headers=(".nhdr",)),
    Format("meta", "MHA/MHD", f"{_ROOM}.itk", "itk_reader", (".mha", ".mhd"), headers=(".mhd",)),
    Format("mgz", "MGZ", f"{_ROOM}.mgz", "mgz_reader", (".mgz", ".mgh")),
    Format("zarr", "Zarr", f"{_ROOM}.zarr_folder", "zarr_reader", (".zarr",), folder=True),
)
"""Suffixes are tried by length, contents in this order."""

_BY_NAME = {form.name: form for form in FORMATS}
_BY_SUFFIX = {suffix: form for form in FORMATS for suffix in form.suffixes}
_LONGEST_FIRST = sorted(_BY_SUFFIX, key=len, reverse=True)


def format_of(name: str) -> Format:
    """The format of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _BY_NAME:
        raise ConfigError(f"format {name!r}", expected=f"one of {', '.join(_BY_NAME)}", found="no such format")
    return _BY_NAME[name]


def format_of_suffix(suffix: str) -> Format:
    """The format of a suffix that `split_name` returned."""
    return _BY_SUFFIX[suffix]


def split_name(name: str) -> tuple[str, str]:
    """A file name as (stem, suffix in lower case), the suffix empty where no reader knows it.

    >>> split_name("scan.v2.nii.gz")
    ('scan.v2', '.nii.gz')
    """
    lower = name.lower()
    for suffix in _LONGEST_FIRST:
        if lower.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)], suffix
    return name, ""


def is_volume_folder(name: str) -> bool:
    """Whether a folder of that name is a volume, and not a folder of volumes."""
    suffix = split_name(name)[1]
    return bool(suffix) and _BY_SUFFIX[suffix].folder


@cache
def _reader(module: str, factory: str) -> Reader:
    reader: Reader = getattr(import_module(module), factory)()
    return reader
