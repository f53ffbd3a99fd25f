"""Which bytes a volume comes from: digests of its files, and whether they changed while they were read."""

import hashlib
import os
import stat
from pathlib import Path

from storage.errors import RefusedInput
from storage.ingest.items import IngestItem
from storage.ingest.readers.registry import format_of_suffix, split_name


def source_digest(item: IngestItem) -> str:
    """SHA-256 of the one file a volume comes from; of several, of the lines `role sha256`."""
    lines = [f"image {file_digest(path)}" for path in _with_pixels(item.images)]
    if item.label:
        lines += [f"label {file_digest(path)}" for path in _with_pixels((item.label,))]
    if len(lines) == 1:
        return lines[0].partition(" ")[2]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def source_state(item: IngestItem) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of change of every file of an item: equal before and after reading if nobody wrote them.

    Raises:
        RefusedInput: one cannot be looked at.
    """
    states = []
    for path in _with_pixels(item.files):
        try:
            root = os.stat(path)
            states.append((path, root.st_size, root.st_mtime_ns))
            for part in sorted(Path(path).rglob("*")) if stat.S_ISDIR(root.st_mode) else []:
                state = part.stat()
                states.append((str(part), state.st_size, state.st_mtime_ns))
        except OSError as error:
            raise RefusedInput(path, expected="a readable file", found=error.strerror or "none") from error
    return tuple(states)


def _with_pixels(paths: tuple[str, ...]) -> list[str]:
    """The paths, and the pixel files that detached headers among them name or imply."""
    files: list[str] = []
    for path in paths:
        suffix = split_name(os.path.basename(path))[1]
        form = format_of_suffix(suffix) if suffix else None
        parts = form.reader.parts(path) if form and suffix in form.headers else []
        files += [path, *(part for part in dict.fromkeys(parts) if os.path.isfile(part))]
    return files


def file_digest(path: str) -> str:
    """SHA-256 of a file, or of every file of a folder with its relative name, in hex."""
    digest = hashlib.sha256()
    try:
        if os.path.isdir(path):
            root = Path(path)
            for part in sorted(p for p in root.rglob("*") if p.is_file()):
                digest.update(f"{part.relative_to(root).as_posix()}\0{file_digest(str(part))}\n".encode())
            return digest.hexdigest()
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RefusedInput(path, expected="a readable file", found=error.strerror or type(error).__name__) from error
