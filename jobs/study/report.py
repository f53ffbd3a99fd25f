"""The files of a study's report: a page, the same in Markdown, the result, and the raw numbers of every case."""

import csv
import io
from pathlib import Path

from jobs.configs.study import StudyConfig
from jobs.output import write_page
from jobs.pages import study as page
from jobs.pages.pictures import ComparedSlice, compared_slice
from jobs.study.run import to_json
from ssl_core.config import dump_yaml
from ssl_core.downstream.scores import METRICS
from ssl_core.downstream.study import StudyResult
from storage.format.manifest import Manifest
from storage.objects import join, open_store
from storage.reading.volume_store import VolumeStore

_FOLDER = "report"
_NAMES = ("report.md", "report.html", "result.json", "cases.csv", "config.yaml")


def files(config: StudyConfig, result: StudyResult, command: str) -> dict[str, str]:
    """Contents by name.

    Args:
        config: The study.
        result: What came of it.
        command: What repeats it.
    """
    return {
        "report.md": page.markdown(result, command),
        "report.html": page.html(result, command, dump_yaml(config), examples(config, result)),
        "result.json": to_json(result),
        "cases.csv": cases(result),
        "config.yaml": dump_yaml(config),
    }


def examples(config: StudyConfig, result: StudyResult) -> list[ComparedSlice]:
    """Slices of the cases that differ most, with image and truth from the store; none where the study shows none."""
    pairs = page.pictured(result) if config.slices else []
    if not pairs:
        return []
    with VolumeStore(config.data, Manifest.open(config.data, result.choice["fingerprint"])) as store:
        return [_compared(store, config.label, result.reference, pair) for pair in pairs]


def _compared(store: VolumeStore, label: str, reference: str, pair: page.Contrast) -> ComparedSlice:
    name = pair.case.volume_id
    own, other = pair.cell.slices[name], pair.reference.slices[name]
    predictions = (
        (f"{pair.cell.start}, Dice {pair.case.scores.dice:.2f}", own.classes_HW),
        (f"{reference}, Dice {pair.dice:.2f}", other.classes_HW),
    )
    return compared_slice(store, label, name, own.at, f"{name}, {pair.case.label}", predictions)


def write(config: StudyConfig, result: StudyResult, folder: Path, command: str) -> list[Path]:
    """Write the files of the report to a folder; returns the two pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files(config, result, command).items():
        write_page(folder / name, text)
    return [folder / "report.html", folder / "report.md"]


def publish(config: StudyConfig, result: StudyResult) -> None:
    """Write the files of the report into the store, below the study."""
    store = open_store(join(config.runs, config.name))
    for name, text in files(config, result, f"tomoscale study {config.name}.yaml").items():
        store.put(f"{_FOLDER}/{name}", text.encode())


def fetch(config: StudyConfig, folder: Path, command: str) -> list[Path]:
    """Copy the report of a study from the store to a folder; returns the two pages.

    Args:
        config: The study.
        folder: Where to.
        command: What repeats it, in place of what its job could say of that.

    Raises:
        NotFound: the study has none yet.
    """
    store = open_store(join(config.runs, config.name))
    folder.mkdir(parents=True, exist_ok=True)
    for name in _NAMES:
        text = store.get(f"{_FOLDER}/{name}").decode()
        write_page(folder / name, text.replace(f"tomoscale study {config.name}.yaml", command, 1))
    return [folder / "report.html", folder / "report.md"]


def cases(result: StudyResult) -> str:
    """Every score of every case as CSV."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = [metric.name for metric in METRICS]
    table.writerow(["start", "labels", "draw", "seed", "volume_id", "subject", "label", *names])
    for cell in result.cells:
        for case in cell.cases:
            scores = [f"{case.scores.of(metric):.6g}" for metric in METRICS]
            table.writerow(
                [cell.start, cell.labels, cell.draw, cell.seed, case.volume_id, case.subject, case.label, *scores]
            )
    return text.getvalue()
