"""COCO-format JSON: images with boxes of named classes and human captions.

`read_coco` is the one reading of such a file.  Boxes are (x, y, width, height) in pixels there, normalised XYXY here.
They refer to the pixels as stored, whatever EXIF orientation says.  An entry that cannot be used costs itself alone and
is counted in `skipped`; a file that contradicts itself (unknown ids, missing fields) raises `ValueError`.

LVIS has the same format but names its images by `coco_url` only: there an image's name is the last two parts of it,
`val2017/000000397133.jpg`.  Roboflow puts `_annotations.coco.json` among the images, in `train`, `valid` and `test`.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from jaxtyping import Float32, Float64, Int64
from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from opencloc import files
from opencloc.boxes import xywh_px_to_xyxy
from opencloc.data.sample import Sample
from opencloc.data.sidecar import SidecarRow, label_sizes, read_labels, with_labels
from opencloc.errors import BadSample
from opencloc.images import decode_image
from opencloc.texts import class_name

T = TypeVar("T")
CROWD, EMPTY_BOX, BAD_BOX = "crowd annotation", "empty box", "bad box"
OUTSIDE = "box reaches outside the image (clipped)"
_OUTSIDE_PX, _OUTSIDE_SHARE = 2, 0.02  # a box may reach this far outside, in pixels or of the side, whichever is more
_MAX_SIDE_PX = 1_000_000
_ROBOFLOW = "_annotations.coco.json"
_ROBOFLOW_SPLITS = ("train", "valid", "test")


@checked(frozen=True, kw_only=True)
class CocoConfig:
    """Which files of a COCO folder are read, and how."""

    split: str | None = None  # annotations/instances_SPLIT.json or SPLIT/_annotations.coco.json; None: the only one
    images: str | None = None  # folder of the images; None: images/ or SPLIT/ in the location
    instances: str | None = None  # file; None: the split's
    captions: str | None = None  # file; None: the split's, if it exists
    sidecar: str | None = None  # name of the labels beside the instances file, or FOLDER/name; they replace its boxes
    image_px: Annotated[int, Field(ge=1)] | None = (
        None  # decode JPEGs no larger than needed for this long side; None: in full
    )


@dataclass(frozen=True, kw_only=True)
class CocoFile:
    """What an annotation file says.  Symbols: N images, A boxes, C classes.

    The boxes lie in the order of the images: those of image i are `spans[i]` to `spans[i + 1]`.
    """

    path: str
    ids: tuple[int, ...]  # N
    names: tuple[str, ...]  # N file names
    sizes_px: Int64[np.ndarray, "N 2"]  # width and height
    classes: tuple[str, ...]  # C distinct names, bare: spaces for underscores
    frequencies: tuple[str, ...]  # C of LVIS's `r`, `c`, `f`; empty texts elsewhere
    spans: Int64[np.ndarray, " N_plus_1"]
    boxes: Float32[np.ndarray, "A 4"]
    labels: Int64[np.ndarray, " A"]  # places in `classes`
    skipped: Counter[str]  # images and annotations left out, by reason
    noticed: Counter[str]  # what was kept and is worth a look


class Coco:
    """The images of one split by number, in the order of the JSON, those without annotations too.

    Keys are file names without their extension, region texts the bare category names.  An image file that is missing
    or has not the shape that its annotations refer to is a `BadSample`.  Raises as `read_coco`, and `FileNotFoundError`
    naming what is missing.
    """

    def __init__(self, location: str, config: CocoConfig | None = None) -> None:
        self.location = location
        self.config = config or CocoConfig()
        self.instances_path, captions_path, self.images_path = _find_files(location.rstrip("/"), self.config)
        self._file = read_coco(self.instances_path)
        self._captions, not_read = ({}, Counter()) if captions_path is None else read_captions(captions_path)
        skipped = self._file.skipped + not_read
        if elsewhere := self._captions.keys() - set(self._file.ids):
            if len(elsewhere) == len(self._captions):
                raise ValueError(f"{captions_path}: no caption is of an image of {self.instances_path}")
            skipped["caption of an image that is not listed"] = sum(len(self._captions[one]) for one in elsewhere)
        self.skipped: Counter[str] = skipped  # what was left out, by reason
        self.noticed = Counter(self._file.noticed)  # what is used and worth a look
        self._labels: dict[str, SidecarRow] | None = None
        if self.config.sidecar is not None:
            self._labels = read_labels(self.instances_path, self.config.sidecar)

    @property
    def size(self) -> int:
        return len(self._file.names)

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
        path = f"{self.images_path}/{self._file.names[index]}"
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
    folder = f"{location}/annotations"
    names = [os.path.basename(path) for path in files.children(folder)] if files.is_folder(folder) else []
    coco = [match[1] for name in names if (match := re.fullmatch(r"instances_([^.]+)\.json", name))]
    return coco or _roboflow_splits(location)


def _find_files(location: str, config: CocoConfig) -> tuple[str, str | None, str]:
    """(instances file, captions file or None, image folder); raises `FileNotFoundError` naming what is missing."""
    split, instances, captions, images = config.split, config.instances, config.captions, config.images
    if instances is None:
        if split is None:
            splits = _splits(location)
            if not splits:
                raise FileNotFoundError(f"{location}: no annotations/instances_*.json, no {_ROBOFLOW}")
            if len(splits) > 1:
                raise ValueError(f"{location} has several splits: choose one by split=, of {', '.join(splits)}")
            split = splits[0]
        instances = f"{location}/annotations/instances_{split}.json"
        roboflow = f"{location}/{split}".rstrip("/")
        if not files.exists(instances) and files.exists(f"{roboflow}/{_ROBOFLOW}"):
            instances, images = f"{roboflow}/{_ROBOFLOW}", images or roboflow
        elif captions is None and files.exists(conventional := f"{location}/annotations/captions_{split}.json"):
            captions = conventional
    if images is None:
        images = f"{location}/images"
        if split is not None and not files.is_folder(images):
            images = f"{location}/{split}"
    if not files.is_folder(images):
        raise FileNotFoundError(f"{images}: no such folder of images")
    return instances, captions, images.rstrip("/")


def _once(read: Callable[[str], T]) -> Callable[[str], T]:
    """`read`, which takes a local file at most once per process as long as the file stays the same.

    Every rank of a run is a process and reads for itself, all at the same time; loader workers get a copy.
    """

    @functools.lru_cache(maxsize=4)
    def kept(path: str, mtime_ns: int, size: int) -> T:
        return read(path)

    @functools.wraps(read)
    def reader(path: str) -> T:
        if (local := files.local_path(path)) is None:
            return read(path)
        status = os.stat(local)
        return kept(path, status.st_mtime_ns, status.st_size)

    return reader


@_once
def read_coco(path: str) -> CocoFile:
    """The content of an annotation file; not to be changed, since others share it.

    Left out are crowd annotations, boxes that are not four finite numbers ("bad box") or empty, images without a usable
    file name or size, and names that are no text.  A box that reaches more than 2 pixels and 2 % of the side outside
    the image is clipped and counted in `noticed`: many of them mean that the file has (x0, y0, x1, y1).  Categories of
    one name are one class.  A category without boxes that others name as their supercategory is no class.

    Raises `FileNotFoundError`, and `ValueError` naming file and reason for malformed JSON, missing fields, unknown
    image or category ids, and where no image or no box at all can be used.
    """
    content = read_json(path, ("images", "annotations", "categories"))
    skipped, noticed = Counter[str](), Counter[str]()
    images = read_images(content["images"], path, skipped)
    if content["images"] and not images:
        raise ValueError(f"{path}: none of {len(content['images'])} images can be used: {dict(skipped)}")
    annotations = content["annotations"]
    row_by_id = {entry["id"]: -1 for entry in content["images"]} | {one[0]: row for row, one in enumerate(images)}
    rows = _looked_up(_column(path, annotations, "image_id", int), row_by_id)
    used = _column(path, annotations, "category_id", int)
    classes, label_by_id, frequencies = _classes(path, content["categories"], set(used), noticed)
    labels = _looked_up(used, label_by_id)
    for number in np.flatnonzero(np.minimum(rows, labels) == -2)[:1]:  # either of the two names it
        row_of(path, annotations[number], row_by_id)
        category_of(path, annotations[number], label_by_id)
    sizes_px = np.asarray([one[2:] for one in images], dtype=np.int64).reshape(-1, 2)
    of_px = np.concatenate([sizes_px, [[1, 1]]])[rows]  # (A, 2); a row of -1 is that of an image left out
    boxes_px = _boxes_px(annotations)
    with np.errstate(over="ignore", invalid="ignore"):  # of numbers that make a bad box
        boxes = xywh_px_to_xyxy(boxes_px, of_px[:, 0], of_px[:, 1])
        beyond = np.maximum(-boxes_px[:, :2], boxes_px[:, :2] + boxes_px[:, 2:] - of_px)
    kept = np.ones(len(annotations), dtype=bool)
    for reason, wrong in (
        ("annotation of an image left out", rows < 0),
        (CROWD, np.asarray([bool(entry.get("iscrowd")) for entry in annotations], dtype=bool)),
        ("bad category name", labels < 0),
        (BAD_BOX, ~np.isfinite(boxes_px).all(axis=1)),
        (EMPTY_BOX, ~(boxes[:, :2] < boxes[:, 2:]).all(axis=1)),
    ):
        skipped[reason] += int((kept & wrong).sum())
        kept &= ~wrong
    if skipped[BAD_BOX] and not kept.any():
        raise ValueError(f"{path}: no annotation has a usable bbox of 4 numbers, the first is {annotations[0]}")
    noticed[OUTSIDE] += int((kept & (beyond > np.maximum(_OUTSIDE_PX, _OUTSIDE_SHARE * of_px)).any(axis=1)).sum())
    kept = np.flatnonzero(kept)
    kept = kept[np.argsort(rows[kept], kind="stable")]
    return CocoFile(
        path=path,
        ids=tuple(one[0] for one in images),
        names=tuple(one[1] for one in images),
        sizes_px=sizes_px,
        classes=classes,
        frequencies=frequencies,
        spans=np.searchsorted(rows[kept], np.arange(len(images) + 1)),
        boxes=boxes[kept],
        labels=labels[kept],
        skipped=+skipped,
        noticed=+noticed,
    )


@_once
def read_captions(path: str) -> tuple[dict[int, tuple[str, ...]], Counter[str]]:
    """(captions by image id, what was left out) of a captions file; raises `ValueError` naming file and entry."""
    annotations = read_json(path, ("annotations",))["annotations"]
    found: dict[int, tuple[str, ...]] = {}
    skipped = Counter[str]()
    texts = _column(path, annotations, "caption", str)
    for image_id, text in zip(_column(path, annotations, "image_id", int), map(str.strip, texts), strict=True):
        if not text or not _is_text(text):
            skipped["bad caption" if text else "empty caption"] += 1
        else:
            found[image_id] = (*found.get(image_id, ()), text)
    return found, skipped


def read_json(path: str, lists: tuple[str, ...]) -> dict[str, Any]:
    """The object in a JSON file, whose fields `lists` are lists of objects; raises `ValueError` naming the file."""
    data = files.read_bytes(path)
    collecting = gc.isenabled()
    gc.disable()  # which would look through the millions of new objects again and again
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    finally:
        if collecting:
            gc.enable()
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object with {', '.join(lists)}, found {type(content).__name__}")
    for name in lists:
        entries = content.get(name)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path}: needs {name!r}, a list of objects")
    return content


def read_images(
    entries: list[dict[str, Any]], path: str, skipped: Counter[str] | None = None
) -> list[tuple[int, str, int, int]]:
    """(id, file name, width, height in pixels) of every image.

    One with a file name or size that no image has is left out and counted in `skipped`, or a `ValueError` without it.
    """
    images: dict[int, tuple[int, str, int, int]] = {}
    ids: set[int] = set()
    for entry in entries:
        image_id = field_of(path, "image", entry, "id", int)
        name = _file_name(path, entry)
        width_px = field_of(path, "image", entry, "width", int)
        height_px = field_of(path, "image", entry, "height", int)
        if image_id in ids:
            raise ValueError(f"{path}: image id {image_id} comes twice")
        ids.add(image_id)
        if not _is_text(name) or "\0" in name or "://" in name:
            problem, found = "bad file name", repr(name)
        elif not (1 <= width_px <= _MAX_SIDE_PX and 1 <= height_px <= _MAX_SIDE_PX):
            problem, found = "bad image size", f"{width_px} x {height_px} pixels"[:80]
        else:
            images[image_id] = (image_id, name, width_px, height_px)
            continue
        if skipped is None:
            raise ValueError(f"{path}: image {image_id}: {problem}: {found}")
        skipped[problem] += 1
    return list(images.values())


def _file_name(path: str, entry: dict[str, Any]) -> str:
    if "file_name" not in entry and "coco_url" in entry:
        return "/".join(field_of(path, "image", entry, "coco_url", str).split("/")[-2:])
    return field_of(path, "image", entry, "file_name", str)


def _is_text(text: str) -> bool:
    """Whether a text can be encoded: half a surrogate pair, which JSON can escape, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_categories(entries: list[dict[str, Any]], path: str) -> dict[int, str]:
    """Names of the categories by id, in the order of the file."""
    names: dict[int, str] = {}
    for one in entries:
        category = field_of(path, "category", one, "id", int)
        if category in names:
            raise ValueError(f"{path}: category id {category} comes twice")
        names[category] = field_of(path, "category", one, "name", str).strip()
    return names


def _classes(
    path: str, entries: list[dict[str, Any]], used: set[int], noticed: Counter[str]
) -> tuple[tuple[str, ...], dict[int, int], tuple[str, ...]]:
    """(class names, place among them by category id or -1 for a name that is no text, LVIS's frequencies)."""
    headings = {str(one.get("supercategory")) for one in entries if one.get("supercategory") != one.get("name")}
    frequencies: dict[str, str] = {}  # by class name
    name_by_id: dict[int, str] = {}
    for (category, name), entry in zip(read_categories(entries, path).items(), entries, strict=True):
        bare = class_name(name)
        if category not in used and name in headings:
            noticed["category without boxes that others have as supercategory (dropped)"] += 1
            continue
        name_by_id[category] = bare if _is_text(bare) else ""
        if name_by_id[category]:
            noticed["category with the name of another (merged)"] += bare in frequencies
            frequencies.setdefault(bare, str(entry.get("frequency") or ""))
    place = {name: number for number, name in enumerate(frequencies)}
    return tuple(place), {one: place.get(name, -1) for one, name in name_by_id.items()}, tuple(frequencies.values())


def _column(path: str, annotations: list[dict[str, Any]], name: str, kind: type[T]) -> list[T]:
    """A field of all annotations; raises `ValueError` naming the first that has it not or of another type."""
    values: list[Any] = [entry.get(name) for entry in annotations]
    if not set(map(type, values)) <= {kind}:
        for entry in annotations:
            field_of(path, "annotation", entry, name, kind)
    return values


def _looked_up(ids: Iterable[int], number_by_id: Mapping[int, int]) -> Int64[np.ndarray, " A"]:
    """The number of each id; -2 for an unknown one."""
    return np.fromiter((number_by_id.get(one, -2) for one in ids), dtype=np.int64)


def _boxes_px(annotations: list[dict[str, Any]]) -> Float64[np.ndarray, "A 4"]:
    """The `bbox` of all annotations; NaN for whatever is not a list of 4 numbers."""
    lists: list[Any] = [entry.get("bbox") for entry in annotations]
    try:
        if set(map(type, lists)) <= {list} and set(map(len, lists)) <= {4}:
            flat = list(itertools.chain.from_iterable(lists))
            if set(map(type, flat)) <= {int, float}:
                return np.asarray(flat, dtype=np.float64).reshape(-1, 4)
    except OverflowError:  # an integer of hundreds of digits
        pass
    return np.asarray([_box_px(one) for one in lists], dtype=np.float64).reshape(-1, 4)


def _box_px(bbox: Any) -> list[float]:
    unusable = [float("nan")] * 4
    if type(bbox) is not list or len(bbox) != 4 or not {int, float}.issuperset(map(type, bbox)):
        return unusable
    try:
        return [float(number) for number in bbox]
    except OverflowError:
        return unusable


def category_of(path: str, annotation: dict[str, Any], names: Mapping[int, Any]) -> int:
    """The category id of an annotation; raises `ValueError` if it is none of `names`."""
    category = field_of(path, "annotation", annotation, "category_id", int)
    if category not in names:
        known = f"{len(names)} categories have ids {min(names, default=0)} to {max(names, default=0)}"
        raise ValueError(f"{path}: annotation {annotation.get('id')} has unknown category_id {category} ({known})")
    return category


def read_box(path: str, annotation: dict[str, Any], size_px: tuple[int, int]) -> np.ndarray | None:
    """The box (4,) of an annotation, clipped and normalised to the image of (width, height); None if it is empty.

    Raises `BadSample` ("bad box") naming file and annotation for what is not 4 finite numbers.
    """
    box_px = np.asarray(_box_px(annotation.get("bbox")))
    if not np.isfinite(box_px).all():
        detail = repr(annotation.get("bbox", "no bbox"))[:80]
        raise BadSample(BAD_BOX, f"{path}: annotation {annotation.get('id')}", detail)
    box = xywh_px_to_xyxy(box_px, *size_px)
    return None if box[2] <= box[0] or box[3] <= box[1] else box


def row_of(path: str, annotation: dict[str, Any], rows: Mapping[int, int]) -> int:
    """The row of an annotation's image; raises `ValueError` if its `image_id` is none of `rows`."""
    image_id = field_of(path, "annotation", annotation, "image_id", int)
    if image_id not in rows:
        raise ValueError(f"{path}: annotation {annotation.get('id')} has unknown image_id {image_id}")
    return rows[image_id]


def field_of(path: str, what: str, entry: Any, name: str, kind: type) -> Any:
    """A field of an object, of the wanted type; raises `ValueError` naming file, entry and field."""
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: {what} must be an object with {name}, it is {entry!r}"[:300])
    value = entry.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = f"it is {value!r}"[:80] if name in entry else "it is missing"
        raise ValueError(f"{path}: {what} {entry.get('id', entry)}: {name} must be {kind.__name__}, {found}")
    return value
