"""Source names: every kind opens by its name, every mistake is named with what is allowed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from opencloc.data.sample import Sample, Source
from opencloc.data.scenes.scenes import Scenes
from opencloc.data.sources.coco import Coco
from opencloc.data.sources.folder import ImageFolder
from opencloc.data.sources.mosaic import Mosaic, MosaicConfig
from opencloc.data.sources.spec import open_source, parse_spec, take
from opencloc.data.tars.shards import Shards, ShardWriter
from opencloc.errors import BadSample


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder with images, one with tars, one in COCO's layout."""
    for folder in ("photos", "coco/images"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (64, 32)).save(tmp_path / folder / "a.jpg")
    (tmp_path / "photos/a.txt").write_text("dog")
    with ShardWriter(str(tmp_path / "tars"), samples_per_shard=1) as writer:
        for i in range(10):
            writer.write(Sample(key=f"{i}", image=Image.new("RGB", (64, 64)), captions=(f"thing {i}",)))
    (tmp_path / "coco/annotations").mkdir()
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 32}],
        "annotations": [],
        "categories": [],
    }
    for split in ("train", "test"):
        (tmp_path / f"coco/annotations/instances_{split}.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "kind", "size"),
    [
        ("photos", ImageFolder, 1),
        ("folder:{}/photos/", ImageFolder, 1),
        ("folder:{}/coco/images", ImageFolder, 1),
        ("file://{}/photos", ImageFolder, 1),
        ("{}/tars", Shards, 10),
        ("{}/tars/00003.tar", Shards, 1),
        ("{}/tars/{{00002..00004}}.tar", Shards, 3),
        ("{}/tars/*.tar", Shards, 10),
        ("shards:{}/tars/0000?.tar", Shards, 10),
        ("shards:{}/tars/0000?.tar?image_px=32", Shards, 10),
        ("{}/coco?split=test", Coco, 1),
        ("coco:{}/coco?split=train&image_px=16", Coco, 1),
        ("coco:?images={}/photos&instances={}/coco/annotations/instances_test.json", None, None),
        ("mosaic:{}/tars?grid=2&split=train", Mosaic, None),
        ("mosaic:shards:{}/tars/*.tar?augment=true&seed=3&test_share=0.5", Mosaic, None),
        ("mosaic:folder:{}/photos", Mosaic, None),
        ("scenes:", Scenes, None),
        ("scenes:easy?seed=3&attributes=size,position&box_jitter=0.1", Scenes, None),
    ],
)
def test_every_kind_opens_by_its_name(
    places: Path, monkeypatch: pytest.MonkeyPatch, spec: str, kind: type | None, size: int | None
) -> None:
    monkeypatch.chdir(places)
    spec = spec.format(places, places)
    if kind is None:
        with pytest.raises(ValueError, match="a path must follow coco:"):
            open_source(spec)
        return
    source = open_source(spec)
    assert isinstance(source, kind)
    assert source.size == size
    assert isinstance(source[0], Sample)


def test_options_reach_the_config(places: Path) -> None:
    source = open_source(f"mosaic:{places}/tars?grid=3&split=test&augment=true&seed=7&test_share=0.5&image_px=64")
    assert isinstance(source, Mosaic)
    assert source.config == MosaicConfig(grid="3", split="test", augment=True, seed=7, test_share=0.5, image_px=64)
    assert "grid='3'" in repr(source)
    assert "10 samples in 10 tars" in repr(source)


def test_image_px_makes_generated_images_and_limits_decoded_ones(places: Path) -> None:
    def side(spec: str, image_px: int | None) -> int:
        return max(open_source(spec, image_px=image_px)[0].image.size)

    assert [side(f"mosaic:{places}/tars", px) for px in (64, 100, None)] == [64, 100, 96]
    assert [side(f"mosaic:{places}/tars?image_px=80", px) for px in (64, None)] == [80, 80]
    assert [side("scenes:rich", px) for px in (48, None)] == [48, 64]
    assert [side(f"{places}/tars", px) for px in (8, 10, 30, 60, 100, None)] == [8, 16, 32, 64, 64, 64]
    assert [side(f"{places}/coco?split=test", px) for px in (16, None)] == [16, 64]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("shard:{}/tars", ValueError, r"unknown kind 'shard' \(did you mean 'shards'\?\); allowed: scenes, shards,"),
        ("mosaic:{}/tars?gird=2", ValueError, r"unknown option 'gird' \(did you mean 'grid'\?\); allowed: grid, image"),
        ("{}/tars?split=train", ValueError, r"unknown option 'split'; allowed: sidecar, image_px"),
        ("mosaic:{}/tars?split=val", ValueError, r"option split is 'val': Input should be 'train', 'test' or 'all'"),
        ("mosaic:{}/tars?seed=x", ValueError, r"option seed is 'x': Input should be a valid integer"),
        ("mosaic:{}/tars?test_share=x", ValueError, r"option test_share is 'x': Input should be a valid number"),
        ("mosaic:{}/tars?augment=maybe", ValueError, r"option augment is 'maybe': Input should be a valid boolean"),
        ("mosaic:{}/tars?grid=9", ValueError, r"mosaic:.*grid=9: option grid is '9': String should match"),
        ("{}/tars?sidecar=", ValueError, r"option sidecar is empty"),
        ("mosaic:{}/tars?seed=1&seed=2", ValueError, r"'seed=2' is not an option key=value that comes once"),
        ("mosaic:{}/tars?seed=-1", ValueError, r"option seed is '-1': Input should be greater than or equal to 0"),
        ("crops:scenes:rich?seed=-1", ValueError, r"option seed is '-1': Input should be greater than or equal to 0"),
        ("folder:{}/photos?image_px=-5", ValueError, r"option image_px is '-5': Input should be greater than"),
        ("{}/coco?split=test&image_px=0", ValueError, r"option image_px is '0': Input should be greater than"),
        ("mosaic:scenes:rich", ValueError, r"mosaics are made of photos"),
        ("scenes:poor", ValueError, r"scenes:poor: option mode is 'poor': Input should be 'easy' or 'rich'"),
        (
            "scenes:rich?num_things=3",
            ValueError,
            r"option num_things is '3': Input should be greater than or equal to 12",
        ),
        (
            "scenes:rich?attributes=size,taste",
            ValueError,
            r"option attributes is 'size,taste': Input should be 'colour', 'size' or",
        ),
        ("rich", ValueError, r"generated scenes are named scenes:rich"),
        ("{}/coco", ValueError, r"has several splits"),
        ("{}/photos/a.jpg", ValueError, r"a source is a folder or \*\.tar"),
        ("{}/nowhere", FileNotFoundError, r"nowhere: no such file or folder"),
        ("{}/tars/9.tar", FileNotFoundError, r"9\.tar: no such shard"),
        ("folder:{}/nowhere", FileNotFoundError, r"no such folder"),
    ],
)
def test_mistakes_are_named_with_what_is_allowed(places: Path, spec: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        open_source(spec.format(places))


@pytest.mark.parametrize("name", ["photos [1]", "photos{a,b}", "data?x=1", "x::y", "what?"])
def test_a_folder_of_any_name_is_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    Image.new("RGB", (64, 32)).save(tmp_path / name / "a.jpg")
    for spec in (f"{tmp_path}/{name}", f"folder:{tmp_path}/{name}"):
        assert open_source(spec)[0].image.size == (64, 32)
        assert open_source(f"{spec}?image_px=16")[0].image.size == (16, 8)


@pytest.mark.parametrize(
    ("spec", "location", "options"),
    [
        ("shards:https://host/0.tar?key=value?", "https://host/0.tar?key=value", {}),
        ("shards:https://host/0.tar?key=value?image_px=8", "https://host/0.tar?key=value", {"image_px": "8"}),
        ("shards:/nowhere/0000?.tar", "/nowhere/0000?.tar", {}),
        ("crops:coco:/nowhere?split=train?seed=1", "coco:/nowhere?split=train", {"seed": "1"}),
    ],
)
def test_options_begin_at_the_last_question_mark(spec: str, location: str, options: dict[str, str]) -> None:
    assert parse_spec(spec)[1:] == (location, options)


class Every:
    """Numbers as samples, of which every third is bad."""

    def __init__(self, size: int | None) -> None:
        self.size = size

    def __getitem__(self, index: int) -> Sample:
        if index % 3 == 2:
            raise BadSample("third", f"{index}")
        return Sample(key=f"{index}", image=Image.new("RGB", (1, 1)))


def taken(source: Source, n: int, start: int = 0) -> tuple[list[str], Counter]:
    samples, reasons = take(source, n, start)
    return [sample.key for sample in samples], reasons


def test_take_passes_over_bad_samples_and_counts_them() -> None:
    assert taken(Every(None), 3, start=1) == (["1", "3", "4"], Counter(third=1))
    assert taken(Every(5), 100) == (["0", "1", "3", "4"], Counter(third=1))
    assert taken(Every(5), 0) == ([], Counter())
    assert taken(Every(5), 3, start=5) == ([], Counter())


def test_take_gives_up_on_an_endless_source_without_samples(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")  # no caption
    with pytest.raises(BadSample, match="no usable photo"):
        take(Mosaic(ImageFolder(str(tmp_path))), 1)
