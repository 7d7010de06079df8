"""Sources by name: `KIND:LOCATION?key=value&key=value`, the one way data is named on the command line and in configs.

Owns the grammar.  Kinds: `scenes` (generated, location `rich` or `easy`), `shards` (tars), `folder` (image files),
`coco` (COCO-format JSON), `mosaic` (of the photos of any location), `crops` (of the regions of any location).  Options
are the fields of the kind's config.  A bare path is recognised: a tar, a pattern of tars or a folder with tars is
`shards`, a folder with `annotations/` is `coco`, any other folder is `folder`.

    scenes:rich?num_things=120&seed=1
    shards:/data/{00000..00007}.tar?sidecar=vesl
    coco:/data/coco?split=train2017
    mosaic:/data/pairs?grid=2-3&split=train
    crops:coco:/data/coco?split=train2017?seed=1
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from opencloc import files
from opencloc.data.sample import Sample, Source
from opencloc.data.scenes.scenes import SceneConfig, Scenes
from opencloc.data.sources.coco import Coco, CocoConfig
from opencloc.data.sources.crops import Crops, CropsConfig
from opencloc.data.sources.folder import FolderConfig, ImageFolder
from opencloc.data.sources.mosaic import Mosaic, MosaicConfig, NamedSource
from opencloc.data.tars.shards import Shards, ShardsConfig
from opencloc.errors import BadSample

_CONFIGS: dict[str, type] = {
    "scenes": SceneConfig,
    "shards": ShardsConfig,
    "folder": FolderConfig,
    "coco": CocoConfig,
    "mosaic": MosaicConfig,
    "crops": CropsConfig,
}
_OPTIONS = re.compile(r"\?(\w+=[^?]*)$")  # a `?` that begins no option is part of the location (a glob's wildcard)


def open_source(spec: str, *, image_px: int | None = None) -> Source:
    """The source that `spec` names.

    `image_px`: the resolution that will be needed.  Generated scenes and mosaics are made at it; of photos, JPEGs are
    decoded no larger than needed for a long side of it.  An `image_px` in the spec itself wins.

    Raises `ValueError` naming the spec and what is wrong with it, with the allowed names or range, and
    `FileNotFoundError` for what is not there.
    """
    kind, location, options = parse_spec(spec)
    config_type = _CONFIGS[kind]
    values = {name: _value(spec, config_type, name, text) for name, text in options.items()}
    if image_px is not None and kind != "crops":
        values.setdefault("image_px", image_px)
    if kind == "scenes":
        if "mode" in values:
            raise ValueError(f"{spec}: the mode is the location, as in scenes:easy, not an option")
        values |= {"mode": _value(spec, config_type, "mode", location)} if location else {}
    elif not location:
        raise ValueError(f"{spec}: a path must follow {kind}:")
    try:
        config = config_type(**values)
    except ValueError as error:
        raise ValueError(f"{spec}: {error}") from None
    openers: dict[str, Callable[[], Source]] = {
        "scenes": lambda: Scenes(config),
        "shards": lambda: Shards(location, config),
        "folder": lambda: ImageFolder(location, config),
        "coco": lambda: Coco(location, config),
        "mosaic": lambda: Mosaic(_photos(spec, location, config), config),
        # a region of a quarter of the image's sides still fills the square
        "crops": lambda: Crops(open_source(location, image_px=image_px and 4 * image_px), config),
    }
    return openers[kind]()


def parse_spec(spec: str) -> tuple[str, str, dict[str, str]]:
    """(kind, location, options as texts) of a spec; the kind of a bare path is found by looking at it.

    Raises as `open_source`, but for options: their names and values are not looked at.
    """
    match = _OPTIONS.search(spec)
    place = spec[: match.start()] if match else spec
    options: dict[str, str] = {}
    for part in match[1].split("&") if match else ():
        name, equals, text = part.partition("=")
        if not equals or name in options:
            raise ValueError(f"{spec}: {part!r} is not an option key=value that comes once")
        options[name] = text
    kind, colon, location = place.partition(":")
    if colon and kind in _CONFIGS:
        return kind, location, options
    if colon and not location.startswith(("//", ":")) and not files.exists(place):
        raise ValueError(f"{spec}: unknown kind {kind!r}{_suggest(kind, list(_CONFIGS))}")
    return _kind_of(spec, place), place, options


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
    if re.search(r"\.tar$|[*{\[]", location):
        return "shards"
    if files.is_folder(location):
        folder = location.rstrip("/")
        if any(path.endswith(".tar") for path in files.children(folder)):
            return "shards"
        return "coco" if files.is_folder(f"{folder}/annotations") else "folder"
    if files.exists(location):
        raise ValueError(f"{spec}: a source is a folder or *.tar; or say KIND:LOCATION with {', '.join(_CONFIGS)}")
    if location in ("rich", "easy"):
        raise ValueError(f"{spec}: generated scenes are named scenes:{location}")
    raise FileNotFoundError(f"{spec}: {location} doesn't exist")


def _photos(spec: str, location: str, config: MosaicConfig) -> NamedSource:
    photos = open_source(location, image_px=2 * config.image_px)
    if not isinstance(photos, NamedSource):
        raise ValueError(f"{spec}: mosaics are made of photos (shards, folder, coco), not of {photos!r}")
    return photos


def _value(spec: str, config_type: type, name: str, text: str) -> Any:
    """The value of an option, of its field's type."""
    hints = get_type_hints(config_type)
    fields = [field.name for field in dataclasses.fields(config_type)]
    if name not in fields:
        raise ValueError(f"{spec}: unknown option {name!r}{_suggest(name, fields)}")
    try:
        return _convert(hints[name], text)
    except ValueError as error:
        raise ValueError(f"{spec}: option {name} is {text!r}; allowed: {error}") from None


def _convert(hint: Any, text: str) -> Any:
    """`text` as a value of type `hint`; raises `ValueError` saying what is allowed."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # only X | None occurs
        return _convert(next(kind for kind in inner if kind is not types.NoneType), text)
    if origin is Literal:
        if text not in inner:
            raise ValueError(", ".join(inner))
        return text
    if origin is tuple:  # tuple[X, ...]
        return tuple(_convert(inner[0], part) for part in text.split(",") if part)
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError("true, false")
        return text.lower() in ("true", "1")
    if hint is str:
        if not text:
            raise ValueError("a text that is not empty")
        return text
    try:
        return hint(text)
    except ValueError:
        raise ValueError("a whole number" if hint is int else "a number") from None


def _suggest(name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    return (f" (did you mean {close[0]!r}?)" if close else "") + f"; allowed: {', '.join(allowed)}"
