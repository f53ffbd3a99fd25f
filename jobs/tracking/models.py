"""Models in MLflow: register, pull, list and promote bundles.

A registered model version is one bundle, stored beside `jobs/tracking/model_code.py` so that
`mlflow.pyfunc.load_model` works in an environment with mlflow, torch, monai and what the network's class needs, without
this project. `candidate` is the newest version; `champion` moves only to a version that beat the current one on the
same held-out cases.
"""

import json
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np

from jobs.output import last_line
from jobs.tracking import runs as tracking
from ssl_core.bundle import fingerprint
from ssl_core.downstream.paired_test import compare
from ssl_core.portable.network import PACKAGES
from ssl_core.portable.predictor import check_bundle
from storage.errors import ConfigError, NotFound, RefusedInput, StackError

CANDIDATE, CHAMPION = "candidate", "champion"
_URI = re.compile(r"^(?:models:/)?(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))?$")
_FINGERPRINT = "tomoscale.bundle"


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


@dataclass(frozen=True)
class Evidence:
    """Scores of a version on held-out cases.

    Attributes:
        split: Names the data, the split and what was segmented, such as a manifest's fingerprint, `test` and labels.
        measure: What the scores are; higher is better.
        cases: Case to score; a case is a subject, since the paired test takes cases for independent.
    """

    split: str
    measure: str
    cases: Mapping[str, float]


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
        number = _log(api, bundle, name, card, run_id, tags)
        for key, value in tags.items():
            api.set_model_version_tag(name, number, key, value)
    if number == _versions(api, name)[0].version:
        api.set_registered_model_alias(name, CANDIDATE, number)
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
    import mlflow
    from mlflow.exceptions import MlflowException

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        _quiet()
        try:
            local = Path(mlflow.artifacts.download_artifacts(f"{version.uri}/artifacts/bundle", dst_path=folder))
        except (MlflowException, OSError) as error:
            if version.tags.get(_FINGERPRINT):
                # MLflow keeps a full disk to itself: the room that there is says which of the two it was.
                room = f"{shutil.disk_usage(target.parent).free / 1e6:.1f} MB free in {target.parent}"
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
        check_bundle(local)
        os.rename(local, target)
    return target


def resolve(uri: str) -> Version:
    """The version that a model URI means.

    Raises:
        NotFound: no such model, version or alias.
        ConfigError: not a model URI.
    """
    from mlflow.exceptions import MlflowException

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
            found="none of that name, version or alias",
            remedy="`tomoscale models list` shows what there is",
        ) from error
    return _version(answer, _aliases(api, name))


def list_models(name: str | None = None) -> list[Version]:
    """All registered versions, by name, newest first.

    Args:
        name: Only this model.
    """
    api = tracking.client()
    names = [name] if name else sorted(model.name for model in api.search_registered_models(max_results=1000))
    return [version for each in names for version in _versions(api, each)]


def evidence_of(uri: str) -> Evidence:
    """The evaluation that a version carries in its bundle.

    Raises:
        NotFound: it carries none.
    """
    with tempfile.TemporaryDirectory(prefix="tomoscale-evidence-") as folder:
        path = pull(uri, Path(folder) / "bundle") / "evaluation.json"
        if not path.is_file():
            raise NotFound(
                f"evaluation of {uri}",
                expected="scores of held-out cases in its bundle",
                found="none",
                remedy="promote segmenters that `tomoscale finetune` registered; it scores them and keeps the scores",
            )
        data = json.loads(path.read_text(encoding="utf-8"))
    return Evidence(data["split"], data["measure"], {str(k): float(v) for k, v in data["cases"].items()})


def promote(
    name: str, version: str, evidence: Evidence | None = None, champion_evidence: Evidence | None = None
) -> str:
    """Give a version the alias `champion`, if it beat the current one on the same cases; returns the reason.

    Args:
        name: Registered model.
        version: Version to promote.
        evidence: Its scores; those in its bundle when None.
        champion_evidence: The current champion's scores on the same split; those in its bundle when None.

    Raises:
        ConfigError: another split, other cases, or no significant gain. The alias stays where it is.
        NotFound: no such version, or no evaluation.
    """
    target = resolve(f"models:/{name}/{version}")
    api = tracking.client()
    scores = evidence_of(target.uri) if evidence is None else evidence
    current = next((v for v in _versions(api, name) if CHAMPION in v.aliases), None)
    if not scores.cases or not np.isfinite(list(scores.cases.values())).all():
        raise ConfigError(
            f"evidence for {target.uri}",
            expected="finite scores of at least one case",
            found=str(dict(scores.cases)),
            remedy="score it again",
        )
    if current is None:
        mean = float(np.mean(list(scores.cases.values())))
        reason = f"first champion: mean {scores.measure} {mean:.3f} over {len(scores.cases)} cases of {scores.split}"
    elif current.version == target.version:
        return "it is the champion already"
    else:
        champion_scores = evidence_of(current.uri) if champion_evidence is None else champion_evidence
        reason = _beats(scores, champion_scores, target, current)
    api.set_model_version_tag(name, target.version, "tomoscale.promotion", reason)
    api.set_model_version_tag(name, target.version, "tomoscale.promotion_split", scores.split)
    api.set_registered_model_alias(name, CHAMPION, target.version)
    return reason


def _beats(challenger: Evidence, champion: Evidence, target: Version, current: Version) -> str:
    both = (challenger, champion)
    if len({(item.split, item.measure, frozenset(item.cases)) for item in both}) > 1:
        raise ConfigError(
            f"promotion of {target.uri}",
            expected=f"{champion.measure} on the {len(champion.cases)} cases of {champion.split}, as the champion has",
            found=f"{challenger.measure} on {len(challenger.cases)} cases of {challenger.split}",
            remedy="fine-tune both with one `labelled.data`, `labelled.fingerprint` and `labelled.label`",
        )
    cases = sorted(challenger.cases)
    result = compare(
        np.array([challenger.cases[c] for c in cases]),
        np.array([champion.cases[c] for c in cases]),
        a=f"version {target.version}",
        b=f"champion {current.version}",
        measure=challenger.measure,
    )
    if not result.significant or result.difference <= 0:
        raise ConfigError(
            f"promotion of {target.uri}",
            expected=f"a version that beats the champion {current.uri} in a paired test",
            found=result.statement,
            remedy="keep the champion, or fine-tune both again with more test cases (`labelled.test_limit`)",
        )
    return result.statement


def _log(
    api: Any, bundle: Path, name: str, card: Mapping[str, Any], run_id: str | None, tags: Mapping[str, str]
) -> str:
    """Store the model under its run and create the version; returns its number."""
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    from jobs.tracking.model_params import CONFIG, params_schema  # of code that imports MLflow

    plan = json.loads((bundle / "preprocess.json").read_text(encoding="utf-8"))
    packages = PACKAGES[json.loads((bundle / "architecture.json").read_text(encoding="utf-8"))["class"]]
    if card["kind"] == "segmenter":
        values = [label["value"] for label in plan["labels"]]
        output = TensorSpec(np.dtype(np.uint8 if max(values) < 256 else np.int32), (-1, -1, -1), "mask")
    else:
        output = TensorSpec(np.dtype(np.float32), (-1, -1, -1, -1), "features")
    if run_id is None:
        run_id = tracking.open_run(api, "tomoscale", f"register {name}", "register", params={}, tags=tags)
        api.set_terminated(run_id)
    _quiet()
    with tempfile.TemporaryDirectory(prefix="tomoscale-register-") as folder, warnings.catch_warnings():
        # MLflow predicts the example, of which a predictor says that it is like nothing that it learned from.
        warnings.filterwarnings("ignore", "array: ", UserWarning)
        copy = Path(folder) / "bundle"
        for file in [*card["files"], "bundle.json"]:  # what is listed, without caches of compiled code
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / file, copy / file)
        # Beside its run: without this the artifacts would go to whatever experiment is active in this process.
        experiment = api.get_run(run_id).info.experiment_id
        logged = api.create_logged_model(experiment, name=name, source_run_id=run_id, model_type=card["kind"])
        info = Model.log(
            None,
            mlflow.pyfunc,
            model_id=logged.model_id,
            registered_model_name=name,
            run_id=run_id,
            python_model=str(Path(__file__).with_name("model_code.py")),
            artifacts={"bundle": str(copy)},
            model_config=dict(CONFIG),
            # Only the output is a schema: a path, an array with its affine and lists of both are all inputs.
            signature=ModelSignature(outputs=Schema([output]), params=params_schema()),
            input_example=_example(plan),
            pip_requirements=[f"{package}=={_public(package)}" for package in ("mlflow", "torch", *packages)],
            metadata={"tomoscale_kind": card["kind"]},
        )
    return str(info.registered_model_version)


def _example(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A small ball in the dark, brightest inside, in file order."""
    i, j, k = np.meshgrid(*(np.arange(n) for n in (12, 12, 12)), indexing="ij")
    squared = (i - 5.5) ** 2 + (j - 5.5) ** 2 + (k - 5.5) ** 2
    ball = np.clip(100 - 4 * squared, 0, None).astype(np.float32)  # of one value it would be refused
    image = ball if plan["channels"] == 1 else np.stack([ball] * int(plan["channels"]), axis=-1)
    # It is like no scan: a model that knows what it learned from would refuse it. MLflow wants all values as arrays.
    return {"image": image, "affine": np.eye(4), **({"force": np.array([True])} if plan.get("training") else {})}


def _public(package: str) -> str:
    """Installed version without a local part such as `+cpu`, which no index has."""
    return installed(package).partition("+")[0]


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


def _quiet() -> None:
    """No progress bars where no terminal shows them, and no log of every file that is tried again."""
    for name in ("store.artifact.http_artifact_repo", "utils.file_utils"):
        logging.getLogger(f"mlflow.{name}").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
