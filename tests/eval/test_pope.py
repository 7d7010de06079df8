"""POPE's questions by image, and the real files where they lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opencloc.eval.sets.item import EvalSet, Unread, load
from opencloc.eval.sets.pope import pope

ROWS = [
    {
        "question_id": 1,
        "image": "COCO_val2014_000000000009.jpg",
        "text": "Is there a dog in the image?",
        "label": "yes",
    },
    {"question_id": 2, "image": "COCO_val2014_000000000009.jpg", "text": "Is there a cat in the image?", "label": "no"},
    {
        "question_id": 3,
        "image": "COCO_val2014_000000000025.jpg",
        "text": "Is there a cat in the image?",
        "label": "yes",
    },
]


def write(folder: Path, rows: list[Any], split: str = "random") -> str:
    (folder / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return str(folder)


def loaded(data: EvalSet) -> list[Any]:
    return [one for batch in load(data, None, 8, Unread(allowed=0)) for one in batch]


@pytest.mark.parametrize("prefix", ["COCO_val2014_", ""])
def test_questions_are_grouped_by_image_under_its_name_of_either_year(prefix: str, tmp_path: Path) -> None:
    for number in (9, 25):
        (tmp_path / "val2014").mkdir(exist_ok=True)
        Image.new("RGB", (number, 10)).save(tmp_path / f"val2014/{prefix}{number:012}.jpg")
    data = pope(write(tmp_path, ROWS, "popular"), split="popular")
    first, second = loaded(data)
    assert (data.name, data.num_items) == ("popular", 2)
    assert first.item.questions == ("Is there a dog in the image?", "Is there a cat in the image?")
    assert first.item.answers == ("yes", "no")
    assert (first.image.width, second.image.width) == (9, 25)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], ROWS[1] | {"label": "maybe"}], "line 2: the label is 'maybe'"),
        ([{"image": "x.jpg", "label": "yes"}], "text must be str, it is missing"),
        ([7], "line 1: expected an object, found int"),
        ([], "no questions"),
    ],
)
def test_a_file_that_is_none_is_named_with_its_line(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pope(write(tmp_path, rows))
    assert "coco_pope_random.json" in str(caught.value)


def test_missing_photos_are_said_where_they_were_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"val2014.*images=FOLDER"):
        pope(write(tmp_path, ROWS))


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_the_published_questions_on_coco740(split: str) -> None:
    folder = Path(os.environ.get("OPENCLOC_DATA", "../shared/data"))
    if not (folder / "benchmarks/pope").is_dir():
        pytest.skip("there is no POPE; OPENCLOC_DATA names the folder")
    data = pope(str(folder / "benchmarks/pope"), split=split, images=str(folder / "coco740/images"))
    found = loaded(data)
    answers = [answer for one in found for answer in one.item.answers]
    assert len(answers) == 90
    assert answers.count("yes") == 45
