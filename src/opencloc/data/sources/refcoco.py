"""RefCOCO, RefCOCO+ and RefCOCOg for training: referring expressions of COCO's objects.

Read are `refs(BY).json` with `instances.json` beside it, or MDETR's `finetune_refcoco_SPLIT.json`, of which every
expression is an entry of `images`.  The authors publish `refs(BY).p`, a pickle, which can run any code when it is
opened: it is not opened here, and the error says how to turn it into JSON.  Every sentence of a reference is a wording.

The photos are COCO's `train2014`; the test photos of RefCOCO lie in it too, so train on the split `train` only.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from opencloc import files
from opencloc.data.sources.coco_json import field_of, read_images, read_json, read_json_list
from opencloc.data.sources.kept import kept
from opencloc.data.sources.table import GROUP, NO_IMAGE, AnnotatedConfig, AnnotatedPhotos, Table, TableBuilder

_CONVERT = "import json, pickle, sys; json.dump(pickle.load(open(sys.argv[1], 'rb'), encoding='latin-1'), sys.stdout)"


@dataclass(frozen=True, kw_only=True)
class RefcocoConfig(AnnotatedConfig):
    """Which references."""

    split: str = "train"
    by: Literal["unc", "umd", "google"] | None = None  # who split them; None: the only file there is
    annotations: str | None = None  # file; None: refs(BY).json or finetune_*_SPLIT.json in the location


def open_refcoco(location: str, config: RefcocoConfig) -> AnnotatedPhotos:
    """The photos of a split with their expressions; `location` is `refcoco/`, `refcoco+/` or `refcocog/`.

    Raises `FileNotFoundError`, and `ValueError` naming a malformed file or a pickle that has to be converted.
    """
    path = config.annotations or _annotations(location, config)
    inputs = [path]
    if os.path.basename(path).startswith("refs("):
        inputs.append(f"{os.path.dirname(path)}/instances.json")
    read = _read_refs if len(inputs) == 2 else _read_mdetr
    table = kept(Table, inputs, lambda: read(inputs, config.split), config.split)
    above = os.path.dirname(location.rstrip("/")) or "."
    folders = [f"{place}/{part}" for place in (location, above) for part in ("train2014", "images/train2014", "images")]
    folders += [f"{place}/images/mscoco/images/train2014" for place in (location, above)]
    return AnnotatedPhotos(location, config, table, folders, inputs)


def _annotations(location: str, config: RefcocoConfig) -> str:
    names = [os.path.basename(path) for path in files.children(location)]
    by = f"refs({config.by})" if config.by else "refs("
    refs = [name for name in names if name.startswith(by) and name.endswith(".json")]
    refs = refs or [n for n in names if n.startswith("finetune_ref") and n.endswith(f"_{config.split}.json")]
    if len(refs) > 1:
        raise ValueError(f"{location}: choose one of {', '.join(refs)} by by= or annotations=")
    if refs:
        return f"{location}/{refs[0]}"
    for name in names:
        if name.startswith(by) and name.endswith(".p"):
            path = f"{location}/{name}"
            command = f'python -c "{_CONVERT}" "{path}" > "{path.removesuffix(".p")}.json"'
            raise ValueError(f"{path} is a pickle, which is not opened. If you trust its author, convert it: {command}")
    raise FileNotFoundError(f"{location}: neither refs(BY).json nor finetune_*_{config.split}.json")


def _read_refs(inputs: list[str], split: str) -> Table:
    path, instances = inputs
    content = read_json(instances, ("images", "annotations"))
    builder = TableBuilder()
    images = {one[0]: one for one in read_images(content["images"], instances, builder.skipped)}
    objects = {field_of(instances, "annotation", one, "id", int): one for one in content["annotations"]}
    refs = read_json_list(path)
    if not (chosen := [ref for ref in refs if ref.get("split") == split]):
        splits = sorted({str(ref.get("split")) for ref in refs})
        raise ValueError(f"{path}: no reference of split {split!r}; there are {', '.join(splits)}")
    found: dict[int, list[tuple[Any, Any]]] = {}
    for ref in chosen:
        one = objects.get(ref.get("ann_id"), {})
        sentences = ref.get("sentences") or ()
        if one.get("image_id") not in images:
            builder.skipped[NO_IMAGE] += len(sentences)
        elif one.get("iscrowd"):
            builder.skipped[GROUP] += len(sentences)
        else:
            texts = [sentence.get("sent") if isinstance(sentence, dict) else None for sentence in sentences]
            found.setdefault(one["image_id"], []).extend((_corners(one.get("bbox")), text) for text in texts)
    return _table(builder, images, found, path)


def _read_mdetr(inputs: list[str], split: str) -> Table:
    (path,) = inputs
    content = read_json(path, ("images", "annotations"))
    builder = TableBuilder()
    entries = {one[0]: one for one in read_images(content["images"], path, builder.skipped)}
    captions = {one["id"]: (one.get("original_id", one["id"]), one.get("caption")) for one in content["images"]}
    images: dict[int, tuple[int, str, int, int]] = {}
    found: dict[int, list[tuple[Any, Any]]] = {}
    for one in content["annotations"]:
        number = one.get("image_id")
        if number not in entries:
            builder.skipped[NO_IMAGE] += 1
        elif one.get("iscrowd"):
            builder.skipped[GROUP] += 1
        else:
            original, text = captions[number]
            images.setdefault(original, entries[number])
            found.setdefault(original, []).append((_corners(one.get("bbox")), text))
    return _table(builder, images, found, path)


def _table(builder: TableBuilder, images: dict[int, Any], found: dict[int, list[tuple[Any, Any]]], path: str) -> Table:
    """The images that have expressions, in the order of the file."""
    for number, (_, name, width_px, height_px) in images.items():
        if number in found and builder.image(name, (width_px, height_px)):
            for box, text in found[number]:
                builder.region(box, text)
    return builder.table(path)


def _corners(bbox: Any) -> Any:
    """XYXY of COCO's x, y, width, height; None for what is not four numbers."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not {int, float}.issuperset(map(type, bbox)):
        return None
    x, y, width, height = bbox
    return [x, y, x + width, y + height]
