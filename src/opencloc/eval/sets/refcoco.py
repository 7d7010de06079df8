"""Referring expressions: RefCOCO, RefCOCO+ and RefCOCOg, from the refer files or MDETR's JSON.

The refer files are `refcoco/refs(unc).p` and `refcoco/instances.json`.  The first is a pickle: it is read as plain
lists, dicts, texts and numbers, and one that names any code is refused.
"""

from __future__ import annotations

import io
import pickle
from collections import Counter
from typing import Any, Literal

import numpy as np

from opencloc import files
from opencloc.data.sources.coco import EMPTY_BOX, field_of, read_box, read_images, read_json, row_of
from opencloc.eval.sets.item import EvalSet, Phrases, Stored, first_file, first_folder

Name = Literal["refcoco", "refcoco+", "refcocog"]
_EMPTY_TEXT = "empty expression"


def refcoco(
    location: str, *, split: str = "val", by: str = "unc", annotations: str | None = None, images: str | None = None
) -> EvalSet[Phrases]:
    """RefCOCO (splits val, testA, testB).

    The refer files lie in the location or its folder `refcoco/`; where there are none, MDETR's
    `finetune_refcoco_SPLIT.json` is read.  `images` has COCO's `train2014`.
    """
    return _read("refcoco", location, split, by, annotations, images)


def refcoco_plus(
    location: str, *, split: str = "val", by: str = "unc", annotations: str | None = None, images: str | None = None
) -> EvalSet[Phrases]:
    """RefCOCO+ (splits val, testA, testB), as `refcoco`."""
    return _read("refcoco+", location, split, by, annotations, images)


def refcocog(
    location: str, *, split: str = "val", by: str = "umd", annotations: str | None = None, images: str | None = None
) -> EvalSet[Phrases]:
    """RefCOCOg, as `refcoco`; `by`: `umd` (splits val, test) or `google` (split val)."""
    return _read("refcocog", location, split, by, annotations, images)


def _read(
    name: Name, location: str, split: str, by: str, annotations: str | None, images: str | None
) -> EvalSet[Phrases]:
    refer = [f"{location}/{name}/refs({by}).p", f"{location}/refs({by}).p"]
    mdetr = [f"{location}/{folder}finetune_{name}_{split}.json" for folder in ("", "OpenSource/", "annotations/")]
    path = annotations or first_file([*refer, *mdetr], "annotations")
    left_out: Counter[str] = Counter()
    read = _read_mdetr if path.endswith(".json") else _read_refer
    found = read(path, split, left_out)
    folders = [f"{location}/images/mscoco/images/train2014", f"{location}/train2014", f"{location}/images"]
    folder = first_folder([images] if images else folders, [stored.path for stored, _ in found])
    items = [
        Phrases(
            image=Stored(path=f"{folder}/{stored.path}", expected_px=stored.expected_px),
            texts=tuple(text for text, _ in queries),
            truths=tuple(box[None] for _, box in queries),
        )
        for stored, queries in found
    ]
    return EvalSet(
        name=f"{name} {split}" + (f" ({by})" * (name == "refcocog")),
        rules="find the one box of each expression; right at plain IoU >= 0.5",
        items=items,
        left_out=dict(+left_out),
    )


_Found = list[tuple[Stored, list[tuple[str, np.ndarray]]]]


def _read_refer(path: str, split: str, left_out: Counter[str]) -> _Found:
    """Each image (by file name) with its expressions and boxes."""
    refs = _read_pickle(path)
    instances = path.rpartition("/")[0] + "/instances.json"
    content = read_json(instances, ("images", "annotations"))
    images = read_images(content["images"], instances)
    rows = {image_id: row for row, (image_id, *_) in enumerate(images)}
    by_id = {one.get("id"): one for one in content["annotations"]}
    queries: dict[int, list[tuple[str, np.ndarray]]] = {}
    splits = Counter(str(ref.get("split")) for ref in refs)
    for ref in refs:
        if ref.get("split") != split:
            continue
        if ref.get("ann_id") not in by_id:
            raise ValueError(f"{path}: ref {ref.get('ref_id')} has ann_id {ref.get('ann_id')!r}, not in {instances}")
        annotation = by_id[ref["ann_id"]]
        row = row_of(instances, annotation, rows)
        box = read_box(instances, annotation, images[row][2:])
        for sentence in field_of(path, "ref", ref, "sentences", list):
            text = field_of(path, "sentence", sentence, "sent", str).strip()
            if box is None or not text:
                left_out[EMPTY_BOX if box is None else _EMPTY_TEXT] += 1
            else:
                queries.setdefault(row, []).append((text, box))
    if not queries:
        raise ValueError(f"{path}: no expression of split {split!r}; there are {', '.join(sorted(splits))}")
    return [(_stored(images[row]), queries[row]) for row in sorted(queries)]


def _read_mdetr(path: str, split: str, left_out: Counter[str]) -> _Found:
    """As `_read_refer`; in this JSON every expression is an entry of `images`, with the image's own `original_id`."""
    content = read_json(path, ("images", "annotations"))
    images = read_images(content["images"], path)
    rows = {image_id: row for row, (image_id, *_) in enumerate(images)}
    queries: dict[int, list[tuple[str, np.ndarray]]] = {}
    first_of: dict[int, int] = {}  # original id -> row
    for annotation in content["annotations"]:
        row = row_of(path, annotation, rows)
        entry = content["images"][row]
        text = field_of(path, "image", entry, "caption", str).strip()
        box = read_box(path, annotation, images[row][2:])
        if box is None or not text:
            left_out[EMPTY_BOX if box is None else _EMPTY_TEXT] += 1
            continue
        first = first_of.setdefault(field_of(path, "image", entry, "original_id", int), row)
        queries.setdefault(first, []).append((text, box))
    if not queries:
        raise ValueError(f"{path}: no expressions")
    return [(_stored(images[row]), queries[row]) for row in sorted(queries)]


def _stored(image: tuple[int, str, int, int]) -> Stored:
    _, file_name, width_px, height_px = image
    return Stored(path=file_name, expected_px=(width_px, height_px))


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, tuples, sets, texts and numbers; a pickle that names any code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; only plain values are read")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to outside objects; only plain values are read")


def _read_pickle(path: str) -> list[dict[str, Any]]:
    """The list of refs; raises `ValueError` naming the file for anything else."""
    try:
        # Written by Python 2, whose strings are bytes: those that are used (`sent`, names, splits) are ASCII.
        refs = _PlainUnpickler(io.BytesIO(files.read_bytes(path)), encoding="latin-1").load()
    except (pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: refused as a pickle of refs: {error}") from error
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise ValueError(f"{path}: expected a list of refs, found {type(refs).__name__}")
    return refs
