"""The batch of predictions between URLs, without Ray: masks are whole, of one model, and made once."""

import csv
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from jobs.cli.main import main
from jobs.predict import folder, objects
from jobs.predict.config import PredictJobConfig
from ssl_core.config import dump_yaml
from ssl_core.portable import Predictor
from ssl_core.portable.head.assess import assess
from storage.errors import ConfigError
from storage.objects import open_store
from storage.reading.slabs import StoredSlabs
from storage.reading.volume_store import VolumeStore
from tests.kit.bundles import scan
from tests.kit.phantoms import write_phantoms
from tests.kit.small_models import head_bundle, segmenter_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segmenter_bundle(tmp_path_factory.mktemp("b") / "bundle")


@pytest.fixture
def in_process(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Commands run here, and what they were; a pull copies the bundle."""
    commands: list[str] = []

    def run(*words: str) -> str:
        commands.append(words[0])
        if words[0] == "models":
            target = Path(words[-1])
            for path in (path for path in bundle.rglob("*.*") if path.is_file() and "__pycache__" not in path.parts):
                (target / path.relative_to(bundle)).parent.mkdir(parents=True, exist_ok=True)
                (target / path.relative_to(bundle)).write_bytes(path.read_bytes())
            return ""
        code = main(list(words))
        return "" if code == 0 else capsys.readouterr().err.strip().splitlines()[-1]

    monkeypatch.setattr(folder, "_tomoscale", run)
    monkeypatch.setattr(folder, "on_cluster", lambda predict, items, *_: ((item, predict(item)) for item in items))
    return commands


def test_files_below_a_url_get_masks_below_another(
    bundle: Path, in_process: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in/more").mkdir(parents=True)
    paths = [scan(tmp_path / "in", (17, 16, 18)), scan(tmp_path / "in/more", (17, 16, 18), seed=1)]
    (tmp_path / "in/bad.nii").write_bytes(b"no volume")
    (tmp_path / "in/notes.txt").write_bytes(b"-")
    scans, masks = (tmp_path / "in").as_uri(), (tmp_path / "out").as_uri()
    assert folder.main(["models:/m/1", scans, masks]) == 3
    assert "1 of 3 volumes have no mask: bad.nii" in capsys.readouterr().err
    predictor = Predictor(bundle, "cpu", lambda _note: None)
    for path in paths:
        mask = nib.load(tmp_path / "out" / path.relative_to(tmp_path / "in"))
        assert np.array_equal(np.asanyarray(mask.dataobj), predictor.predict(path))
    assert in_process == ["models", "predict", "predict", "predict"]
    (tmp_path / "in/bad.nii").unlink()
    (tmp_path / "out/more/scan-1.nii.gz").unlink()
    config = PredictJobConfig(model="models:/m/1", scans=scans, masks=masks)
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert folder.main([str(tmp_path / "config.yaml")]) == 0
    assert in_process[4:] == ["predict"], "what was there is left, and the model with it"
    assert folder.main(["models:/m/2", scans, masks]) == 2
    assert folder.main(["models:/m/1", scans, scans]) == 2
    assert in_process[5:] == []


def test_volumes_of_a_store_get_masks_below_a_url(bundle: Path, in_process: list[str], tmp_path: Path) -> None:
    url, masks = (tmp_path / "store").as_uri(), (tmp_path / "out").as_uri()
    write_phantoms(url, 4, shape=(16, 18, 17))
    assert folder.main(["models:/m/1", url, masks, "--split", "test"]) == 0
    (name,) = [key for key in open_store(masks).list() if key.endswith(".nii.gz")]
    with VolumeStore(url) as store:
        record = store.manifest.record(3)
        assert name == f"{record.volume_id}.nii.gz"
        affine = np.array(record.affine).reshape(4, 4)
        expected = Predictor(bundle, "cpu", lambda _note: None).segment(
            StoredSlabs(store, record.volume_id), affine, record.stats
        )
    mask = np.asanyarray(nib.load(tmp_path / "out" / name).dataobj)
    assert np.array_equal(mask.transpose(2, 1, 0), expected)
    every = objects.find(url, masks)
    assert [s.volume for s in objects.due(every, masks)] == [f"phantom-{n:03d}" for n in range(3)]


@pytest.mark.parametrize("urls", [True, False])
def test_a_classifier_writes_a_row_a_scan_and_one_table(
    in_process: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    urls: bool,
) -> None:  # fmt: skip
    model = head_bundle(tmp_path / "model")
    working = folder._tomoscale

    def pulled(*words: str) -> str:
        if words[0] == "models":
            shutil.copytree(model, words[-1], dirs_exist_ok=True)
            return ""
        return working(*words)

    monkeypatch.setattr(folder, "_tomoscale", pulled)
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    paths = [scan(tmp_path / "in", (17, 16, 18), seed=seed) for seed in range(3)]
    (tmp_path / "in/bad.nii").write_bytes(b"no volume")
    scans, masks = ((tmp_path / name).as_uri() if urls else str(tmp_path / name) for name in ("in", "out"))
    assert folder.main(["models:/m/1", scans, masks]) == 3
    shown = capsys.readouterr()
    assert "1 of 4 volumes have no row" in shown.err
    assert "3 of 4 volumes in predictions.csv" in shown.out
    with (tmp_path / "out/predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["scan"] for row in rows] == sorted(path.name for path in paths)
    predictor = Predictor(model, "cpu", lambda _note: None)
    for row, path in zip(rows, sorted(paths), strict=True):
        said = assess(predictor, path)
        assert row == {"scan": path.name, **{key: str(value) for key, value in said.items()}}
    (tmp_path / "in/bad.nii").unlink()
    commands = len(in_process)
    assert folder.main(["models:/m/1", scans, masks]) == 0
    assert len(in_process) == commands, "what was there is left"


def test_a_place_without_scans_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="or volumes of a store; found none"):
        objects.find((tmp_path / "empty").as_uri(), (tmp_path / "out").as_uri())
    with pytest.raises(ConfigError, match="--split"):
        objects.find((tmp_path / "empty").as_uri(), (tmp_path / "out").as_uri(), "test")


def test_a_mask_that_cannot_be_made_has_its_reason(tmp_path: Path) -> None:
    make = objects.mask_of("b", (tmp_path / "in").as_uri(), (tmp_path / "out").as_uri(), (), lambda *_: "")
    assert "a.nii" in make(objects.RemoteScan("a.nii", "a.nii"))


def test_an_output_behind_a_url_becomes_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import submit
    from jobs.cli.verbs import predict as verb

    sent: list[tuple[str, str, object]] = []
    monkeypatch.setattr(verb, "use_stack", lambda _arguments: None)
    monkeypatch.setattr(
        submit, "run", lambda address, module, config, _name, **_: sent.append((address, module, config))
    )
    words = ["predict", "models:/m/1", "s3://scans/in", "s3://scans/out", "--address", "http://jobs", "--gpus", "1"]
    assert main(words) == 0
    config = PredictJobConfig(model="models:/m/1", scans="s3://scans/in", masks="s3://scans/out", gpus=1)
    assert sent == [("http://jobs", "jobs.predict", config)]
    assert main([*words, "--overlay"]) == 2
    assert "--overlay; expected an output on this machine" in capsys.readouterr().err
