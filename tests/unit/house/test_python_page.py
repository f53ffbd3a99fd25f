"""The Python of README and `docs/python.md` runs as it stands, and the names that the page promises exist."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from ssl_core.bundle import write_bundle
from tests.kit import ROOT
from tests.kit.bundles import FEATURES, facts, network, scan
from tests.kit.phantoms import write_phantoms
from tests.kit.small_models import encoder_bundle

PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(PAGE)
JOB = f"""
name: page
data: elsewhere
method: {{name: simclr, crops: {{size_DHW: [16, 32, 16]}}, hidden: 16, out: 8}}
backbone: {{name: basic_unet, arguments: {{features: {list(FEATURES)}}}}}
stream: {{global_batch: 4, lanes: 4}}
engine: {{steps: 9, warmup_steps: 1, checkpoint_every: 1}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_shows_an_example_of_the_page() -> None:
    assert BLOCK.findall(README) == BLOCKS[1:2]
    assert len(BLOCKS[1].splitlines()) <= 18, "it is meant to fit a screen"


def test_an_encoder_with_its_preprocessing_is_loaded_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder_bundle(folder / "bundle")
    scan(folder, (12, 14, 16)).rename(folder / "scan.nii.gz")
    exec(compile(BLOCKS[0], "docs/python.md", "exec"), {})
    assert capsys.readouterr().out == "(8, 4, 3, 4) (4, 8, 8) ((1, 1, 1), (2, 2, 2), (4, 4, 4))\n"


def test_a_store_is_read_and_views_are_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_phantoms("volumes", 5, shape=(48, 64, 48))
    names: dict[str, object] = {}
    exec(compile(BLOCKS[1], "docs/python.md", "exec"), names)
    assert capsys.readouterr().out.startswith("torch.Size([4, 1, 32, 48, 32])\ntensor([[")
    assert isinstance(names["one"].image_BCDHW, torch.Tensor)  # type: ignore[attr-defined]


def test_an_encoder_is_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(folder / "bundle", "encoder", network(1), facts(labels=()))
    exec(compile(BLOCKS[2], "docs/python.md", "exec"), {})
    assert capsys.readouterr().out.startswith("basic_unet [(1, 1, 1), (2, 2, 2)")


def test_a_scan_is_predicted(folder: Path) -> None:
    write_bundle(folder / "bundle", "segmenter", network(), facts())
    scan(folder).rename(folder / "scan.nii.gz")
    names: dict[str, object] = {}
    exec(compile(BLOCKS[3], "docs/python.md", "exec"), names)
    assert names["mask"].shape == (36, 30, 41)  # type: ignore[attr-defined]


def test_a_method_is_trained(folder: Path) -> None:
    write_phantoms("volumes", 5)
    (folder / "pretrain.yaml").write_text(JOB)
    exec(compile(BLOCKS[4], "docs/python.md", "exec"), {})
    assert len(BLOCKS) == 5, "each example of the page has a test here"


def test_every_promised_name_is_where_the_page_says() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ((?:`[\w.]+`(?:, )?)+) \|", PAGE, re.MULTILINE)
    assert len(rows) > 10
    for names, modules in rows:
        homes = [importlib.import_module(name) for name in re.findall(r"`([\w.]+)`", modules)]
        for name in re.findall(r"`(\w+)`", names):
            assert any(hasattr(home, name) for home in homes), f"{name} is not in {modules}"
