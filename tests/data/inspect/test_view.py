"""The contact sheet: boxes where they belong, nothing from the data becomes markup, nothing is loaded from outside."""

from __future__ import annotations

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opencloc.cli import main
from opencloc.data.inspect.view import ViewConfig, write_view
from opencloc.data.sample import Sample
from opencloc.data.sidecar import SidecarRow, sidecar_path, write_sidecar
from opencloc.data.tars.shards import ShardWriter

EVIL = '<script>alert("x")</script>&"\'>{{ 7 * 7 }}'


class Page(HTMLParser):
    """What a browser makes of a page: elements with their attributes and all their text, those of interest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # (innermost element, text)
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "img", "input", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self._open[-1], data.strip()))

    def all(self, tag: str, css_class: str | None = None) -> list[dict[str, str]]:
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and (css_class is None or css_class in attributes.get("class", "").split())
        ]

    def text_of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def write_tar(folder: Path, *samples: Sample) -> None:
    with ShardWriter(str(folder), image_format="png") as writer:
        for sample in samples:
            writer.write(sample)


def sheet(folder: Path, **settings: Any) -> Page:
    out = folder / "sheet" / "view.html"
    write_view(ViewConfig(data=str(folder), out=str(out), **settings))
    return Page(out)


def percentages(style: str) -> list[float]:
    found = dict(re.findall(r"(left|top|width|height):([\d.]+)%", style))
    return [float(found[name]) / 100 for name in ("left", "top", "width", "height")]


def test_boxes_lie_where_they_belong_the_largest_first(tmp_path: Path) -> None:
    boxes = np.asarray([[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], [0.75, 0.5, 1, 0.6]], dtype=np.float32)
    sample = Sample(
        key="k", image=Image.new("RGB", (40, 20)), boxes=boxes, texts=("cup", "table", "spoon"),
        scores=np.asarray([0.25, 1.0, 0.5], dtype=np.float32),
    )  # fmt: skip
    write_tar(tmp_path, sample)
    page = sheet(tmp_path)
    drawn = np.asarray([percentages(box["style"]) for box in page.all("div", "box")])
    drawn[:, 2:] += drawn[:, :2]  # left, top, width, height -> corners
    np.testing.assert_allclose(drawn, boxes[[1, 0, 2]], atol=1e-4)
    assert page.text_of("li") == ["table", "cup", "spoon"]
    assert page.text_of("i") == ["1.00", "0.25", "0.50"]


def test_a_text_has_one_color_on_the_whole_sheet(tmp_path: Path) -> None:
    boxes = np.asarray([[0, 0, 1, 1], [0, 0, 0.5, 0.5]], dtype=np.float32)
    texts = [("cup", "dog"), ("dog", "cat"), ("dog", "cup")]
    samples = (Sample(key=f"{i}", image=Image.new("RGB", (8, 8)), boxes=boxes, texts=t) for i, t in enumerate(texts))
    write_tar(tmp_path, *samples)
    page = sheet(tmp_path)
    colors = {(text, item["class"]) for text, item in zip(page.text_of("li"), page.all("li"), strict=True)}
    assert colors == {("dog", "c0"), ("cup", "c1"), ("cat", "c2")}


def test_the_image_is_shown_as_it_is_and_small(tmp_path: Path) -> None:
    image = Image.new("RGB", (400, 100), "red")
    image.paste((0, 0, 255), (200, 0, 400, 100))
    write_tar(tmp_path, Sample(key="k", image=image))
    (shown,) = sheet(tmp_path, image_px=80).all("img")
    assert (shown["width"], shown["height"]) == ("400", "100")
    data = shown["src"].removeprefix("data:image/jpeg;base64,")
    pixels = Image.open(io.BytesIO(base64.b64decode(data)))
    assert pixels.size == (80, 20)
    np.testing.assert_allclose(np.asarray(pixels)[10, [10, 70]], [(255, 0, 0), (0, 0, 255)], atol=6)


def test_nothing_from_the_data_becomes_markup(tmp_path: Path) -> None:
    box = np.asarray([[0, 0, 1, 1]], dtype=np.float32)
    sample = Sample(key="k", image=Image.new("RGB", (8, 8)), captions=(EVIL,), alt_text=EVIL, boxes=box, texts=(EVIL,))
    folder = tmp_path / "<script>1 & 2"
    write_tar(folder, sample)
    page = sheet(folder)
    assert len(page.all("script")) == 1  # the sheet's own
    assert page.text_of("title") == page.text_of("h1") == [str(folder)]
    assert page.text_of("li") == [EVIL]
    assert page.text_of("p").count(EVIL) == 2  # caption and alt-text
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_nothing_is_loaded_from_outside(tmp_path: Path) -> None:
    write_tar(tmp_path, Sample(key="k", image=Image.new("RGB", (8, 8))))
    page = sheet(tmp_path)
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert not page.all("link")
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    (policy,) = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy


def test_failures_are_shown_with_their_reason(tmp_path: Path) -> None:
    images = [Sample(key=key, image=Image.new("RGB", (8, 8))) for key in "abc"]
    write_tar(tmp_path, *images)
    box = np.asarray([[0, 0, 0.5, 0.5]], dtype=np.float32)
    rows = [
        SidecarRow(key="a", boxes=box, texts=("dog",), scores=np.asarray([0.9], dtype=np.float32)),
        SidecarRow(key="b", error=f"detector failed: {EVIL}"),
    ]
    write_sidecar(sidecar_path(str(tmp_path / "00000.tar"), "vesl"), rows, {})
    page = sheet(tmp_path)
    assert page.text_of("strong") == ["not labelled", "not in the sidecar"]
    assert any(EVIL in text for text in page.text_of("p"))
    assert len(page.all("article", "failed")) == 2
    assert any("Labels vesl: 1 regions on 3 images" in text and "2 skipped" in text for text in page.text_of("p"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"order": "first", "num_images": 2}, ["0", "1"]),
        ({"order": "first", "start": 3, "num_images": 9}, ["3", "4"]),
        ({"order": "first", "start": 9}, []),
        ({"num_images": 9}, ["0", "1", "2", "3", "4"]),
    ],
)
def test_the_chosen_samples_are_shown(tmp_path: Path, settings: dict[str, Any], expected: list[str]) -> None:
    write_tar(tmp_path, *(Sample(key=str(i), image=Image.new("RGB", (8, 8))) for i in range(5)))
    assert sheet(tmp_path, **settings).text_of("b") == expected


def test_a_random_choice_follows_its_seed(tmp_path: Path) -> None:
    write_tar(tmp_path, *(Sample(key=f"{i:02d}", image=Image.new("RGB", (8, 8))) for i in range(40)))
    choices = [sheet(tmp_path, num_images=8, seed=seed).text_of("b") for seed in (0, 0, 1)]
    assert choices[0] == choices[1] != choices[2]
    assert choices[0] == sorted(set(choices[0]))
    assert len(choices[0]) == 8


@pytest.mark.parametrize(("field", "value"), [("num_images", 0), ("start", -1), ("image_px", 8)])
def test_a_number_out_of_range_is_refused_by_name(field: str, value: int) -> None:
    fields: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"{field}.*\n.*greater than or equal to"):
        ViewConfig(data="x", **fields)


def test_only_a_regular_file_is_replaced(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars", Sample(key="k", image=Image.new("RGB", (8, 8))))
    out = tmp_path / "view.html"
    os.mkfifo(out)
    with pytest.raises(OSError, match=r"view\.html is not a regular file"):
        write_view(ViewConfig(data=str(tmp_path / "tars"), out=str(out)))
    assert out.is_fifo()
    out.unlink()
    write_view(ViewConfig(data=str(tmp_path / "tars"), out=str(out)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tars", "view.html"]


def test_the_command_prints_the_file_then_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "tars", *(Sample(key=key, image=Image.new("RGB", (8, 8))) for key in "ab"))
    rows = [SidecarRow(key="a", error="no caption")]
    write_sidecar(sidecar_path(str(tmp_path / "tars/00000.tar"), "vesl"), rows, {})
    out = str(tmp_path / "view.html")
    assert main(["data", "view", "--data", str(tmp_path / "tars"), "--out", out]) == 0
    expected = "0 regions on 2 images; skipped: not labelled (1), not in the sidecar (1)"
    assert capsys.readouterr().out.splitlines() == [out, expected]
