"""A source as an evaluation set: it says and leaves out the same as the public set in the same files."""

from __future__ import annotations

from pathlib import Path

from opencloc.data.sources.coco import Coco, CocoConfig
from opencloc.data.sources.spec import open_source
from opencloc.eval.registry import open_set
from opencloc.eval.sets.source import source_set
from tests.eval import sets_on_disk as disk
from tests.eval.test_sets import changed, items_of


def test_a_source_reports_what_it_left_out_as_the_public_set_does(tmp_path: Path) -> None:
    disk.write_coco(tmp_path)
    (tmp_path / "val2017").rename(tmp_path / "images")
    file = tmp_path / "annotations/instances_val2017.json"
    changed(file, lambda content: content["annotations"][0].update(bbox=[float("nan")] * 4))
    changed(file, lambda content: content["images"][2].update(file_name="http://x/0.jpg"))
    changed(file, lambda content: content["annotations"][3].update(bbox=[30, 10, 90, 90]))
    of_source = source_set(open_source(f"coco:{tmp_path}"), "photos")
    of_set = open_set("coco-recognition", str(tmp_path))
    own = {key: number for key, number in of_source.skipped.items() if key[0] != "texts"}
    assert own == {key: number for key, number in of_set.skipped.items() if key != ("images", "without regions")}
    assert "box reaches outside the image (clipped) (1)" in of_source.rules
    assert of_source.rules in of_set.rules


def test_training_and_evaluation_call_the_same_things_the_same(tmp_path: Path) -> None:
    disk.write_lvis(tmp_path)
    source = Coco("", CocoConfig(instances=f"{tmp_path}/lvis_v1_val.json", images=str(tmp_path)))
    data = open_set("lvis-recognition", str(tmp_path))
    assert [source[i].texts for i in range(2)] == [item.texts for item in items_of("lvis-recognition", tmp_path)]
    assert source.class_names == data.class_names
