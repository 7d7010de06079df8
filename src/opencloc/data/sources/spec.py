"""Sources by name: `KIND:LOCATION?key=value&key=value`, the one way data is named on the command line and in configs.

Kinds: `scenes` (generated, location `rich` or `easy`), `shards` (tars), `features` (tars of encoded images, for
training alone), `folder` (image files), `coco` (COCO-format JSON, also LVIS's and Objects365's), `grit`,
`visual-genome`, `flickr30k-entities`, `refcoco`, `openimages`, `fg-clip` (those data sets' own files), `mosaic` (of the
photos of any location), `crops` (of the regions of any location).
Options are the fields of the kind's config.

    scenes:rich?num_things=120&seed=1
    shards:/data/{00000..00007}.tar?sidecar=vesl
    coco:/data/coco?split=train2017
    mosaic:/data/pairs?grid=2-3&split=train
    crops:coco:/data/coco?split=train2017?seed=1

A bare path is recognised: a folder with tars is `shards`, one in COCO's or Roboflow's layout `coco`, any other
`folder`; a tar or a pattern of tars is `shards`.  Tars among which `features.json` lies are `features` by any name.

A local path that exists is taken as it is, whatever `[`, `{` or `?` is in it.  Elsewhere options begin at the last `?`
that a `name=` follows.  A `?` at the very end says that there are none: `https://host/0.tar?key=value?`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from opencloc import files
from opencloc.data.sample import Sample, Source
from opencloc.data.scenes.scenes import SceneConfig, Scenes
from opencloc.data.sources.coco import Coco, CocoConfig, is_coco_folder
from opencloc.data.sources.crops import Crops, CropsConfig
from opencloc.data.sources.features import INFO, Features
from opencloc.data.sources.fg_clip import FgClipConfig, open_fg_clip
from opencloc.data.sources.flickr_entities import FlickrEntitiesConfig, open_flickr_entities
from opencloc.data.sources.folder import FolderConfig, ImageFolder
from opencloc.data.sources.grit import Grit, GritConfig
from opencloc.data.sources.mosaic import Mosaic, MosaicConfig, NamedSource
from opencloc.data.sources.open_images import OpenImagesConfig, open_open_images
from opencloc.data.sources.refcoco import RefcocoConfig, open_refcoco
from opencloc.data.sources.visual_genome import VisualGenomeConfig, open_visual_genome
from opencloc.data.tars.shards import Shards, ShardsConfig
from opencloc.errors import BadSample

_CONFIGS: dict[str, type] = {
    "scenes": SceneConfig,
    "shards": ShardsConfig,
    "features": ShardsConfig,
    "folder": FolderConfig,
    "coco": CocoConfig,
    "grit": GritConfig,
    "visual-genome": VisualGenomeConfig,
    "flickr30k-entities": FlickrEntitiesConfig,
    "refcoco": RefcocoConfig,
    "openimages": OpenImagesConfig,
    "fg-clip": FgClipConfig,
    "mosaic": MosaicConfig,
    "crops": CropsConfig,
}


def open_source(
    spec: str, *, image_px: int | None = None, sidecar: str | None = None, features: bool = False
) -> Source:
    """The source that `spec` names.

    `image_px`: the resolution that will be needed.  Generated scenes and mosaics are made at it; of photos, JPEGs are
    decoded no larger than needed for a long side of it.  An `image_px` in the spec itself wins.
    `sidecar`: the name of labels beside the images, as the option of that name.
    `features`: a source of features (`Features`, whose samples have no images) will do as well.

    Raises `ValueError` naming the spec and what is wrong with it, with the allowed names or range, and
    `FileNotFoundError` for what is not there.
    """
    kind, location, options = parse_spec(spec)
    if kind == "scenes":
        if "mode" in options:
            raise ValueError(f"{spec}: the mode is the location, as in scenes:easy, not an option")
        options |= {"mode": location} if location else {}
    elif not location:
        raise ValueError(f"{spec}: a path must follow {kind}:")
    if kind == "features" and not features:
        raise ValueError(
            f"{spec}: features stand in place of images, only training on a frozen vision tower reads them"
        )
    if sidecar is not None and options.setdefault("sidecar", sidecar) != sidecar:
        raise ValueError(f"{spec} names other labels than {sidecar}")
    if image_px is not None and kind != "crops":
        options.setdefault("image_px", str(image_px))
    config = _config(spec, _CONFIGS[kind], options)
    place = location.rstrip("/")
    openers: dict[str, Callable[[], Source]] = {
        "scenes": lambda: Scenes(config),
        "shards": lambda: Shards(location, config),
        "features": lambda: cast(Any, Features(location, config)),  # no images
        "folder": lambda: ImageFolder(location, config),
        "coco": lambda: Coco(location, config),
        "grit": lambda: Grit(location, config),
        "visual-genome": lambda: open_visual_genome(place, config),
        "flickr30k-entities": lambda: open_flickr_entities(place, config),
        "refcoco": lambda: open_refcoco(place, config),
        "openimages": lambda: open_open_images(place, config),
        "fg-clip": lambda: open_fg_clip(place, config),
        "mosaic": lambda: Mosaic(_photos(spec, location, config), config),
        # a region of a quarter of the image's sides still fills the square
        "crops": lambda: Crops(open_source(location, image_px=image_px and 4 * image_px), config),
    }
    return openers[kind]()


def parse_spec(spec: str) -> tuple[str, str, dict[str, str]]:
    """(kind, location, options as texts) of a spec; the kind of a bare path is found by looking at it.

    Raises as `open_source`, but for options: their names and values are not looked at.
    """
    try:
        if b"\0" in os.fsencode(spec):
            raise ValueError(f"{spec!r}: no file has NUL in its name")
    except UnicodeEncodeError as error:
        raise ValueError(f"{spec!r}: no file has such a name ({error.reason})") from None
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in _CONFIGS:
        kind, rest = None, spec
    location, options = _split_options(spec, rest)
    if kind is not None:
        return _tars_kind(location) if kind == "shards" else kind, location, options
    prefix, colon, inner = location.partition(":")
    if colon and not inner.startswith(("//", ":")) and not files.exists(location):
        raise ValueError(f"{spec}: unknown kind {prefix!r}{_suggest(prefix, list(_CONFIGS))}")
    return _kind_of(spec, location), location, options


def _split_options(spec: str, place: str) -> tuple[str, dict[str, str]]:
    """(location, options) of what follows the kind."""
    if (path := files.local_path(place)) is not None and files.exists(path):
        return place, {}
    match = re.search(r"\?(\w+=[^?]*)?$", place)
    if match is None:
        return place, {}
    options: dict[str, str] = {}
    for part in match[1].split("&") if match[1] else ():
        name, equals, text = part.partition("=")
        if not equals or name in options:
            raise ValueError(f"{spec}: {part!r} is not an option key=value that comes once")
        if not text:
            raise ValueError(f"{spec}: option {name} is empty")
        options[name] = text
    return place[: match.start()], options


def _config(spec: str, config_type: type, options: dict[str, str]) -> Any:
    """The config with these options, which its own types read and check."""
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    values: dict[str, Any] = {}
    for name, text in options.items():
        if name not in fields:
            raise ValueError(f"{spec}: unknown option {name!r}{_suggest(name, list(fields))}")
        values[name] = text.split(",") if "tuple" in str(fields[name].type) else text
    try:
        return TypeAdapter(config_type).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        about = f"option {first['loc'][0]} is {options[str(first['loc'][0])]!r}: " if first["loc"] else ""
        raise ValueError(f"{spec}: {about}{first['msg'].removeprefix('Value error, ')}") from None


def take(source: Source, n: int, start: int = 0) -> tuple[list[Sample], Counter[str]]:
    """The first `n` usable samples from number `start` on (fewer where the source ends), and what was passed over.

    The counter holds the reasons of the samples that could not be used.  A source of which the first 1,000 numbers
    give no sample at all raises the last of their `BadSample`s.
    """
    samples: list[Sample] = []
    reasons: Counter[str] = Counter()
    index = start
    while len(samples) < n and (source.size is None or index < source.size):
        try:
            samples.append(source[index])
        except BadSample as bad:
            reasons[bad.reason] += 1
            if not samples and reasons.total() == 1000:
                raise
        index += 1
    return samples, reasons


def _kind_of(spec: str, location: str) -> str:
    """The kind of a bare path, by what lies there."""
    if files.is_folder(location):
        folder = location.rstrip("/")
        if any(path.endswith(".tar") for path in files.children(folder)):
            return _tars_kind(location)
        return "coco" if is_coco_folder(folder) else "folder"
    if re.search(r"\.tar$|[*{\[]", location):
        return _tars_kind(location)
    if files.exists(location):
        raise ValueError(f"{spec}: a source is a folder or *.tar; or say KIND:LOCATION with {', '.join(_CONFIGS)}")
    if location in ("rich", "easy"):
        raise ValueError(f"{spec}: generated scenes are named scenes:{location}")
    raise FileNotFoundError(f"{location}: no such file or folder")


def _tars_kind(location: str) -> str:
    """`features` for tars on this machine among which `features.json` lies, else `shards`."""
    local = files.local_path(location)
    folders = () if local is None else (local, os.path.dirname(local))
    return "features" if any(os.path.isfile(os.path.join(folder, INFO)) for folder in folders) else "shards"


def _photos(spec: str, location: str, config: MosaicConfig) -> NamedSource:
    photos = open_source(location, image_px=2 * config.image_px)
    if not isinstance(photos, NamedSource):
        raise ValueError(f"{spec}: mosaics are made of photos (shards, folder, coco), not of {photos!r}")
    return photos


def _suggest(name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    return (f" (did you mean {close[0]!r}?)" if close else "") + f"; allowed: {', '.join(allowed)}"
