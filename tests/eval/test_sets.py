"""Readers of evaluation sets on small files in each set's own format: boxes, texts, what is left out and counted."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import sets_on_disk as disk

from opencloc.errors import BadSample
from opencloc.eval.registry import BENCHMARKS, open_set
from opencloc.eval.sets.imagenet import class_names, clip_templates
from opencloc.eval.sets.item import Unread, load, read_image


def colour(stored) -> str:
    """Which of the photos this is."""
    pixel = np.asarray(read_image(stored))[3, 3]
    return list(disk.COLOURS)[int(pixel.argmax())]


# -- regions -----------------------------------------------------------------------------------------------------------


def test_coco_boxes_have_classes_and_the_annotations_own_areas(tmp_path: Path) -> None:
    disk.write_coco(tmp_path)
    data = open_set("coco-recognition", str(tmp_path))
    assert data.class_names == ("person", "toothbrush")
    assert data.class_groups == ()
    first, second = data.items
    assert first.labels.tolist() == [0, 1]
    assert first.boxes.tolist() == [[0.25, 0.25, 0.75, 0.75], [0, 0, 0.25, 0.5]]
    assert first.areas_px.tolist() == [150.5, 60.0]
    assert second.boxes.tolist() == [[0.75, 0.5, 1, 1]]
    assert second.areas_px.tolist() == [9500.0]  # as COCO's own evaluation takes it
    assert (colour(first.image), colour(second.image)) == ("red", "green")
    assert data.left_out == {"crowd annotation": 1, "empty box": 1, "image without regions": 1}


def test_lvis_images_are_found_by_their_url_and_classes_have_frequencies(tmp_path: Path) -> None:
    disk.write_lvis(tmp_path)
    data = open_set("lvis-recognition", str(tmp_path))
    assert data.class_names == ("aerosol can", "mouse (computer equipment)", "zebra")
    assert data.class_groups == ("common", "frequent", "rare")
    assert [colour(item.image) for item in data.items] == ["red", "green"]
    assert [item.labels.tolist() for item in data.items] == [[0, 1], [2]]
    assert data.left_out == {}


def test_lvis_is_a_source_for_training_too(tmp_path: Path) -> None:
    from opencloc.data.sources.coco import Coco, CocoConfig

    disk.write_lvis(tmp_path)
    source = Coco("", CocoConfig(instances=f"{tmp_path}/lvis_v1_val.json", images=str(tmp_path)))
    assert [source[i].texts for i in range(2)] == [("aerosol can", "mouse (computer equipment)"), ("zebra",)]


def test_fg_ovd_boxes_have_their_true_caption_first(tmp_path: Path) -> None:
    disk.write_fg_ovd(tmp_path)
    data = open_set("fg-ovd", f"{tmp_path}?images={tmp_path}/coco")
    (item,) = data.items
    assert item.choices == (
        ("A light brown dog.", "A black dog.", "A white dog."),
        ("A black dog.", "A light brown dog."),
    )
    assert data.left_out == {"box without hard negatives": 1}
    file = f"{tmp_path}/benchmarks/1_attributes.json"
    fewer = open_set("fg-ovd", f"{file}?images={tmp_path}/coco&negatives=1")
    assert [len(choices) for choices in fewer.items[0].choices] == [2, 2]


@pytest.mark.parametrize("parquet", [True, False])
def test_grit_texts_are_spans_of_the_caption(tmp_path: Path, parquet: bool) -> None:
    disk.write_grit(tmp_path, parquet=parquet)
    data = open_set("grit-retrieval", str(tmp_path))
    assert [item.texts for item in data.items] == [("a dog", "a red ball")] * 2
    np.testing.assert_allclose(data.items[0].boxes, [[0, 0, 0.5, 1], [0.5, 0.25, 1, 0.75]])
    assert [colour(item.image) for item in data.items] == ["red", "green"]  # read out of the tar
    assert len(open_set("grit-retrieval", f"{tmp_path}?num=1").items) == 1
    expressions = open_set("grit-retrieval", f"{tmp_path}?texts=ref_exps")
    assert expressions.items[0].texts == ("a dog with a red ball",)


def test_grit_images_may_lie_in_folders(tmp_path: Path) -> None:
    disk.write_grit(tmp_path, parquet=True)
    (tmp_path / "00000.tar").unlink()
    disk.photo(tmp_path / "00000/000000001.jpg", "green")  # img2dataset's `files` format
    data = open_set("grit-retrieval", str(tmp_path))
    assert [colour(item.image) for item in data.items] == ["green"]
    assert data.left_out == {"row without an image": 2}


# -- whole images ------------------------------------------------------------------------------------------------------


def test_coco_captions_are_five_per_image(tmp_path: Path) -> None:
    disk.write_coco(tmp_path)
    data = open_set("coco-retrieval", str(tmp_path))
    assert [len(item.captions) for item in data.items] == [5, 1]
    assert data.left_out == {"caption after the fifth of its image": 1, "empty caption": 1, "image without captions": 1}
    assert data.name == "coco-retrieval captions_val2017"


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
def test_karpathys_split_decides_which_images_are_asked(tmp_path: Path, name: str) -> None:
    disk.write_karpathy(tmp_path, name)
    data = open_set(f"{name}-retrieval", str(tmp_path))
    assert [colour(item.image) for item in data.items] == ["red", "green"]
    assert data.items[0].captions == tuple(f"A red photo, said {i}." for i in range(5))
    assert len(open_set(f"{name}-retrieval", f"{tmp_path}?split=train").items) == 1
    with pytest.raises(ValueError, match=r"no image of split 'dev'; there are test, train"):
        open_set(f"{name}-retrieval", f"{tmp_path}?split=dev")


def test_imagenet_folders_are_ids_or_indices(tmp_path: Path) -> None:
    disk.write_imagenet(tmp_path / "v1/val", {"n01440764": "red", "n15075141": "green"})
    disk.write_imagenet(tmp_path / "v2", {"0": "red", "999": "green", "10": "blue"})
    v1, v2 = open_set("imagenet", str(tmp_path / "v1")), open_set("imagenet-v2", str(tmp_path / "v2?templates=7"))
    assert [(item.label, colour(item.image)) for item in v1.items] == [(0, "red"), (999, "green")]
    assert [(item.label, colour(item.image)) for item in v2.items] == [(0, "red"), (10, "blue"), (999, "green")]
    assert (len(v1.templates), len(v2.templates)) == (80, 7)
    assert (v1.class_names[0], v1.class_names[999]) == ("tench", "toilet paper")


def test_imagenet_names_may_come_from_the_download(tmp_path: Path) -> None:
    disk.write_imagenet(tmp_path / "val", {"n01443537": "red"})
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius\n")
    data = open_set("imagenet", f"{tmp_path}?names={tmp_path}/LOC_synset_mapping.txt&templates=none")
    assert data.class_names == ("tench", "goldfish")
    assert (data.items[0].label, data.templates) == (1, ())
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
    (item,) = open_set("refcoco", str(tmp_path)).items
    assert item.texts == ("left half", "the dark one", "right half")
    left, right = [0, 0, 0.5, 1], [0.5, 0, 1, 1]
    assert [truth.tolist() for truth in item.truths] == [[left], [left], [right]]
    (other,) = open_set("refcoco", f"{tmp_path}?split=testA").items
    assert (other.texts, colour(other.image)) == (("whole picture",), "green")
    with pytest.raises(ValueError, match=r"no expression of split 'test'; there are testA, val"):
        open_set("refcoco", f"{tmp_path}?split=test")


def test_mdetrs_json_gives_the_same_as_the_refer_files(tmp_path: Path) -> None:
    disk.write_refer(tmp_path / "refer", "refcocog", "umd")
    disk.write_mdetr(tmp_path / "mdetr", "refcocog")
    (refer,), (mdetr,) = (open_set("refcocog", str(tmp_path / kind)).items for kind in ("refer", "mdetr"))
    assert refer.texts == mdetr.texts
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
    assert item.texts == ("Two young guys", "shaggy hair", "Two men")
    two = [[0, 0, 0.5, 1], [0.75, 0.5, 1, 1]]  # pixels 1 to 20 of 40 are the left half
    assert [truth.tolist() for truth in item.truths] == [two, two[:1], two]
    assert data.left_out == {"phrase without a box": 1, "phrase of nothing visual": 1}
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


def test_unknown_ids_in_json_are_named(tmp_path: Path) -> None:
    disk.write_fg_ovd(tmp_path)
    file = tmp_path / "benchmarks/1_attributes.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["neg_category_ids"] = [34, 77]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"1_attributes\.json: annotation 1: unknown neg_category_ids \[77\]"):
        open_set("fg-ovd", f"{file}?images={tmp_path}/coco")


def test_every_task_says_what_it_reads() -> None:
    assert all(benchmark.help for benchmark in BENCHMARKS.values())


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_come_in_order_and_unusable_ones_are_counted(tmp_path: Path, batch_size: int) -> None:
    disk.write_imagenet(tmp_path, {str(i): "red" for i in range(7)})
    items = open_set("imagenet-v2", str(tmp_path)).items
    Path(items[2].image.path).unlink()
    Path(items[5].image.path).write_bytes(b"no image")
    unread = Unread(allowed=2)
    batches = list(load(items, batch_size, unread))
    assert [number for batch in batches for number, _ in batch] == [0, 1, 3, 4, 6]
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert unread.reasons == {"missing image file": 1, "broken image": 1}
    with pytest.raises(ValueError, match=r"2 images could not be read, at most 1 may be missing; the last: .*5/"):
        list(load(items, batch_size, Unread(allowed=1)))


def test_an_image_of_another_size_than_annotated_is_unusable(tmp_path: Path) -> None:
    disk.write_coco(tmp_path)
    items = open_set("coco-recognition", str(tmp_path)).items
    disk.photo(Path(items[0].image.path), size=(20, 40))
    with pytest.raises(BadSample, match="image size differs from its annotation"):
        read_image(items[0].image)
