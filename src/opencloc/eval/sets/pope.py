"""POPE (Li et al. 2023): questions of yes or no about objects of COCO's photos, a JSON object on every line."""

from __future__ import annotations

import json
from typing import Any

from opencloc import files
from opencloc.data.sources.coco_json import field_of
from opencloc.eval.sets.item import EvalSet, Item, Stored, first_file, first_folder

_PREFIX = "COCO_val2014_"  # COCO's names of 2014; those of 2017 lack it


def pope(location: str, *, split: str = "random", images: str | None = None) -> EvalSet:
    """The questions of `coco_pope_SPLIT.json` (random, popular, adversarial), by image.

    `images` has COCO's `val2014`, under the names of 2014 or of 2017.
    """
    path = first_file([f"{location}/coco_pope_{split}.json", f"{location}/{split}.json"], "")
    asked: dict[str, list[tuple[str, str]]] = {}
    for number, row in enumerate(read_json_lines(path), start=1):
        what = f"line {number}, question"
        label = field_of(path, what, row, "label", str)
        if label not in ("yes", "no"):
            raise ValueError(f"{path}, line {number}: the label is {label!r}, must be yes or no")
        text = field_of(path, what, row, "text", str)
        asked.setdefault(field_of(path, what, row, "image", str), []).append((text, label))
    names = list(asked)
    folders = [images] if images else [f"{location}/val2014", f"{location}/images", location]
    folder = first_folder(folders, names + [name.removeprefix(_PREFIX) for name in names[:20]])
    items = [
        Item(
            image=Stored(path=_present(folder, name)),
            questions=tuple(text for text, _ in rows),
            answers=tuple(label for _, label in rows),
        )
        for name, rows in asked.items()
    ]
    return EvalSet(name=split, items=items, num_items=len(items))


def read_json_lines(path: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file.  Raises ValueError naming file and line for anything else, and for none."""
    rows = []
    for number, line in enumerate(files.read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no questions")
    return rows


def _present(folder: str, name: str) -> str:
    """The file of an image by its name of 2014, or by that of 2017 where only this one is there."""
    path, short = f"{folder}/{name}", f"{folder}/{name.removeprefix(_PREFIX)}"
    return short if short != path and not files.exists(path) else path
