"""Open Images' boxes, from its CSVs: `validation-annotations-bbox.csv` and `class-descriptions-boxable.csv`."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator

import numpy as np

from opencloc import files
from opencloc.data.sources.coco_json import BAD_FILE_NAME, is_file_name
from opencloc.eval.sets.item import (
    BAD_BOX,
    BOXES,
    EvalSet,
    Item,
    Skipped,
    Stored,
    base_name,
    first_file,
    first_folder,
    merge_names,
)

GROUP = "one box around a group"
COLUMNS = ("ImageID", "LabelName", "XMin", "YMin", "XMax", "YMax", "IsGroupOf")


def open_images_recognition(
    location: str,
    *,
    split: str = "validation",
    annotations: str | None = None,
    classes: str | None = None,
    images: str | None = None,
) -> EvalSet:
    """Open Images' boxes with their classes: `SPLIT-annotations-bbox.csv`, `class-descriptions-boxable.csv`, `SPLIT/`.

    `classes`: another file of class descriptions (`/m/01g317,Person` per line).
    """
    place = f"{location}/{split}-annotations-bbox.csv"
    path = annotations or first_file([place, f"{location}/oidv6-{split}-annotations-bbox.csv"], "annotations")
    described = [f"{location}/{start}class-descriptions-boxable.csv" for start in ("", "oidv6-", "oidv7-")]
    names = _read_classes(classes or first_file(described, "classes"))
    skipped: Skipped = Counter()
    found: dict[str, tuple[list[list[float]], list[str]]] = {}
    for number, row in _rows(path):
        image, box = row["ImageID"], [row[edge] for edge in COLUMNS[2:6]]
        if (name := names.get(row["LabelName"])) is None:
            raise ValueError(f"{path}, line {number}: LabelName {row['LabelName']!r} is none of {len(names)} classes")
        if not is_file_name(image):
            skipped[BOXES, BAD_FILE_NAME] += 1
        elif row["IsGroupOf"] == "1":
            skipped[BOXES, GROUP] += 1
        else:
            try:
                numbers = [float(edge) for edge in box]
            except ValueError:
                skipped[BOXES, BAD_BOX] += 1
                continue
            boxes, texts = found.setdefault(image, ([], []))
            boxes.append(numbers)
            texts.append(name)
    if not found:
        raise ValueError(f"{path}: no box can be used")
    folders = [images] if images else [f"{location}/{part}" for part in (split, f"images/{split}", "images")]
    folder = first_folder(folders, [f"{image}.jpg" for image in found])
    items = [
        Item(image=Stored(path=f"{folder}/{image}.jpg"), boxes=np.array(boxes, dtype=np.float32), texts=tuple(texts))
        for image, (boxes, texts) in found.items()
    ]
    known, merged = merge_names(list(names.values()))
    return EvalSet(
        name=base_name(path),
        rules="; ".join(filter(None, ["boxes around groups are left out, depictions and insides are not", merged])),
        items=items,
        num_items=len(items),
        skipped=skipped,
        class_names=known,
    )


def _read_classes(path: str) -> dict[str, str]:
    """Name of each class by its id; raises `ValueError` naming file and line."""
    names: dict[str, str] = {}
    for number, row in _csv(path):
        if not row or row[0] == "LabelName":  # newer files have a heading
            continue
        if len(row) != 2 or not row[1].strip() or row[0] in names:
            raise ValueError(f"{path}, line {number}: needs a class id that comes once and a name, found {row!r}"[:300])
        names[row[0]] = row[1].strip()
    return names


def _rows(path: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV of boxes; raises `ValueError` naming what is missing."""
    lines = _csv(path)
    _, columns = next(lines, (1, []))
    if missing := [name for name in COLUMNS if name not in columns]:
        raise ValueError(f"{path}: no column {', '.join(missing)} in the first line")
    for number, row in lines:
        if len(row) != len(columns):
            raise ValueError(f"{path}, line {number}: {len(row)} fields in {len(columns)} columns")
        yield number, dict(zip(columns, row, strict=True))


def _csv(path: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of a CSV."""
    try:
        yield from enumerate(csv.reader(files.read_text(path).splitlines()), start=1)
    except csv.Error as error:
        raise ValueError(f"{path}: not a CSV ({error})") from error
