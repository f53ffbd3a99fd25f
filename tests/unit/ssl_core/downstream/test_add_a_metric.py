"""The edit that the page on adding a metric shows, made on a copy of the packages: one file, and it is everywhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import ROOT

PAGE = ROOT / "docs/how-to-add-a-metric.md"
PROGRAM = """
import json
import numpy as np
from jobs.configs import FinetuneJobConfig
from jobs.finetune import compared
from jobs.pages import report
from jobs.pages.summary import DataFacts, DemoSummary, PredictedCase, Predictions, PretrainFacts
from ssl_core.config import parse
from ssl_core.downstream.comparison import Comparison, Training
from ssl_core.downstream.scores import CaseScore, score_case
from ssl_core.downstream.search import SearchResult, Trial

def training(start, wide):
    truth, mask = np.zeros((8, 8, 8), int), np.zeros((8, 8, 8), int)
    truth[2:6, 2:6, 2:6], mask[2:6, 2:6, 2:2 + wide] = 1, 1
    scores = score_case(mask, truth, labels={1: "liver", 2: "absent"}, spacing_mm=(1.0, 1.0, 1.0))
    cases = tuple(CaseScore(f"v{i}", f"s{i}", label, s) for i in range(3) for label, s in scores.items())
    return Training(start, 0, ({"loss": 1.0},), cases, None, 1.0)

job = {"name": "n", "starts": {"a": "models:/e/1", "b": "none"}, "seeds": [0], "labelled": {"data": "memory://x"}}
trainings = [training("a", 3), training("b", 6)]
result = compared(parse(FinetuneJobConfig, job), trainings, run_id="r", seconds=1.0)
written = json.loads(json.dumps(result.to_json()))
settings = {"encoder": "none", "finetune.lr": 1e-3, "finetune.encoder_lr_scale": 1.0}
case = PredictedCase("i.nii.gz", "o.nii.gz", 0.5)
summary = DemoSummary(
    created="today",
    headline={},
    data=DataFacts("d", True, "t", (), {}),
    pretrain=PretrainFacts("pgl", 1, 1, 1, ([1, 0, {"loss": 1.0}],), 1.0, 0.0, "r", "u", "m"),
    search=SearchResult((Trial(0, settings, (0.5,), False, None),), settings, "trial 0", 1, "r", 1.0),
    finetune=Comparison.from_json(written),
    predict=Predictions("m", {"median": case}),
    timings={}, links={}, environment={}, config="",
)
print(json.dumps({"result": written, "html": report.render(summary, {}, {}), "text": report.text(summary)}))
"""


def hunks() -> list[tuple[str, str]]:
    """Each fenced diff of the page as the text before and after."""
    pairs = []
    for body in re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        lines = body.splitlines()
        assert {line[:1] for line in lines} <= {" ", "+", ""}, "the page only adds lines"
        before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        pairs.append((before, "\n".join(line[1:] for line in lines)))
    return pairs


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages with the page's edit of the page's one file."""
    folder = tmp_path_factory.mktemp("metric")
    for package in ("storage", "ssl_core", "jobs", "cluster"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (name,) = set(re.findall(r"^In `([\w/.]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    text = (folder / name).read_text(encoding="utf-8")
    for before, after in hunks():
        assert text.count(before) == 1, f"{name} no longer has:\n{before}"
        text = text.replace(before, after)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_the_edit_is_one_field_and_its_formula() -> None:
    lines = sum(after.count("\n") - before.count("\n") for before, after in hunks())
    assert 2 <= lines <= 6, "with two blank lines"


def test_the_metric_is_in_cases_rows_and_the_report(edited: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=edited,
        env=os.environ | {"PYTHONPATH": str(edited), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout.splitlines()[-1])
    by_start = {(c["start"], c["label"]): c["rvd"] for c in output["result"]["cases"]}
    assert by_start == {("a", "liver"): 0.25, ("b", "liver"): 0.5, ("a", "absent"): 0.0, ("b", "absent"): 0.0}
    rows = {(r["start"], r["label"]): (r["rvd_mean"], r["rvd_sd"]) for r in output["result"]["rows"]}
    assert rows["b", "liver"] == (0.5, 0.0)
    head = re.findall(r"<th[^>]*>([^<]*)</th>", output["html"])
    assert head[:6] == ["start", "label", "Dice", "HD95 (mm)", "NSD (1 mm)", "RVD"]
    assert '<td class="number">0.500 ± 0.000</td>' in output["html"]
    assert "RVD" in output["text"]
