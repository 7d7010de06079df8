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
from opencloc.data.sources.coco_json import field_of, read_json, row_of
from opencloc.eval.sets.coco import Entry, images_of, try_box
from opencloc.eval.sets.item import EMPTY_TEXT, TEXTS, EvalSet, Item, Skipped, Stored, first_file, first_folder

Name = Literal["refcoco", "refcoco+", "refcocog"]
NO_BOX = "without a usable box or image"


def refcoco(
    location: str, *, split: str = "val", by: str = "unc", annotations: str | None = None, images: str | None = None
) -> EvalSet:
    """RefCOCO (splits val, testA, testB).

    The refer files lie in the location or its folder `refcoco/`; where there are none, MDETR's
    `finetune_refcoco_SPLIT.json` is read.  `images` has COCO's `train2014`.
    """
    return _read("refcoco", location, split, by, annotations, images)


def refcoco_plus(
    location: str, *, split: str = "val", by: str = "unc", annotations: str | None = None, images: str | None = None
) -> EvalSet:
    """RefCOCO+ (splits val, testA, testB), as `refcoco`."""
    return _read("refcoco+", location, split, by, annotations, images)


def refcocog(
    location: str, *, split: str = "val", by: str = "umd", annotations: str | None = None, images: str | None = None
) -> EvalSet:
    """RefCOCOg, as `refcoco`; `by`: `umd` (splits val, test) or `google` (split val)."""
    return _read("refcocog", location, split, by, annotations, images)


def _read(name: Name, location: str, split: str, by: str, annotations: str | None, images: str | None) -> EvalSet:
    refer = [f"{location}/{name}/refs({by}).p", f"{location}/refs({by}).p"]
    mdetr = [f"{location}/{folder}finetune_{name}_{split}.json" for folder in ("", "OpenSource/", "annotations/")]
    path = annotations or first_file([*refer, *mdetr], "annotations")
    skipped: Skipped = Counter()
    read = _read_mdetr if path.endswith(".json") else _read_refer
    found = read(path, split, skipped)
    folders = [f"{location}/images/mscoco/images/train2014", f"{location}/train2014", f"{location}/images"]
    folder = first_folder([images] if images else folders, [entry[1] for entry, _ in found])
    items = [
        Item(
            image=Stored(path=f"{folder}/{entry[1]}"),
            annotated_px=entry[2:],
            queries=tuple(text for text, _ in queries),
            truths=tuple(box[None] for _, box in queries),
        )
        for entry, queries in found
    ]
    return EvalSet(name=split + (f" ({by})" * (name == "refcocog")), items=items, num_items=len(items), skipped=skipped)


_Found = list[tuple[Entry, list[tuple[str, np.ndarray]]]]  # each image with its expressions and boxes


def _read_refer(path: str, split: str, skipped: Skipped) -> _Found:
    """What the refer files say of a split."""
    refs = _read_pickle(path)
    instances = path.rpartition("/")[0] + "/instances.json"
    content = read_json(instances, ("images", "annotations"))
    images, rows = images_of(instances, content, Counter())
    by_id = {field_of(instances, "annotation", one, "id", int): one for one in content["annotations"]}
    queries: dict[int, list[tuple[str, np.ndarray]]] = {}
    splits = Counter(str(ref.get("split")) for ref in refs)
    for ref in refs:
        if ref.get("split") != split:
            continue
        if (annotation := by_id.get(field_of(path, "ref", ref, "ann_id", int))) is None:
            raise ValueError(f"{path}: ref {ref.get('ref_id')} has ann_id {ref['ann_id']}, not in {instances}")
        row = row_of(instances, annotation, rows)
        box = try_box(instances, annotation, images[row], skipped) if row >= 0 else None
        for sentence in field_of(path, "ref", ref, "sentences", list):
            text = field_of(path, "sentence", sentence, "sent", str).strip()
            if box is None or not text:
                skipped[TEXTS, NO_BOX if box is None else EMPTY_TEXT] += 1
            else:
                queries.setdefault(row, []).append((text, box))
    if not queries:
        raise ValueError(f"{path}: no expression of split {split!r}; there are {', '.join(sorted(splits))}")
    return [(images[row], queries[row]) for row in sorted(queries)]


def _read_mdetr(path: str, split: str, skipped: Skipped) -> _Found:
    """As `_read_refer`; in this JSON every expression is an entry of `images`, with the image's own `original_id`."""
    content = read_json(path, ("images", "annotations"))
    images, rows = images_of(path, content, Counter())
    queries: dict[int, list[tuple[str, np.ndarray]]] = {}
    first_of: dict[int, int] = {}  # original id -> row
    by_id = {one["id"]: one for one in content["images"]}
    for annotation in content["annotations"]:
        row = row_of(path, annotation, rows)
        entry = by_id[annotation["image_id"]]
        text = field_of(path, "image", entry, "caption", str).strip()
        box = try_box(path, annotation, images[row], skipped) if row >= 0 else None
        if box is None or not text:
            skipped[TEXTS, NO_BOX if box is None else EMPTY_TEXT] += 1
            continue
        first = first_of.setdefault(field_of(path, "image", entry, "original_id", int), row)
        queries.setdefault(first, []).append((text, box))
    if not queries:
        raise ValueError(f"{path}: no expressions")
    return [(images[row], queries[row]) for row in sorted(queries)]


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
    except Exception as error:  # damaged pickles raise a whole zoo, and claim more bytes than any memory has
        raise ValueError(f"{path}: refused as a pickle of refs: {error}") from error
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise ValueError(f"{path}: expected a list of refs, found {type(refs).__name__}")
    return refs
