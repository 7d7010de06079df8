"""COCO-format JSON: images with boxes of named classes and human captions.

Owns where the files of such a data set lie, and the checks of their content.  Boxes come in pixels and leave
normalised; crowd annotations and empty boxes are left out and counted in `skipped`.  LVIS has the same format but names
its images by `coco_url` only: there an image's name is the last two parts of it, `val2017/000000397133.jpg`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opencloc import files
from opencloc.boxes import xywh_px_to_xyxy
from opencloc.data.sample import Sample
from opencloc.data.sidecar import SidecarRow, label_sizes, read_labels, with_labels
from opencloc.errors import BadSample
from opencloc.images import decode_image

CROWD, EMPTY_BOX = "crowd annotation", "empty box"


@dataclass(frozen=True, kw_only=True)
class CocoConfig:
    """Which files of a COCO folder are read, and how."""

    split: str | None = None  # annotations/instances_SPLIT.json; None: the only one there is
    images: str | None = None  # folder of the images; None: images/ or SPLIT/ in the location
    instances: str | None = None  # file; None: the split's
    captions: str | None = None  # file; None: the split's, if it exists
    sidecar: str | None = None  # name of the labels beside the instances file, or FOLDER/name; they replace its boxes
    image_px: int | None = None  # decode JPEGs no larger than needed for this long side; None: in full


class Coco:
    """The images of one split by number, in the order of the JSON, those without annotations too.

    Keys are file names without their extension, region texts the bare category names.  An image file that is missing
    or has not the size that its annotations refer to is a `BadSample`.  Raises `FileNotFoundError` for missing JSON
    files, and `ValueError` naming file and reason for malformed ones: missing fields, unknown image or category ids.
    """

    def __init__(self, location: str, config: CocoConfig | None = None) -> None:
        self.location = location
        self.config = config or CocoConfig()
        self.instances_path, self.captions_path, self.images_path = _find_files(location.rstrip("/"), self.config)
        self.skipped: Counter[str] = Counter()  # annotations left out, by reason
        instances = read_json(self.instances_path, ("images", "annotations", "categories"))
        self._images = read_images(instances["images"], self.instances_path)
        rows = {image_id: row for row, (image_id, *_) in enumerate(self._images)}
        self._boxes, self._texts = self._read_boxes(instances, rows)
        self._captions = self._read_captions(rows)
        self._labels: dict[str, SidecarRow] | None = None
        if self.config.sidecar is not None:
            self._labels = read_labels(self.instances_path, self.config.sidecar)

    @property
    def size(self) -> int:
        return len(self._images)

    def __repr__(self) -> str:
        skipped = f", skipped {dict(self.skipped)}" if self.skipped else ""
        return f"Coco({self.location!r}: {self.size} images of {self.instances_path}, {self.config}{skipped})"

    def identity(self, index: int) -> str:
        """Name of a sample that stays the same wherever the images lie: its file name."""
        return self._images[index][1]

    def image_bytes(self, index: int) -> bytes:
        """The image of a sample as it is stored."""
        path = f"{self.images_path}/{self._images[index][1]}"
        try:
            return files.read_bytes(path)
        except FileNotFoundError as error:
            raise BadSample("missing image file", path) from error
        except OSError as error:
            raise BadSample("unreadable image file", path, str(error)) from error

    def label_sizes(self) -> dict[str, int | None]:
        """Sizes of the files that regions come from."""
        path = self.instances_path
        return {"instances": files.version(path).size} | label_sizes(path, self.config.sidecar)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in 0 ... {self.size - 1} of {self!r}")
        _, name, width_px, height_px = self._images[index]
        key, where = os.path.splitext(name)[0], f"{self.images_path}/{name}"
        record: dict[str, Any] = {"captions": self._captions[index], "boxes": self._boxes[index]}
        record["texts"] = self._texts[index]
        if self._labels is not None:
            record = with_labels(record, self._labels.get(key), where)
        expected = (width_px, height_px)
        image = decode_image(self.image_bytes(index), where, self.config.image_px, expected_px=expected)
        return Sample(key=key, image=image, where=where, **record)

    def _read_boxes(self, instances: dict[str, Any], rows: dict[int, int]) -> tuple[list[np.ndarray], list[tuple]]:
        """Boxes (R, 4) and region texts of every image."""
        path = self.instances_path
        names = read_categories(instances["categories"], path)
        boxes: list[list[np.ndarray]] = [[] for _ in self._images]
        texts: list[list[str]] = [[] for _ in self._images]
        for annotation in instances["annotations"]:
            row = row_of(path, annotation, rows)
            category = category_of(path, annotation, names)
            if annotation.get("iscrowd"):
                self.skipped[CROWD] += 1
                continue
            box = read_box(path, annotation, self._images[row][2:])
            if box is None:
                self.skipped[EMPTY_BOX] += 1
                continue
            boxes[row].append(box)
            texts[row].append(names[category])
        return [np.asarray(some, dtype=np.float32).reshape(-1, 4) for some in boxes], [tuple(some) for some in texts]

    def _read_captions(self, rows: dict[int, int]) -> list[tuple[str, ...]]:
        """Captions of every image."""
        captions: list[tuple[str, ...]] = [()] * len(self._images)
        if (path := self.captions_path) is not None:
            for annotation in read_json(path, ("annotations",))["annotations"]:
                row = row_of(path, annotation, rows)
                caption = field_of(path, "annotation", annotation, "caption", str).strip()
                if caption:
                    captions[row] = (*captions[row], caption)
                else:
                    self.skipped["empty caption"] += 1
        return captions


def _find_files(location: str, config: CocoConfig) -> tuple[str, str | None, str]:
    """(instances file, captions file or None, image folder); raises `FileNotFoundError` naming what is missing."""
    split, instances = config.split, config.instances
    if instances is None:
        if split is None:
            splits = _splits(f"{location}/annotations")
            if not splits:
                raise FileNotFoundError(f"{location}/annotations/instances_*.json: no such file")
            if len(splits) > 1:
                raise ValueError(f"{location} has several splits: choose one by split=, of {', '.join(splits)}")
            split = splits[0]
        instances = f"{location}/annotations/instances_{split}.json"
    captions = config.captions
    if captions is None and split is not None and config.instances is None:
        conventional = f"{location}/annotations/captions_{split}.json"
        captions = conventional if files.exists(conventional) else None
    images = config.images or f"{location}/images"
    if config.images is None and split is not None and not files.is_folder(images):
        images = f"{location}/{split}"
    if not files.is_folder(images):
        raise FileNotFoundError(f"{images}: no such folder of images")
    return instances, captions, images.rstrip("/")


def _splits(folder: str) -> list[str]:
    """The splits whose instances lie in a folder (not the figures of sidecars, `instances_SPLIT.NAME_stats.json`)."""
    names = [os.path.basename(path) for path in files.children(folder)] if files.is_folder(folder) else []
    return [match[1] for name in names if (match := re.fullmatch(r"instances_([^.]+)\.json", name))]


def read_json(path: str, lists: tuple[str, ...]) -> dict[str, Any]:
    """The object in a JSON file, whose fields `lists` are lists of objects; raises `ValueError` naming the file."""
    try:
        content = json.loads(files.read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object with {', '.join(lists)}, found {type(content).__name__}")
    for name in lists:
        entries = content.get(name)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path}: needs {name!r}, a list of objects")
    return content


def read_images(entries: list[dict[str, Any]], path: str) -> list[tuple[int, str, int, int]]:
    """(id, file name, width, height in pixels) of every image."""
    images: dict[int, tuple[int, str, int, int]] = {}
    for entry in entries:
        image_id = field_of(path, "image", entry, "id", int)
        name = _file_name(path, entry)
        width_px, height_px = (
            field_of(path, "image", entry, "width", int),
            field_of(path, "image", entry, "height", int),
        )
        if width_px < 1 or height_px < 1:
            raise ValueError(f"{path}: image {image_id} has {width_px} x {height_px} pixels")
        if image_id in images:
            raise ValueError(f"{path}: image id {image_id} comes twice")
        images[image_id] = (image_id, name, width_px, height_px)
    return list(images.values())


def _file_name(path: str, entry: dict[str, Any]) -> str:
    if "file_name" not in entry and "coco_url" in entry:
        return "/".join(field_of(path, "image", entry, "coco_url", str).split("/")[-2:])
    return field_of(path, "image", entry, "file_name", str)


def read_categories(entries: list[dict[str, Any]], path: str) -> dict[int, str]:
    """Names of the categories by id, in the order of the file."""
    return {
        field_of(path, "category", one, "id", int): field_of(path, "category", one, "name", str).strip()
        for one in entries
    }


def category_of(path: str, annotation: dict[str, Any], names: Mapping[int, Any]) -> int:
    """The category id of an annotation; raises `ValueError` if it is none of `names`."""
    category = field_of(path, "annotation", annotation, "category_id", int)
    if category not in names:
        known = f"{len(names)} categories have ids {min(names, default=0)} to {max(names, default=0)}"
        raise ValueError(f"{path}: annotation {annotation.get('id')} has unknown category_id {category} ({known})")
    return category


def read_box(path: str, annotation: dict[str, Any], size_px: tuple[int, int]) -> np.ndarray | None:
    """The box (4,) of an annotation, clipped and normalised to the image of (width, height); None if it is empty."""
    box_px = field_of(path, "annotation", annotation, "bbox", list)
    if len(box_px) != 4 or not all(isinstance(x, int | float) for x in box_px):
        raise ValueError(f"{path}: annotation {annotation.get('id')}: bbox {box_px} is not 4 numbers")
    box = xywh_px_to_xyxy(np.asarray(box_px), *size_px)
    return None if box[2] <= box[0] or box[3] <= box[1] else box


def row_of(path: str, annotation: dict[str, Any], rows: Mapping[int, int]) -> int:
    """The row of an annotation's image; raises `ValueError` if its `image_id` is none of `rows`."""
    image_id = field_of(path, "annotation", annotation, "image_id", int)
    if image_id not in rows:
        raise ValueError(f"{path}: annotation {annotation.get('id')} has unknown image_id {image_id}")
    return rows[image_id]


def field_of(path: str, what: str, entry: dict[str, Any], name: str, kind: type) -> Any:
    """A field of the wanted type; raises `ValueError` naming file, entry and field."""
    value = entry.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = f"it is {value!r}" if name in entry else "it is missing"
        raise ValueError(f"{path}: {what} {entry.get('id', entry)}: {name} must be {kind.__name__}, {found}")
    return value
