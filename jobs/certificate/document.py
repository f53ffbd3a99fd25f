"""The certificate: one JSON file beside the checkpoints, which holds the whole chain of a run.

```
format, version     tomoscale-certificate, 1
name                of the run
settings            the resolved configuration
chain               what, every, starts, weights, head: see `ssl_core.train.chain`
rows                48 bytes a step, base64
checkpoints         of those that lay beside it: step, folder, SHA-256 of each file
model               registered name and version, digest of the encoder's weights; null where none was registered
run_id              of MLflow, or null
code                commit, where git knew it, and SHA-256 of each file; null where the driver had other code
signature           algorithm, public key, value; null where nobody has signed
```
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jobs.certificate import signing
from jobs.certificate.code import code_digest, code_files
from jobs.tracking.runs import code_tags
from ssl_core.train import checkpoint
from ssl_core.train.chain import ROW, Chain
from storage.errors import ConfigError, CorruptChunk, NotFound
from storage.objects import ByteStore

KEY = "certificate.json"
CHAIN = "chain"
"""Of a checkpoint's state."""
FORMAT, VERSION = "tomoscale-certificate", 1
_SIGNATURE = "signature"


@dataclass(frozen=True)
class Model:
    """What was registered of a run: name, version, and digest of the encoder's weights."""

    name: str
    version: str
    weights: str


def issue(
    store: ByteStore,
    name: str,
    settings: Mapping[str, Any],
    chain: Chain,
    *,
    model: Model | None = None,
    run_id: str | None = None,
) -> dict[str, Any]:
    """Write the certificate of a run that has ended, signed where there is a key; returns it.

    A run that is sent again after its end leaves the same certificate, with the signature that it has.

    Args:
        store: The run's folder, in which its checkpoints lie.
        name: Of the run.
        settings: Its resolved configuration.
        chain: From its last checkpoint.
        model: What was registered.
        run_id: Its run in MLflow.

    Raises:
        ConfigError: the file of the key is none.
        StoreError: it could not be written.
    """
    before = read(store) if store.exists(KEY) else None
    body = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "settings": dict(settings),
        "chain": chain.facts(),
        "rows": base64.b64encode(chain.rows).decode(),
        "checkpoints": [_described(store, folder) for folder in folders(store).values()],
        "model": None if model is None else {"name": model.name, "version": model.version, "weights": model.weights},
        "run_id": run_id,
        "code": _code(chain, before),
    }
    body = cast(dict[str, Any], json.loads(json.dumps(body)))
    key = signing.own_key()
    if key is None and before is not None and without_signature(before) == body:
        return before
    return put(store, body, None if key is None else signing.signature(key, body))


def issue_from(
    store: ByteStore, last: Path, name: str, settings: Mapping[str, Any], **of_run: Any
) -> dict[str, Any] | None:
    """`issue` with the chain in the last checkpoint; None, said in the log, where that has none.

    Args:
        store: The run's folder.
        last: Directory of the last checkpoint.
        name: Of the run.
        settings: Its resolved configuration.
        **of_run: `model` and `run_id` of `issue`.
    """
    state, _ = checkpoint.load(last)
    if CHAIN not in state:
        print("no certificate: a version that kept no chain of steps began this run", flush=True)
        return None
    document = issue(store, name, settings, Chain.from_state(state[CHAIN]), **of_run)
    signer = document[_SIGNATURE]
    how = f"signed by {signer['public_key']}" if signer else f"not signed, as {signing.KEY_VARIABLE} names no key"
    print(f"certificate {store.url}/{KEY}, {how}", flush=True)
    return document


def put(store: ByteStore, body: dict[str, Any], signed: dict[str, str] | None) -> dict[str, Any]:
    """Write a document with its signature; returns both together."""
    document = {**body, _SIGNATURE: signed}
    store.put(KEY, json.dumps(document, indent=1).encode())
    return document


def read(store: ByteStore) -> dict[str, Any]:
    """The certificate in a run's folder; whether it is right is not looked at.

    Raises:
        ConfigError: there is none.
        CorruptChunk: it is not one, or of a newer version.
    """
    try:
        document = json.loads(store.get(KEY))
    except NotFound as error:
        raise ConfigError(
            f"{store.url}/{KEY}",
            expected="the certificate of a pre-training that has ended",
            found="none",
            remedy="give the name of the job, and with --runs the URL that its `runs` says; a run that has not ended, "
            "or that a version without certificates began, has none",
        ) from error
    except ValueError as error:
        raise CorruptChunk(f"{store.url}/{KEY}", expected="JSON", found=str(error)) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("version") != VERSION:
        found = "another document or a newer version"
        raise CorruptChunk(f"{store.url}/{KEY}", expected=f"a {FORMAT} of version {VERSION}", found=found)
    return document


def chain_of(document: Mapping[str, Any]) -> Chain:
    """The chain that a certificate holds.

    Raises:
        CorruptChunk: its parts are not of the form.
    """
    try:
        rows = base64.b64decode(document["rows"], validate=True)
        if len(rows) % ROW:
            raise ValueError(f"{len(rows)} bytes of rows")
        if not document["chain"]["starts"]:
            raise ValueError("no start")
        return Chain.of(document["chain"], rows)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptChunk(f"chain of {KEY}", expected="steps of 48 bytes", found=str(error)) from error


def without_signature(document: Mapping[str, Any]) -> dict[str, Any]:
    """What is signed."""
    return {key: value for key, value in document.items() if key != _SIGNATURE}


def folders(store: ByteStore) -> dict[int, str]:
    """Folders of the whole checkpoints in a run's folder, by step, ascending."""
    names = [key.split("/")[0] for key in store.list("step-") if key.count("/") == 1 and key.endswith("/manifest.json")]
    return {int(name.removeprefix("step-")): name for name in sorted(names)}


def files_of(store: ByteStore, folder: str) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint, as its own manifest has them."""
    files = json.loads(store.get(f"{folder}/manifest.json"))["files"]
    return {name: str(facts["sha256"]) for name, facts in sorted(files.items())}


def _described(store: ByteStore, folder: str) -> dict[str, Any]:
    return {"step": int(folder.removeprefix("step-")), "folder": folder, "files": files_of(store, folder)}


def _code(chain: Chain, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Commit and files of the code that trained, where it is at hand: a later version may end the job."""
    if code_digest() == chain.starts[-1].facts["code"]:
        return {"commit": code_tags().get("mlflow.source.git.commit"), "files": code_files()}
    if before is not None and before["chain"] == chain.facts():
        return dict(before["code"])
    return {"commit": None, "files": None}
