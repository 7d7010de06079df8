"""Reports: golden tables, strict JSON, and a page that needs nothing beside it and runs nothing that it was given."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opencloc.eval.metrics import Score
from opencloc.eval.pictures import Grounded, Prediction
from opencloc.eval.report import Result, read_log, to_json, to_markdown, write_html_report
from opencloc.eval.sets.item import Item, Loaded

NAN = float("nan")


def score(label: str, value: float, of: str, spread: float = 0.05) -> Score:
    low, high = (NAN, NAN) if spread == 0 else (max(0, value - spread), min(1, value + spread))
    return Score(label=label, value=value, low=low, high=high, count=0 if np.isnan(value) else 9, of=of)


def recognition(encoder: str, top1: float) -> Result:
    return Result(
        encoder=encoder,
        task="region-recognition",
        data="scenes:rich?num_things=120&seed=1",
        rules="Name each given box",
        precision="fp32",
        images=254,
        of_images=1000,
        class_names=("dog", "cat"),
        scores={
            "top1": score("top-1", top1, "1,200 boxes"),
            "macc": score("mAcc", top1 / 2, "98 classes present of 120", spread=0),
            "top1_small": score("top-1, small (area under 32²)", NAN, "0 boxes"),
        },
        skipped={"images": {"without regions": 2, "after the first 256": 744}, "boxes": {"bad box": 1}},
        noted={},
    )


def grounding(encoder: str, acc50: float | None) -> Result:
    return replace(
        recognition(encoder, 0.5),
        task="grounding",
        rules="Find each text",
        class_names=(),
        scores={} if acc50 is None else {"acc50": score("IoU ≥ 0.5", acc50, "900 texts")},
        skipped={"images": {"after the first 256": 744}}
        | ({"texts": {"asked of an encoder that cannot ground": 900}} if acc50 is None else {}),
        noted={"resized since annotation, boxes scaled": 3},
    )


CLIP = [recognition("CLIP|crop", 0.0912), grounding("CLIP|crop", None)]
CLOC = [recognition("CLOC", 0.8231), grounding("CLOC", 0.64)]

GOLDEN = r"""| score in % | CLIP\|crop | CLOC | of |
|---|---:|---:|---|
| region-recognition: images used | 254 of 1,000 | 254 of 1,000 | of the set |
| region-recognition: top-1 | 9.1 (4.1 to 14.1) | 82.3 (77.3 to 87.3) | 1,200 boxes |
| region-recognition: mAcc | 4.6 | 41.2 | 98 classes present of 120 |
| grounding: images used | – | 254 of 1,000 | of the set |
| grounding: IoU ≥ 0.5 | – | 64.0 (59.0 to 69.0) | 900 texts |

Rules:

* region-recognition, on scenes:rich?num_things=120&seed=1: Name each given box
* grounding, on scenes:rich?num_things=120&seed=1: Find each text

Skipped:

* images: without regions (2), in region-recognition
* images: after the first 256 (744)
* boxes: bad box (1), in region-recognition
* texts: asked of an encoder that cannot ground (900), in grounding, by CLIP\|crop

Used, and unusual:

* images: resized since annotation, boxes scaled (3), in grounding

In brackets: 95 % intervals"""


def test_the_markdown_table_has_every_score_with_its_denominator_and_interval() -> None:
    assert to_markdown([*CLIP, *CLOC]).startswith(GOLDEN)


def test_denominators_that_differ_are_all_named() -> None:
    other = replace(CLOC[1], encoder="other", scores={"acc50": score("IoU ≥ 0.5", 0.5, "7 texts")})
    assert "| grounding: IoU ≥ 0.5 | 64.0 (59.0 to 69.0) | 50.0 (45.0 to 55.0) | 900 texts / 7 texts |" in to_markdown(
        [CLOC[1], other]
    )


def test_json_is_strict_and_complete() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    clip, cloc = json.loads(to_json([CLIP[1], CLOC[0]]), parse_constant=refuse)
    assert (clip["encoder"], clip["scores"]) == ("CLIP|crop", {})
    assert cloc["scores"]["top1"] == {
        "label": "top-1",
        "value": 0.8231,
        "low": pytest.approx(0.7731),
        "high": pytest.approx(0.8731),
        "count": 9,
        "of": "1,200 boxes",
    }
    assert cloc["scores"]["top1_small"]["value"] is None
    assert cloc["skipped"] == {"images": {"without regions": 2, "after the first 256": 744}, "boxes": {"bad box": 1}}


def test_markdown_runs_nothing_that_comes_from_a_path() -> None:
    hostile = replace(CLOC[0], data="coco:/a|b/<script>alert(1)</script>/[x](y)`*&lt;\n\udcff")
    table = to_markdown([hostile])
    assert "<script>" not in table
    assert r"coco:/a\|b/&lt;script>alert(1)&lt;/script>/\[x\](y)\`\*&amp;lt; ?: Name" in table
    table.encode()


# -- the page ----------------------------------------------------------------------------------------------------------


HOSTILE = """<script>alert(1)</script>"><img src=x onerror='alert(2)'>{{ 7 * 7 }}"""


class Page(HTMLParser):
    """The tags of a page with their attributes, its open tags, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "use", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "img", "use", "path"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def prediction(texts: tuple[str, ...], names: tuple[str, ...]) -> Prediction:
    boxes = np.array([[0.1, 0.1, 0.4, 0.5], [0.5, 0.25, 1.0, 1.0]], dtype=np.float32)
    image = Image.new("RGB", (40, 20), (200, 30, 30))
    item = Item(image=image, boxes=boxes, texts=texts)
    return Prediction(
        loaded=Loaded(number=0, item=item, image=image, annotated_px=image.size),
        names=names,
        correct=tuple(name == text for name, text in zip(names, texts, strict=True)),
        grounded=(
            Grounded(text=texts[0], box=boxes[0], truth=boxes[0], iou=1.0),
            Grounded(text=texts[1], box=boxes[0], truth=boxes[1], iou=0.0),
        ),
    )


def write_log(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.fixture
def page(tmp_path: Path) -> Page:
    log = [json.dumps({"step": s, "image_text": 5 / s, "grounding": 1.0, "skipped": {}}) for s in range(1, 60)]
    write_html_report(
        tmp_path / "report.html",
        title=f"Title {HOSTILE}",
        lede=HOSTILE,
        results=[replace(one, encoder=HOSTILE, data=HOSTILE) for one in CLIP] + CLOC,
        logs={HOSTILE: write_log(tmp_path / "a.jsonl", *log), "CLOC": write_log(tmp_path / "b.jsonl", *log)},
        pictures=[prediction(("dog", HOSTILE), ("dog", "cat")), prediction(("dog", "cat"), (HOSTILE, "cat"))],
        facts={"command": HOSTILE},
    )
    assert [p.name for p in tmp_path.iterdir() if p.suffix not in (".jsonl", ".html")] == []
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_hostile_names_are_shown_and_never_run(page: Page) -> None:
    assert not any(tag == "script" or any(name.startswith("on") for name in attrs) for tag, attrs in page.tags)
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in page.tags if tag == "img")  # pyright: ignore
    # Title twice, lede, tables, rules, key of the curves, in pictures as text, name and prompt, the fact.
    assert page.text.count(HOSTILE) >= 9


def test_the_page_is_well_formed_and_needs_nothing_beside_it(page: Page) -> None:
    assert page.open == []
    assert not {"link", "script", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attrs.get(name, "#") is not None
            assert str(attrs.get(name, "#")).startswith(("#", "data:"))
    assert "url(http" not in page.text
    assert "@import" not in page.text


def test_the_page_shows_scores_boxes_and_marks(page: Page) -> None:
    assert "82.3%" in re.sub(r"\s", "", page.text)
    assert page.text.count("✓") == 4
    assert page.text.count("✗") == 4
    styles = [attrs.get("style") for tag, attrs in page.tags if tag == "b"]
    assert styles.count("left:10.00%;top:10.00%;width:30.00%;height:40.00%") == 6
    assert sum(tag == "svg" for tag, _ in page.tags) == 2  # no log has a region-text loss


def test_ids_of_the_curves_do_not_collide(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id", "").startswith(("m", "p"))]  # pyright: ignore
    clips = [i for i in ids if re.fullmatch(r"[mp][0-9a-f]{10}", i or "")]
    assert clips
    assert len(clips) == len(set(clips))


def test_a_page_without_pictures_or_logs_has_no_empty_sections(tmp_path: Path) -> None:
    write_html_report(tmp_path / "r.html", title="T", lede="L", results=CLOC)
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    headings = re.findall(r"What it sees|Training|All numbers|How this was made", page.text)
    assert headings == ["All numbers"]


def test_a_resumed_log_counts_the_last_entry_of_a_step(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", '{"step": 1, "x": 9}', '{"step": 2, "x": 8}', '{"step": 1, "x": 7.5}')
    assert read_log(log) == {"step": [(1, 1.0), (2, 2.0)], "x": [(1, 7.5), (2, 8.0)]}


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1}'])
def test_a_broken_log_is_named_with_its_line(line: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"log.jsonl, line 2: not a JSON object with a step"):
        read_log(write_log(tmp_path / "log.jsonl", '{"step": 1}', line))


def test_more_runs_than_colours_are_refused(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", '{"step": 1, "image_text": 2}')
    with pytest.raises(ValueError, match="5 logs, at most 4"):
        write_html_report(tmp_path / "r.html", title="T", lede="L", results=CLOC, logs={str(i): log for i in range(5)})
    assert not (tmp_path / "r.html").exists()
