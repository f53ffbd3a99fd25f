"""The report: one well-formed page that needs nothing else, and says what the test says."""

import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

from jobs.output import to_json
from jobs.pages import report
from jobs.pages.html import page as html_page
from jobs.pages.html import prose
from jobs.pages.summary import DataFacts, DemoSummary, PredictedCase, Predictions, PretrainFacts
from ssl_core.downstream.comparison import Comparison, StartRow, Training, subject_dice
from ssl_core.downstream.paired_test import PairedTrainings
from ssl_core.downstream.scores import CaseScore
from ssl_core.downstream.search import SearchResult, Trial
from tests.kit.scores import scores

VOID = {"meta", "img", "br", "hr", "link", "input"}
STATEMENT = "No difference between encoder & scratch is shown: <b>-0.012</b> Dice (95 % interval -0.03 to +0.01)."
NASTY = "<script>alert('x')</script>"
PNG = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x00\x00\x00\x00:~\x9bU\x00\x00\x00\n"
    b"IDATx\x9cc`\x00\x00\x00\x02\x00\x01H\xaf\xa4q\x00\x00\x00\x00IEND\xaeB`\x82"
)


def comparison(starts: tuple[str, ...], volumes_of: str = "-", flip: bool = False) -> Comparison:
    """Four subjects, two seeds, a volume of each subject for each character of `volumes_of`."""
    trainings = []
    for k, start in enumerate(starts):
        for seed in (0, 1):
            dice = [0.5 + 0.04 * i + 0.01 * seed + 0.02 * k for i in range(4)]
            cases = [
                CaseScore(f"v{i}{c}", f"s{i}", "label-1", scores(dice=1 - d if flip else d, hd95_mm=2.0 + i, nsd=0.8))
                for i, d in enumerate(dice)
                for c in volumes_of
            ]
            trainings.append(Training(start, seed, (), tuple(cases), None, 1.0))
    mean, sd = scores(dice=0.5612, hd95_mm=3.5, nsd=0.8), scores(dice=0.05, hd95_mm=1.1, nsd=0.01)
    return Comparison(
        rows=tuple(StartRow(start, NASTY, 2, 4, mean, sd) for start in starts),
        trainings=tuple(trainings),
        test=PairedTrainings(4, 2, -0.012, (-0.02, -0.004), -0.03, 0.01, 0.4, 0.5, 0.1, False, STATEMENT),
        model="seg",
        version="1",
        registered_start=starts[0],
        nsd_tolerance_mm=1.0,
        run_id="r",
        seconds=1.0,
    )


def trial(number: int, encoder: str, **changes: Any) -> Trial:
    facts = {"scores": (0.3, 0.4), "stopped_early": False, "error": None} | changes
    return Trial(number, {"encoder": encoder, "finetune.lr": 1e-3, "finetune.encoder_lr_scale": 0.1}, **facts)


def summary(starts: tuple[str, ...] = ("encoder", "scratch"), **changes: Any) -> DemoSummary:
    points = [[s, 0, {"loss": 1.0 / s, "loss/global": 0.6 / s, "loss/local": 0.4 / s}] for s in range(1, 9)]
    encoder = "models:/e@candidate"
    trials = (trial(0, encoder, stopped_early=True), trial(1, encoder, scores=(0.1, 0.9), error="it broke"))
    case = PredictedCase(f"/data/{NASTY}.nii.gz", "/out/p.nii.gz", 0.5)
    whole = DemoSummary(
        created="2026-01-01 00:00 UTC",
        headline={"volumes ingested": 12, "test Dice, scratch": "0.561"},
        data=DataFacts(
            description=f"{NASTY}: 12 volumes",
            simulated=False,
            text="12 volumes published.",
            notes=(f"image without label: {NASTY}.nii.gz",),
            facts={"store": "s3://volumes/x", "train": 8, "test": 4},
        ),
        pretrain=PretrainFacts(
            method="pgl",
            steps=60,
            global_batch=8,
            workers=2,
            points=tuple(points),
            samples_per_s=7.25,
            wait_share=0.012,
            run_id="r",
            run_url='http://127.0.0.1:1/#/experiments/1/runs/a"b',
            model="models:/demo@candidate",
        ),
        search=SearchResult(trials, trials[0].settings, "trial 0, lr 0.001", 4, "r", 1.0),
        finetune=comparison(starts),
        predict=Predictions("models:/seg@candidate", {rank: case for rank in ("best", "median", "worst")}),
        timings={"stack": 12.34, "pre-training": 100.0},
        links={"MLflow": "http://127.0.0.1:1", "Ray dashboard": "http://127.0.0.1:2"},
        environment={"python": "3.11", "torch": "2"},
        config=f"# pretrain\nname: {NASTY}\n",
    )
    return replace(whole, **changes)


class Page(HTMLParser):
    """Checks that tags are balanced, and gathers what a browser would load and what a person would read."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.loads, self.tags, self.words = list[str](), list[str](), list[str](), list[str]()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), "no scripts in attributes"
            if name in ("src", "srcset", "data", "poster") or (tag == "link" and name == "href"):
                self.loads.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def page(data: DemoSummary) -> str:
    pictures = {"views": PNG, "preview-best": PNG, "preview-worst": PNG}
    return report.render(data, pictures, {"views": "two views", "preview-best": f"best, {NASTY}"})


@pytest.fixture(scope="module")
def html() -> str:
    return page(summary())


def test_words_between_backticks_are_code_and_nothing_else_is_markup() -> None:
    assert prose(f"`tomoscale study` goes over draws {NASTY}") == (
        "<code>tomoscale study</code> goes over draws &lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;"
    )
    assert prose("one ` alone") == "one ` alone"


def test_the_page_is_well_formed_and_loads_nothing_from_elsewhere(html: str) -> None:
    parsed = Page(html)
    assert html.startswith("<!doctype html>")
    assert parsed.tags.count("img") == 5  # loss, Dice, views, two previews
    assert len(parsed.loads) == 5
    assert all(source.startswith("data:image/png;base64,") for source in parsed.loads)
    assert not {"script", "link", "iframe", "object", "embed"} & set(parsed.tags)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_names_are_escaped_and_the_statement_is_verbatim(html: str) -> None:
    assert NASTY not in html
    text = Page(html).text
    assert STATEMENT in text
    for part in (f"{NASTY}: 12 volumes", f"image without label: {NASTY}.nii.gz", f"best, {NASTY}", f"name: {NASTY}"):
        assert part in text


def test_the_numbers_of_the_summary_are_on_the_page(html: str) -> None:
    text = Page(html).text
    for part in ("0.561 ± 0.050", "3.50 ± 1.10", "0.800 ± 0.010", "4 × 2", "7.25 samples/s", "data wait 1.2 %"):
        assert part in text, part
    for part in ("2 of 4 (stopped early)", "error", "0.001", "12.3", "s3://volumes/x", "models:/demo@candidate"):
        assert part in text, part
    links = {unescape(link) for link in re.findall(r'href="([^"]*)"', html)}
    data = summary()
    assert links == {*data.links.values(), data.pretrain.run_url}


def test_simulated_subjects_are_called_so(html: str) -> None:
    data = summary()
    simulated = page(summary(data=replace(data.data, simulated=True)))
    assert "simulated" in Page(simulated).text
    assert "simulated" not in Page(html).text


def test_templates_trust_no_value_and_know_all_names() -> None:
    folder = Path(report.__file__).parent
    for template in folder.glob("*.j2"):
        assert not re.search(r"\|\s*safe|autoescape", template.read_text(encoding="utf-8")), template.name
    with pytest.raises(UndefinedError, match="summary"):
        html_page("report.html.j2")


@pytest.mark.parametrize("starts", [("scratch",), ("a", "b", "c", "d", "e")])
def test_any_number_of_starts_is_drawn(starts: tuple[str, ...]) -> None:
    parsed = Page(page(summary(starts)))
    assert all(start in parsed.text for start in starts)


def test_figures_show_what_they_are_given() -> None:
    data = summary()
    two = report.loss_figure(data.pretrain.points)
    one = report.loss_figure([[s, 0, {"loss": 1.0 / s, "loss/only": 1.0 / s}] for s in range(1, 9)])
    moved = report.loss_figure([[s, 0, {"loss": 2.0 - 1.0 / s, "loss/only": 1.0 / s}] for s in range(1, 9)])
    assert all(png.startswith(b"\x89PNG") for png in (two, one, moved))
    assert len({two, one, moved}) == 3
    swapped = comparison(("encoder", "scratch"), flip=True).trainings
    assert report.dice_figure(swapped) != report.dice_figure(data.finetune.trainings)


def test_the_terminal_says_the_same() -> None:
    text = report.text(summary())
    assert STATEMENT in text
    for part in ("0.5612", "encoder", "scratch", "pre-training", "12.3", "True"):
        assert part in text, part


def test_a_dot_is_a_subject_however_many_volumes_it_has() -> None:
    once, twice = (comparison(("encoder", "scratch"), scans).trainings for scans in ("a", "ab"))
    assert report.dice_figure(twice) == report.dice_figure(once)


def test_dots_are_of_each_seed_and_not_of_their_mean() -> None:
    """Two seeds that differ by much have the mean of two that agree, and another picture."""
    agree = comparison(("encoder", "scratch")).trainings
    apart = []
    for training in agree:
        by = 0.2 if training.seed else -0.2
        cases = (replace(case, scores=scores(dice=case.scores.dice + by)) for case in training.cases)
        apart.append(replace(training, cases=tuple(cases)))
    for start in ("encoder", "scratch"):
        assert subject_dice(apart, start) == pytest.approx(subject_dice(agree, start))
    assert report.dice_figure(apart) != report.dice_figure(agree)


@pytest.mark.parametrize("encoder", ["none", "models:/e/1"])
def test_a_search_that_one_side_had_no_part_in_is_said(encoder: str) -> None:
    search = summary().search
    data = summary(search=replace(search, trials=(search.trials[0], trial(1, encoder))))
    for text in (Page(page(data)).text, report.text(data)):
        assert ("had no search of their own" in text) == (encoder != "none")


def test_the_summary_on_disk_has_the_keys_that_it_always_had() -> None:
    data = json.loads(to_json(summary().to_json()))
    assert list(data) == [
        "created", "headline", "data", "pretrain", "search", "finetune", "predict", "timings", "links", "environment",
        "config",
    ]  # fmt: skip
    assert list(data["predict"]) == ["model", "same_geometry", "input", "output", "dice", "cases"]
    assert list(data["predict"]["cases"]["worst"]) == ["input", "output", "dice"]
    assert data["pretrain"]["points"][0] == [1, 0, {"loss": 1.0, "loss/global": 0.6, "loss/local": 0.4}]
    assert data["search"]["chosen"] == "trial 0, lr 0.001"
    trial_keys = "trial encoder lr encoder_lr_scale epochs scores last stopped_early status error id"
    assert list(data["search"]["trials"][0])[:11] == trial_keys.split(), "later ones come after them"
    assert len(data["finetune"]["cases"]) == 16
