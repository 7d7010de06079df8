"""Published data sets from their own files: what is a region, what is left out and why, which layouts are found."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opencloc.data.sample import Source
from opencloc.data.sources.spec import open_source
from opencloc.data.sources.table import around
from opencloc.data.stream import TrainingExamples
from opencloc.errors import BadSample
from tests.eval import sets_on_disk as on_disk

Region = tuple[str, list[float]]


def photo(path: Path, width_px: int = 40, height_px: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width_px, height_px), "green").save(path)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def regions(source: Source, index: int) -> list[Region]:
    sample = source[index]
    return [(text, box) for text, box in zip(sample.texts, sample.boxes.astype(float).round(4).tolist(), strict=True)]


def skipped(source: Any) -> dict[str, int]:
    return dict(source.skipped)


# -- Visual Genome -----------------------------------------------------------------------------------------------------


@pytest.fixture
def genome(tmp_path: Path) -> Path:
    """Two images; the second is in the other folder and has no regions."""
    url = "https://cs.stanford.edu/people/rak248"
    images = [
        {"width": 40, "height": 20, "url": f"{url}/VG_100K_2/1.jpg", "image_id": 1, "coco_id": None, "flickr_id": None},
        {"width": 40, "height": 20, "url": f"{url}/VG_100K/2.jpg", "image_id": 2, "coco_id": 9, "flickr_id": 8},
    ]

    def region(number: int, image: int, phrase: Any, *box: Any) -> dict[str, Any]:
        x, y, width, height = box
        place = {"x": x, "y": y, "width": width, "height": height}
        return {"region_id": number, "image_id": image, "phrase": phrase, **place}

    described = [
        region(1, 1, "the clock is\n green", 10, 5, 20, 10),
        region(2, 1, "the clock is green", 10, 5, 20, 10),  # said twice
        region(3, 1, "  ", 0, 0, 5, 5),
        region(4, 1, "nothing", 3, 3, 0, 9),
        region(5, 1, "no number", "3", 3, 2, 9),
        region(6, 1, "half a pair \ud800", 0, 0, 5, 5),
        region(7, 1, "beyond the border", 30, 0, 30, 20),
        region(8, 77, "of an unknown image", 0, 0, 5, 5),
    ]
    objects = [
        {
            "image_id": 1,
            "image_url": images[0]["url"],
            "objects": [
                {"object_id": 5, "x": 0, "y": 0, "w": 20, "h": 20, "names": ["clock", "wall clock"], "synsets": []}
            ],
        },
        {"image_id": 2, "image_url": images[1]["url"], "objects": []},
    ]
    write(tmp_path / "image_data.json", images)
    write(tmp_path / "region_descriptions.json", [{"id": 1, "regions": described}, {"id": 2, "regions": []}])
    write(tmp_path / "objects.json", objects)
    photo(tmp_path / "VG_100K_2/1.jpg")
    photo(tmp_path / "VG_100K/2.jpg")
    return tmp_path


def test_visual_genome_gives_descriptions_and_counts_the_rest_by_reason(genome: Path) -> None:
    source: Any = open_source(f"visual-genome:{genome}")
    assert source.size == 2
    assert [source.identity(i) for i in range(2)] == ["VG_100K_2/1.jpg", "VG_100K/2.jpg"]
    clock, beyond = regions(source, 0)
    assert clock == ("the clock is green", [0.25, 0.25, 0.75, 0.75])
    assert beyond == ("beyond the border", [0.75, 0.0, 1.0, 1.0])
    assert regions(source, 1) == []
    assert skipped(source) == {
        "empty region text": 1,
        "empty box": 1,
        "bad box": 1,
        "text is not valid Unicode": 1,
        "region of an image that is not listed": 1,
    }
    assert list(source.noticed.values()) == [1]


def test_every_name_of_an_object_is_a_wording_of_its_box(genome: Path) -> None:
    box = [0.0, 0.0, 0.5, 1.0]
    assert regions(open_source(f"visual-genome:{genome}?texts=objects"), 0) == [("clock", box), ("wall clock", box)]
    both = [text for text, _ in regions(open_source(f"visual-genome:{genome}?texts=both"), 0)]
    assert both == ["the clock is green", "beyond the border", "clock", "wall clock"]


# -- Flickr30k Entities ------------------------------------------------------------------------------------------------


def test_entities_with_several_boxes_are_one_region_around_them(tmp_path: Path) -> None:
    on_disk.write_entities(tmp_path)
    (tmp_path / "test.txt").write_text("36979\n404\n")
    source: Any = open_source(f"flickr30k-entities:{tmp_path}?split=test")
    assert source[0].captions == ("Two young guys with shaggy hair in the yard .", "It shows Two men .")
    whole = [0.0, 0.0, 1.0, 1.0]  # around the left half and the lower right corner
    assert regions(source, 0) == [
        ("Two young guys", whole),
        ("shaggy hair", [0.0, 0.0, 0.5, 1.0]),
        ("Two men", whole),  # another wording
    ]
    assert skipped(source) == {"phrase without a box": 2, "bad annotation file": 1}


def test_the_box_around_several_holds_each_and_touches_the_outermost() -> None:
    assert around([[1, 5, 2, 9], [0, 6, 3, 7]]) == [0, 5, 3, 9]


# -- RefCOCO -----------------------------------------------------------------------------------------------------------


def test_references_come_from_json_and_every_sentence_is_a_wording(tmp_path: Path) -> None:
    on_disk.write_refer(tmp_path)
    refs = on_disk.refs()
    refs[1]["split"] = "train"
    write(tmp_path / "refcoco/refs(unc).json", refs)
    source: Any = open_source(f"refcoco:{tmp_path}/refcoco?split=val")
    left = [0.0, 0.0, 0.5, 1.0]
    assert source.size == 1
    assert regions(source, 0) == [("left half", left), ("the dark one", left)]
    assert regions(open_source(f"refcoco:{tmp_path}/refcoco"), 0) == [("right half", [0.5, 0.0, 1.0, 1.0])]
    with pytest.raises(ValueError, match="no reference of split 'testB'; there are testA, train, val"):
        open_source(f"refcoco:{tmp_path}/refcoco?split=testB")


def test_a_pickle_of_references_is_not_opened_but_explained(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([Bomb()]))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p is a pickle, which is not opened.*json\.dump"):
        open_source(f"refcoco:{tmp_path}")
    assert not (tmp_path / "exploded").exists()


def test_the_expressions_of_one_image_in_mdetrs_file_come_together(tmp_path: Path) -> None:
    on_disk.write_mdetr(tmp_path)
    source: Any = open_source(f"refcoco:{tmp_path}?split=val")
    assert source.size == 1
    assert [text for text, _ in regions(source, 0)] == ["left half", "the dark one", "right half"]


def test_references_to_crowds_are_left_out(tmp_path: Path) -> None:
    on_disk.write_refer(tmp_path)
    write(tmp_path / "refcoco/refs(unc).json", on_disk.refs())
    instances = tmp_path / "refcoco/instances.json"
    content = json.loads(instances.read_text())
    content["annotations"][0]["iscrowd"] = 1
    write(instances, content)
    source: Any = open_source(f"refcoco:{tmp_path}/refcoco?split=val")
    assert [text for text, _ in regions(source, 0)] == ["right half"]
    assert skipped(source) == {"group box": 2}


# -- Open Images -------------------------------------------------------------------------------------------------------

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"


def write_open_images(root: Path, rows: Sequence[str]) -> None:
    write(root / "oidv6-train-annotations-bbox.csv", "\n".join([HEADER, *rows]) + "\n")
    write(root / "class-descriptions-boxable.csv", '/m/011k07,Tortoise\n/m/0h8n,"Salt and pepper shakers"\n')
    for key in ("000a", "000b"):
        photo(root / f"train/{key}.jpg")


def test_open_images_leaves_out_groups_and_counts_malformed_rows(tmp_path: Path) -> None:
    rows = [
        "000a,xclick,/m/011k07,1,0.25,0.75,0.1,0.9,0,0,0,0,0",
        "000b,xclick,/m/011k07,1,0,0.5,0,1,0,0,1,0,0",  # a group
        "000a,activemil,/m/0h8n,1,0,1,0,0.5,1,1,0,0,0",
        "000b,xclick,/m/0none,1,0,0.5,0,1,0,0,0,0,0",
        "000b,xclick,/m/011k07,1,zero,0.5,0,1,0,0,0,0,0",
        "000b,xclick,/m/011k07,1,0.5,0.5,0,1,0,0,0,0,0",
        "000b,xclick",
    ]
    write_open_images(tmp_path, rows)
    source: Any = open_source(f"openimages:{tmp_path}")
    assert regions(source, 0) == [
        ("tortoise", [0.25, 0.1, 0.75, 0.9]),
        ("salt and pepper shakers", [0.0, 0.0, 1.0, 0.5]),
    ]
    assert regions(source, 1) == []
    assert skipped(source) == {
        "malformed row": 1,
        "class without a name": 1,
        "group box": 1,
        "bad box": 1,
        "empty box": 1,
    }


def test_a_csv_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    write_open_images(tmp_path, [])
    with pytest.raises(ValueError, match=r"train-annotations-bbox\.csv: no usable region"):
        open_source(f"openimages:{tmp_path}")
    write(tmp_path / "oidv6-train-annotations-bbox.csv", "a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"train-annotations-bbox\.csv: not a CSV with the columns ImageID"):
        open_source(f"openimages:{tmp_path}")


# -- FG-CLIP -----------------------------------------------------------------------------------------------------------


def test_fg_clip_gives_both_captions_and_the_expressions_asked_for(tmp_path: Path) -> None:
    box = {
        "bbox": [0.25, 0.0, 0.75, 1.0, 0.62],
        "short_expr": "A red dog",
        "long_expr": "A red dog, seen from the side",
        "short_expr_negs": {"0": "A blue dog"},
        "flag_short_neg": 1,
    }
    entry = {
        "f_path": "grit-20m/data-12m/coyo_image_0/00000/000000001.jpg",
        "caption": "A red dog on the grass in front of a house.",
        "short_caption": "A red dog.",
        "bbox_info": [box, {"bbox": [0, 0, 1], "short_expr": "three numbers", "long_expr": ""}],
    }
    write(tmp_path / "jsonfiles/results_10.json", [entry, {"caption": "no path"}])
    photo(tmp_path / "coyo_image_0/00000/000000001.jpg")
    source: Any = open_source(f"fg-clip:{tmp_path}")
    assert source.size == 1
    assert source[0].captions == (entry["caption"], "A red dog.")
    assert regions(source, 0) == [("A red dog", [0.25, 0.0, 0.75, 1.0])]
    assert skipped(source) == {"bad box": 1, "bad file name": 1}
    both = regions(open_source(f"fg-clip:{tmp_path}?texts=both"), 0)
    assert [text for text, _ in both] == ["A red dog", "A red dog, seen from the side"]


# -- GRIT --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [False, True])
def test_chunks_and_expressions_of_grit_are_regions(tmp_path: Path, as_text: bool) -> None:
    spans = [[0, 5, 0.0, 0.0, 0.25, 0.5, 0.9], [0, 5, 0.5, 0.5, 1.00001, 0.75, 0.7], [11, 21, 0.5, 0.25, 1, 0.75, 0.6]]
    on_disk.write_grit(tmp_path, parquet=False, spans=json.dumps(spans) if as_text else spans)
    source: Any = open_source(f"grit:{tmp_path}")
    assert source.size == 2
    assert source[0].captions == ("a dog with a red ball",)
    assert regions(source, 0) == [
        ("a dog", [0.0, 0.0, 1.0, 0.75]),
        ("a red ball", [0.5, 0.25, 1.0, 0.75]),
        ("a dog with a red ball", [0.0, 0.0, 0.5, 1.0]),
    ]
    np.testing.assert_allclose(source[0].scores, [0.7, 0.6, 0.98], rtol=1e-6)
    assert [text for text, _ in regions(open_source(f"grit:{tmp_path}?texts=ref_exps"), 0)] == ["a dog with a red ball"]


@pytest.mark.parametrize(
    "spans", ["[[0, 5", [[0, 5, 0.0]], [[90, 95, 0, 0, 1, 1, 1.0]], [["0", 5, 0, 0, 1, 1]], {"a": 1}]
)
def test_a_malformed_chunk_costs_its_image_and_is_counted(tmp_path: Path, spans: Any) -> None:
    on_disk.write_grit(tmp_path, parquet=False, spans=spans)
    source = open_source(f"grit:{tmp_path}?texts=noun_chunks")
    with pytest.raises(BadSample) as bad:
        source[0]
    assert bad.value.reason == "bad chunk"


# -- LVIS, Objects365 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "image", "folder"),
    [
        ("lvis_v1_train.json", {"coco_url": "http://images.cocodataset.org/train2017/000000000001.jpg"}, "."),
        ("annotations/lvis_v1_train.json", {"coco_url": "http://images.cocodataset.org/train2017/01.jpg"}, "coco"),
        ("zhiyuan_objv2_train.json", {"file_name": "images/v1/patch8/objects365_v1_00420917.jpg"}, "."),
    ],
)
def test_lvis_and_objects365_are_found_under_their_own_names(
    tmp_path: Path, file: str, image: dict[str, str], folder: str
) -> None:
    name = image.get("file_name") or "/".join(image["coco_url"].split("/")[-2:])
    photo(tmp_path / folder / name)
    content = {
        "images": [{"id": 1, "width": 40, "height": 20} | image],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 4, "bbox": [0, 0, 20, 20], "iscrowd": 0}],
        "categories": [{"id": 4, "name": "alarm_clock", "frequency": "c", "synonyms": ["alarm_clock", "alarm"]}],
    }
    write(tmp_path / file, content)
    assert regions(open_source(f"coco:{tmp_path}"), 0) == [("alarm clock", [0.0, 0.0, 0.5, 1.0])]


# -- what all share ----------------------------------------------------------------------------------------------------


def test_they_train_like_any_other_source(genome: Path) -> None:
    source: Any = pickle.loads(pickle.dumps(open_source(f"visual-genome:{genome}", image_px=16)))
    examples = TrainingExamples([source], weights=(), num_regions=2, image_size=16, seed=0)
    assert {text for position in range(2) for text in examples[position].texts} == {
        "the clock is green",
        "beyond the border",
    }
    before = examples.fingerprint, examples.labels_fingerprint
    assert source.label_sizes().keys() == {"image_data.json", "region_descriptions.json"}
    write(genome / "region_descriptions.json", (genome / "region_descriptions.json").read_text() + " ")
    other: Any = open_source(f"visual-genome:{genome}")
    again = TrainingExamples([other], weights=(), num_regions=2, image_size=16, seed=0)
    assert (again.fingerprint, again.labels_fingerprint == before[1]) == (before[0], False)


def test_what_is_missing_is_named_with_the_option_that_says_where(genome: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no image such as VG_100K_2/1\.jpg in .*; name their folder by images="
    ):
        open_source(f"visual-genome:{genome}?images={genome}/elsewhere")
    (genome / "VG_100K/2.jpg").unlink()
    with pytest.raises(BadSample, match="missing image file"):
        open_source(f"visual-genome:{genome}")[1]
    photo(genome / "VG_100K/2.jpg", 20, 40)
    with pytest.raises(BadSample, match=r"2\.jpg"):
        open_source(f"visual-genome:{genome}")[1]
    (genome / "image_data.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"image_data\.json"):
        open_source(f"visual-genome:{genome}")
    for kind in ("flickr30k-entities", "refcoco", "openimages", "fg-clip", "grit"):
        with pytest.raises(FileNotFoundError):
            open_source(f"{kind}:{genome}/nowhere")


@pytest.mark.parametrize("content", ['{"a": 1}', "[1]", "[{"])
def test_a_file_that_is_no_list_of_objects_is_refused_by_name(genome: Path, content: str) -> None:
    write(genome / "region_descriptions.json", content)
    with pytest.raises(ValueError, match=r"region_descriptions\.json"):
        open_source(f"visual-genome:{genome}")
