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

from opencloc.data.sample import Sample
from opencloc.eval.metrics import Accuracy, Grounding, Recall, RegionRecognition, Retrieval
from opencloc.eval.report import read_log, to_json, to_markdown, write_html_report
from opencloc.eval.tasks import Evaluation, Grounded, Prediction

NAN = float("nan")


def accuracy(top1: float, boxes: int) -> Accuracy:
    return Accuracy(top1=top1, macc=top1 / 2, boxes=boxes, classes_present=min(boxes, 98))


def recognition(top1: float) -> RegionRecognition:
    by_size = {"small": accuracy(NAN, 0), "medium": accuracy(0.5, 200), "large": accuracy(0.9, 1000)}
    return RegionRecognition(overall=accuracy(top1, 1200), by_size=by_size, classes=120)


IMAGES = Retrieval(
    to_text=Recall(r1=0.6, r5=0.9, r10=1.0, queries=256, gallery=256),
    from_text=Recall(r1=0.55, r5=0.8, r10=0.95, queries=256, gallery=256),
    distinct_texts=250,
)
CLIP = Evaluation(
    encoder="CLIP|crop",
    images=256,
    dtype="float32",
    region_recognition=recognition(0.0912),
    image_retrieval=IMAGES,
    skipped={"grounding": {"this encoder cannot ground": 900}, "image_retrieval": {"image without captions": 2}},
)
CLOC = Evaluation(
    encoder="CLOC",
    images=256,
    dtype="float32",
    region_recognition=recognition(0.8231),
    image_retrieval=IMAGES,
    grounding=Grounding(acc50=0.64, mean_iou=0.6, queries=900),
    skipped={"image_retrieval": {"image without captions": 2}},
)

GOLDEN = r"""| score in % | CLIP\|crop | CLOC | of |
|---|---:|---:|---|
| region recognition: top-1 | 9.1 | 82.3 | 1,200 boxes |
| region recognition: mAcc | 4.6 | 41.2 | 98 classes present of 120 |
| region recognition: top-1, small | – | – | 0 boxes |
| region recognition: top-1, medium | 50.0 | 50.0 | 200 boxes |
| region recognition: top-1, large | 90.0 | 90.0 | 1,000 boxes |
| image retrieval: image to text R@1 | 60.0 | 60.0 | 256 queries among 256 |
| image retrieval: image to text R@5 | 90.0 | 90.0 | 256 queries among 256 |
| image retrieval: image to text R@10 | 100.0 | 100.0 | 256 queries among 256 |
| image retrieval: text to image R@1 | 55.0 | 55.0 | 256 queries among 256 |
| image retrieval: text to image R@5 | 80.0 | 80.0 | 256 queries among 256 |
| image retrieval: text to image R@10 | 95.0 | 95.0 | 256 queries among 256 |
| grounding: IoU ≥ 0.5 | – | 64.0 | 900 texts |
| grounding: mean IoU | – | 60.0 | 900 texts |

Left out:

* grounding: this encoder cannot ground (900): CLIP\|crop
* image retrieval: image without captions (2)
"""


def test_the_markdown_table_has_every_score_with_its_denominator() -> None:
    assert to_markdown([CLIP, CLOC]) == GOLDEN


def test_denominators_that_differ_are_all_named() -> None:
    other = replace(CLOC, grounding=Grounding(acc50=0.5, mean_iou=0.5, queries=7))
    assert "| grounding: mean IoU | 60.0 | 50.0 | 900 texts / 7 texts |" in to_markdown([CLOC, other])


def test_json_is_strict_and_complete() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    clip, cloc = json.loads(to_json([CLIP, CLOC]), parse_constant=refuse)
    assert clip["encoder"] == "CLIP|crop"
    assert clip["grounding"] is None
    assert clip["region_recognition"]["by_size"]["small"] == {
        "top1": None,
        "macc": None,
        "boxes": 0,
        "classes_present": 0,
    }
    assert cloc["grounding"] == {"acc50": 0.64, "mean_iou": 0.6, "queries": 900}
    assert cloc["image_retrieval"]["to_text"]["r1"] == 0.6
    assert cloc["skipped"] == {"image_retrieval": {"image without captions": 2}}


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
    return Prediction(
        sample=Sample(key="k", image=image, boxes=boxes, texts=texts),
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
        evaluations=[replace(CLIP, encoder=HOSTILE), CLOC],
        logs={HOSTILE: write_log(tmp_path / "a.jsonl", *log), "CLOC": write_log(tmp_path / "b.jsonl", *log)},
        pictures=[prediction(("dog", HOSTILE), ("dog", "cat")), prediction(("dog", "cat"), (HOSTILE, "cat"))],
        facts={"command": HOSTILE},
    )
    assert [p.name for p in tmp_path.iterdir() if p.suffix not in (".jsonl", ".html")] == []
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_hostile_names_are_shown_and_never_run(page: Page) -> None:
    assert not any(tag == "script" or any(name.startswith("on") for name in attrs) for tag, attrs in page.tags)
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in page.tags if tag == "img")  # pyright: ignore
    # Title twice, lede, two tables, key of the curves, two in pictures as text and name, one as prompt, the fact.
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
    write_html_report(tmp_path / "r.html", title="T", lede="L", evaluations=[CLOC])
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
        write_html_report(
            tmp_path / "r.html", title="T", lede="L", evaluations=[CLOC], logs={str(i): log for i in range(5)}
        )
    assert not (tmp_path / "r.html").exists()
