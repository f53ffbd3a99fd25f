"""Download of the public hippocampus data set, for a first run on real volumes.

Medical Segmentation Decathlon, Task04: 394 MR crops of the hippocampus, 263 of them labelled; CC BY-SA 4.0 (Antonelli
et al. 2022, doi:10.1038/s41467-022-30695-9; Simpson et al. 2019, arXiv:1902.09063). The MD5 digest is the one that
MONAI 1.6 publishes for the same file (`monai.apps.DecathlonDataset.md5`). MD5 finds damage; it does not prove origin,
for which there is HTTPS. The SHA-256 of what came is recorded beside the data.
"""

import hashlib
import http.client
import json
import math
import os
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from storage.errors import ConfigError, StoreError
from storage.objects.retry import OutOfTime, RetryPolicy, repeat

URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar"
MD5 = "9d24dba78a72977dbd1d2e110310f31b"
LARGEST_ARCHIVE = 200 << 20
LARGEST_UNPACKED = 400 << 20
_KEPT = {"imagesTr": "images", "labelsTr": "labels"}
_MARKER = "dataset.json"
_BLOCK = 1 << 18

Report = Callable[[int, int], None]


def fetch_hippocampus(
    dst: str | os.PathLike[str],
    progress: Report | None = None,
    *,
    url: str = URL,
    md5: str = MD5,
    timeout_s: float = 20,
    tries: int = 4,
) -> Path:
    """Download, check and unpack the labelled part of the data set.

    Args:
        dst: Folder to make; one that holds the data set already is returned at once.
        progress: Called with bytes so far and bytes in all (0 where the server does not say).
        url, md5: Another mirror of the same archive, or another archive of the same form.
        timeout_s: Without a byte for so long, the connection counts as dead.
        tries: Connections before giving up; each continues where the last one ended.

    Returns:
        A folder with `images/`, `labels/` and `dataset.json`.

    Raises:
        ConfigError: `dst` holds something else.
        StoreError: no connection, or not the archive that was expected. What was downloaded stays in
            `<dst>.download` and is continued; `dst` appears whole or not at all.
    """
    path = Path(dst).expanduser()
    if _is_ours(path, md5):
        return path
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            str(path), expected="a new folder", found="one with other files", remedy="name another folder, or remove it"
        )
    partial = path.parent / f"{path.name}.download"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(url, partial, progress, timeout_s, tries)
        digests = _digests(partial)
        if digests["md5"] != md5:
            size = partial.stat().st_size
            partial.unlink()
            raise StoreError(
                url,
                expected=f"an archive with MD5 {md5}",
                found=f"{size:,} bytes with MD5 {digests['md5']}",
                remedy="the download was damaged, or a proxy answered in the server's place; run it again",
            )
        _unpack(partial, path, {"url": url, **digests})
        partial.unlink()
    except OSError as error:
        raise StoreError(
            str(path), expected="a writable folder with 100 MB of room", found=error.strerror or type(error).__name__
        ) from error
    return path


def _download(url: str, partial: Path, progress: Report | None, timeout_s: float, tries: int) -> None:

    def attempt() -> None:
        try:
            # Each try goes on where the last one ended, so that tries are bounded and a slow line is not.
            is_whole = _continue(url, partial, progress, timeout_s)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # what lies there is longer than the archive: not a part of it
                partial.unlink(missing_ok=True)
            raise
        if not is_whole:
            raise ConnectionError("the connection ended early")

    policy = RetryPolicy(deadline_s=math.inf, attempt_s=0.0, first_s=1.0, tries=tries)
    try:
        repeat(attempt, policy, _is_passing, sleep=time.sleep)
    except (OutOfTime, urllib.error.HTTPError) as end:
        error = end.last if isinstance(end, OutOfTime) else end
        raise StoreError(
            url,
            expected="the data set's archive",
            found=_problem(error),
            remedy=(
                "where this network does not reach it, download the file elsewhere, unpack it, and give the folder: "
                "`tomoscale demo --data FOLDER`; without it the demo uses simulated subjects"
            ),
        ) from error


def _is_passing(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 416, 429)
    return isinstance(error, urllib.error.URLError | http.client.HTTPException | TimeoutError | ConnectionError)


def _problem(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    return str(getattr(error, "reason", "") or error) or type(error).__name__


def _continue(url: str, partial: Path, progress: Report | None, timeout_s: float) -> bool:
    """Append to `partial` from one connection; whether the whole archive is there now."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "tomoscale"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        if have and response.status != 206:  # the server sends everything again
            have = 0
        total = have + int(response.headers.get("Content-Length") or 0)
        if total > LARGEST_ARCHIVE:
            raise StoreError(url, expected=f"at most {LARGEST_ARCHIVE >> 20} MiB", found=f"{total:,} bytes")
        with partial.open("ab" if have else "wb") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                have += len(block)
                if have > LARGEST_ARCHIVE:
                    raise StoreError(url, expected=f"at most {LARGEST_ARCHIVE >> 20} MiB", found="more")
                if progress is not None:
                    progress(have, total)
    return have >= total


def _digests(path: Path) -> dict[str, str]:
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            md5.update(block)
            sha256.update(block)
    return {"md5": md5.hexdigest(), "sha256": sha256.hexdigest()}


def _unpack(archive: Path, path: Path, origin: dict[str, str]) -> None:
    """Images and labels of the archive into a new folder, renamed to `path` when complete."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        facts: dict[str, Any] = {}
        room = LARGEST_UNPACKED
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if not member.isfile() or not parts or parts[-1].startswith("."):
                    continue  # macOS leaves ._ files behind
                source = tar.extractfile(member)
                room -= member.size
                if source is None or room < 0:
                    raise StoreError(str(archive), expected=f"at most {LARGEST_UNPACKED >> 20} MiB", found="more")
                if parts[-1] == _MARKER:
                    facts = json.loads(source.read())
                elif len(parts) >= 2 and parts[-2] in _KEPT:
                    folder = temporary / _KEPT[parts[-2]]
                    folder.mkdir(exist_ok=True)
                    with (folder / parts[-1]).open("wb") as file:
                        shutil.copyfileobj(source, file)
        if not (temporary / "images").is_dir():
            raise StoreError(str(archive), expected="a folder imagesTr in the archive", found="none")
        facts["origin"] = {**origin, "digest_checked": "md5, as published by MONAI 1.6; sha256 recorded, not checked"}
        (temporary / _MARKER).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        if path.exists():
            path.rmdir()  # empty, as checked
        temporary.rename(path)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise StoreError(str(archive), expected="a readable tar archive", found=str(error)[:200]) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_ours(path: Path, md5: str) -> bool:
    try:
        facts = json.loads((path / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and facts.get("origin", {}).get("md5") == md5
