"""Visual Genome: 5.4 million described regions, or 3.8 million named objects, on 108,077 photos.

Read are `image_data.json` (sizes, and in `url` the folder of each photo), `region_descriptions.json` and `objects.json`
as published; photos lie in `VG_100K/` and `VG_100K_2/`.  An object with several `names` has several wordings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from opencloc.data.sources.coco_json import field_of, read_json_list
from opencloc.data.sources.kept import kept
from opencloc.data.sources.table import NO_IMAGE, AnnotatedConfig, AnnotatedPhotos, Table, TableBuilder, first_file

Texts = Literal["regions", "objects", "both"]


@dataclass(frozen=True, kw_only=True)
class VisualGenomeConfig(AnnotatedConfig):
    """Which texts of Visual Genome are regions."""

    texts: Texts = "regions"  # the descriptions, the names of objects, or both


def open_visual_genome(location: str, config: VisualGenomeConfig) -> AnnotatedPhotos:
    """The photos with their regions.  Raises `FileNotFoundError`, and `ValueError` naming a malformed file."""
    wanted = ["image_data"]
    wanted += ["region_descriptions"] * (config.texts != "objects") + ["objects"] * (config.texts != "regions")
    inputs = [first_file([f"{location}/{name}.json", f"{location}/annotations/{name}.json"], name) for name in wanted]
    table = kept(Table, inputs, lambda: _read(inputs), config.texts)
    return AnnotatedPhotos(location, config, table, [location, f"{location}/images"], inputs)


def _read(inputs: list[str]) -> Table:
    path, *annotated = inputs
    images: dict[int, dict[str, Any]] = {}
    for entry in read_json_list(path):
        images[field_of(path, "image", entry, "image_id", int)] = entry
    builder = TableBuilder()
    regions: dict[int, list[tuple[Any, Any]]] = {}
    for file in annotated:
        for image_id, box, text in _regions(file):
            if image_id in images:
                regions.setdefault(image_id, []).append((box, text))
            else:
                builder.skipped[NO_IMAGE] += 1
    for image_id, entry in images.items():
        name = "/".join(field_of(path, "image", entry, "url", str).split("/")[-2:])
        if builder.image(name, (entry.get("width"), entry.get("height"))):
            for box, text in regions.get(image_id, ()):
                builder.region(box, text)
        else:
            builder.skipped[NO_IMAGE] += len(regions.get(image_id, ()))
    return builder.table(path)


def _regions(path: str) -> Iterator[tuple[Any, Any, Any]]:
    """(image id, box, text) of every description, or of every name of an object."""
    for entry in read_json_list(path):
        image_id = entry.get("image_id", entry.get("id"))
        for one in entry.get("regions") or ():
            if isinstance(one, dict):
                yield one.get("image_id", image_id), _box(one, "width", "height"), one.get("phrase")
        for one in entry.get("objects") or ():
            if isinstance(one, dict):
                for name in one.get("names") or [None]:
                    yield image_id, _box(one, "w", "h"), name


def _box(entry: dict[str, Any], width: str, height: str) -> Any:
    """XYXY in pixels; None for what is not four numbers."""
    x, y, w, h = (entry.get(name) for name in ("x", "y", width, height))
    numbers = {int, float}.issuperset(map(type, (x, y, w, h)))
    return [x, y, x + w, y + h] if numbers else None  # type: ignore[operator]
