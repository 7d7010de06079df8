"""Photos with COCO-format JSON: images with boxes of named classes and human captions.

Boxes refer to the pixels as stored, whatever EXIF orientation says.  The files lie as COCO lays them out; as Roboflow
does, with `_annotations.coco.json` among the images of `train`, `valid` and `test`; or as LVIS and Objects365 name
theirs, `lvis_v1_SPLIT.json` and `zhiyuan_objv2_SPLIT.json`, whose images have their folder in their name.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from opencloc import files
from opencloc.data.sample import Sample
from opencloc.data.sidecar import SidecarRow, label_sizes, read_labels, with_labels
from opencloc.data.sources.coco_json import STRAY_CAPTION, read_captions, read_coco
from opencloc.data.sources.table import folder_with, image_file
from opencloc.images import decode_image

_ROBOFLOW = "_annotations.coco.json"
_ROBOFLOW_SPLITS = ("train", "valid", "test")
_LARGE_SETS = ("lvis_v1_", "zhiyuan_objv2_")  # LVIS, Objects365: SPLIT.json follows, in annotations/ or beside it


@dataclass(frozen=True, kw_only=True)
class CocoConfig:
    """Which files of a COCO folder are read, and how."""

    split: str | None = None  # of annotations/instances_SPLIT.json and so on; None: the only one
    images: str | None = None  # folder of the images; None: images/ or SPLIT/ in the location
    instances: str | None = None  # file; None: the split's
    captions: str | None = None  # file; None: the split's, if it exists
    sidecar: str | None = None  # name of the labels beside the instances file, or FOLDER/name; they replace its boxes
    image_px: Annotated[int, Field(ge=1)] | None = (
        None  # decode JPEGs no larger than needed for this long side; None: in full
    )


class Coco:
    """The images of one split by number, in the order of the JSON, those without annotations too.

    Keys are file names without their extension, region texts the bare category names.  An image file that is missing
    or has not the shape that its annotations refer to is a `BadSample`.  Raises as `read_coco`, and `FileNotFoundError`
    naming what is missing.
    """

    def __init__(self, location: str, config: CocoConfig | None = None) -> None:
        self.location = location
        self.config = config or CocoConfig()
        place = location.rstrip("/")
        self.instances_path, captions_path, images_path = _find_files(place, self.config)
        self._file = read_coco(self.instances_path)
        self.images_path = images_path or folder_with([place, f"{place}/images", f"{place}/coco"], self._file.names)
        self._captions, not_read = ({}, Counter()) if captions_path is None else read_captions(captions_path)
        skipped = self._file.skipped + not_read
        if elsewhere := self._captions.keys() - set(self._file.ids):
            if len(elsewhere) == len(self._captions):
                raise ValueError(f"{captions_path}: no caption is of an image of {self.instances_path}")
            skipped[STRAY_CAPTION] = sum(len(self._captions[one]) for one in elsewhere)
        self.skipped: Counter[str] = skipped  # what was left out, by reason
        self.noticed = Counter(self._file.noticed)  # what is used and worth a look
        self._labels: dict[str, SidecarRow] | None = None
        if self.config.sidecar is not None:
            self._labels = read_labels(self.instances_path, self.config.sidecar)

    @property
    def size(self) -> int:
        return len(self._file.names)

    @property
    def num_regions(self) -> int:
        """How many regions all images have by the JSON."""
        return len(self._file.labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        """All categories of the file, those without boxes too."""
        return self._file.classes

    def __repr__(self) -> str:
        skipped = f", skipped {dict(self.skipped)}" if self.skipped else ""
        return f"Coco({self.location!r}: {self.size} images of {self.instances_path}, {self.config}{skipped})"

    def annotated_px(self, index: int) -> tuple[int, int]:
        """Width and height of an image as it was annotated."""
        width_px, height_px = self._file.sizes_px[index].tolist()
        return width_px, height_px

    def identity(self, index: int) -> str:
        """Name of a sample that stays the same wherever the images lie: its file name."""
        return self._file.names[index]

    def image_bytes(self, index: int) -> bytes:
        """The image of a sample as it is stored."""
        return image_file(f"{self.images_path}/{self._file.names[index]}")

    def label_sizes(self) -> dict[str, int | None]:
        """Sizes of the files that regions come from."""
        path = self.instances_path
        return {"instances": files.version(path).size} | label_sizes(path, self.config.sidecar)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in 0 ... {self.size - 1} of {self!r}")
        file, name = self._file, self._file.names[index]
        key, where = os.path.splitext(name)[0], f"{self.images_path}/{name}"
        regions = slice(file.spans[index], file.spans[index + 1])
        texts = tuple(file.classes[label] for label in file.labels[regions])
        captions = self._captions.get(file.ids[index], ())
        record: dict[str, Any] = {"captions": captions, "boxes": file.boxes[regions].copy(), "texts": texts}
        if self._labels is not None:
            record = with_labels(record, self._labels.get(key), where)
        expected_px = self.annotated_px(index)
        image = decode_image(self.image_bytes(index), where, self.config.image_px, expected_px=expected_px)
        return Sample(key=key, image=image, where=where, **record)


def is_coco_folder(folder: str) -> bool:
    """Whether a folder looks like one of COCO's or Roboflow's layout."""
    return files.is_folder(f"{folder}/annotations") or bool(_roboflow_splits(folder))


def _roboflow_splits(folder: str) -> list[str]:
    """The splits of Roboflow's layout in a folder; the empty text stands for the folder itself."""
    return [one for one in ("", *_ROBOFLOW_SPLITS) if files.exists(os.path.join(folder, one, _ROBOFLOW))]


def _splits(location: str) -> list[str]:
    """The splits in a location (the figures of sidecars, `instances_SPLIT.NAME_stats.json`, are none)."""
    found: list[str] = []
    for folder, beginnings in ((f"{location}/annotations", ("instances_", *_LARGE_SETS)), (location, _LARGE_SETS)):
        pattern = re.compile(rf"(?:{'|'.join(beginnings)})([^.]+)\.json")
        names = [os.path.basename(path) for path in files.children(folder)] if files.is_folder(folder) else []
        found += [match[1] for name in names if (match := pattern.fullmatch(name))]
    return found or _roboflow_splits(location)


def _large_set(location: str, split: str) -> str | None:
    """The file of LVIS or Objects365 for a split."""
    places = [f"{location}/{part}{name}{split}.json" for part in ("annotations/", "") for name in _LARGE_SETS]
    return next(filter(files.exists, places), None)


def _find_files(location: str, config: CocoConfig) -> tuple[str, str | None, str | None]:
    """(instances file, captions file or None, image folder); raises `FileNotFoundError` naming what is missing.

    The folder is None where image names tell it: those of LVIS and Objects365 begin with `train2017/` or `images/`.
    """
    split, instances, captions, images = config.split, config.instances, config.captions, config.images
    if instances is None:
        if split is None:
            splits = _splits(location)
            if not files.is_folder(location):
                raise FileNotFoundError(f"{location}: no such folder")
            if not splits:
                raise FileNotFoundError(f"{location}: no annotations/instances_*.json, no {_ROBOFLOW}")
            if len(splits) > 1:
                raise ValueError(f"{location} has several splits: choose one by split=, of {', '.join(splits)}")
            split = splits[0]
        instances = f"{location}/annotations/instances_{split}.json"
        roboflow = f"{location}/{split}".rstrip("/")
        if not files.exists(instances) and files.exists(f"{roboflow}/{_ROBOFLOW}"):
            instances, images = f"{roboflow}/{_ROBOFLOW}", images or roboflow
        elif not files.exists(instances) and (large := _large_set(location, split)) is not None:
            return large, captions, images
        elif captions is None and files.exists(conventional := f"{location}/annotations/captions_{split}.json"):
            captions = conventional
    if images is None:
        images = f"{location}/images"
        if split is not None and not files.is_folder(images):
            images = f"{location}/{split}"
    if not files.is_folder(images):
        raise FileNotFoundError(f"{images}: no such folder of images")
    return instances, captions, images.rstrip("/")
