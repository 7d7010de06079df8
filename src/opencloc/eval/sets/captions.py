"""Image-text sets for retrieval: COCO and Flickr30k, from Karpathy's JSON or COCO's captions JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from opencloc import files
from opencloc.data.sources.coco_json import BAD_FILE_NAME, field_of, is_file_name, read_json, row_of
from opencloc.eval.sets.coco import images_of
from opencloc.eval.sets.item import (
    EMPTY_TEXT,
    IMAGES,
    NO_CAPTIONS,
    TEXTS,
    EvalSet,
    Item,
    Skipped,
    Stored,
    base_name,
    first_file,
    first_folder,
)

CAPTIONS_PER_IMAGE = 5  # COCO has up to seven; the 5k and 1k protocols take the first five
SURPLUS = "after the fifth of its image"


def coco_retrieval(
    location: str, *, split: str | None = None, annotations: str | None = None, images: str | None = None
) -> EvalSet:
    """COCO's images with five captions each.

    `dataset_coco.json` (Karpathy's, split `test`: the 5k test set, images of `val2014/`) where it lies in the
    location, else `annotations/captions_SPLIT.json` (split `val2017`).
    """
    karpathy, wanted = f"{location}/dataset_coco.json", split or "val2017"
    coco = f"{location}/annotations/captions_{wanted}.json"
    path = annotations or first_file([karpathy, coco], "annotations")
    content = read_json(path, ("images",))
    if "annotations" not in content:
        return _karpathy(path, content, split or "test", [images] if images else [location, f"{location}/images"])
    folders = [f"{location}/{part}" for part in (wanted, f"images/{wanted}", "images")]
    return _coco_captions(path, [images] if images else folders)


def flickr30k_retrieval(
    location: str, *, split: str = "test", annotations: str | None = None, images: str | None = None
) -> EvalSet:
    """Flickr30k's images with five captions each: `dataset_flickr30k.json` (Karpathy's; test: 1,000 images)."""
    path = annotations or first_file([f"{location}/dataset_flickr30k.json"], "annotations")
    folders = [images] if images else flickr_folders(location)
    return _karpathy(path, read_json(path, ("images",)), split, folders)


def flickr_folders(location: str) -> list[str]:
    """Where the photos of Flickr30k may lie."""
    return [f"{location}/{part}" for part in ("flickr30k-images", "flickr30k_images", "images", "Images")] + [location]


def _karpathy(path: str, content: dict[str, Any], split: str, folders: list[str]) -> EvalSet:
    entries = content["images"]
    found: dict[str, list[str]] = {}
    for entry in entries:
        if field_of(path, "image", entry, "split", str) == split:
            name = field_of(path, "image", entry, "filename", str)
            sentences = field_of(path, "image", entry, "sentences", list)
            folder = field_of(path, "image", {"filepath": ""} | entry, "filepath", str)
            texts = [field_of(path, f"image {name!r}, sentence", sentence, "raw", str) for sentence in sentences]
            found[f"{folder}/{name}" if folder else name] = texts
    if not found:
        splits = sorted({str(entry.get("split")) for entry in entries})
        raise ValueError(f"{path}: no image of split {split!r}; there are {', '.join(splits)}")
    return _captioned(f"Karpathy {split}", found, folders, {}, Counter())


def _coco_captions(path: str, folders: list[str]) -> EvalSet:
    content = read_json(path, ("images", "annotations"))
    skipped: Skipped = Counter()
    entries, rows = images_of(path, content, skipped)
    texts: list[list[str]] = [[] for _ in [*entries, None]]  # the last one's are of images that cannot be used
    for annotation in content["annotations"]:
        texts[row_of(path, annotation, rows)].append(field_of(path, "annotation", annotation, "caption", str))
    found = {entry[1]: of_image for entry, of_image in zip(entries, texts[:-1], strict=True)}
    sizes = {file_name: (width_px, height_px) for _, file_name, width_px, height_px in entries}
    return _captioned(base_name(path), found, folders, sizes, skipped)


def _captioned(
    name: str, found: dict[str, list[str]], folders: list[str], sizes: dict[str, Any], skipped: Skipped
) -> EvalSet:
    tried = [folder for folder in folders if files.is_folder(folder)] or folders
    folder = first_folder(tried, list(found))
    items = []
    for file_name, texts in found.items():
        captions = [text.strip() for text in texts if text.strip()]
        skipped[TEXTS, EMPTY_TEXT] += len(texts) - len(captions)
        skipped[TEXTS, SURPLUS] += max(0, len(captions) - CAPTIONS_PER_IMAGE)
        if not is_file_name(file_name):
            skipped[IMAGES, BAD_FILE_NAME] += 1
        elif not captions:
            skipped[IMAGES, NO_CAPTIONS] += 1
        else:
            image, first = Stored(path=f"{folder}/{file_name}"), tuple(captions[:CAPTIONS_PER_IMAGE])
            items.append(Item(image=image, annotated_px=sizes.get(file_name), captions=first))
    return EvalSet(name=name, items=items, num_items=len(items), skipped=skipped)
