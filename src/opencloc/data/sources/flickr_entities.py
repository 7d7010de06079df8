"""Flickr30k Entities for training: phrases of captions with their boxes, and the captions.

Read are `SPLIT.txt` (image ids), `Annotations/ID.xml` and `Sentences/ID.txt` as published; photos lie in
`flickr30k-images/`.  A phrase stands in its sentence as `[/EN#283585/people Two young guys]`; the XML has the boxes of
283585, any number of them, with corners in whole pixels counted from 1 that belong to the box.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from pydantic.dataclasses import dataclass

from opencloc import files
from opencloc.data.sources.kept import kept
from opencloc.data.sources.table import AnnotatedConfig, AnnotatedPhotos, Table, TableBuilder, around, first_file

NO_BOX, BAD_XML = "phrase without a box", "bad annotation file"
_PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s/\]]+)+) ([^\]]+)\]")


@dataclass(frozen=True, kw_only=True)
class FlickrEntitiesConfig(AnnotatedConfig):
    """Which photos of Flickr30k Entities."""

    split: str = "train"  # train, val or test


def open_flickr_entities(location: str, config: FlickrEntitiesConfig) -> AnnotatedPhotos:
    """The photos with their phrases.  Raises `FileNotFoundError`, and `ValueError` if no phrase can be used."""
    listing = first_file([f"{location}/{config.split}.txt"], "split")
    inputs = [listing, f"{location}/Annotations", f"{location}/Sentences"]
    table = kept(Table, inputs, lambda: _read(location, listing), config.split)
    folders = [f"{location}/{part}" for part in ("flickr30k-images", "flickr30k_images", "images", "Images")]
    return AnnotatedPhotos(location, config, table, [*folders, location], inputs)


def _read(location: str, listing: str) -> Table:
    builder = TableBuilder()
    for key in files.read_text(listing).split():
        try:
            size_px, boxes = _boxes(f"{location}/Annotations/{key}.xml")
            sentences = files.read_text(f"{location}/Sentences/{key}.txt").splitlines()
        except (ElementTree.ParseError, ValueError, OSError):
            builder.skipped[BAD_XML] += 1
            continue
        captions = [_PHRASE.sub(lambda match: match[3], sentence) for sentence in sentences]
        if not builder.image(f"{key}.jpg", size_px, captions):
            continue
        for chain, _, text in _PHRASE.findall("\n".join(sentences)):
            if chain in boxes:
                builder.region(around(boxes[chain]), text)
            else:
                builder.skipped[NO_BOX] += 1
    return builder.table(listing)


def _boxes(path: str) -> tuple[tuple[int, int], dict[str, list[list[int]]]]:
    """(width and height in pixels, XYXY boxes in pixels by chain id); raises `ValueError` for anything else."""
    root = ElementTree.fromstring(files.read_bytes(path))
    width_px, height_px = (_number(root, f"size/{side}") for side in ("width", "height"))
    found: dict[str, list[list[int]]] = {}
    for entry in root.findall("object"):
        if entry.find("bndbox") is not None:
            x0, y0, x1, y1 = (_number(entry, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax"))
            for name in entry.findall("name"):  # a box may belong to several chains
                found.setdefault(name.text or "", []).append([x0 - 1, y0 - 1, x1, y1])
    return (width_px, height_px), found


def _number(element: ElementTree.Element, place: str) -> int:
    return int(element.findtext(place) or "")
