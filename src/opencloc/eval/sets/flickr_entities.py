"""Flickr30k Entities: phrases of captions with their boxes, from `Annotations/ID.xml` and `Sentences/ID.txt`.

A phrase stands in its sentence as `[/EN#283585/people Two young guys]`; the XML has the boxes of 283585, any number of
them.  Phrases of things that have no box (scenes, `notvisual`, not visible) are left out and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from xml.etree import ElementTree

import numpy as np

from opencloc import files
from opencloc.eval.sets.captions import flickr_folders
from opencloc.eval.sets.item import (
    BOXES,
    EMPTY_BOX,
    IMAGES,
    TEXTS,
    EvalSet,
    Item,
    Skipped,
    Stored,
    first_file,
    first_folder,
)

NO_BOX, NOT_VISUAL = "without a box", "of nothing visual"
_PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s/\]]+)+) ([^\]]+)\]")


def flickr30k_entities(location: str, *, split: str = "test", images: str | None = None) -> EvalSet:
    """The phrases of the images listed in `SPLIT.txt` (train, val, test) with their boxes.

    Each phrase of each of an image's sentences is one query, repeats included.
    """
    listing = first_file([f"{location}/{split}.txt"], "split")
    keys = files.read_text(listing).split()
    folder = first_folder([images] if images else flickr_folders(location), [f"{key}.jpg" for key in keys])
    skipped: Skipped = Counter()
    items = []
    for key in keys:
        size_px, boxes = _read_boxes(f"{location}/Annotations/{key}.xml", skipped)
        texts, truths = [], []
        for chain, text in _read_phrases(f"{location}/Sentences/{key}.txt", skipped):
            if chain in boxes:
                texts.append(text)
                truths.append(boxes[chain])
            else:
                skipped[TEXTS, NO_BOX] += 1
        if texts:
            image = Stored(path=f"{folder}/{key}.jpg")
            items.append(Item(image=image, annotated_px=size_px, queries=tuple(texts), truths=tuple(truths)))
        else:
            skipped[IMAGES, "without phrases that have boxes"] += 1
    return EvalSet(name=split, items=items, num_items=len(items), skipped=skipped)


def _read_boxes(path: str, skipped: Skipped) -> tuple[tuple[int, int], dict[str, np.ndarray]]:
    """(width and height in pixels, boxes (K, 4) by chain id) of an XML; raises `ValueError` naming the file.

    Corners are whole pixels counted from 1, both inside the box: its edges are xmin - 1 and xmax.
    """
    try:
        root = ElementTree.fromstring(files.read_bytes(path))
        width_px, height_px = (int(_text(root, f"size/{side}")) for side in ("width", "height"))
        found: dict[str, list[list[float]]] = {}
        for entry in root.findall("object"):
            if entry.find("bndbox") is None:
                continue
            x0, y0, x1, y1 = (int(_text(entry, f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax"))
            box = [max(x0 - 1, 0) / width_px, max(y0 - 1, 0) / height_px, x1 / width_px, y1 / height_px]
            box = [min(edge, 1.0) for edge in box]
            if box[0] >= box[2] or box[1] >= box[3]:
                skipped[BOXES, EMPTY_BOX] += 1
                continue
            for name in entry.findall("name"):  # a box may belong to several chains
                found.setdefault(name.text or "", []).append(box)
    except (ElementTree.ParseError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: not an annotation of Flickr30k Entities ({error})") from error
    return (width_px, height_px), {chain: np.array(rows, dtype=np.float32) for chain, rows in found.items()}


def _text(element: ElementTree.Element, place: str) -> str:
    text = element.findtext(place)
    if text is None:
        raise ValueError(f"no {place} in <{element.tag}>")
    return text


def _read_phrases(path: str, skipped: Skipped) -> list[tuple[str, str]]:
    """(chain id, phrase) of every phrase of an image's sentences."""
    phrases = []
    for chain, kinds, text in _PHRASE.findall(files.read_text(path)):
        if kinds == "/notvisual":
            skipped[TEXTS, NOT_VISUAL] += 1
        else:
            phrases.append((chain, text.strip()))
    return phrases
