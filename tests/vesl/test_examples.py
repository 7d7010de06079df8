"""The example detector: its rules for phrases, its geometry, and what it finds on real photos."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opencloc.boxes import pairwise_iou
from opencloc.data.sources.coco import Coco, CocoConfig
from opencloc.vesl.detectors import load_detector
from opencloc.vesl.filters import FilterConfig, filter_detections

pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
sys.path.insert(0, str(Path(__file__).parents[2]))
from examples import yolox_detector as example

SIDE = 416
CELLS = sum((SIDE // stride) ** 2 for stride in example.STRIDES)


@pytest.mark.parametrize(
    ("phrase", "name"),
    [
        ("dog", "dog"),
        ("small brown dogs", "dog"),
        ("hot dog", "hot dog"),  # the longer name wins
        ("two hot dogs", "hot dog"),
        ("young women", "person"),
        ("people", "person"),
        ("red tennis racket", "tennis racket"),
        ("racquets", "tennis racket"),
        ("puppies", "dog"),  # -ies
        ("buses", "bus"),  # -es
        ("bus", "bus"),  # no plural
        ("scissors", "scissors"),
        ("knives", "knife"),
        ("Wine Glasses", "wine glass"),
        ("glasses", None),  # for drinking or for reading
        ("train station", None),  # the last word decides
        ("dog house", None),
        ("board", None),
        ("s", None),
        ("", None),
    ],
)
def test_a_phrase_stands_for_the_class_that_its_last_words_name(phrase: str, name: str | None) -> None:
    found = example.class_of_phrase(phrase)
    assert (None if found is None else example.COCO_CLASSES[found]) == name


@pytest.mark.parametrize(
    ("phrase", "text"),
    [
        ("people", "person"),
        ("several young women", "young woman"),
        ("small brown dogs", "small brown dog"),
        ("red tennis racquets", "red tennis racquet"),
        ("man", "man"),
        ("scissors", "scissors"),
        ("other people", "person"),
    ],
)
def test_a_box_is_one_object_and_its_text_in_the_singular(phrase: str, text: str) -> None:
    detector = fake_detector((40, 70, example.class_of_phrase(phrase), 0.9))
    found = detector([Image.new("RGB", (SIDE, SIDE))], [[phrase]])[0]
    assert found.texts is not None
    assert found.texts.tolist() == [text]


def test_every_class_stands_for_itself() -> None:
    assert [example.class_of_phrase(name) for name in example.COCO_CLASSES] == list(range(80))


@pytest.mark.parametrize(
    ("phrases", "expected"),
    [
        (("man", "woman"), {0: 0}),  # the first of several for one class
        (("men", "young people", "man", "boy"), {0: 2}),  # a box shows one object: the singular before plurals
        (("people", "men"), {0: 0}),
        (("man", "person", "people"), {0: 1}),  # the class name itself before all others
        (("table", "cat", "red thing", "kittens"), {60: 0, 15: 1}),
        (("red thing",), {}),
    ],
)
def test_boxes_of_a_class_get_one_phrase(phrases: tuple[str, ...], expected: dict[int, int]) -> None:
    assert example.phrases_of_classes(phrases) == expected


def test_decoding_equals_a_slow_loop() -> None:
    output = np.random.default_rng(0).normal(size=(CELLS, 85)).astype(np.float32)
    boxes, scores = example.decode(output, SIDE)
    row = 0
    for stride in (8, 16, 32):
        for y in range(SIDE // stride):
            for x in range(SIDE // stride):
                if row % 97 == 0:  # a sample of the cells
                    cx, cy = (output[row, 0] + x) * stride, (output[row, 1] + y) * stride
                    w, h = math.exp(output[row, 2]) * stride, math.exp(output[row, 3]) * stride
                    expected = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                    np.testing.assert_allclose(boxes[row], expected, rtol=1e-4, atol=1e-3)
                    np.testing.assert_allclose(scores[row], output[row, 4] * output[row, 5:], rtol=1e-5)
                row += 1
    assert row == CELLS


def test_the_image_lies_at_the_top_left_in_bgr() -> None:
    pixels, scale = example.letterbox(Image.new("RGB", (200, 100), (10, 20, 30)), SIDE)
    assert pixels.shape == (1, 3, SIDE, SIDE)
    assert scale == SIDE / 200
    np.testing.assert_array_equal(pixels[0, :, 0, -1], [30, 20, 10])
    np.testing.assert_array_equal(pixels[0, :, SIDE // 2, 0], [example.PAD] * 3)


class FakeSession:
    """Finds one object of a class in the cell of stride 32 at a pixel of the square, one cell wide."""

    def __init__(self, *objects: tuple[int, int, int, float]) -> None:
        self.output = np.full((1, CELLS, 85), 1e-6, dtype=np.float32)
        self.output[..., :4] = 0
        first = CELLS - (SIDE // 32) ** 2
        for x_px, y_px, number, score in objects:
            cell = self.output[0, first + y_px // 32 * (SIDE // 32) + x_px // 32]
            cell[:2], cell[4], cell[5 + number] = 0.5, 1.0, score

    def run(self, names, inputs):
        return [self.output]


def fake_detector(*objects) -> example.YoloxDetector:
    detector = example.YoloxDetector.__new__(example.YoloxDetector)
    session: Any = FakeSession(*objects)
    detector._session, detector._input, detector._side_px, detector._score = session, "x", SIDE, 0.1
    return detector


@pytest.mark.parametrize(("width", "height"), [(832, 416), (208, 416), (100, 100)])
def test_boxes_come_back_to_a_non_square_image(width: int, height: int) -> None:
    detector = fake_detector((40, 70, 16, 0.9))
    found = detector([Image.new("RGB", (width, height))], [["dog"]])[0]
    scale = max(width, height) / SIDE
    expected_px = np.array([[32, 64, 64, 96]]) * scale
    np.testing.assert_allclose(found.boxes * np.tile([width, height], 2), expected_px, rtol=1e-5)
    np.testing.assert_allclose(found.scores, [0.9])


def test_only_boxes_whose_class_the_phrases_name_are_returned() -> None:
    detector = fake_detector((40, 70, 16, 0.9), (200, 200, 15, 0.8), (300, 300, 0, 0.05))
    image = Image.new("RGB", (SIDE, SIDE))
    for phrases, expected in (
        (["kitten", "puppy"], [1, 0]),
        (["kitten"], [0]),
        (["tree"], []),
        (["man"], []),  # there, but below the threshold
    ):
        assert detector([image], [phrases])[0].phrase.tolist() == expected


def test_a_missing_model_is_named(monkeypatch) -> None:
    monkeypatch.delenv("OPENCLOC_YOLOX", raising=False)
    with pytest.raises(ValueError, match="set OPENCLOC_YOLOX"):
        example.make_detector()
    with pytest.raises(ValueError, match=r"no YOLOX model at /nowhere\.onnx"):
        example.make_detector("/nowhere.onnx")


def test_on_real_photos_it_finds_most_large_objects(photos: Path) -> None:
    model = Path(os.environ.get("OPENCLOC_YOLOX", Path(__file__).parents[3] / "shared" / "models" / "yolox_nano.onnx"))
    if not model.is_file():
        pytest.skip(f"no YOLOX model at {model} (set OPENCLOC_YOLOX)")
    detector = load_detector(f"{example.__file__}:make_detector?model={model}")
    source = Coco(str(photos / "coco740"), CocoConfig(split="test"))
    found = total = 0
    for index in range(12):
        sample = source[index]
        names = sorted(set(sample.texts))
        if not names:
            continue
        kept, _ = filter_detections(detector([sample.image], [names])[0], names, FilterConfig())
        overlap = pairwise_iou(as_tensor(kept.boxes), as_tensor(sample.boxes)).numpy()
        for i, (box, text) in enumerate(zip(sample.boxes, sample.texts, strict=True)):
            if (box[2] - box[0]) * (box[3] - box[1]) < 0.1:
                continue
            total += 1
            found += any(overlap[k, i] > 0.5 and names[kept.phrase[k]] == text for k in range(len(kept)))
    assert total >= 8
    assert found / total > 0.6


def as_tensor(boxes: np.ndarray):
    import torch

    return torch.from_numpy(boxes)
