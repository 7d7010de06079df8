"""COCO-format JSON: pixel boxes arrive normalised, files that don't fit together are named with the reason."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opencloc.data.sidecar import SidecarRow, sidecar_path, write_sidecar
from opencloc.data.sources.coco import Coco, CocoConfig
from opencloc.errors import BadSample


def instances() -> dict[str, Any]:
    return {
        "images": [
            {"id": 7, "file_name": "wide.jpg", "width": 40, "height": 20},
            {"id": 3, "file_name": "tall.jpg", "width": 20, "height": 40},
            {"id": 5, "file_name": "bare.jpg", "width": 8, "height": 8},
        ],
        "categories": [{"id": 1, "name": "dog"}, {"id": 90, "name": "toothbrush"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [10, 5, 20, 10], "iscrowd": 0},
            {"id": 2, "image_id": 3, "category_id": 1, "bbox": [0.0, 20.0, 5.0, 10.0]},
            {"id": 3, "image_id": 7, "category_id": 1, "bbox": [30, 10, 20, 20], "iscrowd": 0},  # reaches outside
            {"id": 4, "image_id": 7, "category_id": 1, "bbox": [0, 0, 40, 20], "iscrowd": 1},
            {"id": 5, "image_id": 7, "category_id": 1, "bbox": [4, 4, 0, 9], "iscrowd": 0},
            {"id": 6, "image_id": 7, "category_id": 1, "bbox": [50, 4, 9, 9], "iscrowd": 0},  # wholly outside
        ],
    }


CAPTIONS = [(7, "A dog."), (3, "A tall dog."), (7, " Two dogs. "), (3, "  ")]


def write(root: Path, content: dict[str, Any] | str, split: str = "train") -> str:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "images").mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / f"annotations/instances_{split}.json").write_text(text)
    for image in instances()["images"]:
        Image.new("RGB", (image["width"], image["height"]), "green").save(root / "images" / image["file_name"])
    return str(root)


def write_captions(root: Path) -> None:
    entries = [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(CAPTIONS)]
    (root / "annotations/captions_train.json").write_text(json.dumps({"annotations": entries}))


def test_boxes_texts_and_captions_arrive_as_annotated(tmp_path: Path) -> None:
    source = Coco(write(tmp_path, instances()))
    assert [source[i].captions for i in range(3)] == [()] * 3
    write_captions(tmp_path)
    source = pickle.loads(pickle.dumps(Coco(str(tmp_path), CocoConfig(split="train"))))
    assert source.size == 3
    wide, tall, bare = (source[i] for i in range(3))
    assert [sample.key for sample in (wide, tall, bare)] == ["wide", "tall", "bare"]
    assert wide.texts == ("toothbrush", "dog")
    assert wide.boxes.tolist() == [[0.25, 0.25, 0.75, 0.75], [0.75, 0.5, 1, 1]]
    assert wide.captions == ("A dog.", "Two dogs.")
    assert (tall.texts, tall.boxes.tolist(), tall.image.size) == (("dog",), [[0, 0.5, 0.25, 0.75]], (20, 40))
    assert (bare.texts, bare.captions, bare.boxes.shape) == ((), (), (0, 4))
    assert source.skipped == Counter({"crowd annotation": 1, "empty box": 2, "empty caption": 1})


def changed(*place: Any, value: Any) -> dict[str, Any]:
    """The instances with one value replaced, or removed where `value` is `...`."""
    content = instances()
    inner: Any = content
    for step in place[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"not JSON"),
        ("[]", "expected an object with images, annotations, categories, found list"),
        (changed("categories", value=...), "needs 'categories', a list of objects"),
        (changed("images", value=[1]), "needs 'images', a list of objects"),
        (changed("annotations", 0, "category_id", value=2), r"annotation 1 has unknown category_id 2 \(2 categories"),
        (changed("annotations", 1, "image_id", value=99), "annotation 2 has unknown image_id 99"),
        (changed("annotations", 0, "bbox", value=[1, 2, 3]), r"annotation 1: bbox \[1, 2, 3\] is not 4 numbers"),
        (changed("annotations", 0, "bbox", value=...), "annotation 1: bbox must be list, it is missing"),
        (changed("images", 0, "width", value=...), "image 7: width must be int, it is missing"),
        (changed("images", 0, "height", value=0), "image 7 has 40 x 0 pixels"),
        (changed("images", 1, "id", value=7), "image id 7 comes twice"),
        (changed("categories", 0, "name", value=5), "category 1: name must be str, it is 5"),
    ],
)
def test_malformed_files_are_named_with_the_reason(tmp_path: Path, content: dict | str, message: str) -> None:
    with pytest.raises(ValueError, match=r"instances_train\.json: " + message):
        Coco(write(tmp_path, content))


def test_one_bad_image_is_a_bad_sample_and_the_others_stay(tmp_path: Path) -> None:
    content = changed("annotations", 1, "bbox", value=[0, 0, float("nan"), 5])
    source = Coco(write(tmp_path, content))
    (tmp_path / "images/wide.jpg").unlink()
    Image.new("RGB", (9, 8)).save(tmp_path / "images/bare.jpg")  # turned or resized since it was annotated
    for index, message in enumerate(
        (r"wide\.jpg: missing image file", r"tall\.jpg: bad box", r"bare\.jpg: image size .* \(9 x 8 .* 8 x 8")
    ):
        with pytest.raises(BadSample, match=message):
            source[index]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"annotations/instances_\*\.json"):
        Coco(str(tmp_path))
    root = write(tmp_path, instances())
    with pytest.raises(FileNotFoundError, match=r"instances_val\.json"):
        Coco(root, CocoConfig(split="val"))
    write(tmp_path, instances(), split="val")
    with pytest.raises(ValueError, match="has several splits: choose one by split=, of train, val"):
        Coco(root)
    (tmp_path / "images").rename(tmp_path / "photos")
    with pytest.raises(FileNotFoundError, match="no such folder of images"):
        Coco(root, CocoConfig(split="val"))


def test_files_may_lie_elsewhere(tmp_path: Path) -> None:
    root = Path(write(tmp_path, instances()))
    write_captions(tmp_path)
    (root / "images").rename(root / "train")  # as COCO itself names it
    assert Coco(str(root))[0].image.size == (40, 20)
    (root / "train").rename(root / "photos")
    config = CocoConfig(
        images=str(root / "photos"),
        instances=str(root / "annotations/instances_train.json"),
        captions=str(root / "annotations/captions_train.json"),
    )
    assert Coco("/nowhere", config)[0].captions == ("A dog.", "Two dogs.")


def test_scaled_decoding_keeps_the_boxes(tmp_path: Path) -> None:
    root = write(tmp_path, instances())
    small, full = Coco(root, CocoConfig(image_px=10))[0], Coco(root)[0]
    assert (small.image.size, full.image.size) == ((10, 5), (40, 20))
    np.testing.assert_array_equal(small.boxes, full.boxes)


def test_sidecar_labels_replace_the_boxes(tmp_path: Path) -> None:
    root = write(tmp_path, instances())
    labels = SidecarRow(key="tall", boxes=np.array([[0, 0, 1, 1]]), texts=("poodle",), scores=np.array([0.5]))
    write_sidecar(sidecar_path(f"{root}/annotations/instances_train.json", "vesl"), [labels], {})
    source = Coco(root, CocoConfig(sidecar="vesl"))
    assert source[1].texts == ("poodle",)
    with pytest.raises(BadSample, match="not in the sidecar"):
        source[0]


@pytest.mark.parametrize(("split", "size"), [("train", 560), ("test", 180)])
def test_real_photos_have_the_boxes_of_their_json(photos: Path, split: str, size: int) -> None:
    source = Coco(str(photos / "coco740"), CocoConfig(split=split, image_px=64))
    assert source.size == size
    content = json.loads((photos / f"coco740/annotations/instances_{split}.json").read_text())
    num_regions = 0
    for index in range(size):
        sample = source[index]
        num_regions += len(sample.boxes)
        assert len(sample.captions) >= 5
        assert max(sample.image.size) >= 64
    assert num_regions == len(content["annotations"]) - source.skipped.total()
