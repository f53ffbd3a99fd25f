"""Draws `docs/studies.svg`, every tested comparison of the committed studies: `python docs/studies_chart.py`."""

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from jobs.pages.charts import COLOURS, INK, plt  # noqa: E402  a script of this folder is not on the path of the packages

STUDIES = ROOT / "docs/benchmarks/studies"
PICTURE = ROOT / "docs/studies.svg"
FAINT = "#9aa3af"


@dataclass(frozen=True)
class Comparison:
    """A tested difference in Dice of a study.

    Attributes:
        data: Name of the data set, the first word of the study's folder.
        labels: Labelled subjects.
        title: What was compared, over what.
        difference: Mean.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p: After Holm's correction.
    """

    data: str
    labels: int
    title: str
    difference: float
    low: float
    high: float
    p: float

    @property
    def figures(self) -> str:
        """The numbers as the chart writes them."""
        return f"{self.difference:+.3f} ({self.low:+.3f} to {self.high:+.3f}), p {self.p:.2g}"


def comparisons() -> list[Comparison]:
    """Of all studies, by count of labels, the largest difference first."""
    found = []
    for path in sorted(STUDIES.glob("*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for test in result["tests"]:
            over = f"{test['draws']} draws x {test['pretrainings']}"
            twice = f" against {test['labels_of_b']} labels" if test.get("labels_of_b") else ""
            found.append(
                Comparison(
                    data=path.parent.name.split("-")[0],
                    labels=test["labels"],
                    title=f"{path.parent.name}: {test['a']}{twice}, {over}",
                    difference=test["difference"],
                    low=test["low"],
                    high=test["high"],
                    p=test["corrected"],
                )
            )
    return sorted(found, key=lambda one: (one.labels, -one.difference))


def svg(rows: list[Comparison]) -> str:
    """A line a comparison: mean, 95 % interval; filled where the corrected p is below 0.05."""
    colours = dict(zip(sorted({row.data for row in rows}), COLOURS, strict=False))
    counts = sorted({row.labels for row in rows})
    height = len(rows) + len(counts)
    drawing, axis = plt.subplots(figsize=(11, 0.9 + 0.25 * height))
    y = height
    beyond = axis.get_yaxis_transform()  # x of the axes, y of the data: texts left and right of the chart
    for labels in counts:
        y -= 1
        heading = f"{labels} labelled subject{'s' if labels > 1 else ''}"
        axis.text(-0.94, y, heading, transform=beyond, va="center", color=INK, weight="bold")
        for row in (row for row in rows if row.labels == labels):
            y -= 1
            colour = colours[row.data]
            axis.text(-0.94, y, row.title, transform=beyond, va="center", color=INK)
            axis.text(1.02, y, row.figures, transform=beyond, va="center", color=INK)
            axis.plot([row.low, row.high], [y, y], color=colour, lw=1.6)
            face = colour if row.p < 0.05 else "white"
            axis.plot([row.difference], [y], marker="D", ms=5, mec=colour, mfc=face)
    axis.axvline(0, color=FAINT, lw=1)
    axis.set_ylim(-0.7, height - 0.3)
    axis.set_yticks([])
    axis.grid(axis="x", color="#e6e9ed", lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[["left", "right", "top"]].set_visible(False)
    axis.tick_params(colors=INK)
    axis.set_xlabel(
        "Dice, pre-trained minus from scratch, and the 95 % interval; filled where p < 0.05, corrected", color=INK
    )
    drawing.subplots_adjust(left=0.37, right=0.76, top=0.99, bottom=0.75 / (0.9 + 0.25 * height))
    text = io.StringIO()
    # Text stays text and nothing in the file tells when it was made: equal figures make equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "studies"}):
        drawing.savefig(text, format="svg", metadata={"Date": None}, facecolor="white")
    plt.close(drawing)
    return text.getvalue()


if __name__ == "__main__":
    with matplotlib.rc_context({"font.size": 9}):
        PICTURE.write_text(svg(comparisons()), encoding="utf-8")
    sys.stdout.write(f"wrote {PICTURE.relative_to(ROOT)}\n")
