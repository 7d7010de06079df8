"""Image-text sets for retrieval: COCO and Flickr30k, from Karpathy's JSON or COCO's captions JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from opencloc import files
from opencloc.data.sources.coco import field_of, read_images, read_json, row_of
from opencloc.eval.sets.item import Captioned, EvalSet, Stored, base_name, first_file, first_folder

CAPTIONS_PER_IMAGE = 5  # COCO has up to seven; the 5k and 1k protocols take the first five
SURPLUS, EMPTY_CAPTION, NO_CAPTIONS = "caption after the fifth of its image", "empty caption", "image without captions"


def coco_retrieval(
    location: str, *, split: str | None = None, annotations: str | None = None, images: str | None = None
) -> EvalSet[Captioned]:
    """COCO's images with five captions each.

    `dataset_coco.json` (Karpathy's, split `test`: the 5k test set, images of `val2014/`) where it lies in the
    location, else `annotations/captions_SPLIT.json` (split `val2017`).
    """
    karpathy, wanted = f"{location}/dataset_coco.json", split or "val2017"
    coco = f"{location}/annotations/captions_{wanted}.json"
    path = annotations or first_file([karpathy, coco], "annotations")
    folders = [location, f"{location}/images"]
    content = read_json(path, ("images",))
    if "annotations" not in content:
        return _karpathy("coco-retrieval", path, content, split or "test", [images] if images else folders)
    folders = [f"{location}/{part}" for part in (wanted, f"images/{wanted}", "images")]
    return _coco_captions("coco-retrieval", path, [images] if images else folders)


def flickr30k_retrieval(
    location: str, *, split: str = "test", annotations: str | None = None, images: str | None = None
) -> EvalSet[Captioned]:
    """Flickr30k's images with five captions each: `dataset_flickr30k.json` (Karpathy's; test: 1,000 images)."""
    path = annotations or first_file([f"{location}/dataset_flickr30k.json"], "annotations")
    folders = [images] if images else flickr_folders(location)
    return _karpathy("flickr30k-retrieval", path, read_json(path, ("images",)), split, folders)


def flickr_folders(location: str) -> list[str]:
    """Where the photos of Flickr30k may lie."""
    return [f"{location}/{part}" for part in ("flickr30k-images", "flickr30k_images", "images", "Images")] + [location]


def _karpathy(name: str, path: str, content: dict[str, Any], split: str, folders: list[str]) -> EvalSet[Captioned]:
    entries = content["images"]
    left_out: Counter[str] = Counter()
    found: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        if field_of(path, "image", entry, "split", str) == split:
            sentences = field_of(path, "image", entry, "sentences", list)
            texts = [field_of(path, "sentence", sentence, "raw", str) for sentence in sentences]
            parts = [entry.get("filepath"), field_of(path, "image", entry, "filename", str)]
            found["/".join(part for part in parts if part)] = _first_five(texts, left_out)
    if not found:
        splits = sorted({str(entry.get("split")) for entry in entries})
        raise ValueError(f"{path}: no image of split {split!r}; there are {', '.join(splits)}")
    return _captioned(f"{name} Karpathy {split}", found, folders, left_out, {})


def _coco_captions(name: str, path: str, folders: list[str]) -> EvalSet[Captioned]:
    content = read_json(path, ("images", "annotations"))
    entries = read_images(content["images"], path)
    rows = {image_id: row for row, (image_id, *_) in enumerate(entries)}
    texts: list[list[str]] = [[] for _ in entries]
    for annotation in content["annotations"]:
        texts[row_of(path, annotation, rows)].append(field_of(path, "annotation", annotation, "caption", str))
    left_out: Counter[str] = Counter()
    found = {entry[1]: _first_five(of_image, left_out) for entry, of_image in zip(entries, texts, strict=True)}
    sizes = {file_name: (width_px, height_px) for _, file_name, width_px, height_px in entries}
    return _captioned(f"{name} {base_name(path)}", found, folders, left_out, sizes)


def _first_five(texts: list[str], left_out: Counter[str]) -> tuple[str, ...]:
    sound = [text.strip() for text in texts if text.strip()]
    left_out[EMPTY_CAPTION] += len(texts) - len(sound)
    left_out[SURPLUS] += max(0, len(sound) - CAPTIONS_PER_IMAGE)
    return tuple(sound[:CAPTIONS_PER_IMAGE])


def _captioned(
    name: str,
    found: dict[str, tuple[str, ...]],
    folders: list[str],
    left_out: Counter[str],
    sizes: dict[str, Any],
) -> EvalSet[Captioned]:
    left_out[NO_CAPTIONS] += sum(not captions for captions in found.values())
    tried = [folder for folder in folders if files.is_folder(folder)] or folders
    folder = first_folder(tried, list(found))
    items = [
        Captioned(image=Stored(path=f"{folder}/{file_name}", expected_px=sizes.get(file_name)), captions=captions)
        for file_name, captions in found.items()
        if captions
    ]
    return EvalSet(
        name=name,
        rules="every image against all captions and every caption against all images; any caption of an image is a hit",
        items=items,
        left_out=dict(+left_out),
    )
