"""ImageNet-1k and ImageNet-V2: folders of images by class, names and templates for zero-shot classification.

Class folders are WordNet ids (`n01440764`, as ImageNet's `val` is usually sorted) or the indices 0 to 999 (as
ImageNet-V2 comes).  Names and templates lie beside this file with their source and licence.
"""

from __future__ import annotations

import os
from collections import Counter
from importlib.resources import files as resources
from typing import Literal, get_args

from opencloc import files
from opencloc.data.sample import IMAGE_EXTENSIONS
from opencloc.eval.sets.item import FILES, EvalSet, Item, Skipped, Stored, merge_names

Templates = Literal["80", "7", "none"]


def imagenet(location: str, *, split: str = "val", names: str | None = None, templates: str = "80") -> EvalSet:
    """Images by class folder, in the location or its folder SPLIT.

    `names`: a file with `n01440764 tench, Tinca tinca` per line (the download's `LOC_synset_mapping.txt`; what comes
    before the first comma is the name), in place of CLIP's.  `templates`: CLIP's 80, its 7, or none.
    """
    inner = f"{location}/{split}"
    return _read("imagenet", inner if files.is_folder(inner) else location, names, templates)


def imagenet_v2(location: str, *, names: str | None = None, templates: str = "80") -> EvalSet:
    """ImageNet-V2's folders 0 to 999, in the location or its `imagenetv2-matched-frequency-format-val`."""
    inner = f"{location}/imagenetv2-matched-frequency-format-val"
    return _read("imagenet-v2", inner if files.is_folder(inner) else location, names, templates)


def class_names() -> dict[str, str]:
    """CLIP's name of each of the 1,000 classes by WordNet id, in the order of the classes."""
    return dict(line.split("\t") for line in _lines("imagenet_names.txt"))


def clip_templates(which: Templates) -> tuple[str, ...]:
    """CLIP's templates, `{}` standing for the name; none of them for `none`."""
    lines = _lines("imagenet_templates.txt")
    chosen = {"80": lines, "7": [line for line in lines if line.startswith("*")], "none": []}
    return tuple(line.removeprefix("*") for line in chosen[which])


def _lines(name: str) -> list[str]:
    text = resources("opencloc.eval.sets").joinpath(name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def _read(name: str, folder: str, names_file: str | None, templates: str) -> EvalSet:
    if templates not in (known := get_args(Templates)):
        raise ValueError(f"templates is {templates!r}, must be one of {', '.join(known)}")
    if not files.is_folder(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    names = class_names() if names_file is None else _read_names(names_file)
    if (merged := merge_names(list(names.values())))[1]:
        raise ValueError(f"{names_file}: {merged[1]}; tell them apart")
    ids = list(names)
    label = {one: i for i, one in enumerate(ids)} | {str(i): i for i in range(len(ids))}
    skipped: Skipped = Counter()
    items: list[Item] = []
    for path in files.children(folder):
        class_id = os.path.basename(path.rstrip("/"))
        if not files.is_folder(path):
            skipped[FILES, "outside the class folders"] += 1
            continue
        if class_id not in label:
            raise ValueError(f"{path}: the folder is neither one of the {len(ids)} WordNet ids nor a class index")
        for image in files.children(path):
            if image.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
                items.append(Item(image=Stored(path=image), label=label[class_id]))
            else:
                skipped[FILES, "not an image"] += 1
    if not items:
        raise ValueError(f"{folder}: no image in class folders (n01440764/ or 0/)")
    return EvalSet(
        name=os.path.basename(folder.rstrip("/")),
        items=items,
        num_items=len(items),
        skipped=skipped,
        class_names=tuple(names.values()),
        templates=clip_templates(templates),  # pyright: ignore[reportArgumentType]
    )


def _read_names(path: str) -> dict[str, str]:
    """WordNet id -> name, in order; raises `ValueError` naming file and line."""
    names: dict[str, str] = {}
    for number, line in enumerate(files.read_text(path).splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        class_id, _, text = line.strip().replace("\t", " ").partition(" ")
        name = text.split(",")[0].strip()
        if not name or class_id in names:
            raise ValueError(f"{path}, line {number}: needs a WordNet id that comes once and a name, found {line!r}")
        names[class_id] = name
    return names
