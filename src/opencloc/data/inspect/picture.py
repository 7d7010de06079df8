"""Samples with their boxes as one PNG, for the eye."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from opencloc.boxes import area
from opencloc.data.sample import Sample

NUM_TILES = 16
_COLUMNS, _TILE_PX, _LINE_PX, _GAP_PX = 4, 320, 18, 8
_INK, _PAPER, _EMPTY = (31, 41, 51), (255, 255, 255), (228, 233, 238)
_COLOURS = ((209, 73, 91), (34, 116, 165), (42, 145, 71), (201, 112, 10), (123, 79, 181), (14, 138, 138))


def contact_sheet(samples: Sequence[Sample]) -> bytes:
    """A PNG of up to 16 samples, four in a row: boxes, their texts, below each its key and number of regions."""
    samples = samples[:NUM_TILES]
    rows = max(1, -(-len(samples) // _COLUMNS))
    width, height = _TILE_PX + _GAP_PX, _TILE_PX + _LINE_PX + _GAP_PX
    sheet = Image.new("RGB", (_COLUMNS * width + _GAP_PX, rows * height + _GAP_PX), _PAPER)
    # matplotlib's font, which is there wherever matplotlib is
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 11)
    pen = ImageDraw.Draw(sheet)
    for number, sample in enumerate(samples):
        left, top = _GAP_PX + number % _COLUMNS * width, _GAP_PX + number // _COLUMNS * height
        sheet.paste(_tile(sample, font), (left, top))
        line = f"{len(sample.texts)} regions  {_shown(sample.key)}"
        pen.text((left, top + _TILE_PX + 3), _cut(line, font, _TILE_PX), fill=_INK, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _tile(sample: Sample, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The image in the middle of a square, with its boxes, small ones on top."""
    scale = _TILE_PX / max(sample.image.size)
    size = max(1, round(sample.image.width * scale)), max(1, round(sample.image.height * scale))
    tile = Image.new("RGB", (_TILE_PX, _TILE_PX), _EMPTY)
    corner = (_TILE_PX - size[0]) // 2, (_TILE_PX - size[1]) // 2
    tile.paste(sample.image.resize(size, Image.Resampling.BICUBIC), corner)
    pen = ImageDraw.Draw(tile)
    for row in np.argsort(-area(sample.boxes), kind="stable").tolist():
        colour = _COLOURS[row % len(_COLOURS)]
        x0, y0, x1, y1 = (sample.boxes[row].astype(float).reshape(2, 2) * size + corner).reshape(-1).tolist()
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=2)
        text = _cut(_shown(sample.texts[row]), font, _TILE_PX - 4)
        x = max(0, min(x0, _TILE_PX - font.getlength(text) - 4))
        y = y0 - 15 if y0 >= 15 else min(y0, _TILE_PX - 15)  # above its box where there is room
        pen.rectangle((x, y, x + font.getlength(text) + 4, y + 14), fill=colour)
        pen.text((x + 2, y), text, fill=_PAPER, font=font)
    return tile


def _shown(text: str) -> str:
    """The text on one line, with signs in place of what cannot be encoded."""
    return " ".join(text.encode(errors="backslashreplace").decode().split())


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or as much of its beginning as is not wider."""
    text = text[:200]
    while font.getlength(text) > width:
        text = text[:-2] + "…"
    return text
