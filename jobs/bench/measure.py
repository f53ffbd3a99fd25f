"""What every benchmark shares: spreads, the machine's facts, tables, and the S3 environment."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from storage.errors import ConfigError
from storage.objects.aws import resolve

_VERSIONS = (
    *("numpy", "zarr", "s3fs", "obstore", "numcodecs", "fsspec", "tensorstore", "zarrs", "blosc2", "h5py", "nibabel"),
    *("isal", "torch", "monai", "torchio", "mosaicml-streaming"),
)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def machine() -> dict[str, Any]:
    """Processor, cores, memory, operating system and the versions of what is compared."""
    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "load_1min": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


def peak_mib(process: int | str = "self") -> float:
    """Most resident memory of a process so far, MiB; 0 of one that has ended.

    Not `ru_maxrss`, in which a process begins with the peak of the one that started it.
    """
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0) / 1024


def read_result(path: Path, key: str) -> dict[str, Any]:
    """A JSON file that another command wrote.

    Args:
        path: The file.
        key: What such a result has.

    Raises:
        ConfigError: no such file, no JSON, or that of something else.
    """
    thing, expected = str(path), f"a JSON result with {key!r}"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(thing, expected=expected, found=str(error.strerror), remedy="check the path") from error
    except ValueError as error:  # what JSON is not, and what UTF-8 is not
        raise ConfigError(thing, expected=expected, found=str(error), remedy="check the path") from error
    if not isinstance(result, dict) or key not in result:
        found = ", ".join(result) if isinstance(result, dict) else type(result).__name__
        raise ConfigError(thing, expected=expected, found=found[:120] or "no keys", remedy="check the path")
    return result


def headline(facts: Mapping[str, Any]) -> str:
    """The machine and the versions, as two paragraphs."""
    head = f"{facts['processor']}, {facts['cores']} cores, Python {facts['python']}, load {facts['load_1min']}"
    return f"{head}\n\n" + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table that also reads as plain text; `columns` maps keys of the rows to headings."""
    cells = [list(columns.values())] + [[_text(row.get(key)) for key in columns] for row in rows]
    widths = [max(len(line[c]) for line in cells) for c in range(len(columns))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


@contextmanager
def s3_environment(endpoint: str | None) -> Iterator[None]:
    """The AWS environment of this process with `endpoint` and plain static keys, which every client understands."""
    access = resolve("the benchmark's S3 store")
    keys = access.credential()
    environment = {
        "AWS_ACCESS_KEY_ID": keys["access_key_id"],
        "AWS_SECRET_ACCESS_KEY": keys["secret_access_key"],
        "AWS_SESSION_TOKEN": keys["token"],
        "AWS_REGION": access.region,
        "AWS_DEFAULT_REGION": access.region,
        "AWS_ENDPOINT_URL_S3": endpoint,
    }
    before = {name: os.environ.get(name) for name in environment}
    try:
        _set(environment)
        yield
    finally:
        _set(before)


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Keep this thread, and threads and processes started under it, on so many cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[:count]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def s3_endpoint() -> str | None:
    """Where the environment says that S3 is; None for AWS itself."""
    return resolve("the benchmark's S3 store").endpoint


def select(names: Sequence[str] | None, available: Sequence[str]) -> list[str]:
    """The peers that are named, or all.

    Raises:
        ConfigError: an unknown name; lists the available ones.
    """
    for name in names or ():
        if name not in available:
            raise ConfigError(f"peer {name!r}", expected=f"one of {', '.join(available)}", found=name)
    return [name for name in available if names is None or name in names]


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{_number(value['median'])} [{_number(value['low'])}, {_number(value['high'])}]"
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
