"""Brings up to date what is made from the code: the reference of configurations and the tables of rooms.

Run it as `python docs/update.py`.
"""

import ast
import json
import re
import sys
from functools import partial
from pathlib import Path

from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from jobs import configs  # noqa: E402  a script of this folder is not on the path of the packages
from jobs.ingest_config import IngestConfig  # noqa: E402
from ssl_core.downstream.finetune import FinetuneConfig  # noqa: E402
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
MARKED = r"<!-- {} -->\n(.*?)<!-- end -->"
TABLES: tuple[type[BaseModel], ...] = (
    configs.PretrainConfig,
    configs.BackboneConfig,
    IntensityPolicy,
    configs.StreamConfig,
    EngineConfig,
    configs.ProbeConfig,
    configs.ClusterConfig,
    Crops,
    configs.TuneConfig,
    configs.SearchSpace,
    configs.FinetuneJobConfig,
    configs.LabelledConfig,
    FinetuneConfig,
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


def update_reference() -> None:
    """Write every table of the reference anew."""
    text = REFERENCE.read_text(encoding="utf-8")
    for model in TABLES:
        new = f"<!-- {model.__name__} -->\n{table(model)}<!-- end -->"
        text = re.sub(MARKED.format(model.__name__), partial(_value, new), text, flags=re.DOTALL)
    REFERENCE.write_text(text, encoding="utf-8")


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


def update_rooms() -> None:
    """Write the tables of rooms anew."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    new = f"<!-- rooms -->\n{rooms()}<!-- end -->"
    text = re.sub(MARKED.format("rooms"), partial(_value, new), text, flags=re.DOTALL)
    ARCHITECTURE.write_text(text, encoding="utf-8")


def disasters() -> str:
    """What `make chaos` measured, as a table."""
    if not NODES_FIGURES.exists():
        return "\nNot measured yet.\n\n"
    figures = json.loads(NODES_FIGURES.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    lines = [
        "",
        f"Measured on {figures['day']} on {figures['cores']} cores with Python {figures['python']}, {versions}.",
        "",
    ]
    lines += [
        "| disaster | noticed | next new step | repeated | weights | exit code | last line |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        noticed, resumed = ("-" if row[key] is None else f"{row[key]:.0f} s" for key in ("noticed_s", "resumed_s"))
        last = row["last"].replace("|", "\\|")
        cells = [row["scenario"], noticed, resumed, row["repeated"], row["weights"], row["code"], f"`{last}`"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n\n"


def update_disasters() -> None:
    """Write the table of disasters anew."""
    text = NODES.read_text(encoding="utf-8")
    new = f"<!-- nodes -->\n{disasters()}<!-- end -->"
    text = re.sub(MARKED.format("nodes"), partial(_value, new), text, flags=re.DOTALL)
    NODES.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    update_reference()
    update_rooms()
    update_disasters()
