"""Whether a run was what its certificate says: signature, links, weights, and any step done again."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.certificate import document, signing
from jobs.certificate.code import code_files
from jobs.pinning import decisive
from jobs.replay.ranks import Span, replay
from jobs.tracking import bundles, models
from ssl_core.train import checkpoint
from ssl_core.train.chain import Chain, Start, canonical_digest, first_difference, weights_digest
from storage.errors import ConfigError, CorruptChunk, NotFound
from storage.objects import ByteStore


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: Such as `signature` or `weights of step 200`.
        ok: Whether it is as the certificate says; None where it could not be told, which `text` explains.
        text: What it is, or what is other than it should be.
    """

    name: str
    ok: bool | None
    text: str


def checks(
    store: ByteStore, certificate: dict[str, Any], *, signer: str | None = None, registered: bool = True
) -> Iterator[Check]:
    """What can be told without training, one after the other.

    Args:
        store: The run's folder.
        certificate: As read.
        signer: The public key that must have signed it, hexadecimal.
        registered: Whether to fetch the registered model from MLflow and look at its weights.
    """
    chain = document.chain_of(certificate)
    yield _signature(certificate, signer)
    yield from _links(certificate, chain)
    yield _code(certificate, chain)
    yield from _checkpoints(store, certificate, chain)
    if certificate["model"] is not None and registered:
        yield _model(certificate["model"])


def step_again(store: ByteStore, certificate: dict[str, Any], step: int, *, whole: bool = False) -> Check:
    """Do a step again from the nearest checkpoint before it, or from the beginning, and compare all links on the way.

    Args:
        store: The run's folder.
        certificate: As read.
        step: The step, counted from 1.
        whole: From the beginning, whatever checkpoints there are.

    Raises:
        ConfigError: the run has no such step, or part of it was trained where this machine's CPU has other bits.
        TomoscaleError: the data or the checkpoint could not be read.
    """
    chain = document.chain_of(certificate)
    if not 1 <= step <= chain.steps:
        raise ConfigError("--step", expected=f"1 to {chain.steps}, the steps of the run", found=str(step))
    near = {number: name for number, name in document.folders(store).items() if number < step and not whole}
    after = max(near, default=0)
    spans = _spans(chain, after, step)
    with tempfile.TemporaryDirectory(prefix="tomoscale-replay-") as folder:
        place: Path | None = None
        if near:
            place = fetch(store, near[after], Path(folder) / "start")
            state, _ = checkpoint.load(place)
            if document.CHAIN not in state:
                raise ConfigError(f"checkpoint {near[after]}", expected="one with a chain of steps", found="none")
        for number, (begin, end, facts) in enumerate(spans):
            target = Path(folder) / f"span-{number}"
            span = Span(
                settings=certificate["settings"],
                fingerprint=chain.what["manifest"],
                restore=None if place is None else str(place),
                after=begin,
                until=end,
                out=str(target),
                world=int(facts["world"]),
                threads=int(facts["threads"]),
            )
            replay(span)
            place = target
        assert place is not None
        again = Chain.from_state(checkpoint.load(place)[0][document.CHAIN])
    difference = first_difference(chain, again, step)
    name = f"replay of steps {after + 1} to {step}"
    if difference is None:
        return Check(name, True, "the same bits: samples, losses, gradient norms, and weights where there is a digest")
    where = f"step {difference.step}: {difference.part}" if difference.step else difference.part
    text = f"{where}: the certificate has {difference.expected}, the replay {difference.actual}"
    return Check(name, False, "; ".join([text, *_reasons(chain, again, difference.step)]))


def fetch(store: ByteStore, folder: str, target: Path) -> Path:
    """Copy a checkpoint from object storage; returns `target`.

    Raises:
        NotFound: there is none.
    """
    keys = [key for key in store.list(f"{folder}/") if key.count("/") == 1]
    if not keys:
        raise NotFound(f"{store.url}/{folder}", expected="a checkpoint", found="none")
    target.mkdir(parents=True)
    for key in keys:
        (target / key.split("/")[1]).write_bytes(store.get(key))
    return target


def _signature(certificate: dict[str, Any], signer: str | None) -> Check:
    signed = certificate["signature"]
    if signed is None:
        return Check("signature", None if signer is None else False, "not signed: anybody could have written it")
    if not signing.is_signed(document.without_signature(certificate), signed):
        return Check("signature", False, f"not that of this text by {signed.get('public_key')}")
    if signer is not None and signed["public_key"] != signer:
        return Check("signature", False, f"by {signed['public_key']}, not by {signer}")
    trust = "" if signer else "; whose key that is, --signer FILE checks"
    return Check("signature", True, f"by {signed['public_key']}{trust}")


def _links(certificate: dict[str, Any], chain: Chain) -> Iterator[Check]:
    head = certificate["chain"]["head"]
    if chain.head() != head:
        yield Check("chain", False, f"its links lead to {chain.head()}, not to the head {head}")
    else:
        yield Check("chain", True, f"{chain.steps} steps, head {head}")
    settings = certificate["settings"]
    digest = canonical_digest(decisive(settings))
    same = digest == chain.what["configuration"]
    text = digest if same else f"the settings have digest {digest}, the chain {chain.what['configuration']}"
    yield Check("configuration", same, text)
    if chain.steps != settings["engine"]["steps"]:
        yield Check("steps", False, f"{chain.steps} in the chain, {settings['engine']['steps']} in the settings")


def _code(certificate: dict[str, Any], chain: Chain) -> Check:
    before, now = certificate["code"]["files"], code_files()
    commit = f" of commit {certificate['code']['commit']}" if certificate["code"]["commit"] else ""
    if before is None:
        return Check("code", None, f"{chain.starts[-1].facts['code']}, which was not that of the job's driver")
    if canonical_digest(before) != chain.starts[-1].facts["code"]:
        return Check("code", False, "the list of files is not that of the chain")
    others = _others(before, now)
    if not others:
        return Check("code", True, f"{len(now)} files{commit}, the same as these")
    return Check("code", None, f"this is another version than the run's{commit}: {_listed(others)}")


def _checkpoints(store: ByteStore, certificate: dict[str, Any], chain: Chain) -> Iterator[Check]:
    for item in certificate["checkpoints"]:
        name, is_last = f"checkpoint {item['folder']}", item["step"] == chain.steps
        try:
            files = document.files_of(store, item["folder"])
            others = _others(item["files"], files)
            if others:
                yield Check(name, False, f"other contents than certified: {_listed(others)}")
            elif is_last:
                yield from _last(store, name, item["folder"], chain)
            else:
                yield Check(name, True, f"{len(files)} files")
        except NotFound:
            yield Check(name, False if is_last else None, "not there any more")
        except CorruptChunk as error:
            yield Check(name, False, str(error))


def _last(store: ByteStore, name: str, folder: str, chain: Chain) -> Iterator[Check]:
    with tempfile.TemporaryDirectory(prefix="tomoscale-verify-") as place:
        state, _ = checkpoint.load(fetch(store, folder, Path(place) / "last"))
    digest, expected = weights_digest(state["method"]), chain.weights.get(chain.steps)
    same = digest == expected
    yield Check(f"weights of {name}", same, digest if same else f"{digest}, where the chain has {expected}")
    own = Chain.from_state(state[document.CHAIN])
    same = own.head() == chain.head()
    yield Check(f"chain of {name}", same, "the certificate's" if same else f"leads to {own.head()}")


def _model(model: dict[str, Any]) -> Check:
    uri = f"models:/{model['name']}/{model['version']}"
    try:
        with tempfile.TemporaryDirectory(prefix="tomoscale-verify-") as place:
            digest = weights_digest(bundles.read_encoder(models.pull(uri, Path(place) / "bundle")).weights)
    except NotFound:
        return Check(uri, False, "not registered any more")
    same = digest == model["weights"]
    return Check(uri, same, f"weights {digest}" if same else f"weights {digest}, certified were {model['weights']}")


def _spans(chain: Chain, after: int, until: int) -> list[tuple[int, int, dict[str, Any]]]:
    """First step done, last step and facts of each part that was trained in one way.

    Raises:
        ConfigError: one of them was not trained on a CPU, or in shards.
    """
    spans: list[tuple[int, int, dict[str, Any]]] = []
    following: list[Start | None] = [*chain.starts[1:], None]
    for start, later in zip(chain.starts, following, strict=True):
        begin, end = max(start.step, after), min(until, until if later is None else later.step)
        if begin >= end:
            continue
        facts = dict(start.facts)
        if facts["device"] != "cpu":
            raise ConfigError(
                f"replay of steps {begin + 1} to {end}",
                expected="steps that were trained on a CPU",
                found=f"a {facts['device']} device ({facts['processor']}), whose sums have other bits",
                remedy="leave --step out: signature, chain and weights can be checked anywhere",
            )
        if "sharding" in facts:
            raise ConfigError(
                f"replay of steps {begin + 1} to {end}",
                expected="steps that were trained with engine.sharding none",
                found=f"{facts['sharding']}, where gradient norms are added up in another order",
                remedy="leave --step out: signature, chain and weights can be checked anywhere",
            )
        spans.append((begin, end, facts))
    return spans


def _reasons(chain: Chain, again: Chain, step: int) -> list[str]:
    """What may be behind other bits: what else was other when the step was trained."""
    then = [item.facts for item in chain.starts if item.step < max(step, 1)][-1]
    now = again.starts[-1].facts
    others = [key for key in then if then[key] != now.get(key)]
    return [
        "the code is another version" if key == "code" else f"{key} then {then[key]}, now {now.get(key)}"
        for key in others
    ]


def _others(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names whose digest is another, or that one of them lacks."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
