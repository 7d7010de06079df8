"""Region sets in COCO's JSON: recognition on COCO and LVIS, hard negatives of FG-OVD.

The checks of the format are `data/coco.py`'s.  Class names are bare: no template, and in LVIS a space for every
underscore ("mouse (computer equipment)").
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from opencloc.data.sources.coco import (
    CROWD,
    EMPTY_BOX,
    category_of,
    field_of,
    read_box,
    read_categories,
    read_images,
    read_json,
    row_of,
)
from opencloc.eval.sets.item import Choices, EvalSet, Regions, Stored, base_name, first_file, first_folder, pixel_areas

FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
NO_REGIONS = "image without regions"


def coco_recognition(
    location: str, *, split: str = "val2017", annotations: str | None = None, images: str | None = None
) -> EvalSet[Regions]:
    """COCO's boxes with their classes: `annotations/instances_SPLIT.json`, images in `SPLIT/` or `images/`."""
    path = annotations or first_file([f"{location}/annotations/instances_{split}.json"], "annotations")
    folders = [images] if images else [f"{location}/{part}" for part in (split, f"images/{split}", "images")]
    return _recognition("coco-recognition", path, folders)


def lvis_recognition(
    location: str, *, split: str = "val", annotations: str | None = None, images: str | None = None
) -> EvalSet[Regions]:
    """LVIS v1's boxes with their classes: `lvis_v1_SPLIT.json`, images under `train2017/` and `val2017/` as in COCO."""
    name = f"lvis_v1_{split}.json"
    path = annotations or first_file([f"{location}/{name}", f"{location}/annotations/{name}"], "annotations")
    folders = [images] if images else [location, f"{location}/images", f"{location}/coco"]
    return _recognition("lvis-recognition", path, folders)


def _recognition(name: str, path: str, folders: list[str]) -> EvalSet[Regions]:
    content = read_json(path, ("images", "annotations", "categories"))
    entries = read_images(content["images"], path)
    rows = {image_id: row for row, (image_id, *_) in enumerate(entries)}
    names = read_categories(content["categories"], path)
    place = {category: label for label, category in enumerate(names)}
    left_out: Counter[str] = Counter()
    found: list[list[tuple[np.ndarray, int, float]]] = [[] for _ in entries]
    for annotation in content["annotations"]:
        row = row_of(path, annotation, rows)
        label = place[category_of(path, annotation, names)]
        if annotation.get("iscrowd"):
            left_out[CROWD] += 1
        elif (box := read_box(path, annotation, entries[row][2:])) is None:
            left_out[EMPTY_BOX] += 1
        else:
            found[row].append((box, label, _area_px(annotation, box, entries[row][2:])))
    left_out[NO_REGIONS] += sum(not regions for regions in found)
    folder = first_folder(folders, [entry[1] for entry in entries])
    items = [
        Regions(
            image=Stored(path=f"{folder}/{file_name}", expected_px=(width_px, height_px)),
            boxes=np.stack([box for box, _, _ in regions]),
            labels=np.array([label for _, label, _ in regions], dtype=np.int64),
            areas_px=np.array([area for _, _, area in regions], dtype=np.float64),
        )
        for (_, file_name, width_px, height_px), regions in zip(entries, found, strict=True)
        if regions
    ]
    groups = [FREQUENCIES.get(str(one.get("frequency")), "") for one in content["categories"]]
    return EvalSet(
        name=f"{name} {base_name(path)}",
        rules=f"name each given box among the {len(names)} bare class names; crowd annotations are left out",
        items=items,
        left_out=dict(+left_out),
        class_names=tuple(name.replace("_", " ") for name in names.values()),
        class_groups=tuple(groups) if all(groups) else (),
    )


def _area_px(annotation: dict[str, Any], box: np.ndarray, size_px: tuple[int, int]) -> float:
    """COCO's `area`, which is the mask's, as its own evaluation by size takes it; the box's where there is none."""
    area = annotation.get("area")
    return float(area) if isinstance(area, int | float) else float(pixel_areas(box[None], size_px)[0])


def fg_ovd(
    location: str, *, split: str = "1_attributes", images: str | None = None, negatives: int | None = None
) -> EvalSet[Choices]:
    """FG-OVD's boxes with a true caption and hard negatives each: `SPLIT.json`, or the file itself as the location.

    Splits as the authors name the files: `1_attributes` (hard), `2_attributes` (medium), `3_attributes` (easy),
    `shuffle_negatives` (trivial), `color`, `material`, `pattern`, `transparency`.  `images` has COCO's `train2017/`
    and `val2017/`.  `negatives`: at most so many of each box's, from the first on.
    """
    path = location
    if not location.endswith(".json"):
        path = first_file([f"{location}/{part}{split}.json" for part in ("", "benchmarks/", "gt/")], "split")
    content = read_json(path, ("images", "annotations", "categories"))
    entries = read_images(content["images"], path)
    rows = {image_id: row for row, (image_id, *_) in enumerate(entries)}
    captions = read_categories(content["categories"], path)
    left_out: Counter[str] = Counter()
    found: list[list[tuple[np.ndarray, tuple[str, ...]]]] = [[] for _ in entries]
    for annotation in content["annotations"]:
        row = row_of(path, annotation, rows)
        category = category_of(path, annotation, captions)
        others = field_of(path, "annotation", annotation, "neg_category_ids", list)
        if unknown := [one for one in others if one not in captions]:
            raise ValueError(f"{path}: annotation {annotation.get('id')}: unknown neg_category_ids {unknown[:3]}")
        if not others:
            left_out["box without hard negatives"] += 1
        elif (box := read_box(path, annotation, entries[row][2:])) is None:
            left_out[EMPTY_BOX] += 1
        else:
            found[row].append((box, tuple(captions[one] for one in [category, *others[:negatives]])))
    left_out[NO_REGIONS] += sum(not regions for regions in found)
    folders = [images] if images else [location, f"{location}/images", f"{location}/coco"]
    folder = first_folder(folders, [entry[1] for entry in entries])
    items = [
        Choices(
            image=Stored(path=f"{folder}/{file_name}", expected_px=(width_px, height_px)),
            boxes=np.stack([box for box, _ in regions]),
            choices=tuple(choices for _, choices in regions),
        )
        for (_, file_name, width_px, height_px), regions in zip(entries, found, strict=True)
        if regions
    ]
    return EvalSet(
        name=f"fg-ovd {base_name(path)}",
        rules="rank each box's true caption among its own hard negatives; a tie counts as wrong",
        items=items,
        left_out=dict(+left_out),
    )
