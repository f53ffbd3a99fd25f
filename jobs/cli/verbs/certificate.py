"""verify-run, replay: what a run's certificate says is checked, and a captured step is run alone."""

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.cli.verbs.common import add_json, add_state, use_stack
from jobs.output import emit, table
from storage.errors import ConfigError, TomoscaleError
from storage.objects import join, open_store

if TYPE_CHECKING:
    from jobs.replay.capture import Replay


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verbs."""
    verify = verbs.add_parser(
        "verify-run",
        help="check the certificate of a pre-training, or do a step of it again",
        epilog="Exit codes: 0 equal, 1 different, 2 usage, or it could not be told.",
    )
    verify.add_argument("name", help="name of the pre-training")
    verify.add_argument("--runs", default="s3://runs", metavar="URL", help="the job's `runs` (default: s3://runs)")
    verify.add_argument("--step", type=int, metavar="K", help="train from the nearest checkpoint to step K and compare")
    verify.add_argument("--from-start", action="store_true", help="with --step: from the first step, not a checkpoint")
    verify.add_argument("--signer", type=Path, metavar="FILE", help="Ed25519 public key that must have signed it")
    verify.add_argument("--sign", type=Path, metavar="FILE", help="where all is equal, sign it with this private key")
    verify.add_argument("--no-model", action="store_true", help="leave the registered model out, and MLflow with it")
    add_json(verify)
    add_state(verify)
    verify.set_defaults(run=_verify)

    replay = verbs.add_parser("replay", help="run one captured step alone: its loss, and where it goes wrong")
    replay.add_argument("capture", help="URL or folder of a capture, as the job's log names it")
    add_json(replay)
    add_state(replay)
    replay.set_defaults(run=_replay)


def _verify(arguments: argparse.Namespace) -> int:
    try:
        return _verified(arguments)
    except TomoscaleError as error:
        print(f"tomoscale: {error}", file=sys.stderr)
        return 2  # 1 says that something is different, which is not what happened


def _verified(arguments: argparse.Namespace) -> int:
    from jobs.certificate import document, signing
    from jobs.replay import verify
    from jobs.tracking import runs

    if arguments.from_start and arguments.step is None:
        raise ConfigError("--from-start", expected="--step K beside it", found="none")
    signer = None if arguments.signer is None else signing.public_key(arguments.signer, "--signer")
    key = None if arguments.sign is None else signing.private_key(arguments.sign, "--sign")
    use_stack(arguments)
    store = open_store(join(arguments.runs, arguments.name))
    certificate = document.read(store)
    results = []
    try:
        for check in verify.checks(store, certificate, signer=signer, registered=not arguments.no_model):
            results.append(check)
        if arguments.step is not None:
            results.append(verify.step_again(store, certificate, arguments.step, whole=arguments.from_start))
    finally:
        words = {True: "equal", False: "DIFFERENT", None: "-"}
        text = table(("what", "is", "detail"), [(check.name, words[check.ok], check.text) for check in results])
        emit([asdict(check) for check in results], arguments.json, text)
    if any(check.ok is False for check in results):
        return 1
    if key is not None:
        body = document.without_signature(certificate)
        signed = signing.signature(key, body)
        certificate = document.put(store, body, signed)
        if certificate["run_id"] is not None and not arguments.no_model:
            runs.client().log_dict(certificate["run_id"], certificate, document.KEY)
        print(f"signed by {signed['public_key']}: {store.url}/{document.KEY}", file=sys.stderr)
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from jobs.replay import capture, verify

    if Path(arguments.capture).is_dir():
        return _shown(arguments, capture.run_alone(Path(arguments.capture)))
    use_stack(arguments)
    parent, _, name = arguments.capture.rstrip("/").rpartition("/")
    with tempfile.TemporaryDirectory(prefix="tomoscale-capture-") as folder:
        return _shown(arguments, capture.run_alone(verify.fetch(open_store(parent), name, Path(folder) / "capture")))


def _shown(arguments: argparse.Namespace, replay: "Replay") -> int:
    limit = "" if replay.threshold is None else f", threshold {replay.threshold:.6g}"
    lines = [
        f"step {replay.step}, captured as {replay.reason}{limit}; samples {', '.join(map(str, replay.samples))}",
        f"loss {replay.loss!r}, in training {replay.captured_loss!r}" + (": the same bits" if replay.is_same else ""),
        *(f"  {name} {value!r}" for name, value in replay.terms.items()),
        f"first value that is not finite: {replay.where or 'none'}",
        *(f"note: {note}" for note in replay.notes),
    ]
    emit(asdict(replay) | {"same": replay.is_same}, arguments.json, "\n".join(lines))
    return 0
