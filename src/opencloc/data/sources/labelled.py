"""Opening a data set together with its region labels, for the commands that look at labels.

Owns how the labels beside the images are chosen; reading them is `sidecar.py`'s and the sources'.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter

from opencloc import files
from opencloc.data.sample import Source
from opencloc.data.sidecar import sidecar_path
from opencloc.data.sources.coco import Coco
from opencloc.data.sources.folder import ImageFolder
from opencloc.data.sources.spec import open_source
from opencloc.data.tars.shards import Shards


def open_labelled(spec: str, sidecar: str | None = None) -> Source:
    """The source that `spec` names, with labels: those called `sidecar`, else those that the spec names, else the only
    ones that lie beside the images, else the regions that come with the images.

    Raises as `open_source`, and `ValueError` if several labels lie beside the images and none was chosen, or `sidecar`
    is given for a source that has no labels beside it.
    """
    if sidecar is not None:
        return open_source(_with_option(spec, f"sidecar={sidecar}"))
    source = open_source(spec)
    if labels_of(source) is None and (names := _labels_beside(source)):
        if len(names) > 1:
            raise ValueError(f"{spec} has the labels {', '.join(names)}: choose one as sidecar")
        return open_source(_with_option(spec, f"sidecar={names[0]}"))
    return source


def labels_of(source: Source) -> str | None:
    """The name of the labels that a source reads beside its images; None where it uses the images' own regions."""
    return source.config.sidecar if isinstance(source, Shards | Coco | ImageFolder) else None


def left_out(source: Source) -> Counter[str]:
    """What a source left out when it was opened, by reason."""
    return Counter(getattr(source, "problems", None) or getattr(source, "skipped", None) or {})


def _with_option(spec: str, option: str) -> str:
    has_options = re.search(r"[?]\w+=[^?]*$", spec)  # as `open_source` tells them from a wildcard
    return f"{spec}{'&' if has_options else '?'}{option}"


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
        start = sidecar_path(place, "NAME", part).removesuffix("NAME.parquet")
        for path in files.glob(f"{glob.escape(start)}*.parquet"):
            names.add(os.path.basename(path).removeprefix(os.path.basename(start)).removesuffix(".parquet"))
    return sorted(names)
