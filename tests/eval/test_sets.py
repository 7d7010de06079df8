"""Readers of evaluation sets on small files in each set's own format: boxes, texts, what is left out and counted."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opencloc.errors import BadSample
from opencloc.eval.registry import open_set
from opencloc.eval.sets.imagenet import class_names, clip_templates
from opencloc.eval.sets.item import ORIENTED, RESIZED, EvalSet, Item, Stored, Unread, by_unit, load, read_image
from tests.eval import sets_on_disk as disk


def items_of(task: str, place: Any) -> list[Item]:
    data = open_set(task, str(place))
    return [data.items[number] for number in range(data.num_items or 0)]


def colour(item: Item) -> str:
    """Which of the photos this is."""
    assert isinstance(item.image, Stored)
    pixel = np.asarray(read_image(item.image, item.annotated_px))[3, 3]
    return list(disk.COLOURS)[int(pixel.argmax())]


# -- regions -----------------------------------------------------------------------------------------------------------


def test_coco_boxes_have_the_names_of_their_classes(tmp_path: Path) -> None:
    disk.write_coco(tmp_path)
    data = open_set("coco-recognition", str(tmp_path))
    assert (data.class_names, data.class_groups) == (("person", "toothbrush"), ())
    first, second = items_of("coco-recognition", tmp_path)
    assert first.texts == ("person", "toothbrush")
    assert first.boxes.tolist() == [[0.25, 0.25, 0.75, 0.75], [0, 0, 0.25, 0.5]]
    assert second.boxes.tolist() == [[0.75, 0.5, 1, 1]]
    assert (colour(first), colour(second)) == ("red", "green")
    assert by_unit(data.skipped) == {
        "images": {"without regions": 1},
        "boxes": {"crowd annotation": 1, "empty box": 1},
    }


def test_lvis_images_are_found_by_their_url_and_classes_have_frequencies(tmp_path: Path) -> None:
    disk.write_lvis(tmp_path)
    data = open_set("lvis-recognition", str(tmp_path))
    assert data.class_names == ("aerosol can", "mouse (computer equipment)", "zebra")
    assert data.class_groups == ("common", "frequent", "rare")
    items = items_of("lvis-recognition", tmp_path)
    assert [colour(item) for item in items] == ["red", "green"]
    assert [item.texts for item in items] == [("aerosol can", "mouse (computer equipment)"), ("zebra",)]
    assert by_unit(data.skipped) == {}


def test_fg_ovd_boxes_have_their_true_caption_first(tmp_path: Path) -> None:
    disk.write_fg_ovd(tmp_path)
    data = open_set("fg-ovd", f"{tmp_path}?images={tmp_path}/coco")
    (item,) = data.items
    assert item.choices == (
        ("A light brown dog.", "A black dog.", "A white dog."),
        ("A black dog.", "A light brown dog."),
    )
    assert by_unit(data.skipped) == {"boxes": {"without hard negatives": 1}}
    file = f"{tmp_path}/benchmarks/1_attributes.json"
    fewer = open_set("fg-ovd", f"{file}?images={tmp_path}/coco&negatives=1")
    assert [len(choices) for choices in fewer.items[0].choices] == [2, 2]


@pytest.mark.parametrize("parquet", [True, False])
def test_grit_texts_are_spans_of_the_caption(tmp_path: Path, parquet: bool) -> None:
    disk.write_grit(tmp_path, parquet=parquet)
    data = open_set("grit-retrieval", str(tmp_path))
    assert [item.texts for item in data.items] == [("a dog", "a red ball")] * 2
    np.testing.assert_allclose(data.items[0].boxes, [[0, 0, 0.5, 1], [0.5, 0.25, 1, 0.75]])
    assert [colour(item) for item in data.items] == ["red", "green"]  # read out of the tar
    assert len(items_of("grit-retrieval", f"{tmp_path}?num=1")) == 1
    expressions = open_set("grit-retrieval", f"{tmp_path}?texts=ref_exps")
    assert expressions.items[0].texts == ("a dog with a red ball",)


def test_grit_images_may_lie_in_folders(tmp_path: Path) -> None:
    disk.write_grit(tmp_path, parquet=True)
    (tmp_path / "00000.tar").unlink()
    disk.photo(tmp_path / "00000/000000001.jpg", "green")  # img2dataset's `files` format
    data = open_set("grit-retrieval", str(tmp_path))
    assert [colour(item) for item in data.items] == ["green"]
    assert by_unit(data.skipped) == {"images": {"missing, of a row": 2}}


# -- whole images ------------------------------------------------------------------------------------------------------


def test_coco_captions_are_five_per_image(tmp_path: Path) -> None:
    disk.write_coco(tmp_path)
    data = open_set("coco-retrieval", str(tmp_path))
    assert [len(item.captions) for item in data.items] == [5, 1]
    assert by_unit(data.skipped) == {
        "images": {"without captions": 1},
        "texts": {"after the fifth of its image": 1, "empty": 1},
    }
    assert data.name == "captions_val2017"


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
def test_karpathys_split_decides_which_images_are_asked(tmp_path: Path, name: str) -> None:
    disk.write_karpathy(tmp_path, name)
    data = open_set(f"{name}-retrieval", str(tmp_path))
    assert [colour(item) for item in data.items] == ["red", "green"]
    assert data.items[0].captions == tuple(f"A red photo, said {i}." for i in range(5))
    assert len(items_of(f"{name}-retrieval", f"{tmp_path}?split=train")) == 1
    with pytest.raises(ValueError, match=r"no image of split 'dev'; there are test, train"):
        open_set(f"{name}-retrieval", f"{tmp_path}?split=dev")


def test_imagenet_folders_are_ids_or_indices(tmp_path: Path) -> None:
    disk.write_imagenet(tmp_path / "v1/val", {"n01440764": "red", "n15075141": "green"})
    disk.write_imagenet(tmp_path / "v2", {"0": "red", "999": "green", "10": "blue"})
    v1, v2 = open_set("imagenet", str(tmp_path / "v1")), open_set("imagenet-v2", str(tmp_path / "v2?templates=7"))
    assert [(item.label, colour(item)) for item in v1.items] == [(0, "red"), (999, "green")]
    assert [(item.label, colour(item)) for item in v2.items] == [(0, "red"), (10, "blue"), (999, "green")]
    assert (len(v1.templates), len(v2.templates)) == (80, 7)
    assert (v1.class_names[0], v1.class_names[999]) == ("tench", "toilet paper")


def test_imagenet_names_may_come_from_the_download(tmp_path: Path) -> None:
    disk.write_imagenet(tmp_path / "val", {"n01443537": "red"})
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius\n")
    data = open_set("imagenet", f"{tmp_path}?names={tmp_path}/LOC_synset_mapping.txt&templates=none")
    assert data.class_names == ("tench", "goldfish")
    assert (data.items[0].label, data.templates) == (1, ())
    (tmp_path / "twice.txt").write_text("n01440764 crane\nn01443537 Crane, bird\n")
    with pytest.raises(ValueError, match=r"twice\.txt: categories of one name are one class: 'crane'; tell them apart"):
        open_set("imagenet", f"{tmp_path}?names={tmp_path}/twice.txt")
    disk.write_imagenet(tmp_path / "val", {"n99999999": "red"})
    with pytest.raises(ValueError, match=r"n99999999: the folder is neither one of the 1000 WordNet ids"):
        open_set("imagenet", str(tmp_path))


def test_the_thousand_names_are_distinct_and_every_template_has_one_place() -> None:
    names = class_names()
    assert len(names) == len({name.lower() for name in names.values()}) == 1000
    assert list(names) == sorted(names)  # the order of the indices
    assert (names["n02012849"], names["n03126707"]) == ("crane bird", "construction crane")
    assert [len(clip_templates(which)) for which in ("80", "7", "none")] == [80, 7, 0]
    assert all(template.count("{}") == 1 for template in clip_templates("80"))
    assert set(clip_templates("7")) < set(clip_templates("80"))


# -- grounding ---------------------------------------------------------------------------------------------------------


def test_refer_files_give_every_sentence_with_its_box(tmp_path: Path) -> None:
    disk.write_refer(tmp_path)
    (item,) = items_of("refcoco", str(tmp_path))
    assert item.queries == ("left half", "the dark one", "right half")
    left, right = [0, 0, 0.5, 1], [0.5, 0, 1, 1]
    assert [truth.tolist() for truth in item.truths] == [[left], [left], [right]]
    (other,) = items_of("refcoco", f"{tmp_path}?split=testA")
    assert (other.queries, colour(other)) == (("whole picture",), "green")
    with pytest.raises(ValueError, match=r"no expression of split 'test'; there are testA, val"):
        open_set("refcoco", f"{tmp_path}?split=test")


def test_mdetrs_json_gives_the_same_as_the_refer_files(tmp_path: Path) -> None:
    disk.write_refer(tmp_path / "refer", "refcocog", "umd")
    disk.write_mdetr(tmp_path / "mdetr", "refcocog")
    (refer,), (mdetr,) = (items_of("refcocog", str(tmp_path / kind)) for kind in ("refer", "mdetr"))
    assert refer.queries == mdetr.queries
    np.testing.assert_array_equal(np.stack(refer.truths), np.stack(mdetr.truths))


class _Hostile:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([_Hostile()]), r"refused as a pickle of refs: it asks for (builtins|__builtin__)\.print"),
        (pickle.dumps([np.float64(1)]), r"it asks for numpy"),
        (pickle.dumps({"refs": []}), r"expected a list of refs, found dict"),
        (b"not a pickle", r"refused as a pickle of refs"),
        (b"", r"refused as a pickle of refs"),
    ],
)
def test_a_pickle_of_anything_but_plain_values_is_refused(
    tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.write_refer(tmp_path)
    (tmp_path / "refcoco/refs(unc).p").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_set("refcoco", str(tmp_path))
    assert capsys.readouterr().out == ""


def test_entities_phrases_have_all_their_boxes(tmp_path: Path) -> None:
    disk.write_entities(tmp_path)
    data = open_set("flickr30k-entities", str(tmp_path))
    (item,) = data.items
    assert item.queries == ("Two young guys", "shaggy hair", "Two men")
    two = [[0, 0, 0.5, 1], [0.75, 0.5, 1, 1]]  # pixels 1 to 20 of 40 are the left half
    assert [truth.tolist() for truth in item.truths] == [two, two[:1], two]
    assert by_unit(data.skipped) == {"texts": {"of nothing visual": 1, "without a box": 1}}
    (tmp_path / "Annotations/36979.xml").write_text("<annotation><size/></annotation>")
    with pytest.raises(ValueError, match=r"36979\.xml: not an annotation of Flickr30k Entities \(no size/width"):
        open_set("flickr30k-entities", str(tmp_path))


# -- what is wrong with the files or the command -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("?split=val2014", r"no such file: .*instances_val2014\.json \(\?annotations=FILE says which\)"),
        ("?part=1", r"'part=1' is not one of split=\.\.\., annotations=\.\.\., images=\.\.\., once"),
        ("?images=/nowhere", r"no 000000000139\.jpg in /nowhere: say where the images lie by \?images=FOLDER"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, place: str, message: str) -> None:
    disk.write_coco(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_set("coco-recognition", f"{tmp_path}{place}")


def test_a_number_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num is 'few', must be a whole number >= 1"):
        open_set("grit-retrieval", f"{tmp_path}?num=few")
    with pytest.raises(ValueError, match="unknown task 'coco'; there are imagenet, "):
        open_set("coco", str(tmp_path))


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_come_in_order_and_unusable_ones_are_counted(tmp_path: Path, batch_size: int) -> None:
    disk.write_imagenet(tmp_path, {str(i): "red" for i in range(7)})
    data, paths = open_set("imagenet-v2", str(tmp_path)), sorted(tmp_path.glob("*/*"))
    paths[2].unlink()
    paths[5].write_bytes(b"no image")
    unread = Unread(allowed=2)
    batches = list(load(data, None, batch_size, unread))
    assert [one.number for batch in batches for one in batch] == [0, 1, 3, 4, 6]
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert unread.reasons == {"missing image file": 1, "broken image": 1}
    assert [one.number for batch in load(data, 3, batch_size, Unread(allowed=1)) for one in batch] == [0, 1, 3]
    message = r"2 images could not be read, at most 1 may be missing \(--max-missing\); the last: .*5/"
    with pytest.raises(ValueError, match=message):
        list(load(data, None, batch_size, Unread(allowed=1)))


@pytest.mark.parametrize("size", [(20, 10), (80, 40), (41, 20), (13, 7), (40, 20)])
def test_an_image_resized_since_annotation_is_used_and_noted(tmp_path: Path, size: tuple[int, int]) -> None:
    disk.write_coco(tmp_path)
    data = open_set("coco-recognition", str(tmp_path))
    disk.photo(tmp_path / "val2017/000000000139.jpg", size=size)
    (one, _) = next(load(data, None, 2, Unread(allowed=0)))
    assert (one.image.size, one.annotated_px) == (size, (40, 20))
    assert one.item.boxes.tolist()[0] == [0.25, 0.25, 0.75, 0.75]  # a share of the image, whatever its size
    assert one.noted == ((RESIZED,) if size != (40, 20) else ())


@pytest.mark.parametrize("size", [(20, 40), (40, 30), (23, 10)])
def test_an_image_of_another_shape_than_annotated_is_unusable(tmp_path: Path, size: tuple[int, int]) -> None:
    disk.write_coco(tmp_path)
    disk.photo(tmp_path / "val2017/000000000139.jpg", size=size)
    with pytest.raises(BadSample, match="image size differs from its annotation"):
        colour(items_of("coco-recognition", tmp_path)[0])


def test_an_oriented_image_is_seen_as_stored_and_noted(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "a.jpg", exif=exif)
    data = EvalSet(name="x", items=[Item(image=Stored(path=str(tmp_path / "a.jpg")))], num_items=1)
    ((one,),) = load(data, None, 1, Unread(allowed=0))
    assert (one.image.size, one.noted) == ((40, 20), (ORIENTED,))


# -- entries that no set should have -----------------------------------------------------------------------------------


def changed(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "bbox", [[float("nan"), 4, 20, 10], [6, 4, float("inf"), 10], [6, 4, 20, 10**400], [1, 2], "x"]
)
@pytest.mark.parametrize("task", ["coco-recognition", "fg-ovd", "refcoco"])
def test_a_bad_box_costs_itself_alone(tmp_path: Path, task: str, bbox: Any) -> None:
    {"coco-recognition": disk.write_coco, "fg-ovd": disk.write_fg_ovd, "refcoco": disk.write_refer}[task](tmp_path)
    file = {
        "coco-recognition": "annotations/instances_val2017.json",
        "fg-ovd": "benchmarks/1_attributes.json",
        "refcoco": "refcoco/instances.json",
    }[task]
    place = f"{tmp_path}?images={tmp_path}/coco" if task == "fg-ovd" else str(tmp_path)
    before = [len(item.boxes) + len(item.queries) for item in items_of(task, place)]
    changed(tmp_path / file, lambda content: content["annotations"][0].update(bbox=bbox))
    data = open_set(task, place)
    after = [len(item.boxes) + len(item.queries) for item in items_of(task, place)]
    assert sum(before) - sum(after) == (2 if task == "refcoco" else 1)  # two texts name the box
    assert by_unit(data.skipped)["boxes"]["bad box"] >= 1


@pytest.mark.parametrize("name", ["a\0.jpg", "http://x/0.jpg", "\ud800.jpg"])
def test_an_image_of_an_impossible_name_is_counted_and_nothing_is_fetched(tmp_path: Path, name: str) -> None:
    disk.write_coco(tmp_path)
    disk.write_karpathy(tmp_path / "karpathy", "flickr30k")
    for file in ("annotations/instances_val2017.json", "annotations/captions_val2017.json"):
        changed(tmp_path / file, lambda content: content["images"][0].update(file_name=name))
    changed(tmp_path / "karpathy/dataset_flickr30k.json", lambda content: content["images"][0].update(filename=name))
    for task, place in (
        ("coco-recognition", tmp_path),
        ("coco-retrieval", tmp_path),
        ("flickr30k-retrieval", tmp_path / "karpathy"),
    ):
        data = open_set(task, str(place))
        assert by_unit(data.skipped)["images"]["bad file name"] == 1
        assert [colour(item) for item in items_of(task, place)] == ["green"]


def test_categories_of_one_name_are_one_class_and_it_is_said(tmp_path: Path) -> None:
    disk.write_coco(tmp_path)
    file = tmp_path / "annotations/instances_val2017.json"
    changed(file, lambda content: content["categories"].append({"id": 91, "name": "person"}))
    changed(file, lambda content: content["annotations"][1].update(category_id=91))
    data = open_set("coco-recognition", str(tmp_path))
    assert data.class_names == ("person", "toothbrush")
    assert "merged" in data.rules
    assert items_of("coco-recognition", tmp_path)[0].texts == ("person", "person")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentences": ["  "]}, r"image '1000.jpg', sentence must be an object with raw"),
        ({"sentences": [{"raw": 1}]}, r"image '1000.jpg', sentence .*: raw must be str"),
        ({"filepath": float("-inf")}, r"filepath must be str, it is -inf"),
        ({"split": 10**18}, r"split must be str"),
    ],
)
def test_wrong_types_in_karpathys_json_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    disk.write_karpathy(tmp_path, "flickr30k")
    changed(tmp_path / "dataset_flickr30k.json", lambda content: content["images"][0].update(change))
    with pytest.raises(ValueError, match=r"dataset_flickr30k\.json: .*" + message):
        open_set("flickr30k-retrieval", str(tmp_path))


@pytest.mark.parametrize("others", [[34, 77], [34, [None]], [34, "x"]])
def test_unknown_ids_in_json_are_named(tmp_path: Path, others: list[Any]) -> None:
    disk.write_fg_ovd(tmp_path)
    file = tmp_path / "benchmarks/1_attributes.json"
    changed(file, lambda content: content["annotations"][0].update(neg_category_ids=others))
    with pytest.raises(ValueError, match=r"1_attributes\.json: annotation 1: unknown neg_category_ids"):
        open_set("fg-ovd", f"{file}?images={tmp_path}/coco")


@pytest.mark.parametrize("span", [[0, 5, float("nan"), 0, 1, 1, 0.9], [0, 5, 0, 0, 10**400, 1, 0.9]])
def test_a_bad_box_of_grit_costs_itself_alone(tmp_path: Path, span: list[Any]) -> None:
    from opencloc.eval.run import evaluate
    from tests.eval.oracle import Oracle

    disk.write_grit(tmp_path, parquet=False, spans=[span, [11, 21, 0.5, 0.25, 1, 0.75, 0.7]])
    oracle = Oracle({(colour, (0.5, 0.25, 1.0, 0.75)): "a red ball" for colour in ("red", "green")})
    (got,) = evaluate(oracle, open_set("grit-retrieval", str(tmp_path)), ["grit-retrieval"])
    assert (got.scores["r2t_r1"].value, got.scores["r2t_r1"].count) == (1.0, 2)
    assert got.skipped == {"boxes": {"bad box": 2}}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "not a tar"),
        (gzip.compress, "not a tar"),
        (lambda data: data[: len(data) // 2], "truncated tar"),
        (lambda data: data[:124] + b"\xff" * 12 + data[136:], "not a tar"),  # a negative size
    ],
)
def test_a_damaged_tar_of_grit_is_counted_and_the_next_one_read(
    tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    disk.write_grit(tmp_path, parquet=False)
    sound = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(sound)
    (tmp_path / "00000.tar").write_bytes(damage(sound))
    data = open_set("grit-retrieval", str(tmp_path))
    assert by_unit(data.skipped)["files"] == {reason: 1}
    assert len(items_of("grit-retrieval", tmp_path)) in (2, 3)
