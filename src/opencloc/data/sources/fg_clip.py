"""FG-CLIP's FineHARD (FgGRN-12M): web photos with a long and a short caption and described boxes.

Read are the lists in `jsonfiles/*.json`, or the one file that is the location, as published: `f_path`, `caption`,
`short_caption` and `bbox_info`, a list of `{"bbox": [x0, y0, x1, y1, score], "short_expr": ..., "long_expr": ...}` with
edges as shares of the image.  The hard negatives of the expressions are not read.  A leading `grit-20m/data-12m/` of
`f_path` is no folder on disk.
"""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from opencloc import files
from opencloc.data.sources.coco_json import read_json_list
from opencloc.data.sources.kept import kept
from opencloc.data.sources.table import AnnotatedConfig, AnnotatedPhotos, Table, TableBuilder

_PREFIX = "grit-20m/data-12m/"


@dataclass(frozen=True, kw_only=True)
class FgClipConfig(AnnotatedConfig):
    """Which expressions of FG-CLIP's data are region texts."""

    texts: Literal["short_expr", "long_expr", "both"] = "short_expr"


def open_fg_clip(location: str, config: FgClipConfig) -> AnnotatedPhotos:
    """The photos with their regions.  Raises `FileNotFoundError`, and `ValueError` naming a malformed file."""
    inputs = [location]
    root = location.rpartition("/")[0] or "."
    if not location.endswith(".json"):
        folder = f"{location}/jsonfiles" if files.is_folder(f"{location}/jsonfiles") else location
        inputs, root = [path for path in files.children(folder) if path.endswith(".json")], location
        if not inputs:
            raise FileNotFoundError(f"{folder}: no *.json")
    table = kept(Table, inputs, lambda: _read(inputs, config), config.texts)
    return AnnotatedPhotos(location, config, table, [root, f"{root}/images", f"{root}/grit-12m"], inputs)


def _read(inputs: list[str], config: FgClipConfig) -> Table:
    builder = TableBuilder()
    wanted = ("short_expr", "long_expr") if config.texts == "both" else (config.texts,)
    for path in inputs:
        for entry in read_json_list(path):
            captions = [text for name in ("caption", "short_caption") if isinstance(text := entry.get(name), str)]
            name = entry.get("f_path")
            if not builder.image(name.removeprefix(_PREFIX) if isinstance(name, str) else None, None, captions):
                continue
            for one in entry.get("bbox_info") or ():
                for text in (one.get(kind) for kind in wanted) if isinstance(one, dict) else ():
                    builder.region(one.get("bbox"), text)
    return builder.table(inputs[0])
