"""A contact sheet of a labelled data set (`opencloc data view`): images with their boxes and texts, as one HTML file.

Owns which samples are shown; how they are shown is in `view.html.jinja`.  The file needs nothing beside it and loads
nothing from anywhere; everything that comes from the data is escaped.
"""

from __future__ import annotations

import base64
import importlib.resources
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import numpy as np
from PIL import Image

from opencloc import files
from opencloc.boxes import area
from opencloc.data.sample import Sample, Source, encode_image
from opencloc.data.sources.labelled import labels_of, open_labelled
from opencloc.errors import BadSample

NUM_COLORS = 10  # that the style sheet tells apart


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """A contact sheet: images with their boxes and texts."""

    data: str
    """The data: a folder, tars, or any `KIND:LOCATION?key=value`."""
    sidecar: str | None = None
    """Name of the labels; None: the only ones that lie beside the images, else the images' own regions."""
    out: str = "view.html"
    """The HTML file."""
    limit: int = 100
    """How many samples are shown; at least 1."""
    order: Literal["random", "first"] = "random"
    """Which: a random choice, or those from number `start` on."""
    start: int = 0
    """Number of the first sample, for `first`; at least 0."""
    seed: int = 0
    """Of the random choice."""
    image_px: int = 480
    """Longest side of the images in the sheet; at least 16."""

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("start", 0), ("image_px", 16)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


def write_view(config: ViewConfig) -> int:
    """Writes the sheet and returns how many samples are on it, those with an error included.

    Raises as `open_labelled`.
    """
    source = open_labelled(config.data, config.sidecar)
    cards = [_card(source, index, config.image_px) for index in _choice(source, config)]
    html = _template().render(
        data=config.data,
        labels=labels_of(source),
        cards=cards,
        size=source.size,
        regions=sum(len(card["regions"]) for card in cards),
        failed=sum("error" in card for card in cards),
        config=config,
    )
    if folder := os.path.dirname(config.out):
        os.makedirs(folder, exist_ok=True)
    files.write_bytes(config.out, html.encode())
    return len(cards)


def _template() -> jinja2.Template:
    text = importlib.resources.files("opencloc.data.inspect").joinpath("view.html.j2").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(text)


def _choice(source: Source, config: ViewConfig) -> Iterator[int]:
    """The numbers of the samples to show, ascending."""
    size = source.size if source.size is not None else config.start + config.limit
    if config.order == "first":
        yield from range(config.start, min(config.start + config.limit, size))
    else:
        chosen = np.random.default_rng(config.seed).choice(size, min(config.limit, size), replace=False)
        yield from sorted(chosen.tolist())


def _card(source: Source, index: int, image_px: int) -> dict[str, Any]:
    """What the template needs of one sample."""
    try:
        sample = source[index]
    except BadSample as bad:
        return {"number": index, "key": bad.where, "error": bad.reason, "detail": bad.detail, "regions": []}
    return {
        "number": index,
        "key": sample.key,
        "captions": sample.captions,
        "alt_text": sample.alt_text,
        "width": sample.image.width,
        "height": sample.image.height,
        "image": _data_url(sample.image, image_px),
        "regions": _regions(sample),
    }


def _regions(sample: Sample) -> list[dict[str, Any]]:
    """The regions, largest first so that small boxes lie on top; equal texts have equal colors."""
    color = {text: number % NUM_COLORS for number, text in enumerate(dict.fromkeys(sample.texts))}
    regions = []
    for row in np.argsort(-area(sample.boxes), kind="stable").tolist():
        x0, y0, x1, y1 = (100 * sample.boxes[row].astype(float)).clip(0, 100).round(3).tolist()  # per cent
        text = sample.texts[row]
        score = None if sample.scores is None else float(sample.scores[row])
        place = {"left": x0, "top": y0, "width": round(x1 - x0, 3), "height": round(y1 - y0, 3)}
        regions.append({"text": text, "score": score, "color": color[text], **place})
    return regions


def _data_url(image: Image.Image, image_px: int) -> str:
    image = image.copy()
    image.thumbnail((image_px, image_px), Image.Resampling.LANCZOS)
    return "data:image/jpeg;base64," + base64.b64encode(encode_image(image, "jpg", 85)).decode("ascii")
