import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jobs.cli import main as cli
from jobs.pages import store as store_page
from jobs.pages.pictures import thumbnail
from storage.format.manifest import Manifest
from storage.reading.volume_store import VolumeStore
from storage.testing.phantoms import publish_phantoms
from tests.kit.phantoms import write_phantoms


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = tmp_path_factory.mktemp("store").as_uri()
    write_phantoms(url, 30)
    return url


class Page(HTMLParser):
    """Which tags are open, and what the pictures are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_facts_histograms_and_slices_and_needs_nothing_else(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "show", store, "--json", "--html", str(tmp_path / "s.html")]) == 0
    facts = json.loads(capsys.readouterr().out)
    text = (tmp_path / "s.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|<script|@import", text)
    slices = [i["alt"] or "" for i in page.images if "slice 10 of 20" in (i["alt"] or "")]
    assert len(slices) == store_page.THUMBNAILS
    assert slices[0].startswith("phantom-000")
    assert slices[-1].startswith("phantom-029")
    assert len(page.images) == store_page.THUMBNAILS + 4
    for image in page.images:
        data = base64.b64decode((image["src"] or "").removeprefix("data:image/png;base64,"), validate=True)
        assert data.startswith(b"\x89PNG")
    assert f"<td>{facts['manifest']}</td>" in text
    assert "MR 30" in text
    assert "24 of 30, evenly spread" in text


def test_every_channel_has_its_histograms(tmp_path: Path) -> None:
    url = tmp_path.as_uri()
    publish_phantoms(url, [(8, 9, 10)] * 3, channels=6)
    with VolumeStore(url) as volumes:
        text = store_page.render(volumes, {})
    pictures = [i["alt"] or "" for i in Page(text).images]
    assert sum("of channel 3 (counted from 0) of 3 volumes" in alt for alt in pictures) == 1
    assert not any("of channel 4" in alt for alt in pictures)
    assert "The first 4 of 6 channels are shown" in text


def test_a_thumbnail_outlines_the_label_and_keeps_the_proportions() -> None:
    image = np.random.default_rng(0).normal(size=(20, 30))
    mask = np.zeros((20, 30), np.uint8)
    mask[:8, 5:12] = 3
    plain = thumbnail(image)
    assert thumbnail(image, np.zeros_like(mask)) == plain
    assert thumbnail(image, mask) != plain
    wide, high = (int.from_bytes(thumbnail(image, spacing_mm=(3.0, 1.0))[a : a + 4], "big") for a in (16, 20))
    assert (wide, high) == (120, 240)


def test_the_patients_right_is_on_the_left() -> None:
    from matplotlib.image import imread

    image = np.zeros((16, 16))
    image[:, :4] = 1.0  # W runs from left to right of the patient: low W is left
    pixels = imread(io.BytesIO(thumbnail(image)))
    assert pixels[:, -20:, 0].mean() > 0.9
    assert pixels[:, :20, 0].mean() < 0.1


def test_label_volumes_are_in_millilitres(store: str) -> None:
    manifest = Manifest.open(store)
    volumes_ml = store_page.label_volumes(manifest)
    with VolumeStore(store, manifest) as volumes:
        mask = volumes.read_volume("phantom-004", "labels")
    assert set(volumes_ml) == {("labels", 1)}
    assert volumes_ml["labels", 1][4] == pytest.approx((mask == 1).sum() / 1000)


@pytest.mark.parametrize(("count", "most"), [(1, 24), (5, 24), (24, 24), (25, 24), (10**6, 24)])
def test_evenly_spread_indices(count: int, most: int) -> None:
    indices = store_page.evenly(count, most)
    assert len(indices) == min(count, most)
    assert indices[0] == 0
    assert indices[-1] == count - 1
    assert np.ptp(np.diff(indices)) <= 1 if len(indices) > 2 else True


def test_histograms_take_what_stores_hold() -> None:
    same, one = np.ones(5), np.array([3.0])
    assert store_page.histograms({"a": same}) != store_page.histograms({"a": one})
    assert store_page.histograms({"a": np.array([np.nan])}).startswith(b"\x89PNG")
    rounded = np.array([1.25, 1.25 + 1e-7, 1.25])
    assert store_page.histograms({"a": rounded}) == store_page.histograms({"a": np.full(3, 1.25)})
    tail = np.array([-3.0, 1.0, 2.0, 3.0, 1e6])
    assert store_page.histograms({"a": tail}).startswith(b"\x89PNG")
    wide = {("a", 1): np.array([1e-3, 5.0, 1e6]), ("b", 9): np.array([0.0])}
    assert store_page.label_figure(wide).startswith(b"\x89PNG")
