"""The seal between search and test: settings are recorded for good before a test volume can be read.

Until then nothing can read one: pre-training and search open a manifest that was written without the test split. The
choice is written once, and every tested training reads its settings and the whole manifest from it.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from jobs.configs import LabelledConfig
from jobs.configs.study import StudyConfig
from jobs.labelled import WITHOUT_TEST
from ssl_core.config import digest, parse
from storage.errors import ConfigError, NotFound, RefusedInput
from storage.format.manifest import Manifest
from storage.objects import ByteStore, open_store

KEY = "choice.json"


def without_test(data: str, manifest: Manifest, scored: Collection[str] = ()) -> str:
    """Write the manifest without its test split beside it, the published one staying; returns its fingerprint.

    Args:
        data: URL of the store.
        manifest: The whole one.
        scored: Further subjects that it is to be without.

    Raises:
        StoreError: the store cannot be written.
    """
    records = [record for record in manifest.records() if record.split != "test" and record.subject not in scored]
    facts = {**manifest.dataset, WITHOUT_TEST: manifest.fingerprint}
    sealed = Manifest.from_records(records, facts)
    try:
        return Manifest.open(data, sealed.fingerprint).fingerprint
    except NotFound:
        return sealed.write_aside(open_store(data))


def seal(store: ByteStore, choice: Mapping[str, Any]) -> dict[str, Any]:
    """Record the choice for good; returns it with its digest.

    Args:
        store: Of the study, `<runs>/<name>`.
        choice: Settings by start and count, and the data that will be tested on.

    Raises:
        RefusedInput: another choice was recorded before, after which the test may have been read.
    """
    sealed = {**choice, "digest": _digest(choice)}
    if store.put(KEY, json.dumps(sealed, indent=1).encode(), if_absent=True):
        return sealed
    before = read(store)
    if _held(before) != _held(sealed):
        raise RefusedInput(
            f"{store.url}/{KEY}",
            expected=f"the choice that the test was opened with, digest {before['digest']}",
            found=f"another one, digest {sealed['digest']}",
            remedy="a choice that changes after the test was seen proves nothing: run the study under another name",
        )
    return before


def read(store: ByteStore) -> dict[str, Any]:
    """The recorded choice.

    Raises:
        NotFound: none is recorded, so the test stays shut.
        RefusedInput: it is not what its digest says.
    """
    try:
        sealed: dict[str, Any] = json.loads(store.get(KEY))
    except NotFound as error:
        raise NotFound(
            f"{store.url}/{KEY}",
            expected="the recorded choice of settings, before a test volume is read",
            found="none",
            remedy="let the study search first: `tomoscale study CONFIG`",
        ) from error
    content = {key: value for key, value in sealed.items() if key != "digest"}
    if sealed.get("digest") != _digest(content):
        raise RefusedInput(
            f"{store.url}/{KEY}",
            expected=f"the choice of digest {sealed.get('digest')}",
            found=f"digest {_digest(content)}: it was changed after it was recorded",
            remedy="run the study under another name",
        )
    return sealed


def open_test(url: str, spec: Mapping[str, Any], start: str, labels: int) -> LabelledConfig:
    """The subjects of a tested training, test volumes included: the only way to them.

    Args:
        url: Of the study, `<runs>/<name>`.
        spec: Of the cell.
        start: Name of its start.
        labels: Its count, as the study says it.

    Raises:
        NotFound: no choice is recorded.
        ConfigError: the cell's settings or data are not those of the choice.
    """
    sealed = read(open_store(url))
    settings = sealed["settings"].get(start, {}).get(str(labels))
    finetune, labelled = spec["finetune"], spec["labelled"]
    expected = None if settings is None else {"lr": settings["lr"], "steps": settings["whole_steps"]}
    steps = finetune["epochs"] * finetune["steps_per_epoch"]
    if expected != {"lr": finetune["lr"], "steps": steps} or labelled["fingerprint"] != sealed["fingerprint"]:
        raise ConfigError(
            f"test of {start} with {labels} labels",
            expected=f"the recorded settings {expected} on manifest {sealed['fingerprint']}",
            found=f"lr {finetune['lr']:g}, {steps} steps on {labelled['fingerprint']}",
            remedy="run the study under another name for other settings",
        )
    return parse(LabelledConfig, labelled, "labelled subjects")


def _held(choice: Mapping[str, Any]) -> dict[str, Any]:
    """What of a choice must stay, the same for a version that has more settings (`ssl_core.config.LATER`)."""
    kept = {key: value for key, value in choice.items() if key not in ("digest", "study")}
    # A choice that was read has lists where one that was made has tuples.
    return {**json.loads(json.dumps(kept)), "study": digest(parse(StudyConfig, choice["study"], "the recorded study"))}


def _digest(choice: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(choice, sort_keys=True).encode()).hexdigest()[:16]
