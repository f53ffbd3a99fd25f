"""Classes and numbers of whole scans: a table with a row for each."""

from collections.abc import Callable
from pathlib import Path

from jobs.output import Progress
from jobs.predict.outputs import Choice
from jobs.predict.scans import scans_of
from ssl_core.portable import Predictor
from ssl_core.portable.head.assess import Row, assess_values, head_of, write_table
from ssl_core.portable.predictor import check_target
from storage.errors import ConfigError, RefusedInput

ENDING = ".csv"


def check(predictor: Predictor, model: str, source: str, output: Path, choice: Choice, *, overwrite: bool) -> None:
    """Refuse what a table of results is not made of, before any scan is read.

    Raises:
        ConfigError: a model of masks or features, another ending, an option of masks, or a file that is there.
    """
    if predictor.head is None:
        raise ConfigError(
            f"model {model}",
            expected="a classifier or a regressor, of which results are a table",
            found=f"kind {predictor.kind}",
            remedy="name an output of another kind: `tomoscale predict --help`",
        )
    if output.suffix.lower() != ENDING:
        raise ConfigError(
            "output", expected=f"a name that ends in {ENDING}", found=str(output), remedy="name one table for all scans"
        )
    odd = [f"--{name}" for name in ("probabilities", "features", "overlay", "nifti") if getattr(choice, name)]
    if odd:
        raise ConfigError(
            odd[0], expected="a segmenter", found=f"kind {predictor.kind}", remedy="leave it out: a table has it all"
        )
    check_target(source if Path(source).is_file() else "", output, overwrite=overwrite, endings=(ENDING,))


def to_table(predictor: Predictor, source: str, output: Path, choice: Choice, say: Callable[[str], None], *,
             split: str | None = None, volume: str | None = None) -> tuple[int, dict[str, str]]:  # fmt: skip
    """Write a row for each scan of a source; those that are refused have none.

    Returns:
        How many scans have a row, and why others have none, by scan.

    Raises:
        ConfigError: as `jobs.predict.scans.scans_of`.
        RefusedInput: the only scan is refused.
    """
    scans = scans_of(source, split, volume)
    rows: list[tuple[str, Row]] = []
    refused: dict[str, str] = {}
    bar = Progress("predict", len(scans), "scans")
    for number, scan in enumerate(scans, 1):
        try:
            seen = scan.read()
            for note in seen.notes:
                say(f"{scan.source}: {note}")
            frame, slabs = seen.admitted(predictor, scan.source)
            row = assess_values(
                predictor,
                slabs,
                frame.affine,
                seen.stats,
                name=scan.source,
                modality=seen.modality,
                force=choice.force,
            )
            rows.append((scan.name, row))
        except RefusedInput as error:
            if len(scans) == 1:
                raise
            refused[scan.source] = str(error)
            say(f"no row: {error}")
        bar.update(number, f"{len(refused)} without a row" if refused else "")
    write_table(output, head_of(predictor), rows)
    return len(rows), refused
