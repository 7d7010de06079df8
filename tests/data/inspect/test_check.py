"""`opencloc data check`: every suspicion fires on data broken in its way and on none that is sound."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opencloc.cli import main
from opencloc.data.inspect import check as check_module
from opencloc.data.inspect.check import CheckConfig, write_check
from opencloc.data.inspect.picture import contact_sheet
from opencloc.data.sample import Sample
from tests.data.sources import test_published as published

NUM_IMAGES = 40
Box = Sequence[float]

XYXY = "boxes end at the right or lower border far more often than they begin at the other two"
OUTSIDE = "boxes reach outside the image, clipped at opening"
SHARES = "boxes within the first pixel"
PIXELS = "bad box (reaches outside the image)"


def coco(root: Path, bbox: Callable[[np.ndarray], Any], name: Callable[[int], str] = str) -> str:
    """A COCO folder of 40 images of 80 x 60 pixels with 3 boxes each, as `bbox` writes x0, y0, x1, y1 in pixels."""
    rng = np.random.default_rng(0)
    size_px = np.array([80, 60])
    annotations, images = [], []
    for image in range(NUM_IMAGES):
        images.append({"id": image, "file_name": f"{image}.jpg", "width": 80, "height": 60})
        published.photo(root / f"images/{image}.jpg", 80, 60)
        for _ in range(3):
            low = rng.uniform(0.02, 0.6, 2) * size_px
            box = np.concatenate([low, low + rng.uniform(0.1, 0.38, 2) * size_px])
            number = len(annotations)
            annotations.append({"id": number, "image_id": image, "category_id": number % 12, "bbox": bbox(box)})
    categories = [{"id": one, "name": name(one)} for one in range(12)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    published.write(root / "annotations/instances_train.json", content)
    captions = [{"id": one, "image_id": one, "caption": f"photo {one}"} for one in range(NUM_IMAGES)]
    published.write(root / "annotations/captions_train.json", {"annotations": captions})
    return str(root)


def xywh(box: np.ndarray) -> list[float]:
    return [*box[:2], *(box[2:] - box[:2])]


def folder(root: Path, regions: Callable[[int], list[dict[str, Any]]], **fields: Any) -> str:
    for image in range(NUM_IMAGES):
        published.photo(root / f"{image}.jpg", 80, 60)
        published.write(root / f"{image}.json", {"caption": "a photo", "regions": regions(image)} | fields)
    return str(root)


def found(data: str, out: Path, **options: Any) -> set[str]:
    return {one.what for one in write_check(CheckConfig(data=data, out=str(out), **options)).suspicions}


# -- sound data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        "scenes:rich?num_things=30&attributes=colour&box_jitter=0.1&wrong_text=0.1&missing_region=0.25",
        "scenes:rich?context=next_to&num_things=16",
        "scenes:easy",
    ],
)
def test_nothing_is_suspicious_about_sound_scenes(tmp_path: Path, data: str) -> None:
    assert found(data, tmp_path, num_images=60) == set()


def test_nothing_is_suspicious_about_a_sound_coco_folder(tmp_path: Path) -> None:
    assert found(coco(tmp_path / "coco", xywh), tmp_path / "out") == set()


def test_nothing_is_suspicious_about_mosaics(tmp_path: Path) -> None:
    for number in range(12):
        path = tmp_path / f"photos/{number}.jpg"
        published.photo(path)
        published.write(path.with_suffix(".txt"), f"thing {number}")
    assert found(f"mosaic:{tmp_path}/photos?grid=2", tmp_path / "out", num_images=40) == set()


# -- broken data -------------------------------------------------------------------------------------------------------


def test_corners_in_a_file_of_widths_are_suspected(tmp_path: Path) -> None:
    assert {XYXY, OUTSIDE} <= found(coco(tmp_path / "coco", list), tmp_path / "out")


def test_shares_in_a_file_of_pixels_are_suspected(tmp_path: Path) -> None:
    size = np.array([80, 60, 80, 60])
    assert found(coco(tmp_path / "coco", lambda box: xywh(box / size)), tmp_path / "out") == {SHARES}


def test_pixels_in_a_record_of_shares_are_suspected(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", lambda image: [{"box": [3, 4, 30, 40 + image % 9], "text": f"{image}"}])
    assert main(["data", "check", "--data", data, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/check.json").read_text())
    assert {one["what"] for one in report["suspicions"]} == {PIXELS, "samples that cannot be used"}


def test_pixels_in_a_published_file_of_shares_are_suspected(tmp_path: Path) -> None:
    entries = []
    for image in range(NUM_IMAGES):
        published.photo(tmp_path / f"data/{image}.jpg", 80, 60)
        expressions = [
            {"bbox": [x, 5, 60, 50, 0.5], "short_expr": f"thing {image} {x}"} for x in (0, 10 + image % 5, 30)
        ]
        entries.append({"f_path": f"{image}.jpg", "caption": "a photo", "bbox_info": expressions})
    entries[0]["bbox_info"].append({"bbox": [0, 0, 0.5, 0.5], "short_expr": "the only sound one"})
    published.write(tmp_path / "data/results.json", entries)
    suspicions = found(f"fg-clip:{tmp_path}/data/results.json", tmp_path / "out")
    assert "empty boxes, left out at opening" in suspicions


def scattered(image: int, number: int = 0) -> list[float]:
    x, y = 0.1 + 0.013 * (image % 40), 0.1 + 0.1 * number
    return [x, y, x + 0.2, y + 0.3]


BROKEN: list[tuple[str, Callable[[int], list[dict[str, Any]]], dict[str, Any]]] = [
    (
        "boxes touch a border",
        lambda image: [
            {"box": [0, 0.1 + 0.01 * image, 0.3, 0.9], "text": f"{image} left"},
            {"box": [0.6, 0.2, 1, 0.5 + 0.01 * image], "text": f"{image} right"},
        ],
        {},
    ),
    ("boxes are the whole image", lambda image: [{"box": [0, 0, 1, 1], "text": f"{image}"}], {}),
    (
        "boxes under 2 pixels wide or high",
        lambda image: [{"box": [0.2, 0.1 + 0.01 * image, 0.9, 0.11 + 0.01 * image], "text": f"{image}"}],
        {},
    ),
    ("one box on many images", lambda image: [{"box": [0.2, 0.2, 0.7, 0.8], "text": f"{image}"}], {}),
    ("one text for most regions", lambda image: [{"box": scattered(image), "text": "object"}], {}),
    (
        "region texts of more than 30 words",
        lambda image: [{"box": scattered(image), "text": f"a very long tale {image} " * 9}],
        {},
    ),
    ("images without regions", lambda image: [], {}),
    ("images without a caption", lambda image: [{"box": scattered(image), "text": f"{image}"}], {"caption": None}),
]


@pytest.mark.parametrize(("suspicion", "regions", "fields"), BROKEN, ids=[one[0] for one in BROKEN])
def test_each_suspicion_fires_on_data_broken_in_its_way_alone(
    tmp_path: Path, suspicion: str, regions: Callable[[int], list[dict[str, Any]]], fields: dict[str, Any]
) -> None:
    assert found(folder(tmp_path / "data", regions, **fields), tmp_path / "out") == {suspicion}


def test_images_that_cannot_be_used_are_suspected(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", lambda image: [{"box": scattered(image), "text": f"{image}"}])
    for image in range(5):
        (tmp_path / f"data/{image}.jpg").write_bytes(b"no image")
    assert found(data, tmp_path / "out") == {"samples that cannot be used"}


def test_turned_images_are_suspected(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", lambda image: [{"box": scattered(image), "text": f"{image}"}])
    exif = Image.Exif()
    exif[0x0112] = 6
    for image in range(3):
        Image.new("RGB", (80, 60)).save(tmp_path / f"data/{image}.jpg", exif=exif)
    assert found(data, tmp_path / "out") == {"images that EXIF says to turn"}


def test_a_handful_of_samples_raises_no_suspicion(tmp_path: Path) -> None:
    assert found(coco(tmp_path / "coco", list), tmp_path / "out", num_images=check_module.ENOUGH // 3 - 1) <= {OUTSIDE}


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_command_warns_on_stderr_and_exits_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["data", "check", "--data", coco(tmp_path / "coco", list), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == str(out)
    assert f"SUSPICIOUS: {XYXY}" in printed.err
    assert "x0, y0, x1, y1 may have been read as x, y, width, height" in printed.err
    assert {path.name for path in out.iterdir()} == {"check.md", "check.json", "samples.png", "stats.png"}
    text = (out / "check.md").read_text()
    assert text.index("## Suspicious") < text.index(XYXY) < text.index("![samples with their boxes](samples.png)")
    report = json.loads((out / "check.json").read_text())
    assert report["stats"]["images"] == NUM_IMAGES
    assert report["stats"]["region_text_tokens"] == 1


def test_sound_data_are_said_to_be_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["data", "check", "--data", "scenes:easy", "--num-images", "40", "--out", out]) == 0
    printed = capsys.readouterr()
    assert "Nothing suspicious" in printed.out
    assert "SUSPICIOUS" not in printed.err


def test_samples_are_drawn_with_boxes_where_they_are() -> None:
    image = Image.new("RGB", (160, 80), "white")
    sample = Sample(key="k", image=image, boxes=np.array([[0.25, 0.5, 0.75, 1.0]]), texts=("a thing \u732b " * 30,))
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet([sample] * 20))).convert("RGB")).astype(int)
    tile = sheet[8:328, 8:328]  # the first of 16; the image fills rows 80 to 240 of it
    red = np.abs(tile - np.array([209, 73, 91])).sum(axis=2) == 0
    assert red[160:240, 80].all()
    assert red[160:240, 239].all()
    assert red[239, 80:240].all()
    assert not red[180:230, 90:230].any()
    assert sheet.shape[0] == 4 * (320 + 18 + 8) + 8  # twenty samples, sixteen shown


def test_no_samples_make_an_empty_sheet() -> None:
    assert Image.open(io.BytesIO(contact_sheet([]))).size[0] > 0
