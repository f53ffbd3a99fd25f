"""A batch of predictions between two buckets of the real S3, with a model of the real registry, as a job."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from cluster.stack_info import StackInfo
from jobs.cli.main import main
from jobs.tracking import models as registry
from ssl_core.portable import Predictor
from storage.objects import open_store
from tests.kit.bundles import scan
from tests.kit.small_models import segmenter_bundle

pytestmark = [pytest.mark.service, pytest.mark.timeout(900)]
SHAPE = (17, 16, 18)


def test_files_of_s3_get_masks_on_s3_and_once(
    local_stack: StackInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = segmenter_bundle(tmp_path / "bundle")
    registry.register(bundle, "batch-segmenter")
    source, target = open_store("s3://volumes/scans"), open_store("s3://runs/masks")
    paths = {f"{name}.nii.gz": scan(tmp_path, SHAPE, seed=seed) for seed, name in enumerate(("one", "more/two"))}
    for key, path in paths.items():
        source.put(key, path.read_bytes())
    source.put("bad.nii", b"no volume")
    command = ["predict", "models:/batch-segmenter/1", source.url, target.url, "--cpus", "1"]
    assert main(command) == 3
    words = capsys.readouterr()
    assert "1 of 3 volumes have no mask: bad.nii" in words.out + words.err
    predictor = Predictor(bundle, "cpu", lambda _note: None)
    assert sorted(key for key in target.list() if key.endswith(".nii.gz")) == sorted(paths)
    for key, path in paths.items():
        (tmp_path / "mask.nii.gz").write_bytes(target.get(key))
        mask = np.asanyarray(nib.load(tmp_path / "mask.nii.gz").dataobj)
        assert np.array_equal(mask, predictor.predict(path)), key
    source.delete("bad.nii")
    untouched = target.get("one.nii.gz")
    target.delete("more/two.nii.gz")
    assert main(command) == 0
    assert "1 of 1: more/two.nii.gz" in capsys.readouterr().out, "what has a mask is left"
    assert target.get("one.nii.gz") == untouched
    assert target.exists("more/two.nii.gz")
    assert main([*command[:1], "models:/batch-segmenter/2", *command[2:]]) == 2, "masks are of one model"
