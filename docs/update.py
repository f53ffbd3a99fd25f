"""Brings up to date what is made from the code: the reference of configurations, the tables of metrics and of rooms.

Run it as `python docs/update.py`.
"""

import ast
import json
import re
import statistics
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from jobs import configs  # noqa: E402  a script of this folder is not on the path of the packages
from jobs.configs import groups, population, search, study  # noqa: E402
from jobs.ingest_config import IngestConfig  # noqa: E402
from jobs.on_ray.metrics import METRICS  # noqa: E402
from ssl_core.downstream.settings import Change, FinetuneConfig, TrainedParts  # noqa: E402
from ssl_core.methods.base import Crops  # noqa: E402
from ssl_core.superpixels.settings import Superpixels  # noqa: E402
from ssl_core.train.engine import EngineConfig  # noqa: E402
from ssl_core.views.intensity import IntensityPolicy  # noqa: E402
from storage.ingest.policy import IngestPolicy  # noqa: E402
from storage.ingest.readers.raw import ReadPolicy  # noqa: E402
from tests.kit.house import ROOMS  # noqa: E402

ARCHITECTURE = ROOT / "docs/architecture.md"
REFERENCE = ROOT / "docs/reference-configs.md"
NODES = ROOT / "docs/benchmarks-nodes.md"
NODES_FIGURES = ROOT / "docs/benchmarks/nodes.json"
METRICS_PAGE = ROOT / "docs/reference-metrics.md"
MARKED = r"<!-- {} -->\n(.*?)<!-- end -->"
TABLES: tuple[type[BaseModel], ...] = (
    configs.PretrainConfig,
    groups.BackboneConfig,
    IntensityPolicy,
    configs.StreamConfig,
    EngineConfig,
    configs.ProbeConfig,
    groups.ClusterConfig,
    groups.CheckpointConfig,
    Crops,
    search.TuneConfig,
    population.PopulationConfig,
    search.ConfirmConfig,
    search.SearchSpace,
    configs.FinetuneJobConfig,
    configs.LabelledConfig,
    FinetuneConfig,
    TrainedParts,
    Change,
    study.StudyConfig,
    study.StudyStart,
    study.SupervisedStart,
    study.StudySearch,
    IngestConfig,
    IngestPolicy,
    ReadPolicy,
    configs.SuperpixelConfig,
    Superpixels,
)


def table(model: type[BaseModel]) -> str:
    """The keys of a configuration as a table, in the order of their definition."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            shown = f"see `{type(default).__name__}`"
        else:
            shown = "required" if field.is_required() else f"`{json.dumps(default)}`"
        rows.append(f"| `{name}` | {shown} | {field.description or ''} |".replace("|  |", "| |"))
    return "\n".join(rows) + "\n"


def _value(new: str, _match: re.Match[str]) -> str:
    return new


def update(page: Path, tables: Mapping[str, str]) -> None:
    """Write tables of a page anew, each between its mark and the next end."""
    text = page.read_text(encoding="utf-8")
    for mark, rows in tables.items():
        new = f"<!-- {mark} -->\n{rows}<!-- end -->"
        text = re.sub(MARKED.format(mark), partial(_value, new), text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def metrics_table() -> str:
    """What a pre-training shows to Prometheus, in the order of the code."""
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(
            f"| `{metric.exported}` | {'counter' if metric.is_counter else 'gauge'} | {labels} | {metric.text} |"
        )
    return "\n".join(rows) + "\n"


def rooms() -> str:
    """A table for each top folder: its rooms, what each is for in the words of the room, and what it may enter."""
    lines = []
    for top, table_of in ROOMS.items():
        if not table_of:
            continue
        lines += ["", f"### `{top}/`", "", "| room | is for | may enter |", "|---|---|---|"]
        for room, entered in table_of.items():
            entries = ", ".join(f"`{name}`" for name in entered.split()) or "-"
            lines.append(f"| `{room}` | {_purpose(ROOT / top / room)} | {'all' if entered == '*' else entries} |")
    return "\n".join(lines) + "\n\n"


def _purpose(path: Path) -> str:
    """The first sentence of a room's docstring."""
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]


def disasters() -> str:
    """What `make chaos` measured, as a table."""
    if not NODES_FIGURES.exists():
        return "\nNot measured yet.\n\n"
    figures = json.loads(NODES_FIGURES.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    lines = [
        "",
        f"Measured on {figures['cores']} cores with Python {figures['python']}, {versions}.",
        "",
    ]
    lines += [
        "| disaster | noticed | longest pause | repeated | weights | exit code | last line | day |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        noticed, pause = ("-" if row[key] is None else f"{row[key]:.0f} s" for key in ("noticed_s", "pause_s"))
        last = row["last"].replace("|", "\\|")
        cells = [
            row["scenario"],
            noticed,
            pause,
            row["repeated"],
            row["weights"],
            row["code"],
            f"`{last}`",
            row["day"],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if rates := figures.get("rates"):
        lines += ["", *_rates(rates)]
    return "\n".join(lines) + "\n\n"


def _rates(rates: Mapping[str, Any]) -> list[str]:
    """Ray Train beside torchrun, as a table."""
    lines = [
        "| a step of two workers on two machines | Ray Train | torchrun | ratios of the turns |",
        "|---|---|---|---|",
    ]
    for key, words in (("ms", "ms of the clock"), ("cpu_ms", "ms of a worker's processor")):
        ray, torchrun = (statistics.median(rates[key][kind]) for kind in ("ray", "torchrun"))
        lines.append(f"| {words} | {ray:.1f} | {torchrun:.1f} | {', '.join(map(str, rates[key]['ratios']))} |")
    shares = (f"{100 * statistics.median(rates['busy'][kind]):.0f} %" for kind in ("ray", "torchrun"))
    return [*lines, f"| share of all cores that was busy | {' | '.join(shares)} | |"]


if __name__ == "__main__":
    update(REFERENCE, {model.__name__: table(model) for model in TABLES})
    update(METRICS_PAGE, {"metrics": metrics_table()})
    update(ARCHITECTURE, {"rooms": rooms()})
    update(NODES, {"nodes": disasters()})
