"""Statements about whole images: SugarCrepe's true and false captions, VSR's true and false spatial relations."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from opencloc import files
from opencloc.data.sources.coco_json import BAD_FILE_NAME, field_of, is_file_name
from opencloc.eval.sets.item import EMPTY_TEXT, IMAGES, TEXTS, EvalSet, Item, Skipped, Stored, first_file, first_folder

CATEGORIES = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
COCO = ("val2017", "images", "images/val2017")  # where the photos may lie
VSR = ("images", "trainval2017", "data/images", "data/trainval2017")


def sugarcrepe(location: str, *, images: str | None = None) -> EvalSet:
    """SugarCrepe's pairs of a true and a false caption: `add_att.json` ..., images of COCO's `val2017/`.

    All seven files are read, from the location or its folder `data/`.
    """
    found: dict[str, list[tuple[str, str, str]]] = {}
    skipped: Skipped = Counter()
    for category in CATEGORIES:
        name = f"{category}.json"
        path = first_file([f"{location}/{name}", f"{location}/data/{name}"], "")
        for number, entry in _json(path, files.read_text(path)).items():
            what = f"entry {number!r}"
            file_name = field_of(path, what, entry, "filename", str)
            true, false = (field_of(path, what, entry, key, str).strip() for key in ("caption", "negative_caption"))
            _add(found, file_name, (category, true, false), skipped)
    items = [Item(image=image, pairs=tuple(pairs)) for image, pairs in _images(found, images, location, COCO)]
    return EvalSet(name="all", items=items, num_items=len(items), skipped=skipped)


def vsr(location: str, *, split: str = "random/test", images: str | None = None) -> EvalSet:
    """VSR's spatial relations, each true or false of its image: `SPLIT.jsonl` (random/test, zeroshot/test, ...).

    The file lies in the location or its folder `data/splits/`, COCO's photos in one folder, `data/images/` as a rule.
    """
    path = first_file([f"{location}/{part}{split}.jsonl" for part in ("", "splits/", "data/splits/")], "split")
    found: dict[str, list[tuple[str, bool]]] = {}
    skipped: Skipped = Counter()
    for number, line in enumerate(files.read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        entry, what = _json(f"{path}, line {number}", line), f"line {number}"
        label, text = (field_of(path, what, entry, key, kind) for key, kind in (("label", int), ("caption", str)))
        if label not in (0, 1):
            raise ValueError(f"{path}: {what}: label is {label}, must be 0 or 1")
        _add(found, field_of(path, what, entry, "image", str), (text.strip(), label == 1), skipped)
    items = [Item(image=image, claims=tuple(claims)) for image, claims in _images(found, images, location, VSR)]
    return EvalSet(name=split, items=items, num_items=len(items), skipped=skipped)


def _json(where: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: must be a JSON object, it is {content!r}"[:300])
    return content


def _add(found: dict[str, list[Any]], file_name: str, statement: tuple[Any, ...], skipped: Skipped) -> None:
    """Adds a statement to its image, unless a text of it is empty."""
    if not is_file_name(file_name):
        skipped[IMAGES, BAD_FILE_NAME] += 1
    elif "" in statement:
        skipped[TEXTS, EMPTY_TEXT] += 1
    else:
        found.setdefault(file_name, []).append(statement)


def _images(
    found: dict[str, list[Any]], images: str | None, location: str, parts: tuple[str, ...]
) -> list[tuple[Stored, list[Any]]]:
    """Where each image lies, with its statements."""
    if not found:
        raise ValueError(f"{location}: no statement can be used")
    folder = first_folder([images] if images else [f"{location}/{part}" for part in parts], list(found))
    return [(Stored(path=f"{folder}/{name}"), statements) for name, statements in found.items()]
