"""`tomoscale predict`: scans in, masks out, one after another in this process."""

import json
import shutil
from collections.abc import Callable
from glob import escape
from pathlib import Path

from jobs.output import Progress
from jobs.predict import dicom_seg
from jobs.predict.outputs import ENDINGS, Choice, check_model, ending_of, split_ending, write_scan
from jobs.predict.scans import DICOM, Scan, scans_of
from ssl_core.bundle import fingerprint
from ssl_core.portable import Predictor
from ssl_core.portable.predictor import check_target
from storage.errors import ConfigError, RefusedInput

_NOTE = "model.json"
Say = Callable[[str], None]


def check_places(source: str, output: Path) -> None:
    """Refuse places that cannot be, before a model is fetched.

    Raises:
        ConfigError: see `predict`.
    """
    if "://" not in source and not Path(source).exists():
        raise ConfigError(source, expected="a file or a folder", found="no such file", remedy="check the path")
    if not output.absolute().parent.is_dir():
        raise ConfigError(str(output.parent), expected="a folder", found="none", remedy="create it first")


def check_file(source: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse an output of one file that nothing can be written to.

    Raises:
        ConfigError: see `check_target`.
    """
    check_target(source, output, overwrite=overwrite, endings=ENDINGS)


def to_file(predictor: Predictor, model: str, source: str, output: Path, choice: Choice, say: Say, *, overwrite: bool,
            split: str | None = None, volume: str | None = None) -> dict[str, int]:  # fmt: skip
    """Predict the one scan of a source into a file; returns the voxels of each label.

    Raises:
        ConfigError: several scans, an output of another kind, or one that is there.
        RefusedInput: the scan is refused.
    """
    check_model(predictor, model, choice)
    scans = scans_of(source, split, volume)
    if len(scans) > 1:
        raise ConfigError(
            str(output), expected=f"a folder for the {len(scans)} scans of {source}", found="a file", remedy="name one"
        )
    (scan,) = scans
    _check_output(scan, predictor, output, overwrite)
    return write_scan(predictor, scan, output, choice, say, _slices())


def _slices() -> Callable[[int, int], None]:
    """Progress within a scan, of which a large one takes minutes."""
    bars: list[Progress] = []

    def show(done: int, of: int) -> None:
        if not done:
            bars[:] = [Progress("predict", of, "slices")]
        bars[0].update(done)

    return show


def _check_output(scan: Scan, predictor: Predictor, output: Path, overwrite: bool) -> None:
    endings: tuple[str, ...] = (".nii", ".nii.gz")
    if predictor.kind == "encoder":
        endings = (".npz",)
    elif scan.kind == DICOM:
        endings = (".dcm", *endings)
    check_target(scan.item.images[0] if scan.item else "", output, overwrite=overwrite, endings=endings)
    if output.name.lower().endswith(".dcm"):
        dicom_seg.require()


def to_folder(predictor: Predictor, model: str, bundle: Path, source: str, output: Path, choice: Choice, say: Say, *,
              overwrite: bool, split: str | None = None,
              volume: str | None = None) -> tuple[int, dict[str, str]]:  # fmt: skip
    """Predict each scan of a source into a folder; what is there already is left.

    A run that was ended goes on where it stopped: files take their places whole, and the mask last.

    Returns:
        How many scans have their mask now, and why others have none, by scan.

    Raises:
        ConfigError: the folder has masks of another model, or is the source itself.
    """
    check_model(predictor, model, choice)
    if "://" not in source and output.exists() and output.samefile(source):
        raise ConfigError(
            str(output), expected="another folder than that of the scans", found="the same", remedy="name another"
        )
    scans = scans_of(source, split, volume)
    targets = {scan.name: output / f"{scan.name}{ending_of(scan, predictor, choice)}" for scan in scans}
    if len(targets) < len(scans):
        raise ConfigError(source, expected="scans of different names", found="two of one", remedy="name one folder")
    if any(target.name.endswith(".dcm") for target in targets.values()):
        dicom_seg.require()
    output.mkdir(exist_ok=True)
    _pin(output, model, fingerprint(bundle), overwrite)
    refused: dict[str, str] = {}
    bar = Progress("predict", len(scans), "scans")
    for number, scan in enumerate(scans, 1):
        target = targets[scan.name]
        for stale in output.glob(f".{escape(target.name)}.*"):  # of a run that was killed
            shutil.rmtree(stale, ignore_errors=True)
        if overwrite or not target.exists():
            try:
                write_scan(predictor, scan, target, choice, say)
            except RefusedInput as error:
                refused[scan.source] = str(error)
                say(f"no mask: {error}")
        bar.update(number, f"{len(refused)} without a mask" if refused else "")
    return len(scans) - len(refused), refused


def _pin(output: Path, model: str, digest: str, overwrite: bool) -> None:
    """Note in the folder whose masks it has, or refuse those of another model."""
    path = output / _NOTE
    if path.is_file() and not overwrite:
        note = json.loads(path.read_text(encoding="utf-8"))
        if note.get("bundle_sha256") != digest:
            raise ConfigError(
                str(output),
                expected=f"masks of {model}, bundle {digest[:12]}",
                found=f"those of {note.get('model')}, bundle {str(note.get('bundle_sha256'))[:12]}",
                remedy="name another folder, or replace them with `--overwrite`",
            )
        return
    path.write_text(json.dumps({"model": model, "bundle_sha256": digest}, indent=1) + "\n", encoding="utf-8")


def is_file_output(source: str, output: Path) -> bool:
    """Whether one file is meant by an output, and not a folder."""
    if split_ending(output.name)[1]:
        return True
    return Path(source).is_file() and not output.is_dir()
