"""A certificate: what it says is so, and each thing that is not so is told by name; captures run alone."""

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from jobs.certificate import captures, code, document, signing
from jobs.certificate.captures import Captures
from jobs.cli.main import main
from jobs.configs import PretrainConfig
from jobs.pretrain import evidence as evidence_of
from jobs.pretrain import loop
from jobs.pretrain.loop import Hooks, SampleRecord, Take, run
from jobs.replay import verify
from jobs.replay.capture import run_alone
from ssl_core.config import parse, resolved
from ssl_core.train import chain as chains
from ssl_core.train import checkpoint
from ssl_core.train.chain import Chain
from ssl_core.train.engine import Engine, NonFiniteError
from ssl_core.train.spikes import Spikes
from storage.errors import ConfigError
from storage.objects import open_store
from storage.stream.crop_stream import HostBatch
from tests.kit.networks import SMALL
from tests.kit.phantoms import write_phantoms
from tests.kit.pretraining import CPU, config

STEPS = 9


def job(data: str) -> PretrainConfig:
    plain = resolved(config(data, "simclr", log_every=9))
    plain["method"] |= {"crops": {**plain["method"]["crops"], "size_DHW": [16, 16, 16]}}
    return parse(PretrainConfig, plain | {"backbone": {"name": "resenc", "arguments": SMALL["resenc"]}})


def train(settings: PretrainConfig, folder: Path, restore: Path | None = None, **hooks: Any) -> None:
    """As `torchrun` does: checkpoints and the certificate lie in the run's folder."""

    def publish(step: int, take: Take | None, _metrics: dict[str, float]) -> None:
        assert take is not None
        take().save(folder / f"step-{step:08d}")

    run(settings, Hooks(publish=publish, **hooks), restore=restore, device=CPU)
    document.issue_from(open_store(folder.as_uri()), folder / f"step-{STEPS:08d}", "t", resolved(settings))


@dataclass(frozen=True)
class Run:
    """A run with its certificate, made once; tests change copies of it."""

    settings: PretrainConfig
    folder: Path

    def certificate(self) -> dict[str, Any]:
        return document.read(open_store(self.folder.as_uri()))

    def copy(self, target: Path) -> "Run":
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                place = target / path.relative_to(self.folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(path.read_bytes())
        return Run(self.settings, target)

    def different(self, **options: Any) -> dict[str, str]:
        results = verify.checks(open_store(self.folder.as_uri()), self.certificate(), **options)
        return {check.name: check.text for check in results if check.ok is False}

    def again(self, step: int, **options: Any) -> verify.Check:
        return verify.step_again(open_store(self.folder.as_uri()), self.certificate(), step, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"file://{tmp_path_factory.mktemp('store')}"
    write_phantoms(url, 8)
    return url


@pytest.fixture(scope="module")
def calm(data: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("calm")
    train(job(data), folder)
    return Run(job(data), folder)


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ed25519PrivateKey:
    own = Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = own.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "public.pem").write_bytes(public)
    monkeypatch.setenv(signing.KEY_VARIABLE, str(tmp_path / "key.pem"))
    return own


def flip(folder: Path) -> str:
    """Change the last bit of a weight of a checkpoint, digests of its files included; returns the tensor's name."""
    state, meta = checkpoint.load(folder)
    name = "projector.0.weight"  # a tensor with one name: of the network's, a second name would bring back the bit
    state["method"][name].view(-1).view(torch.int32)[0] ^= 1
    checkpoint.save(folder, state, meta)
    return name


def test_any_step_is_done_again_with_the_same_bits(calm: Run) -> None:
    assert not calm.different()
    near, whole = calm.again(7), calm.again(2)
    assert (near.name, near.ok) == ("replay of steps 5 to 7", True)
    assert (whole.name, whole.ok) == ("replay of steps 1 to 2", True)
    with pytest.raises(ConfigError, match="1 to 9"):
        calm.again(10)


def test_a_run_that_goes_on_has_the_certificate_of_the_undisturbed_one(calm: Run, tmp_path: Path) -> None:
    turns = iter(range(5))
    early = Hooks(
        publish=lambda step, take, _metrics: take().save(tmp_path / f"step-{step:08d}") and None,  # type: ignore[misc]
        stop=lambda: next(turns, None) is None,
    )
    assert run(calm.settings, early, restore=calm.folder / "step-00000004", device=CPU)["steps"] == STEPS
    train(calm.settings, tmp_path / "again", calm.folder / "step-00000004")
    again = Run(calm.settings, tmp_path / "again").certificate()
    assert again["chain"] == calm.certificate()["chain"]
    assert again["rows"] == calm.certificate()["rows"]


def test_a_flipped_bit_of_a_weight_is_told(calm: Run, tmp_path: Path) -> None:
    last = calm.copy(tmp_path / "last")
    flip(last.folder / f"step-{STEPS:08d}")
    different = last.different()
    assert list(different) == [f"checkpoint step-{STEPS:08d}"]
    assert "method.safetensors" in different[f"checkpoint step-{STEPS:08d}"]
    # As if the certificate had been made after it.
    store, chain = open_store(last.folder.as_uri()), document.chain_of(calm.certificate())
    document.issue(store, "t", resolved(last.settings), chain)
    assert f"weights of checkpoint step-{STEPS:08d}" in last.different()
    # In the middle of training: told by the first step that depends on it, or by the next digest of the weights.
    middle = calm.copy(tmp_path / "middle")
    flip(middle.folder / "step-00000004")
    train(middle.settings, middle.folder, middle.folder / "step-00000004")
    assert not middle.different()
    check = middle.again(STEPS, whole=True)
    assert check.ok is False
    assert re.match(r"step [5-9]: (loss|gradient norm|weights): ", check.text)


def test_a_swapped_sample_is_told(calm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SampleRecord.add

    def swapped(record: SampleRecord, batch: HostBatch, collectives: Any) -> None:
        if batch.sample_B[0] == 8:  # of the third step
            batch.image_BCDHW[[0, 1]] = batch.image_BCDHW[[1, 0]]
        plain(record, batch, collectives)

    with monkeypatch.context() as patch:
        patch.setattr(SampleRecord, "add", swapped)
        train(calm.settings, tmp_path)
    other = Run(calm.settings, tmp_path)
    assert not other.different()
    assert other.again(2).ok
    check = other.again(3)
    assert check.ok is False
    assert check.text.startswith("step 3: samples: ")


def test_another_version_of_the_code_is_told(calm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {**code.code_files(), "ssl_core/train/engine.py": "0" * 64}
    monkeypatch.setattr(verify, "code_files", lambda: files)
    results = verify.checks(open_store(calm.folder.as_uri()), calm.certificate())
    check = next(check for check in results if check.name == "code")
    assert check.ok is None
    assert check.text.endswith(": ssl_core/train/engine.py")
    # Code that trains otherwise: what differs, and that the code is another.
    monkeypatch.setattr(evidence_of, "environment", lambda *_: {**code.environment(CPU, "fp32", 1), "code": "0" * 64})
    monkeypatch.setattr(Engine, "_rates", lambda _self: (1e-4, 0.0))
    check = calm.again(2)
    assert check.ok is False
    assert check.text.startswith("step 2: ")
    assert "the code is another version" in check.text


def test_every_edit_of_a_certificate_is_told(calm: Run, tmp_path: Path, key: Ed25519PrivateKey) -> None:
    copy = calm.copy(tmp_path / "run")
    store = open_store(copy.folder.as_uri())
    chain = document.chain_of(copy.certificate())
    document.issue(store, "t", resolved(copy.settings), chain)
    public = key.public_key().public_bytes_raw().hex()
    assert copy.certificate()["signature"]["public_key"] == public
    assert not copy.different(signer=public)
    assert copy.different(signer="0" * 64) == {"signature": f"by {public}, not by {'0' * 64}"}
    text = (copy.folder / document.KEY).read_text()
    secret = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    assert secret.hex() not in text
    assert str(tmp_path / "key.pem") not in text

    other_chain = chains.Chain.of(chain.facts(), bytes(chain.rows))
    other_chain.rows[50] ^= 1
    edits: list[tuple[dict[str, Any], str]] = [
        ({"rows": base64.b64encode(other_chain.rows).decode()}, "chain"),
        ({"settings": resolved(job("file:///elsewhere"))}, "configuration"),
        ({"chain": {**chain.facts(), "what": {**chain.what, "manifest": "0"}}}, "chain"),
        ({"code": {"commit": None, "files": {}}}, "code"),
    ]
    for edit, name in edits:
        document.put(store, {**document.without_signature(copy.certificate()), **edit}, copy.certificate()["signature"])
        assert set(copy.different()) >= {"signature", name}
        (copy.folder / document.KEY).write_text(text)


def test_a_signed_certificate_stays_when_its_run_is_sent_again(
    calm: Run, tmp_path: Path, key: Ed25519PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = calm.copy(tmp_path / "run")
    monkeypatch.delenv(signing.KEY_VARIABLE)
    command = ["verify-run", "run", "--runs", tmp_path.as_uri()]
    assert main([*command, "--sign", str(tmp_path / "key.pem")]) == 0
    assert copy.certificate()["signature"] is not None
    train(copy.settings, copy.folder, copy.folder / f"step-{STEPS:08d}")
    assert copy.certificate()["signature"] is not None
    assert main([*command, "--signer", str(tmp_path / "public.pem")]) == 0


def test_verify_run_ends_with_0_1_or_2(calm: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = calm.copy(tmp_path / "run")
    command = ["verify-run", "run", "--runs", tmp_path.as_uri(), "--json"]
    assert main([*command, "--step", "6"]) == 0
    results = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert results["signature"]["ok"] is None
    assert results["replay of steps 5 to 6"]["ok"]
    assert main([*command, "--step", "0"]) == 2
    assert main(["verify-run", "other", "--runs", tmp_path.as_uri()]) == 2
    assert "a run that has not ended" in capsys.readouterr().err
    (tmp_path / "wrong.pem").write_text("no key")
    assert main([*command, "--sign", str(tmp_path / "wrong.pem")]) == 2
    assert "no key" not in capsys.readouterr().err
    flip(copy.folder / "step-00000004")
    assert main(command) == 1


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"device": "cuda", "processor": "x86_64 H"}, "trained on a CPU; found a cuda device"),
        ({"sharding": "full"}, "engine.sharding none; found full"),
    ],
)
def test_a_step_of_a_gpu_or_in_shards_is_not_compared_on_a_cpu(
    facts: dict[str, str], words: str, calm: Run, tmp_path: Path
) -> None:
    copy = calm.copy(tmp_path)
    chain = document.chain_of(copy.certificate())
    how = {**chain.starts[0].facts, **facts}
    other = Chain({**chain.what}, starts=[chains.Start(0, how)], rows=chain.rows, weights=chain.weights)
    document.issue(open_store(copy.folder.as_uri()), "t", resolved(copy.settings), other)
    with pytest.raises(ConfigError, match=words):
        copy.again(6)


def test_a_checkpoint_without_a_chain_goes_on_without_one_and_says_so(
    calm: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, meta = checkpoint.load(calm.folder / "step-00000004")
    del state[document.CHAIN]
    checkpoint.save(tmp_path / "old", state, meta)
    lines: list[str] = []
    train(calm.settings, tmp_path / "run", tmp_path / "old", say=lines.append)
    assert any("will have no certificate" in line for line in lines)
    assert "no certificate: " in capsys.readouterr().out
    assert not (tmp_path / "run" / document.KEY).exists()
    one, two = (checkpoint.load(place / f"step-{STEPS:08d}")[0] for place in (calm.folder, tmp_path / "run"))
    assert all(torch.equal(tensor, two["method"][name]) for name, tensor in one["method"].items())


def poisoned(monkeypatch: pytest.MonkeyPatch, sample: int, value: float) -> None:
    """Give one sample's batch an offset, as of a scan with a wrong scale."""
    plain = SampleRecord.add

    def add(record: SampleRecord, batch: HostBatch, collectives: Any) -> None:
        if sample in batch.sample_B.tolist():
            batch.offset_B[:] = np.float32(value)
        plain(record, batch, collectives)

    monkeypatch.setattr(SampleRecord, "add", add)


def test_a_loss_that_is_not_finite_leaves_a_capture_that_runs_alone(
    calm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(monkeypatch, 9, np.nan)
    lines: list[str] = []
    for _ in range(2):  # met again when the run is sent again: one capture
        with pytest.raises(NonFiniteError):
            train(calm.settings, tmp_path, captures=Captures(tmp_path.as_uri(), lines.append))
    assert len(lines) == 1
    assert lines[0].startswith("step 3: loss nan, captured; `tomoscale replay ")
    assert [path.name for path in (tmp_path / captures.FOLDER).iterdir()] == ["1"]
    replay = run_alone(tmp_path / captures.FOLDER / "1")
    assert (replay.step, replay.samples, replay.reason) == (3, (8, 9, 10, 11), "not finite")
    assert replay.is_same
    assert replay.where is not None
    assert replay.where.startswith("views: ")
    assert main(["replay", (tmp_path / captures.FOLDER / "1").as_uri()]) == 0
    assert "first value that is not finite: views: " in capsys.readouterr().out


def test_the_module_where_a_value_stops_being_finite_is_named(
    calm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = loop.build_engine

    def built(*arguments: Any, **named: Any) -> Engine:
        engine = plain(*arguments, **named)
        with torch.no_grad():
            [m for m in engine.method.modules() if isinstance(m, torch.nn.Conv3d)][2].weight.fill_(3e38)
        return engine

    monkeypatch.setattr(loop, "build_engine", built)
    with pytest.raises(NonFiniteError):
        train(calm.settings, tmp_path, captures=Captures(tmp_path.as_uri(), print))
    replay = run_alone(tmp_path / captures.FOLDER / "1")
    names = [n for n, m in plain(calm.settings, CPU).method.named_modules() if isinstance(m, torch.nn.Conv3d)]
    assert replay.where == f"forward pass: output of {names[2]} (Conv3d)"


def test_a_spike_leaves_a_capture_with_the_bits_of_its_step(
    calm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spikes, "is_spike", lambda _self, loss: loss > 0)
    lines: list[str] = []
    train(calm.settings, tmp_path, captures=Captures(tmp_path.as_uri(), lines.append))
    assert len(lines) == 1, "one of an excursion"
    replay = run_alone(tmp_path / captures.FOLDER / "1")
    assert (replay.step, replay.reason, replay.where) == (1, "spike", None)
    assert replay.is_same
    assert sum(replay.terms.values()) == pytest.approx(replay.loss, rel=1e-6)
    assert Run(calm.settings, tmp_path).certificate()["chain"] == calm.certificate()["chain"]


def test_a_run_has_two_captures_at_most_and_a_store_that_fails_ends_nothing(calm: Run, tmp_path: Path) -> None:
    state, meta = checkpoint.load(calm.folder / "step-00000004")
    lines: list[str] = []
    writer = Captures(tmp_path.as_uri(), lines.append)
    for step in (3, 3, 5, 7):
        facts = {**meta, "step": step, "rank": 0, "loss": "nan"}
        writer.put(checkpoint.Snapshot({"batch": state["engine"]}, facts), wait=True)
    assert [line.split(":")[0] for line in lines] == ["step 3", "step 5"]
    (tmp_path / "file").write_text("")
    blocked = Captures((tmp_path / "file").as_uri(), lines.append)
    blocked.put(checkpoint.Snapshot({}, {"step": 1, "rank": 0, "loss": "nan"}), wait=True)
    assert "not captured" in lines[-1]
