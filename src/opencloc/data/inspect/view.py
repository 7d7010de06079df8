"""A contact sheet of a labelled data set (`opencloc data view`): images with their boxes and texts, as one HTML file.

The file, made from `view.html.j2`, needs nothing beside it and loads nothing from anywhere.  What comes from the data
is escaped.
"""

from __future__ import annotations

import base64
import importlib.resources
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import numpy as np
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from opencloc import files
from opencloc.boxes import area
from opencloc.data.sample import Sample, Source, encode_image
from opencloc.data.sources.labelled import labels_of, open_labelled
from opencloc.errors import BadSample
from opencloc.progress import track

NUM_COLORS = 10  # that the style sheet tells apart


@checked(frozen=True, kw_only=True)
class ViewConfig:
    """A contact sheet: images with their boxes and texts."""

    data: str
    """The data: a folder, tars, or any `KIND:LOCATION?key=value`."""
    sidecar: str | None = None
    """Name of the labels; None: the only ones that lie beside the images, else the images' own regions."""
    out: str = "view.html"
    """The HTML file."""
    num_images: Annotated[int, Field(ge=1)] = 100
    """How many images are shown; at least 1."""
    order: Literal["random", "first"] = "random"
    """Which: a random choice, or those from number `start` on."""
    start: Annotated[int, Field(ge=0)] = 0
    """Number of the first image, for `first`; at least 0."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the random choice."""
    image_px: Annotated[int, Field(ge=16)] = 480
    """Longest side of the images in the sheet; at least 16."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What is on a sheet."""

    images: int  # with those that cannot be used
    regions: int
    skipped: Counter[str]  # images that cannot be used, by reason


def write_view(config: ViewConfig) -> Sheet:
    """What is on the sheet, after writing it.

    Raises as `open_labelled`, and `OSError` where something other than a regular file has the name.
    """
    source = open_labelled(config.data, config.sidecar)
    with files.new_file(Path(config.out)) as partial:
        cards = [_card(source, index, config.image_px) for index in track(_choice(source, config), "reading images")]
        regions = [region for card in cards for region in card["regions"]]
        frequent = Counter(region["text"] for region in regions).most_common()
        color = {text: number % NUM_COLORS for number, (text, _) in enumerate(frequent)}
        for region in regions:  # equal texts have equal colors, the most frequent ones colors of their own
            region["color"] = color[region["text"]]
        sheet = Sheet(
            images=len(cards),
            regions=len(regions),
            skipped=Counter(card["error"] for card in cards if "error" in card),
        )
        html = _template().render(
            data=config.data, labels=labels_of(source), cards=cards, size=source.size, sheet=sheet, config=config
        )
        partial.write_text(html, encoding="utf-8", errors="backslashreplace")  # paths may be any bytes
    return sheet


def _template() -> jinja2.Template:
    text = importlib.resources.files("opencloc.data.inspect").joinpath("view.html.j2").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(text)


def _choice(source: Source, config: ViewConfig) -> list[int]:
    """The numbers of the samples to show, ascending."""
    size = source.size if source.size is not None else config.start + config.num_images
    if config.order == "first":
        return list(range(config.start, min(config.start + config.num_images, size)))
    chosen = np.random.default_rng(config.seed).choice(size, min(config.num_images, size), replace=False)
    return sorted(chosen.tolist())


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
    """The regions, largest first so that small boxes lie on top."""
    regions = []
    for row in np.argsort(-area(sample.boxes), kind="stable").tolist():
        x0, y0, x1, y1 = (100 * sample.boxes[row].astype(float)).clip(0, 100).round(3).tolist()  # per cent
        text = sample.texts[row]
        score = None if sample.scores is None else float(sample.scores[row])
        place = {"left": x0, "top": y0, "width": round(x1 - x0, 3), "height": round(y1 - y0, 3)}
        regions.append({"text": text, "score": score, **place})
    return regions


def _data_url(image: Image.Image, image_px: int) -> str:
    image = image.copy()
    image.thumbnail((image_px, image_px), Image.Resampling.LANCZOS)
    return "data:image/jpeg;base64," + base64.b64encode(encode_image(image, "jpg", 85)).decode("ascii")
