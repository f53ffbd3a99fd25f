"""Models in MLflow: register, pull and list bundles, and their aliases.

A registered model version is one bundle, stored beside `jobs/tracking/model_code.py` so that
`mlflow.pyfunc.load_model` works in an environment with mlflow, torch, monai and what the network's class needs, without
this project. `candidate` is the newest version; `champion` is moved by `jobs.tracking.promotion`.
"""

import difflib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.output import last_line
from jobs.tracking import runs as tracking
from jobs.tracking.model_entry import describe, log_model, quiet
from ssl_core.bundle import fingerprint
from ssl_core.portable.predictor import check_bundle
from storage.errors import ConfigError, NotFound, RefusedInput, StackError

CANDIDATE, CHAMPION = "candidate", "champion"
_URI = re.compile(r"^(?:models:/)?(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))?$")
_LOGGED_MODEL = re.compile(r"models:/(m-[^/]+)")
_FINGERPRINT, _HISTORY = "tomoscale.bundle", "tomoscale.history."
_LONGEST_HISTORY = 100  # of an alias; our choice


@dataclass(frozen=True)
class Version:
    """One registered version.

    Attributes:
        name: Registered model.
        version: Number, as MLflow writes it.
        aliases: Such as `candidate`.
        tags: Kind, bundle fingerprint and lineage, under `tomoscale.*`.
        run_id: The run that made it; may be empty.
        created_ms: Since the epoch.
    """

    name: str
    version: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    run_id: str
    created_ms: int

    @property
    def uri(self) -> str:
        """`models:/name/version`."""
        return f"models:/{self.name}/{self.version}"


def register(bundle: Path, name: str, *, run_id: str | None = None) -> str:
    """Register a bundle and give it the alias `candidate`; returns the version.

    The same bundle under the same name is registered once, so that a restarted job does not double it; where newer
    versions have come since, the alias stays with the newest.

    Args:
        bundle: Directory.
        name: Registered model name.
        run_id: Run that the model belongs to; stays as it is, running or finished. A new one when None.

    Raises:
        StackError: MLflow is away.
        RefusedInput: the bundle is damaged.
    """
    card = check_bundle(bundle)
    api = tracking.client()
    digest = fingerprint(bundle)
    number = next((v.version for v in _versions(api, name) if v.tags.get(_FINGERPRINT) == digest), None)
    if number is None:
        tags = {f"tomoscale.{key}": str(value) for key, value in card["lineage"].items()}
        tags |= {"tomoscale.kind": card["kind"], _FINGERPRINT: digest}
        number = log_model(api, bundle, name, card, run_id, tags)
    describe(api, bundle, name, number)
    if number == _versions(api, name)[0].version:
        set_alias(api, name, CANDIDATE, number)
    return number


def pull(uri: str, target: Path) -> Path:
    """Download a bundle and check every digest; returns `target`.

    Args:
        uri: `models:/name@alias`, `models:/name/3`, or either without `models:/`; a bare name is its candidate.
        target: Directory to create.

    Raises:
        NotFound: no such model, version or alias.
        ConfigError: the URI is none, or the target exists.
        RefusedInput: what came does not match its digests.
    """
    if target.exists():
        raise ConfigError(
            str(target), expected="a new directory", found="one that exists", remedy="remove it or name another"
        )
    version = resolve(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        local = _download(version, "", Path(folder))
        check_bundle(local)
        os.rename(local, target)
    return target


def file_of(version: Version, name: str) -> bytes:
    """One file of a version's bundle, without the others.

    Raises:
        RefusedInput: another kind of model.
        StackError: the artifact store does not give it.
    """
    with tempfile.TemporaryDirectory(prefix="tomoscale-file-") as folder:
        return _download(version, f"/{name}", Path(folder)).read_bytes()


def _download(version: Version, name: str, folder: Path) -> Path:
    """The bundle of a version, or with `/NAME` one of its files, below a folder that is there."""
    import mlflow
    from mlflow.exceptions import MlflowException

    quiet()
    try:
        return Path(mlflow.artifacts.download_artifacts(f"{version.uri}/artifacts/bundle{name}", dst_path=str(folder)))
    except (MlflowException, OSError) as error:
        if version.tags.get(_FINGERPRINT):
            # MLflow keeps a full disk to itself: the room that there is says which of the two it was.
            room = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB free in {folder.parent}"
            raise StackError(
                f"artifacts of {version.uri}",
                expected="a download from MLflow's artifact store to a disk with room for it",
                found=f"{last_line(error).rstrip('.')}, and {room}",
                remedy="free space there or check the artifact store (`tomoscale doctor`), then pull again",
            ) from error
        raise RefusedInput(
            version.uri,
            expected="a model registered by tomoscale",
            found="another kind of model",
            remedy="download it with `mlflow artifacts download`",
        ) from error


def resolve(uri: str) -> Version:
    """The version that a model URI means.

    Raises:
        NotFound: no such model, version or alias.
        ConfigError: not a model URI.
    """
    match = _URI.match(uri)
    if match is None:
        raise ConfigError(
            f"model {uri!r}",
            expected="models:/NAME@ALIAS or models:/NAME/VERSION",
            found="another form",
            remedy="`tomoscale models list` shows what there is",
        )
    name, number = match["name"], match["version"]
    api = tracking.client()
    from mlflow.exceptions import MlflowException

    try:
        if number is None:
            number = api.get_model_version_by_alias(name, match["alias"] or CANDIDATE).version
        answer = api.get_model_version(name, str(number))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise NotFound(
            f"model {uri!r}",
            expected="a registered model",
            found=_instead(api, name),
            remedy="`tomoscale models list` shows what there is",
        ) from error
    return _version(answer, _aliases(api, name))


def model_id_of(uri: str) -> str | None:
    """MLflow's id of the logged model behind a registered version; None of `none`, a folder, a URL or what has none."""
    if uri == "none" or "://" in uri or Path(uri).is_absolute() or Path(uri).is_dir():
        return None
    version = resolve(uri)
    # The version's own `model_id` is not served; what it was made of is.
    source = str(tracking.client().get_model_version(version.name, version.version).source)
    match = _LOGGED_MODEL.fullmatch(source)
    return match[1] if match else None


def _instead(api: Any, name: str) -> str:
    """What there is in place of a name, version or alias that is not there."""
    names = [model.name for model in api.search_registered_models(max_results=1000)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        return "none of that name" + (f"; near ones are {', '.join(near)}" if near else "")
    versions = sorted((int(v.version) for v in _versions(api, name)), reverse=True)
    numbers = ", ".join(map(str, versions[:8])) + (", ..." if len(versions) > 8 else "")
    aliases = ", ".join(sorted(api.get_registered_model(name).aliases))
    return f"none of that version or alias; {name} has versions {numbers or '-'} and aliases {aliases or '-'}"


def list_models(name: str | None = None) -> list[Version]:
    """All registered versions, by name, newest first.

    Args:
        name: Only this model.
    """
    api = tracking.client()
    names = [name] if name else sorted(model.name for model in api.search_registered_models(max_results=1000))
    return [version for each in names for version in _versions(api, each)]


def set_alias(api: Any, name: str, alias: str, version: str) -> None:
    """Move an alias, and note which versions it has had, the newest last.

    What it has now is noted before it moves, so that a death in between loses nothing.
    """
    history, now = alias_history(api, name, alias)
    if now == version:
        return
    if now is not None and history[-1:] != [now]:
        history.append(now)
        note_history(api, name, alias, history)
    api.set_registered_model_alias(name, alias, version)
    note_history(api, name, alias, [*history, version])


def alias_history(api: Any, name: str, alias: str) -> tuple[list[str], str | None]:
    """Versions that an alias has had, as far as they were noted, and the one that it has; None where it has none."""
    model = api.get_registered_model(name)
    now = model.aliases.get(alias)
    text = model.tags.get(_HISTORY + alias)
    return [str(v) for v in json.loads(text)] if text else [], None if now is None else str(now)


def note_history(api: Any, name: str, alias: str, history: list[str]) -> None:
    """Keep the newest of it in a tag of the registered model."""
    api.set_registered_model_tag(name, _HISTORY + alias, json.dumps(history[-_LONGEST_HISTORY:]))


def _exists(api: Any, name: str) -> bool:
    # A name that is no query's business to quote; the list is short.
    return any(model.name == name for model in api.search_registered_models(max_results=1000))


def _versions(api: Any, name: str) -> list[Version]:
    if not _exists(api, name):
        return []
    aliases = _aliases(api, name)
    versions = [_version(v, aliases) for v in api.search_model_versions(f"name='{name}'", max_results=1000)]
    return sorted(versions, key=lambda v: -int(v.version))


def _aliases(api: Any, name: str) -> dict[str, list[str]]:
    aliases: dict[str, list[str]] = {}
    for alias, number in api.get_registered_model(name).aliases.items():
        aliases.setdefault(str(number), []).append(alias)
    return aliases


def _version(answer: Any, aliases: Mapping[str, list[str]]) -> Version:
    number = str(answer.version)
    names = tuple(sorted(aliases.get(number, ())))
    return Version(answer.name, number, names, dict(answer.tags), answer.run_id or "", int(answer.creation_timestamp))
