"""COCO-format JSON: images with boxes of named classes and human captions.

Owns where the files of such a data set lie, and the checks of their content.  Boxes come in pixels and leave
normalised; crowd annotations and empty boxes are left out and counted in `skipped`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from opencloc.boxes import xywh_px_to_xyxy
from opencloc.data import files
from opencloc.data.record import Record, decode_image
from opencloc.data.sample import BadSample, Sample
from opencloc.data.sidecar import SidecarRow, read_labels, with_labels


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
        instances = _read_json(self.instances_path, ("images", "annotations", "categories"))
        self._images = _images(instances["images"], self.instances_path)
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

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in 0 ... {self.size - 1} of {self!r}")
        _, name, width_px, height_px = self._images[index]
        key, where = os.path.splitext(name)[0], f"{self.images_path}/{name}"
        record = Record(captions=self._captions[index], boxes=self._boxes[index], texts=self._texts[index])
        if self._labels is not None:
            record = with_labels(record, self._labels.get(key), where)
        expected = (width_px, height_px)
        image = decode_image(self.image_bytes(index), where, self.config.image_px, expected_px=expected)
        return record.sample(key, image, where)

    def _read_boxes(self, instances: dict[str, Any], rows: dict[int, int]) -> tuple[list[np.ndarray], list[tuple]]:
        """Boxes (R, 4) and region texts of every image."""
        path = self.instances_path
        names = {_field(path, "category", one, "id", int): _field(path, "category", one, "name", str).strip()
                 for one in instances["categories"]}  # fmt: skip
        boxes: list[list[np.ndarray]] = [[] for _ in self._images]
        texts: list[list[str]] = [[] for _ in self._images]
        for annotation in instances["annotations"]:
            row = _row_of(path, annotation, rows)
            category = _field(path, "annotation", annotation, "category_id", int)
            if category not in names:
                known = f"{len(names)} categories have ids {min(names, default=0)} to {max(names, default=0)}"
                raise ValueError(
                    f"{path}: annotation {annotation.get('id')} has unknown category_id {category} ({known})"
                )
            if annotation.get("iscrowd"):
                self.skipped["crowd annotation"] += 1
                continue
            box_px = _field(path, "annotation", annotation, "bbox", list)
            if len(box_px) != 4 or not all(isinstance(x, int | float) for x in box_px):
                raise ValueError(f"{path}: annotation {annotation.get('id')}: bbox {box_px} is not 4 numbers")
            _, _, width_px, height_px = self._images[row]
            box = xywh_px_to_xyxy(np.asarray(box_px), width_px, height_px)
            if box[2] <= box[0] or box[3] <= box[1]:
                self.skipped["empty box"] += 1
                continue
            boxes[row].append(box)
            texts[row].append(names[category])
        return [np.asarray(some, dtype=np.float32).reshape(-1, 4) for some in boxes], [tuple(some) for some in texts]

    def _read_captions(self, rows: dict[int, int]) -> list[tuple[str, ...]]:
        """Captions of every image."""
        captions: list[tuple[str, ...]] = [()] * len(self._images)
        if (path := self.captions_path) is not None:
            for annotation in _read_json(path, ("annotations",))["annotations"]:
                row = _row_of(path, annotation, rows)
                caption = _field(path, "annotation", annotation, "caption", str).strip()
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


def _read_json(path: str, lists: tuple[str, ...]) -> dict[str, Any]:
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


def _images(entries: list[dict[str, Any]], path: str) -> list[tuple[int, str, int, int]]:
    """(id, file name, width, height in pixels) of every image."""
    images: dict[int, tuple[int, str, int, int]] = {}
    for entry in entries:
        image_id = _field(path, "image", entry, "id", int)
        name = _field(path, "image", entry, "file_name", str)
        width_px, height_px = _field(path, "image", entry, "width", int), _field(path, "image", entry, "height", int)
        if width_px < 1 or height_px < 1:
            raise ValueError(f"{path}: image {image_id} has {width_px} x {height_px} pixels")
        if image_id in images:
            raise ValueError(f"{path}: image id {image_id} comes twice")
        images[image_id] = (image_id, name, width_px, height_px)
    return list(images.values())


def _row_of(path: str, annotation: dict[str, Any], rows: dict[int, int]) -> int:
    image_id = _field(path, "annotation", annotation, "image_id", int)
    if image_id not in rows:
        raise ValueError(f"{path}: annotation {annotation.get('id')} has unknown image_id {image_id}")
    return rows[image_id]


def _field(path: str, what: str, entry: dict[str, Any], name: str, kind: type) -> Any:
    """A field of the wanted type; raises `ValueError` naming file, entry and field."""
    value = entry.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = f"it is {value!r}" if name in entry else "it is missing"
        raise ValueError(f"{path}: {what} {entry.get('id', entry)}: {name} must be {kind.__name__}, {found}")
    return value
