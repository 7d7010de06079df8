"""COCO-format JSON: pixel boxes arrive normalised, files that don't fit together are named with the reason."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opencloc.data.sidecar import SidecarRow, sidecar_path, write_sidecar
from opencloc.data.sources.coco import Coco, CocoConfig
from opencloc.data.sources.coco_json import read_box, read_coco
from opencloc.data.sources.spec import open_source
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
        (changed("images", 0, "width", value=...), "image 7: width must be int, it is missing"),
        (changed("images", 1, "id", value=7), "image id 7 comes twice"),
        (changed("categories", 0, "name", value=5), "category 1: name must be str, it is 5"),
        (changed("categories", 0, "id", value=90), "category id 90 comes twice"),
        (changed("annotations", value=[{"image_id": 7, "category_id": 1}]), "no annotation has a usable bbox"),
        (
            changed("images", value=[{"id": 7, "file_name": "\0", "width": 4, "height": 4}]),
            "none of 1 images can be used",
        ),
    ],
)
def test_malformed_files_are_named_with_the_reason(tmp_path: Path, content: dict | str, message: str) -> None:
    with pytest.raises(ValueError, match=r"instances_train\.json: " + message):
        Coco(write(tmp_path, content))


def test_an_image_file_that_does_not_fit_is_a_bad_sample_and_the_others_stay(tmp_path: Path) -> None:
    source = Coco(write(tmp_path, instances()))
    (tmp_path / "images/wide.jpg").unlink()
    Image.new("RGB", (9, 5)).save(tmp_path / "images/bare.jpg")  # turned or cut since it was annotated
    for index, message in ((0, r"wide\.jpg: missing image file"), (2, r"bare\.jpg: image size .* \(9 x 5 .* 8 x 8")):
        with pytest.raises(BadSample, match=message):
            source[index]
    assert source[1].texts == ("dog",)


@pytest.mark.parametrize(
    "bbox",
    [[0, 0, float("nan"), 5], [float("inf"), 0, 2, 5], [0, 0, 10**400, 5], [1, 2, 3], "x", None, [0, 0, True, 5]],
)
def test_a_box_that_is_not_four_finite_numbers_costs_itself_alone(tmp_path: Path, bbox: Any) -> None:
    sound = Coco(write(tmp_path / "sound", instances()))
    content = instances()
    content["annotations"].append({"id": 7, "image_id": 3, "category_id": 1, "bbox": bbox})
    source = Coco(write(tmp_path / "broken", content))
    assert source.skipped == sound.skipped + Counter({"bad box": 1})
    for index in range(3):
        np.testing.assert_array_equal(source[index].boxes, sound[index].boxes)
        assert source[index].texts == sound[index].texts


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("file_name", "a\0.jpg", "bad file name"),
        ("file_name", "http://x/0.jpg", "bad file name"),
        ("file_name", "\ud800.jpg", "bad file name"),
        ("height", 10**400, "bad image size"),
        ("width", 0, "bad image size"),
    ],
)
def test_an_image_that_cannot_be_is_left_out_with_its_annotations(
    tmp_path: Path, field: str, value: Any, reason: str
) -> None:
    source = Coco(write(tmp_path, changed("images", 0, field, value=value)))
    assert [source[i].key for i in range(source.size)] == ["tall", "bare"]
    assert source[0].texts == ("dog",)
    assert source.skipped == Counter({reason: 1, "annotation of an image left out": 5})


def test_texts_that_cannot_be_written_are_left_out(tmp_path: Path) -> None:
    root = Path(write(tmp_path, changed("categories", 0, "name", value="\ud800")))
    captions = [
        {"image_id": 7, "caption": "half \ud83d"},
        {"image_id": 7, "caption": "a brush"},
        {"image_id": 8, "caption": "?"},
    ]
    (root / "annotations/captions_train.json").write_text(json.dumps({"annotations": captions}))
    source = Coco(str(root))
    assert (source[0].texts, source[0].captions, source[1].texts) == (("toothbrush",), ("a brush",), ())
    assert source.skipped["bad category name"] == 4
    assert source.skipped["bad caption"] == 1
    assert source.skipped["caption of an image that is not listed"] == 1
    (root / "annotations/captions_train.json").write_text(json.dumps({"annotations": captions[2:]}))
    with pytest.raises(ValueError, match=r"captions_train\.json: no caption is of an image of .*instances_train"):
        Coco(str(root))


def test_class_names_are_bare_distinct_and_no_headings(tmp_path: Path) -> None:
    content = instances()
    content["categories"] = [
        {"id": 0, "name": "animals", "supercategory": "none"},  # as Roboflow writes it
        {"id": 1, "name": "alarm_clock", "supercategory": "animals", "frequency": "r"},  # as LVIS writes it
        {"id": 2, "name": "alarm clock", "supercategory": "animals", "frequency": "c"},
        {"id": 90, "name": "person", "supercategory": "person"},  # as COCO does; without boxes a class all the same
    ]
    content["annotations"] = [{"id": i, "image_id": 7, "category_id": i, "bbox": [0, 0, 9, 9]} for i in (1, 2)]
    source = Coco(write(tmp_path, content))
    assert source[0].texts == ("alarm clock", "alarm clock")
    file = read_coco(source.instances_path)
    assert (file.classes, file.frequencies) == (("alarm clock", "person"), ("r", ""))
    assert source.noticed == Counter(
        {
            "category without boxes that others have as supercategory (dropped)": 1,
            "category with the name of another (merged)": 1,
        }
    )


def test_boxes_far_outside_are_clipped_and_counted(tmp_path: Path) -> None:
    content = instances()
    content["images"][0] |= {"width": 400, "height": 200}
    boxes = [[350, 150, 50, 50], [350, 150, 57, 53], [350, 150, 59, 50], [-9, 0, 20, 20], [100, 50, 390, 180]]
    content["annotations"] = [{"id": i, "image_id": 7, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)]
    file = read_coco(Coco(write(tmp_path, content)).instances_path)
    assert file.noticed == Counter({"box reaches outside the image (clipped)": 3})  # from 8 pixels of 400 on
    assert len(file.boxes) == 5
    assert file.boxes.min() == 0
    assert file.boxes.max() == 1


number = st.one_of(
    st.integers(-50, 90),
    st.floats(-50, 90),
    st.sampled_from([10**400, 1e308, float("nan"), float("inf"), -float("inf"), "x"]),
)


@given(st.lists(st.tuples(st.sampled_from([3, 5, 7]), st.lists(number, min_size=3, max_size=5), st.booleans())))
def test_boxes_equal_those_read_one_by_one(entries: list[tuple[int, list[Any], bool]]) -> None:
    content = instances()
    content["annotations"] = [
        {"id": 0, "image_id": 5, "category_id": 1, "bbox": [0, 0, 8, 8]},
        *(
            {"id": i, "image_id": image, "category_id": 90, "bbox": b, "iscrowd": c}
            for i, (image, b, c) in enumerate(entries)
        ),
    ]
    sizes = {one["id"]: (one["width"], one["height"]) for one in content["images"]}
    expected: dict[int, list[list[float]]] = {7: [], 3: [], 5: []}
    skipped = Counter[str]()
    for one in content["annotations"]:
        try:
            box = None if one.get("iscrowd") else read_box("x", one, sizes[one["image_id"]])
            if box is None:
                skipped["crowd annotation" if one.get("iscrowd") else "empty box"] += 1
            else:
                expected[one["image_id"]].append(box.tolist())
        except BadSample as bad:
            skipped[bad.reason] += 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.json")
        path.write_text(json.dumps(content))
        file = read_coco(str(path))
    found = [file.boxes[a:b].tolist() for a, b in itertools.pairwise(file.spans)]
    assert found == list(expected.values())
    assert file.skipped == skipped


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    path = Coco(write(tmp_path, instances())).instances_path
    first = read_coco(path)
    assert read_coco(path) is first
    Path(path).write_text(json.dumps(changed("annotations", value=[])))
    assert read_coco(path).boxes.shape == (0, 4)


@pytest.mark.parametrize("folder", ["", "train", "valid"])
def test_roboflow_layout_is_recognised(tmp_path: Path, folder: str) -> None:
    write(tmp_path / "coco", instances())
    place = tmp_path / "export" / folder
    shutil.copytree(tmp_path / "coco/images", place)
    shutil.copy(tmp_path / "coco/annotations/instances_train.json", place / "_annotations.coco.json")
    (tmp_path / "export/README.roboflow.txt").touch()
    specs = [str(tmp_path / "export"), f"coco:{place}", str(place)]
    for source in map(open_source, [*specs, *([f"coco:{tmp_path}/export?split={folder}"] if folder else [])]):
        assert isinstance(source, Coco)
        assert source[0].texts == ("toothbrush", "dog")
    if folder:
        shutil.copytree(place, tmp_path / "export/test")
        with pytest.raises(ValueError, match=f"has several splits: choose one by split=, of .*{folder}"):
            open_source(specs[0])


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no annotations/instances_\*\.json, no _annotations"):
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
