"""COCO's panoptic segments, things and stuff: boxes from `panoptic_SPLIT.json`, masks from the PNGs beside it."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from opencloc.data.sources.coco_json import (
    BAD_FILE_NAME,
    CROWD,
    category_of,
    field_of,
    is_file_name,
    read_categories,
    read_json,
    row_of,
)
from opencloc.eval.sets.coco import images_of, try_box
from opencloc.eval.sets.item import (
    BOXES,
    IMAGES,
    NO_REGIONS,
    EvalSet,
    Item,
    Skipped,
    Stored,
    base_name,
    first_file,
    first_folder,
    merge_names,
)


def coco_panoptic(
    location: str,
    *,
    split: str = "val2017",
    annotations: str | None = None,
    masks: str | None = None,
    images: str | None = None,
) -> EvalSet:
    """COCO's things and stuff with their classes: `annotations/panoptic_SPLIT.json`, its PNGs in `panoptic_SPLIT/`.

    `masks`: the folder of the PNGs; `images`: that of the photos (`SPLIT/` or `images/`).
    """
    path = annotations or first_file([f"{location}/annotations/panoptic_{split}.json"], "annotations")
    content = read_json(path, ("images", "annotations", "categories"))
    skipped: Skipped = Counter()
    entries, rows = images_of(path, content, skipped)
    names = {number: bare_name(name) for number, name in read_categories(content["categories"], path).items()}
    is_thing = [field_of(path, "category", one, "isthing", int) for one in content["categories"]]
    items, pngs = [], []
    for annotation in content["annotations"]:
        if (row := row_of(path, annotation, rows)) < 0:
            continue
        png = field_of(path, "annotation", annotation, "file_name", str)
        boxes, texts, ids = [], [], []
        for segment in field_of(path, "annotation", annotation, "segments_info", list):
            number = field_of(path, f"annotation of {png}, segment", segment, "id", int)
            category = category_of(path, segment, names)
            if segment.get("iscrowd"):
                skipped[BOXES, CROWD] += 1
            elif (box := try_box(path, segment, entries[row], skipped)) is not None:
                boxes.append(box)
                texts.append(names[category])
                ids.append(number)
        if not is_file_name(png):
            skipped[IMAGES, BAD_FILE_NAME] += 1
        elif not boxes:
            skipped[IMAGES, NO_REGIONS] += 1
        else:
            pngs.append(png)
            items.append((entries[row], np.stack(boxes), tuple(texts), tuple(ids)))
    folders = [images] if images else [f"{location}/{part}" for part in (split, f"images/{split}", "images")]
    folder = first_folder(folders, [entry[1] for entry, *_ in items])
    drawn = [masks] if masks else [path.removesuffix(".json"), f"{location}/panoptic_{split}"]
    folder_of_masks = first_folder(drawn, pngs, "masks")
    known, merged = merge_names(list(names.values()))
    group_of = {name: "things" if thing else "stuff" for name, thing in zip(names.values(), is_thing, strict=True)}
    return EvalSet(
        name=base_name(path),
        rules="; ".join(
            filter(None, ["crowd segments are left out; names without -merged, -other and -stuff", merged])
        ),
        items=[
            Item(
                image=Stored(path=f"{folder}/{entry[1]}"),
                annotated_px=entry[2:],
                boxes=boxes,
                texts=texts,
                segments=Stored(path=f"{folder_of_masks}/{png}"),
                segment_ids=ids,
            )
            for (entry, boxes, texts, ids), png in zip(items, pngs, strict=True)
        ],
        num_items=len(items),
        skipped=skipped,
        class_names=known,
        class_groups=tuple(group_of[name] for name in known),
    )


def bare_name(name: str) -> str:
    """A category's name as a person would say it: `floor-other-merged` is floor, `wall-brick` wall brick."""
    return re.sub(r"(-(merged|other|stuff))+$", "", name).replace("-", " ").replace("_", " ")
