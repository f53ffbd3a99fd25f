"""What was trained stays on object storage until MLflow has taken it, whatever name MLflow takes it under."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from jobs.output import last_line
from jobs.tracking import models
from jobs.tracking.outage import through_outage
from jobs.tracking.runs import in_our_words
from storage.errors import NotFound, RefusedInput, StackError, TomoscaleError
from storage.objects import join, open_store

FOLDER = "bundle"
_CARD = "bundle.json"  # lists the others with their digests, and is written last


def store_bundle(bundle: Path, url: str) -> str:
    """Copy a bundle to `<url>/bundle`, in place of an earlier one; returns that URL.

    Args:
        bundle: Directory.
        url: Of the job, `<runs>/<name>`.
    """
    store = open_store(join(url, FOLDER))
    names = [path.relative_to(bundle).as_posix() for path in sorted(bundle.rglob("*")) if path.is_file()]
    for name in sorted(names, key=lambda name: name == _CARD):
        store.put(name, (bundle / name).read_bytes())
    return store.url


def is_stored(url: str) -> bool:
    """Whether a job at this URL has stored a bundle."""
    return open_store(join(url, FOLDER)).exists(_CARD)


def register_stored(
    url: str, name: str, *, run_id: str, command: str, change: Callable[[Path], None] = lambda _bundle: None
) -> str:
    """Register the bundle that a job has stored; returns the version. The same bundle is registered once a name.

    Args:
        url: Of the job, `<runs>/<name>`.
        name: Registered model name.
        run_id: Run that the model belongs to.
        command: What registers it when this fails.
        change: What is done to a copy of the bundle before, the same each time.

    Raises:
        StackError: it could not be registered. It stays where it is, and the message says where and what to do.
        NotFound: no bundle is stored there.
        RefusedInput: it is damaged.
    """
    store = open_store(join(url, FOLDER))
    with tempfile.TemporaryDirectory(prefix="tomoscale-bundle-") as folder:
        target = Path(folder) / FOLDER
        for key in store.list():
            (target / key).parent.mkdir(parents=True, exist_ok=True)
            (target / key).write_bytes(store.get(key))
        if not (target / _CARD).is_file():
            raise NotFound(store.url, expected="a stored bundle", found="none", remedy="run the job under another name")
        change(target)
        return register(target, name, run_id=run_id, place=store.url, command=command)


def register(bundle: Path, name: str, *, run_id: str, place: str, command: str) -> str:
    """`jobs.tracking.models.register`, which waits for MLflow, and whose failure says that nothing trained is lost.

    Args:
        bundle: Directory.
        name: Registered model name.
        run_id: Run that the model belongs to.
        place: Where what was trained stays.
        command: What registers it without training again.

    Raises:
        StackError: it could not be registered.
        RefusedInput: the bundle is damaged.
    """
    try:
        return through_outage(lambda: models.register(bundle, name, run_id=run_id), f"registering {name!r}")
    except RefusedInput:
        raise
    except Exception as error:  # whatever the network did, the reader has to know that hours are not lost
        ours = error if isinstance(error, TomoscaleError) else in_our_words(error)
        raise StackError(
            f"registering {name!r}",
            expected="MLflow to take the model",
            found=last_line(error) if ours is None else ours.found,
            remedy=f"nothing is lost: it stays at {place}, and {command} registers it without training again",
        ) from error
