"""Checkpoints: a directory that is whole or not there, that says what it holds, and that is checked when read.

```
<dir>/manifest.json            format, version, the caller's `meta`, size and SHA-256 of every other file
<dir>/state.json               the tree of the state; scalars in place, tensors by reference
<dir>/<group>.safetensors      the tensors under one top-level key of the state: `method`, `optimizer`, ...
```

Nothing in it is executable: no pickle. The directory is written under another name and renamed when complete.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from storage.errors import ConfigError, CorruptChunk, NotFound, StoreError

FORMAT = "tomoscale-checkpoint"
VERSION = 1
_MANIFEST, _STATE = "manifest.json", "state.json"
_RESTORE = "resume from an earlier checkpoint, or copy this one again from where it was written"


def save(path: str | Path, state: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
    """Write `state` to the directory `path`, replacing a checkpoint of that name only when the new one is complete.

    Args:
        path: Directory to make. Its parents are made too.
        state: Nested dicts (string keys) and lists of tensors, numbers, strings, booleans and None.
        meta: JSON-able facts to read without the tensors: step, stream position, config digest, fingerprint.

    Returns:
        `path`.

    Raises:
        StoreError: the file system refused, for example because it is full; nothing of that name has changed.
        ConfigError: `state` or `meta` holds something that has no place in the format; names the key.
    """
    path = Path(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    storages: dict[str, set[int]] = {}
    tree = {_key(k, ""): _describe(v, str(k), str(k), tensors, storages) for k, v in state.items()}
    try:
        facts = json.loads(json.dumps(dict(meta), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError("checkpoint meta", expected="JSON-able values", found=str(error)) from error
    temporary = path.parent / f".{path.name}.tmp-{uuid.uuid4().hex[:12]}"
    try:
        for left in path.parent.glob(f".{path.name}.tmp-*"):  # of a writer that was killed; a name has one writer
            shutil.rmtree(left)
        temporary.mkdir(parents=True)
        _write_text(temporary / _STATE, tree)
        for group, group_tensors in tensors.items():
            safetensors.torch.save_file(group_tensors, temporary / f"{group}.safetensors")
        files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "version": VERSION, "meta": facts, "files": files}
        _write_text(temporary / _MANIFEST, {**manifest, "sha256": _own_digest(manifest)})
        for file in temporary.iterdir():
            _flush(file)
        _flush_folder(temporary)
        _put_in_place(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        need = sum(t.nbytes for group_tensors in tensors.values() for t in group_tensors.values())
        raise StoreError(
            f"checkpoint {path}",
            expected=f"room and permission to write {need / 2**20:.1f} MiB",
            found=str(error),
            remedy="free space or choose another directory; the previous checkpoint is untouched",
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path


class Buffers:
    """Tensors on the host that one snapshot after another is copied into.

    They are made once: training waits for the copy, and fresh memory takes longer to get than to fill.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def filled(self, name: str, source: Tensor) -> Tensor:
        """The tensor of that name, equal to `source` from now on; a new one where type or shape is another."""
        source = source.detach()
        tensor = self._tensors.get(name)
        if tensor is None or (tensor.dtype, tensor.shape) != (source.dtype, source.shape):
            tensor = self._tensors[name] = torch.empty_like(source, device="cpu")
        tensor.copy_(source)
        return tensor


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A checkpoint before it is written: as long as it is held, training may go on.

    Attributes:
        state: See `save`; tensors on the host that nobody else changes.
        meta: See `save`.
    """

    state: Mapping[str, Any]
    meta: Mapping[str, Any]

    @classmethod
    def of(cls, state: Mapping[str, Any], meta: Mapping[str, Any], buffers: "Buffers | None" = None) -> "Snapshot":
        """A copy of a live state.

        Args:
            state: See `save`.
            meta: See `save`.
            buffers: Memory for the tensors, those of the snapshot before this one, which is then used up.
        """
        buffers = Buffers() if buffers is None else buffers
        return cls({key: _copy(value, str(key), buffers) for key, value in state.items()}, dict(meta))

    def save(self, path: str | Path) -> Path:
        """Write it; see `save`."""
        return save(path, self.state, self.meta)


def load(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read and verify a checkpoint: `(state, meta)`, tensors on the CPU, equal bit for bit to what was saved.

    Raises:
        NotFound: there is no checkpoint at `path`, or a file of it is missing.
        CorruptChunk: a file's size or digest is not what the manifest says, or cannot be parsed.
        StoreError: written by a newer version of the format.
    """
    path = _existing(Path(path))
    manifest = _read_manifest(path)
    for name, facts in manifest["files"].items():
        _verify(path / name, facts)
    tensors = {
        file.stem: safetensors.torch.load_file(file)
        for file in (path / name for name in manifest["files"])
        if file.suffix == ".safetensors"
    }
    tree = _read_json(path / _STATE)
    return {k: _restore(v, tensors) for k, v in tree.items()}, manifest["meta"]


def read_meta(path: str | Path) -> dict[str, Any]:
    """The `meta` of a checkpoint without reading its tensors. Raises as `load` does."""
    meta: dict[str, Any] = _read_manifest(_existing(Path(path)))["meta"]
    return meta


def require_same(meta: Mapping[str, Any], allow: bool = False, **identity: Any) -> list[str]:
    """Refuse to resume with another configuration or other data than the checkpoint's.

    Args:
        meta: What the checkpoint says.
        allow: Whether differences are accepted; they are then returned, to be logged.
        **identity: What this run has, such as `config_digest` and `fingerprint`.

    Returns:
        A line for each difference.

    Raises:
        ConfigError: a value differs and `allow` is not set.
    """
    other = [(k, meta.get(k), v) for k, v in identity.items() if meta.get(k) != v]
    if other and not allow:
        name, recorded, expected = other[0]
        raise ConfigError(
            f"checkpoint's {name}",
            expected=f"{expected!r}, as in this run",
            found=repr(recorded),
            remedy="start a new run under another name, or allow the change explicitly",
        )
    return [f"{name}: checkpoint has {recorded!r}, this run has {expected!r}" for name, recorded, expected in other]


def _copy(value: Any, name: str, buffers: Buffers) -> Any:
    if isinstance(value, Tensor):
        return buffers.filled(name, value)
    if isinstance(value, Mapping):
        return {key: _copy(item, f"{name}/{key}", buffers) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item, f"{name}/{i}", buffers) for i, item in enumerate(value)]
    return value


def _key(key: Any, prefix: str) -> str:
    if not isinstance(key, str) or not key or key.startswith(("$", ".")) or "/" in key:
        raise ConfigError(f"state key {prefix}{key!r}", expected="a name without '/' or a leading '$' or '.'")
    return key


def _describe(
    value: Any, name: str, group: str, tensors: dict[str, dict[str, Tensor]], storages: dict[str, set[int]]
) -> Any:
    """JSON for `value`; puts its tensors into `tensors[group]` under their full names, their memory into `storages`."""
    if isinstance(value, Tensor):
        group_tensors = tensors.setdefault(group, {})
        flat = value.detach().cpu().contiguous()
        # The format has no shared memory: a tied or sliced tensor is written out.
        group_storages = storages.setdefault(group, set())
        if flat.untyped_storage().nbytes() != flat.nbytes or flat.untyped_storage().data_ptr() in group_storages:
            flat = flat.clone()
        group_storages.add(flat.untyped_storage().data_ptr())
        group_tensors[name] = flat
        return {"$tensor": name, "in": group}
    if isinstance(value, Mapping):
        return {_key(k, f"{name}/"): _describe(v, f"{name}/{k}", group, tensors, storages) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_describe(v, f"{name}/{i}", group, tensors, storages) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"state {name!r}", expected="tensors, numbers, strings, lists or dicts", found=type(value).__name__
    )


def _restore(node: Any, tensors: Mapping[str, Mapping[str, Tensor]]) -> Any:
    if isinstance(node, list):
        return [_restore(v, tensors) for v in node]
    if not isinstance(node, dict):
        return node
    if "$tensor" in node:
        return tensors[node["in"]][node["$tensor"]]
    if "$float" in node:
        return float(node["$float"])
    return {k: _restore(v, tensors) for k, v in node.items()}


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`. A checkpoint already there waits under another name, where `load` finds it."""
    old = _aside(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    temporary.rename(path)
    _flush_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.parent / f".{path.name}.old"


def _existing(path: Path) -> Path:
    if not path.is_dir() and _aside(path).is_dir():
        return _aside(path)  # a crash between the two renames of a replacement
    if not (path / _MANIFEST).is_file():
        raise NotFound(f"checkpoint {path}", expected=f"a directory with {_MANIFEST}", found="none", remedy=_RESTORE)
    return path


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_json(path / _MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CorruptChunk(f"{path / _MANIFEST}", expected=f"format {FORMAT!r}", found="another", remedy=_RESTORE)
    version = manifest.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise StoreError(
            f"checkpoint {path}",
            expected=f"format version {VERSION} or older",
            found=f"version {version}",
            remedy="update tomoscale to the version that wrote it",
        )
    if manifest.get("sha256") != _own_digest(manifest):
        change = "another digest: it was edited or damaged"
        raise CorruptChunk(f"{path / _MANIFEST}", expected="its own SHA-256", found=change, remedy=_RESTORE)
    return manifest


def _verify(file: Path, facts: Mapping[str, Any]) -> None:
    if not file.is_file():
        raise NotFound(f"checkpoint file {file}", expected=f"{facts['bytes']} bytes", found="no file", remedy=_RESTORE)
    size = file.stat().st_size
    if size != facts["bytes"]:
        length = f"{size} bytes"
        raise CorruptChunk(f"checkpoint file {file}", expected=f"{facts['bytes']} bytes", found=length, remedy=_RESTORE)
    digest = _sha256(file)
    if digest != facts["sha256"]:
        raise CorruptChunk(
            f"checkpoint file {file}", expected=f"SHA-256 {facts['sha256']}", found=digest, remedy=_RESTORE
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptChunk(f"checkpoint file {file}", expected="JSON", found=str(error), remedy=_RESTORE) from error


def _write_text(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _own_digest(manifest: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in manifest.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _flush(path: Path) -> None:
    # A rename may reach the disk before the bytes it names.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot flush a directory
        _flush(path)


def require_same_tensors(what: str, own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Refuse a state whose tensors are not those of the method that is to have it.

    Raises:
        ConfigError: names the first that is missing, new, or of another shape or dtype.
    """
    for name in sorted(own.keys() | other.keys()):
        expected = "none" if name not in own else f"{tuple(own[name].shape)} {own[name].dtype}"
        actual = "none" if name not in other else f"{tuple(other[name].shape)} {other[name].dtype}"
        if expected != actual:
            raise ConfigError(
                f"checkpoint's {what} tensor {name!r}",
                expected=expected,
                found=actual,
                remedy="resume with the method and network that wrote it",
            )
