"""The batch of predictions that a RayJob runs, without Ray."""

from pathlib import Path

import pytest

from jobs.predict import folder
from storage.errors import ConfigError, TomoscaleError


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    scans, masks = tmp_path / "in", tmp_path / "out"
    for path in (scans, masks):
        path.mkdir()
    for name in ("b.nii.gz", "a.nii", "notes.txt"):
        (scans / name).write_text("-")
    return scans, masks


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that would run; a `pull` makes its folder."""
    commands: list[tuple[str, ...]] = []

    def run(*words: str) -> str:
        commands.append(words)
        if words[0] == "models":
            Path(words[-1]).mkdir()
            (Path(words[-1]) / "bundle.json").write_text('{"kind": "segmenter"}', encoding="utf-8")
        return "refused" if words[0] == "predict" and words[2].endswith("a.nii") else ""

    monkeypatch.setattr(folder, "_tomoscale", run)
    return commands


def test_volumes_without_a_mask_are_predicted_by_name(
    folders: tuple[Path, Path], commands: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scans, masks = folders
    monkeypatch.setattr(folder, "on_cluster", lambda predict, volumes, *_: ((v, predict(v)) for v in volumes))
    assert [path.name for path in folder.find(scans, masks)] == ["a.nii", "b.nii.gz"]
    (masks / "a.nii").write_text("-")
    assert folder.main(["models:/m/1", str(scans), str(masks)]) == 0
    assert [Path(words[2]).name for words in commands if words[0] == "predict"] == ["b.nii.gz"]


def test_one_folder_for_volumes_and_masks_or_none_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    scans, masks = folders
    for wrong in ((scans, scans), (scans, tmp_path / "none"), (tmp_path / "none", masks), (masks, scans)):
        with pytest.raises(ConfigError):
            folder.find(*wrong)


def test_all_masks_are_of_one_model(folders: tuple[Path, Path], commands: list[tuple[str, ...]]) -> None:
    _, masks = folders
    for _ in range(2):  # the second time as a job sent again, whose alias may have moved
        assert folder.pin("models:/m@champion", masks) == masks / "model"
    assert commands == [("models", "pull", "models:/m@champion", str(masks / "model"))]
    with pytest.raises(ConfigError, match="models:/m@champion"):
        folder.pin("models:/other/1", masks)


def test_a_download_that_failed_says_why_and_is_tried_again(
    folders: tuple[Path, Path], commands: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    working = folder._tomoscale
    monkeypatch.setattr(folder, "_tomoscale", lambda *words: "MLflow is away")
    with pytest.raises(TomoscaleError, match="MLflow is away"):
        folder.pin("models:/m/1", folders[1])
    monkeypatch.setattr(folder, "_tomoscale", working)
    assert folder.pin("models:/m/2", folders[1]).is_dir()


def test_what_has_no_mask_is_named_and_the_rest_is_done(
    folders: tuple[Path, Path],
    commands: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scans, masks = folders
    monkeypatch.setattr(folder, "on_cluster", lambda predict, volumes, *_: ((v, predict(v)) for v in volumes))
    assert folder.main(["models:/m/1", str(scans), str(masks)]) == 3
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["1 of 2: a.nii: refused", "2 of 2: b.nii.gz"]
    assert shown.err == "1 of 2 volumes have no mask: a.nii\n"
    assert commands[-1] == ("predict", str(masks / "model"), str(scans / "b.nii.gz"), str(masks / "b.nii.gz"))
    assert folder.main(["models:/m/2", str(scans), str(masks)]) == 2
