"""COCO's panoptic segments and Open Images' boxes: what is read of them, and how they are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opencloc.eval.registry import open_set
from opencloc.eval.sets.item import Unread, by_unit, load
from tests.eval import sets_on_disk as disk
from tests.eval.oracle import Oracle
from tests.eval.test_sets import colour
from tests.eval.test_tasks import result_of, values


def test_panoptic_segments_have_boxes_masks_and_bare_names(tmp_path: Path) -> None:
    disk.write_panoptic(tmp_path)
    data = open_set("coco-panoptic", str(tmp_path))
    assert (data.class_names, data.class_groups[:2]) == (
        ("person", "floor", "grass", "wall brick"),
        ("things", "stuff"),
    )
    assert by_unit(data.skipped) == {"boxes": {"crowd annotation": 1}}
    ((first, second),) = load(data, None, 2, Unread(allowed=0))
    assert first.item.texts == ("person", "wall brick", "floor")
    person, wall, floor = first.masks()
    assert [int(mask.sum()) for mask in (person, wall, floor)] == [200, 300, 300]  # the person stands before both
    assert person[5:15, 10:30].all()
    assert second.item.texts == ("grass",)  # the other one has no pixel
    assert second.item.skipped == {("boxes", "without a pixel in the image of segments"): 1}
    (tmp_path / "annotations/panoptic_val2017/000000000001.png").unlink()
    unread = Unread(allowed=1)
    assert [one.number for batch in load(data, None, 2, unread) for one in batch] == [1]
    assert unread.reasons == {"missing image file": 1}
    with pytest.raises(FileNotFoundError, match=r"say where the masks lie by \?masks=FOLDER"):
        open_set("coco-panoptic", f"{tmp_path}?masks=/nowhere")


def test_segments_are_named_by_boxes_and_by_masks_things_and_stuff_apart(tmp_path: Path) -> None:
    disk.write_panoptic(tmp_path)
    person, wall, floor = (0.25, 0.25, 0.75, 0.75), (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
    knows: dict[Any, str] = {("red", person): "wall brick", ("red", wall): "wall brick", ("red", floor): "floor"}
    knows |= {("red", "mask", person): "person", ("red", "mask", wall): "wall brick", ("red", "mask", floor): "grass"}
    knows |= {("green", floor): "grass", ("green", "mask", floor): "grass"}
    oracle = Oracle(knows)
    by_box = result_of("coco-panoptic", str(tmp_path), oracle)
    assert not any("mask" in key for key in by_box.scores)
    oracle.takes_masks = True
    got = result_of("coco-panoptic", str(tmp_path), oracle)
    assert values(got, "top1", "top1_things", "top1_stuff") == [0.75, 0, 1]
    assert values(got, "top1_masks", "top1_masks_things", "top1_masks_stuff") == pytest.approx([0.75, 1, 2 / 3])
    assert (got.scores["top1"].of, got.scores["top1_masks"].of) == ("4 boxes", "4 masks")
    assert got.scores["top1_masks_things"].label == "top-1, masks, things"
    assert got.skipped == {"boxes": {"crowd annotation": 1, "without a pixel in the image of segments": 1}}
    assert {key: one.value for key, one in by_box.scores.items() if one.count} == {
        key: one.value for key, one in got.scores.items() if "mask" not in key and one.count
    }


def test_open_images_boxes_lose_groups_and_keep_depictions(tmp_path: Path) -> None:
    disk.write_open_images(tmp_path)
    data = open_set("open-images-recognition", str(tmp_path))
    first, second = data.items
    assert (first.texts, first.boxes.tolist()) == (("Airplane",), [[0, 0.25, 0.5, 0.75]])
    assert (second.texts, colour(second)) == (("Person",), "green")
    assert data.class_names == ("airplane", "person", "balloon, hot air")
    assert by_unit(data.skipped) == {"boxes": {"one box around a group": 1}}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",/m/0cmf2,1,0,", ",/m/nothing,1,0,", r"bbox\.csv, line 2: LabelName '/m/nothing' is none of 3 classes"),
        ("XMin", "Left", r"bbox\.csv: no column XMin in the first line"),
        (",0,1,1,1,0,1,1\n", ",0,1\n", r"bbox\.csv, line 4: 8 fields in 13 columns"),
        ("xclick", "x" * 200_000, r"bbox\.csv: not a CSV \(field larger than field limit"),
    ],
)
def test_broken_rows_of_open_images_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    disk.write_open_images(tmp_path)
    file = tmp_path / "validation-annotations-bbox.csv"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        open_set("open-images-recognition", str(tmp_path))


def test_a_box_of_open_images_that_is_no_number_costs_itself_alone(tmp_path: Path) -> None:
    disk.write_open_images(tmp_path)
    file = tmp_path / "validation-annotations-bbox.csv"
    file.write_text(file.read_text().replace(",0.1,0.9,", ",left,0.9,"))
    data = open_set("open-images-recognition", str(tmp_path))
    assert (data.num_items, by_unit(data.skipped)["boxes"]["bad box"]) == (1, 1)


def test_open_images_boxes_are_named_among_all_described_classes(tmp_path: Path) -> None:
    disk.write_open_images(tmp_path)
    plane, person = (0.0, 0.25, 0.5, 0.75), (0.1, 0.0, 0.9, 1.0)
    oracle = Oracle({("red", plane): "airplane", ("green", person): "balloon, hot air"})
    got = result_of("open-images-recognition", str(tmp_path), oracle)
    assert values(got, "top1", "macc") == [0.5, 0.5]
    assert got.scores["macc"].of == "2 classes present of 3"
    assert got.skipped == {"boxes": {"one box around a group": 1}}
