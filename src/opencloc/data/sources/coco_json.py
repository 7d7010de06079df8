"""What an annotation file in COCO's JSON says, as arrays.

`read_coco` is the one reading of such a file.  Boxes are (x, y, width, height) in pixels there, normalised XYXY here.
An entry that cannot be used costs itself alone and is counted in `skipped`; a file that contradicts itself (unknown
ids, missing fields) raises `ValueError`.

LVIS has the same format but names its images by `coco_url` only: there an image's name is the last two parts of it,
`val2017/000000397133.jpg`.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32, Float64, Int64

from opencloc import files
from opencloc.boxes import xywh_px_to_xyxy
from opencloc.data.sources.kept import kept
from opencloc.errors import BadSample, and_skipped
from opencloc.texts import class_name, is_text

T = TypeVar("T")
CROWD, EMPTY_BOX, BAD_BOX = "crowd annotation", "empty box", "bad box"
BAD_FILE_NAME, BAD_IMAGE_SIZE = "bad file name", "bad image size"
EMPTY_CAPTION, BAD_CAPTION, STRAY_CAPTION = "empty caption", "bad caption", "caption of an image that is not listed"
OUTSIDE = "box reaches outside the image (clipped)"
_OUTSIDE_PX, _OUTSIDE_SHARE = 2, 0.02  # a box may reach this far outside, in pixels or of the side, whichever is more
_MAX_SIDE_PX = 1_000_000


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


def read_coco(path: str) -> CocoFile:
    """The content of an annotation file; not to be changed, since others share it.

    Left out are crowd annotations, boxes that are not four finite numbers ("bad box") or empty, images without a usable
    file name or size, and names that are no text.  A box that reaches more than 2 pixels and 2 % of the side outside
    the image is clipped and counted in `noticed`: many of them mean that the file has (x0, y0, x1, y1).  Categories of
    one name are one class.  A category without boxes that others name as their supercategory is no class.

    Raises `FileNotFoundError`, and `ValueError` naming file and reason for malformed JSON, missing fields, unknown
    image or category ids, and where no image or no box at all can be used.
    """
    return kept(CocoFile, [path], lambda: _read_coco(path))


def _read_coco(path: str) -> CocoFile:
    content = read_json(path, ("images", "annotations", "categories"), polygons=False)
    skipped, noticed = Counter[str](), Counter[str]()
    images = read_images(content["images"], path, skipped)
    if content["images"] and not images:
        raise ValueError(f"{path}: none of {len(content['images'])} images can be used{and_skipped(skipped)}")
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
    boxes_px = boxes_of([entry.get("bbox") for entry in annotations])
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


@dataclass(frozen=True, kw_only=True)
class _Captions:
    ids: tuple[int, ...]
    texts: tuple[tuple[str, ...], ...]
    skipped: Counter[str]


def read_captions(path: str) -> tuple[dict[int, tuple[str, ...]], Counter[str]]:
    """(captions by image id, what was left out) of a captions file; raises `ValueError` naming file and entry."""
    found = kept(_Captions, [path], lambda: _read_captions(path))
    return dict(zip(found.ids, found.texts, strict=True)), Counter(found.skipped)


def _read_captions(path: str) -> _Captions:
    annotations = read_json(path, ("annotations",))["annotations"]
    found: dict[int, tuple[str, ...]] = {}
    skipped = Counter[str]()
    texts = _column(path, annotations, "caption", str)
    for image_id, text in zip(_column(path, annotations, "image_id", int), map(str.strip, texts), strict=True):
        if not text or not is_text(text):
            skipped[BAD_CAPTION if text else EMPTY_CAPTION] += 1
        else:
            found[image_id] = (*found.get(image_id, ()), text)
    return _Captions(ids=tuple(found), texts=tuple(found.values()), skipped=skipped)


def read_json(path: str, lists: tuple[str, ...], *, polygons: bool = True) -> dict[str, Any]:
    """The object in a JSON file, whose fields `lists` are lists of objects; raises `ValueError` naming the file.

    Without `polygons`, those of COCO's `segmentation` are not read, which are most of its bytes.
    """
    content = _parsed(path, polygons)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object with {', '.join(lists)}, found {type(content).__name__}")
    for name in lists:
        entries = content.get(name)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path}: needs {name!r}, a list of objects")
    return content


def read_json_list(path: str) -> list[dict[str, Any]]:
    """The list of objects in a JSON file; raises `ValueError` naming the file."""
    content = _parsed(path)
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise ValueError(f"{path}: expected a list of objects, found {type(content).__name__}")
    return content


def _parsed(path: str, polygons: bool = True) -> Any:
    data = files.read_bytes(path)
    collecting = gc.isenabled()
    gc.disable()  # which would look through the millions of new objects again and again
    try:
        if not polygons:
            with contextlib.suppress(ValueError, RecursionError):  # then the file as it is has its own say
                return json.loads(without_polygons(data))
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    finally:
        if collecting:
            gc.enable()


_POLYGONS = b'"segmentation":'


def without_polygons(data: bytes) -> bytes:
    """The JSON with 0 for its lists of polygons, which nothing here reads and which take long to parse.

    Only what stands between `[` and the next `]]` without any quote is cut: within a text a quote would be escaped, so
    the key is one, and a list that nests deeper leaves brackets that make the rest no JSON.
    """
    pieces, begin = [], 0
    while (key := data.find(_POLYGONS, begin)) >= 0:
        start = key + len(_POLYGONS)
        while data[start : start + 1].isspace():
            start += 1
        end = data.find(b"]]", start) + 2
        cut = data[start : start + 1] == b"[" and end >= 2 and data.find(b'"', start, end) < 0
        pieces += (data[begin:start], b"0") if cut else (data[begin:start],)
        begin = end if cut else start
    pieces.append(data[begin:])
    return b"".join(pieces)


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
        if not is_file_name(name):
            problem, found = BAD_FILE_NAME, repr(name)
        elif not (1 <= width_px <= _MAX_SIDE_PX and 1 <= height_px <= _MAX_SIDE_PX):
            problem, found = BAD_IMAGE_SIZE, f"{width_px} x {height_px} pixels"[:80]
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


def is_file_name(name: str) -> bool:
    """Whether a name in an annotation file can be a file below a folder: no URL, no NUL, valid Unicode."""
    return bool(name) and "\0" not in name and "://" not in name and is_text(name)


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
        name_by_id[category] = bare if is_text(bare) else ""
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


def boxes_of(lists: list[Any]) -> Float64[np.ndarray, "A 4"]:
    """Boxes as JSON gives them; NaN for whatever is not a list of 4 numbers."""
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
