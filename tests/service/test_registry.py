"""Register, pull, list, promote and load bundles on a real MLflow server."""

import pickletools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from jobs.tracking import models as registry
from jobs.tracking import promotion
from jobs.tracking import runs as tracking
from jobs.tracking.promotion import Evidence
from ssl_core.bundle import write_bundle
from ssl_core.portable import Predictor
from ssl_core.portable.geometry import to_canonical
from storage.errors import ConfigError, NotFound, RefusedInput, StackError
from tests.kit.bundles import facts, learned, network, scan
from tests.kit.mlflow_server import environment, mlflow_server

pytestmark = pytest.mark.service
TUTORIAL = Path(__file__).parents[2] / "docs/tutorial.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with mlflow_server(folder) as url, pytest.MonkeyPatch.context() as patch:
        for key, value in {**environment(), "MLFLOW_TRACKING_URI": url}.items():
            patch.setenv(key, value)
        yield url


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lineage = {"data_fingerprint": "f00d", "config_digest": "cafe", "parent": "models:/encoder/1"}
    return write_bundle(tmp_path_factory.mktemp("b") / "segmenter", "segmenter", network(), facts(lineage=lineage))


def _scored(folder: Path, seed: int, scores: list[float], split: str = "abc/test") -> Path:
    cases = {f"case-{i}": score for i, score in enumerate(scores)}
    evaluation = {"split": split, "measure": "Dice", "cases": cases}
    return write_bundle(folder / f"b{seed}", "segmenter", network(seed), facts(evaluation=evaluation))


def test_a_registered_model_predicts_like_its_bundle(server: str, bundle: Path, tmp_path: Path) -> None:
    import mlflow

    api = tracking.client()
    run_id = tracking.open_run(api, "exp", "job", "finetune", params={"lr": 1}, tags={})
    version = registry.register(bundle, "seg", run_id=run_id)
    assert api.get_run(run_id).info.status == "RUNNING", "registering does not end the run it belongs to"
    assert registry.register(bundle, "seg", run_id=run_id) == version, "the same bundle is registered once"

    source = scan(tmp_path)
    wanted = Predictor(bundle).predict(source)
    model = mlflow.pyfunc.load_model("models:/seg@candidate")
    image = nib.load(source)
    array = {"image": np.asanyarray(image.dataobj), "affine": image.affine}
    assert np.array_equal(model.predict(str(source)), wanted)
    assert np.array_equal(model.predict(source), wanted)
    assert np.array_equal(model.predict(array), wanted)
    many = model.predict([str(source), array])
    assert len(many) == 2
    assert all(np.array_equal(mask, wanted) for mask in many)
    one = model.predict([str(source)])
    assert isinstance(one, list)
    assert len(one) == 1
    with pytest.raises(Exception, match="absent"):
        model.predict(str(tmp_path / "absent.nii.gz"))


def test_registering_says_nothing_of_its_own_example(
    server: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    bundle = write_bundle(tmp_path / "b", "segmenter", network(12), facts(training=learned()))
    registry.register(bundle, "quiet")
    assert [note for note in recwarn if "array: " in str(note.message)] == []


def test_a_version_tells_where_it_comes_from(server: str, bundle: Path) -> None:
    version = registry.register(bundle, "seg")
    found = registry.resolve("models:/seg@candidate")
    assert found.version == version
    assert found.tags["tomoscale.data_fingerprint"] == "f00d"
    assert found.tags["tomoscale.config_digest"] == "cafe"
    assert found.tags["tomoscale.parent"] == "models:/encoder/1"
    assert found.tags["tomoscale.kind"] == "segmenter"
    assert found in registry.list_models("seg")
    assert registry.resolve("seg") == registry.resolve(f"seg/{version}") == found


def test_what_is_stored_has_no_pickle_and_one_schema(server: str, bundle: Path, tmp_path: Path) -> None:
    import mlflow

    registry.register(bundle, "seg")
    root = Path(mlflow.artifacts.download_artifacts("models:/seg@candidate", dst_path=str(tmp_path)))
    files = [path for path in root.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".py", ".json", ".md", ".safetensors", ".txt", ".yaml", ".yml", ""}
    for path in files:
        data = path.read_bytes()
        assert not data.startswith((b"\x80", b"PK"))
        with pytest.raises((ValueError, IndexError, UnicodeDecodeError)):
            list(pickletools.genops(data))
    info = mlflow.models.get_model_info(str(root))
    assert info.signature.outputs.inputs[0].type == np.dtype("uint8")
    assert (root / "input_example.json").is_file()
    needs = (root / "requirements.txt").read_text().split()
    assert sorted(line.partition("==")[0] for line in needs) == ["mlflow", "monai", "torch"]
    assert not any("+" in line for line in needs)


def test_pulled_bundles_are_whole_or_refused(server: str, bundle: Path, tmp_path: Path) -> None:
    registry.register(bundle, "seg")
    local = registry.pull("models:/seg@candidate", tmp_path / "pulled")
    for path in bundle.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (local / path.relative_to(bundle)).read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["pulled"]
    with pytest.raises(ConfigError, match="new directory"):
        registry.pull("models:/seg@candidate", local)
    with pytest.raises(ConfigError, match=r"models:/NAME@ALIAS"):
        registry.pull("s3://bucket/a/b", tmp_path / "x")
    for absent in ("models:/seg@nobody", "models:/seg/999", "models:/nothing@candidate"):
        with pytest.raises(NotFound, match=absent):
            registry.pull(absent, tmp_path / "x")
    damaged = write_bundle(tmp_path / "damaged", "segmenter", network(9), facts())
    (damaged / "preprocess.json").write_text("{}")
    with pytest.raises(RefusedInput, match=r"preprocess\.json"):
        registry.register(damaged, "seg")


def test_other_models_and_lost_artifacts_are_told_apart(server: str, folder: Path, tmp_path: Path) -> None:
    import mlflow

    script = tmp_path / "alien.py"
    script.write_text(
        "from mlflow.models import set_model\ndef same(model_input):\n    return model_input\nset_model(same)\n"
    )
    mlflow.pyfunc.log_model(python_model=str(script), registered_model_name="alien", pip_requirements=[], name="alien")
    with pytest.raises(RefusedInput, match="another kind of model"):
        registry.pull("alien/1", tmp_path / "x")
    bundle = write_bundle(tmp_path / "b", "segmenter", network(11), facts())
    registry.register(bundle, "lost")
    weights = (bundle / "weights.safetensors").read_bytes()
    (stored,) = [p for p in (folder / "artifacts").rglob("weights.safetensors") if p.read_bytes() == weights]
    stored.unlink()
    with pytest.raises(RefusedInput, match=r"weights\.safetensors"):
        registry.pull("lost@candidate", tmp_path / "x")
    shutil.rmtree(stored.parent)
    with pytest.raises(StackError, match=r"artifacts of models:/lost.* MB free in .*free space there or check"):
        registry.pull("lost@candidate", tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith((".x", "x"))] == []


def test_an_encoder_gives_features(server: str, tmp_path: Path) -> None:
    import mlflow

    bundle = write_bundle(tmp_path / "enc", "encoder", network(2), facts(labels=()))
    registry.register(bundle, "enc")
    source = scan(tmp_path)
    found = mlflow.pyfunc.load_model("models:/enc@candidate").predict(str(source))
    assert found.shape[0] == 16
    assert np.array_equal(found, Predictor(bundle).features(source))


def test_two_versions_in_one_process_run_their_own_weights(server: str, tmp_path: Path) -> None:
    import mlflow

    source = scan(tmp_path)
    bundles = [write_bundle(tmp_path / str(seed), "segmenter", network(seed), facts()) for seed in (3, 4)]
    numbers = [registry.register(bundle, "pair") for bundle in bundles]
    assert registry.register(bundles[0], "pair") == numbers[0], "the first job runs again"
    assert [v.version for v in registry.list_models("pair")] == numbers[::-1]
    assert [v.aliases for v in registry.list_models("pair")] == [("candidate",), ()]
    masks = [mlflow.pyfunc.load_model(f"models:/pair/{number}").predict(str(source)) for number in numbers]
    for bundle, mask in zip(bundles, masks, strict=True):
        assert np.array_equal(mask, Predictor(bundle).predict(source))
    assert not np.array_equal(*masks)


def test_the_champion_moves_only_to_a_version_that_beat_it(server: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 0.6, 12)
    first = registry.register(_scored(tmp_path, 1, base.tolist()), "race")
    noise = registry.register(_scored(tmp_path, 2, (base + rng.normal(0, 0.02, 12)).tolist()), "race")
    better = registry.register(_scored(tmp_path, 3, (base + 0.05 + rng.normal(0, 0.01, 12)).tolist()), "race")
    worse = registry.register(_scored(tmp_path, 4, (base - 0.05).tolist()), "race")
    other = registry.register(_scored(tmp_path, 5, (base + 0.1).tolist(), split="xyz/test"), "race")
    silent = registry.register(write_bundle(tmp_path / "silent", "segmenter", network(6), facts()), "race")

    def champion() -> str:
        return registry.resolve("models:/race@champion").version

    with pytest.raises(NotFound, match="evaluation"):
        promotion.promote("race", silent)
    with pytest.raises(NotFound):
        champion()
    assert "first champion" in promotion.promote("race", first)
    assert champion() == first
    for loser, why in ((noise, "paired test"), (worse, "paired test"), (other, "cases of abc/test")):
        with pytest.raises(ConfigError, match=why):
            promotion.promote("race", loser)
        assert champion() == first
    cases = {f"case-{i}": 0.99 for i in range(11)}
    with pytest.raises(ConfigError, match="12 cases"):
        promotion.promote("race", better, Evidence("abc/test", "Dice", cases))
    with pytest.raises(ConfigError, match="finite"):
        promotion.promote("race", better, Evidence("abc/test", "Dice", {"case-0": float("nan")}))
    assert champion() == first
    assert "scored higher than champion" in promotion.promote("race", better)
    assert champion() == better
    assert "champion already" in promotion.promote("race", better)
    assert "scored higher" in registry.resolve(f"race/{better}").tags["tomoscale.promotion"]
    assert torch.get_num_threads() >= 1


def test_the_tutorials_lines_make_a_stock_network_of_monai(server: str, tmp_path: Path) -> None:
    from monai.transforms import LoadImage, Orientation

    encoder = write_bundle(tmp_path / "encoder", "encoder", network(3), facts(labels=()))
    registry.register(encoder, "aligned-simulated-encoder")
    blocks = re.findall(r"^```python\n(.*?)^```$", TUTORIAL.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "safetensors" in block]
    made: dict[str, object] = {}
    exec(code, made)
    bundle, stock = Predictor(encoder, "cpu"), made["network"]
    assert isinstance(stock, torch.nn.Module)
    assert made["architecture"]["class"] == f"monai.networks.nets.{type(stock).__name__}"  # type: ignore[index]
    keys = bundle.architecture["encoder_keys"]
    assert keys
    assert all(torch.equal(stock.state_dict()[key], bundle.network.state_dict()[key]) for key in keys)
    # The axes are those that the page names.
    source = scan(tmp_path)
    image = nib.load(source)
    turned = Orientation(axcodes="SAR")(LoadImage(image_only=True, ensure_channel_first=True)(source))
    wanted = to_canonical(str(source), np.asarray(image.dataobj), image.affine).values_CDHW
    assert np.array_equal(np.asarray(turned), wanted)
