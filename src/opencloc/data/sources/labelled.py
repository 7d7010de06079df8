"""Opening a data set together with the region labels beside it, for the commands that look at labels."""

from __future__ import annotations

import os
from collections import Counter

from opencloc import files
from opencloc.data.sample import Source
from opencloc.data.sidecar import sidecar_path
from opencloc.data.sources.coco import Coco
from opencloc.data.sources.folder import ImageFolder
from opencloc.data.sources.spec import open_source
from opencloc.data.sources.table import AnnotatedPhotos
from opencloc.data.tars.shards import Shards

StoredPhotos = Shards | Coco | ImageFolder | AnnotatedPhotos  # sources of image files, which `image_bytes` gives


def open_labelled(spec: str, sidecar: str | None = None) -> Source:
    """The source that `spec` names, with labels: those called `sidecar`, else those that the spec names, else the only
    ones that lie beside the images, else the regions that come with the images.

    Raises as `open_source`, and `ValueError` if several labels lie beside the images and none was chosen, or `sidecar`
    is given for a source that has no labels beside it.
    """
    source = open_source(spec, sidecar=sidecar)
    if labels_of(source) is None and (names := _labels_beside(source)):
        if len(names) > 1:
            raise ValueError(f"{spec} has the labels {', '.join(names)}: choose one as sidecar")
        return open_source(spec, sidecar=names[0])
    return source


def labels_of(source: Source) -> str | None:
    """The name of the labels that a source reads beside its images; None where it uses the images' own regions."""
    return source.config.sidecar if isinstance(source, Shards | Coco | ImageFolder) else None


def left_out(source: Source) -> Counter[str]:
    """What a source left out when it was opened, by reason."""
    return Counter(getattr(source, "problems", None) or getattr(source, "skipped", None) or {})


def _labels_beside(source: Source) -> list[str]:
    """Names of the labels beside a source: of its first tar, of the folder, of the instances file."""
    if isinstance(source, Shards):
        place = source.urls[0]
    elif isinstance(source, Coco):
        place = source.instances_path
    elif isinstance(source, ImageFolder):
        place = source.location
    else:
        return []
    names: set[str] = set()
    for part in (None, 0):
        folder, pattern = os.path.split(sidecar_path(place, "NAME", part))
        before, _, after = pattern.rpartition("NAME")
        there = files.children(folder) if files.is_folder(folder or ".") else []
        for file in map(os.path.basename, there):
            if file.startswith(before) and file.endswith(after):
                names.add(file.removeprefix(before).removesuffix(after))
    return sorted(names)
