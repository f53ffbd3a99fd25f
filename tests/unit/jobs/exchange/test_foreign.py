"""A checkpoint of nnU-Net's shape becomes an encoder that training starts from, or nothing is written."""

from pathlib import Path

import pytest
import torch
import yaml

from jobs.cli.main import main
from jobs.tracking.bundles import pull_encoder
from ssl_core.downstream.transfer import Start, build_segmenter
from ssl_core.networks import build
from ssl_core.networks.weights import load_exact
from tests.kit.networks import SMALL
from tests.kit.small_models import resenc

MAP = {
    "name": "elsewhere",
    "backbone": {"name": "resenc", "arguments": {k: list(v) for k, v in SMALL["resenc"].items()}},
    "rename": {"module.encoder.": "encoder.", "module.decoder.encoder.": "decoder.encoder."},
    "drop": ["module.decoder."],
    "patch_DHW": [16, 16, 16],
    "notes": ["Licence: of those who made it."],
}


def _files(folder: Path, changes: dict[str, object] | None = None, **tensors: torch.Tensor) -> list[str]:
    weights = {f"module.{name}": tensor for name, tensor in resenc(4).net.state_dict().items()} | tensors
    torch.save({"network_weights": weights, "nnssl_adaptation_plan": {}, "citations": []}, folder / "c.pth")
    (folder / "map.yaml").write_text(yaml.safe_dump(MAP | (changes or {})))
    return [str(folder / "c.pth"), str(folder / "out"), "--from", "nnssl", "--map", str(folder / "map.yaml")]


def test_a_checkpoint_becomes_an_encoder_that_training_starts_from(tmp_path: Path) -> None:
    assert main(["models", "import", *_files(tmp_path)]) == 0
    encoder = pull_encoder(str(tmp_path / "out"))
    network = build(encoder.backbone, **encoder.arguments)
    report = load_exact(network.net, encoder.weights, network.encoder_keys())  # as pre-training and fine-tuning do
    own = resenc(4).net.state_dict()
    assert len(report.matched) == len(network.encoder_keys())
    assert all(torch.equal(encoder.weights[key], own[key]) for key in network.encoder_keys())
    assert encoder.lineage["imported_from"] == "nnssl"
    assert encoder.intensity.kind == "zscore"
    assert "Licence: of those who made it." in (tmp_path / "out/MODEL_CARD.md").read_text()


def test_a_decoder_comes_along_where_the_map_asks_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = {
        "decoder": True,
        "rename": {"module.encoder.": "encoder.", "module.decoder.": "decoder."},
        "drop": ["module.decoder.seg_layers."],
    }
    assert main(["models", "import", *_files(tmp_path, rules)]) == 0
    encoder, own = pull_encoder(str(tmp_path / "out")), resenc(4).net.state_dict()
    start = Start("elsewhere", encoder.weights, encoder.rest, transfer="encoder_decoder")
    network = build_segmenter(encoder.backbone, encoder.arguments, 3, 0, start).net.state_dict()
    assert all(torch.equal(network[key], own[key]) for key in own if "seg_layers" not in key)
    (tmp_path / "out").rename(tmp_path / "first")
    assert main(["models", "import", *_files(tmp_path, {"decoder": True})]) == 1
    assert "missing: decoder." in capsys.readouterr().err


def test_what_does_not_match_to_the_last_tensor_is_not_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = {k: list(v) for k, v in SMALL["resenc"].items()} | {"features_per_stage": [4, 8, 16]}
    cases: list[tuple[dict[str, object], dict[str, torch.Tensor], int, str]] = [
        ({"drop": ["module.decoder.stages."]}, {}, 2, "a rule of `rename` or `drop` for it"),
        ({}, {"module.encoder.more": torch.zeros(1)}, 1, "1 unexpected: encoder.more"),
        ({"backbone": {"arguments": wide}}, {}, 1, "of another shape"),
        ({"rename": {"module.encoder.stem.": "encoder.stem."}, "drop": ["module."]}, {}, 1, "missing"),
        ({"ranme": {}}, {}, 2, "ranme"),
    ]
    for changes, tensors, code, message in cases:
        assert main(["models", "import", *_files(tmp_path, changes, **tensors)]) == code, message
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    words = _files(tmp_path)
    torch.save({"model": {}}, tmp_path / "c.pth")
    assert main(["models", "import", *words]) == 3
    assert "tensors below 'network_weights'; found model" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.pth", "map.yaml"]
