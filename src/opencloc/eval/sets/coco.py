"""Region sets in COCO's JSON: recognition on COCO and LVIS, hard negatives of FG-OVD.

The format is `data/sources/coco.py`'s.  Class names are bare: no template, and spaces for underscores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from opencloc.data.sources.coco_json import (
    BAD_CAPTION,
    BAD_FILE_NAME,
    BAD_IMAGE_SIZE,
    EMPTY_BOX,
    EMPTY_CAPTION,
    STRAY_CAPTION,
    category_of,
    field_of,
    read_box,
    read_categories,
    read_coco,
    read_images,
    read_json,
    row_of,
)
from opencloc.errors import BadSample, counted
from opencloc.eval.sets.item import (
    BOXES,
    IMAGES,
    NO_REGIONS,
    TEXTS,
    EvalSet,
    Item,
    Skipped,
    Stored,
    base_name,
    first_file,
    first_folder,
    merge_names,
)

FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}

Entry = tuple[int, str, int, int]  # an image: id, file name, width and height in pixels


def coco_recognition(
    location: str, *, split: str = "val2017", annotations: str | None = None, images: str | None = None
) -> EvalSet:
    """COCO's boxes with their classes: `annotations/instances_SPLIT.json`, images in `SPLIT/` or `images/`."""
    path = annotations or first_file([f"{location}/annotations/instances_{split}.json"], "annotations")
    folders = [images] if images else [f"{location}/{part}" for part in (split, f"images/{split}", "images")]
    return _recognition(path, folders)


def lvis_recognition(
    location: str, *, split: str = "val", annotations: str | None = None, images: str | None = None
) -> EvalSet:
    """LVIS v1's boxes with their classes: `lvis_v1_SPLIT.json`, images under `train2017/` and `val2017/` as in COCO."""
    name = f"lvis_v1_{split}.json"
    path = annotations or first_file([f"{location}/{name}", f"{location}/annotations/{name}"], "annotations")
    folders = [images] if images else [location, f"{location}/images", f"{location}/coco"]
    return _recognition(path, folders)


def _recognition(path: str, folders: list[str]) -> EvalSet:
    file = read_coco(path)
    names, merged = merge_names(file.classes)
    skipped = with_units(file.skipped)
    folder = first_folder(folders, file.names)
    items = []
    for row, (name, size_px) in enumerate(zip(file.names, file.sizes_px.tolist(), strict=True)):
        regions = slice(file.spans[row], file.spans[row + 1])
        texts = tuple(file.classes[label] for label in file.labels[regions])
        if not texts:
            skipped[IMAGES, NO_REGIONS] += 1
            continue
        image = Stored(path=f"{folder}/{name}")
        items.append(Item(image=image, annotated_px=tuple(size_px), boxes=file.boxes[regions], texts=texts))
    groups = tuple(FREQUENCIES.get(frequency, "") for frequency in file.frequencies)
    return EvalSet(
        name=base_name(path),
        rules="; ".join(filter(None, ["crowd annotations are left out", merged, counted(file.noticed)])),
        items=items,
        num_items=len(items),
        skipped=skipped,
        class_names=names,
        class_groups=groups if all(groups) and len(groups) == len(names) else (),
    )


def fg_ovd(
    location: str, *, split: str = "1_attributes", images: str | None = None, negatives: int | None = None
) -> EvalSet:
    """FG-OVD's boxes with a true caption and hard negatives each: `SPLIT.json`, or the file itself as the location.

    Splits as the authors name the files: `1_attributes` (hard), `2_attributes` (medium), `3_attributes` (easy),
    `shuffle_negatives` (trivial), `color`, `material`, `pattern`, `transparency`.  `images` has COCO's `train2017/`
    and `val2017/`.  `negatives`: at most so many of each box's, from the first on.
    """
    path = location
    if not location.endswith(".json"):
        path = first_file([f"{location}/{part}{split}.json" for part in ("", "benchmarks/", "gt/")], "split")
    content = read_json(path, ("images", "annotations", "categories"))
    skipped: Skipped = Counter()
    entries, rows = images_of(path, content, skipped)
    captions = read_categories(content["categories"], path)
    found: list[list[tuple[np.ndarray, tuple[str, ...]]]] = [[] for _ in entries]
    for annotation in content["annotations"]:
        row = row_of(path, annotation, rows)
        category = category_of(path, annotation, captions)
        others = field_of(path, "annotation", annotation, "neg_category_ids", list)
        if unknown := [one for one in others if not isinstance(one, int) or one not in captions]:
            raise ValueError(f"{path}: annotation {annotation.get('id')}: unknown neg_category_ids {unknown[:3]}")
        if not others:
            skipped[BOXES, "without hard negatives"] += 1
        elif row >= 0 and (box := try_box(path, annotation, entries[row], skipped)) is not None:
            found[row].append((box, tuple(captions[one] for one in [category, *others[:negatives]])))
    skipped[IMAGES, NO_REGIONS] += sum(not regions for regions in found)
    asked = [(entry, regions) for entry, regions in zip(entries, found, strict=True) if regions]
    folders = [images] if images else [location, f"{location}/images", f"{location}/coco"]
    folder = first_folder(folders, [entry[1] for entry, _ in asked])
    items = [
        Item(
            image=Stored(path=f"{folder}/{entry[1]}"),
            annotated_px=entry[2:],
            boxes=np.stack([box for box, _ in regions]),
            choices=tuple(texts for _, texts in regions),
        )
        for entry, regions in asked
    ]
    return EvalSet(name=base_name(path), items=items, num_items=len(items), skipped=skipped)


# -- what the readers of COCO's JSON share -----------------------------------------------------------------------------


def with_units(reasons: Mapping[str, int]) -> Skipped:
    """What `read_coco`, `read_images` and `read_captions` left out, by unit and reason."""
    units: dict[str, str] = dict.fromkeys((BAD_FILE_NAME, BAD_IMAGE_SIZE), IMAGES)
    units |= dict.fromkeys((EMPTY_CAPTION, BAD_CAPTION, STRAY_CAPTION), TEXTS)
    return Counter({(units.get(reason, BOXES), reason): number for reason, number in reasons.items()})


def images_of(path: str, content: dict[str, Any], skipped: Skipped) -> tuple[list[Entry], dict[int, int]]:
    """(the images of a file, the row of each by its id); those that cannot be used are counted and have row -1."""
    reasons: Counter[str] = Counter()
    entries = read_images(content["images"], path, reasons)
    skipped.update(with_units(reasons))
    return entries, {one["id"]: -1 for one in content["images"]} | {one[0]: row for row, one in enumerate(entries)}


def try_box(path: str, annotation: dict[str, Any], entry: Entry, skipped: Skipped) -> np.ndarray | None:
    """The box (4,) of an annotation of an image; None, and counted, if it is empty or not four finite numbers."""
    try:
        box = read_box(path, annotation, entry[2:])
    except BadSample as bad:
        skipped[BOXES, bad.reason] += 1
        return None
    if box is None:
        skipped[BOXES, EMPTY_BOX] += 1
    return box
