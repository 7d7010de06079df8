"""What the web page does, without the page: a photo held for a session, its regions, heat maps, pictures of answers."""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from opencloc.boxes import clipped_px
from opencloc.images import as_array, open_image
from opencloc.model.predictor import COLOURS, EncodedImage, Predictor
from opencloc.model.prompts import Box, Point
from opencloc.search.query import Found, Library, Row

SHOWN_PX = 1600  # long side of a photo on the page; larger ones are made smaller first
MAX_UPLOAD_MB = 40
MAX_REGIONS = 50
MAX_NAMES = 100
MAX_CHARS = 300  # of a name
NAMES = "person, dog, cat, car, tree, house"  # until someone types others
LAYOUT_ERROR = "a region is four numbers (a box: x0 y0 x1 y1) or two (a point: x y), in pixels"


@dataclass(frozen=True, kw_only=True)
class Session:
    """What the page remembers of one visitor: a photo, encoded once, and what was marked on it."""

    photo: EncodedImage | None = None
    regions: tuple[tuple[float, ...], ...] = ()  # boxes (4 numbers) and points (2), in pixels of the photo
    corner: tuple[float, float] | None = None  # the first click of a box
    found: Found | None = None  # the answer on show
    earlier: tuple[Found, ...] = ()  # those before


class Desk:
    """The model and the library behind the page.  Visitors take turns: one model serves them all."""

    def __init__(self, predictor: Predictor, library: Library | None) -> None:
        self.predictor, self.library = predictor, library
        self.turn = threading.Lock()

    # -- regions ---------------------------------------------------------------------------------------------------

    def open_photo(self, session: Session, path: str | None) -> Session:
        """The session with another photo, encoded.  Raises ValueError or OSError saying what is wrong with the file."""
        if path is None:
            return replace(session, photo=None, regions=(), corner=None)
        if os.path.getsize(path) > MAX_UPLOAD_MB * 2**20:
            raise ValueError(f"the file has more than {MAX_UPLOAD_MB} MB")
        try:
            image = open_image(Path(path))
        except ValueError as error:  # without the name of the server's copy
            raise ValueError(str(error).replace(path, os.path.basename(path))) from None
        image.thumbnail((SHOWN_PX, SHOWN_PX), Image.Resampling.LANCZOS)
        with self.turn:
            photo = self.predictor.encode(image)
        return replace(session, photo=photo, regions=(), corner=None)

    def click(self, session: Session, x: float, y: float, shape: str) -> Session:
        """The session after a click: a point, the first corner of a box, or its second and with it the box."""
        if session.photo is None:
            return session
        if shape == "point":
            return self.add(session, (x, y))
        if session.corner is None:
            return replace(session, corner=(x, y))
        (x0, y0), session = session.corner, replace(session, corner=None)
        if abs(x - x0) < 1 or abs(y - y0) < 1:
            raise ValueError("the two corners are the same: click two opposite corners of a box")
        return self.add(session, (min(x, x0), min(y, y0), max(x, x0), max(y, y0)))

    def add(self, session: Session, region: Sequence[float]) -> Session:
        """The session with one more region, that lies in the photo.  Raises ValueError."""
        if session.photo is None:
            raise ValueError("open a photo first")
        if len(session.regions) >= MAX_REGIONS:
            raise ValueError(f"{MAX_REGIONS} regions are on the photo: clear some first")
        width, height = session.photo.image.size
        if len(region) == 4:
            region = clipped_px(np.array([region], dtype=np.float64), width, height)[0].tolist()
        elif not (0 <= region[0] <= width and 0 <= region[1] <= height):
            raise ValueError(f"the point {region[0]:g} {region[1]:g} is outside the photo of {width} x {height} pixels")
        return replace(session, regions=(*session.regions, tuple(region)), corner=None)

    def names(self, session: Session, typed: str) -> list[list[str]]:
        """For every region: its number, the best name, its probability, the next ones.  Raises ValueError."""
        if session.photo is None or not session.regions:
            return []
        names = listed(typed)
        if not names:
            raise ValueError("type one name at least, several with commas between")
        prompts = [Box(*region) if len(region) == 4 else Point(*region) for region in session.regions]
        with self.turn:
            embeddings = self.predictor.embed(session.photo, prompts)
            texts = self.predictor.embed_texts(names)
            logits = self.predictor.model.scale("region") * embeddings @ texts.T
        table = []
        for number, row in enumerate(logits.detach().softmax(-1).cpu().numpy(), start=1):
            first, *others = np.argsort(-row, kind="stable")[:4]
            rest = ", ".join(f"{names[i]} {row[i]:.2f}" for i in others)
            table.append([str(number), names[first], f"{row[first]:.2f}", rest])
        return table

    def marked(self, session: Session, labels: Sequence[str] = ()) -> Image.Image | None:
        """The photo with its regions drawn on it, numbered, with their names."""
        if session.photo is None:
            return None
        boxes, captions = [], []
        for number, region in enumerate(session.regions):
            name = f" {labels[number]}" if number < len(labels) else ""
            captions.append(f"{number + 1}{name}")
            boxes.append(region if len(region) == 4 else (region[0], region[1], region[0], region[1]))
        picture = Predictor.draw(session.photo.image, boxes, captions)
        pen, radius = ImageDraw.Draw(picture), max(4, max(picture.size) // 120)
        dots = [(region, COLOURS[i % len(COLOURS)]) for i, region in enumerate(session.regions) if len(region) == 2]
        for (x, y), colour in [*dots, *([(session.corner, "#e4572e")] if session.corner else [])]:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline="white", width=2)
        return picture

    # -- find ------------------------------------------------------------------------------------------------------

    def find(self, session: Session, phrase: str) -> tuple[Image.Image, Image.Image, str]:
        """(photo with the box of the phrase, heat map over the photo, what was found in words).  Raises ValueError."""
        if session.photo is None:
            raise ValueError("open a photo first")
        text = one_text(phrase, "type what to find")
        photo = session.photo
        with self.turn:
            heat = as_array(self.predictor.heatmap(photo, [text]))[0]
            grounded = self.predictor.ground(photo, [text]) if self.predictor.model.has_text_prompts else None
        warm = f"similarity from {heat.min():.2f} (dark) to {heat.max():.2f} (bright)"
        if grounded is None:
            picture = photo.image
            words = (
                f"This model has no text prompts, so it names no box; its heat map shows where “{text}” fits. {warm}"
            )
        else:
            (box,), (score,) = grounded
            picture = Predictor.draw(photo.image, [box.tolist()], [text], [float(score)])
            there = "is there" if score >= 0.5 else "is probably not there; the box is where it would be"
            place = " ".join(f"{edge:.0f}" for edge in box)
            words = f"“{text}” {there}: score {score:.2f}, box {place} in pixels; {warm}"
        return picture, heat_over(photo.image, heat), words

    # -- library -----------------------------------------------------------------------------------------------------

    def ask(self, session: Session, text: str = "", minus: str = "", like: int | None = None) -> Session:
        """The session with the answer to a text, or to the region in a row of the answer.  Raises ValueError."""
        if self.library is None:
            raise ValueError("no library is open")
        if like is not None:
            if session.found is None or not 0 <= like < len(session.found.rows):
                raise ValueError("this answer is gone: search again")
            query: dict[str, Any] = {"like": session.found.rows[like]}
        else:
            query = {"text": one_text(text, "type what to look for")}
        without = listed(minus)
        with self.turn:
            found = self.library.search(**query, minus=without, top=12)
        return _answered(session, found)

    def ask_region(self, session: Session) -> Session:
        """The session with the answer to the last box marked on the photo, or the whole photo.  Raises ValueError."""
        if self.library is None:
            raise ValueError("no library is open")
        if session.photo is None:
            raise ValueError("open a photo in the tab Regions first")
        boxes = [region for region in session.regions if len(region) == 4]
        with self.turn:
            found = self.library.search(image=session.photo.image, box_px=boxes[-1] if boxes else None, top=12)
        return _answered(session, found)


def _answered(session: Session, found: Found) -> Session:
    earlier = session.earlier if session.found is None else (*session.earlier, session.found)[-20:]
    return replace(session, found=found, earlier=earlier)


def back(session: Session) -> Session:
    """The session with the answer before this one."""
    *earlier, last = session.earlier or (session.found,)
    return replace(session, found=last, earlier=tuple(earlier) if session.earlier else ())


def listed(typed: str) -> list[str]:
    """What was typed with commas between.  Raises ValueError where it is too much."""
    names = [name for part in re.split(r"[,;\n]", typed or "") if (name := " ".join(part.split()))]
    names = list(dict.fromkeys(names))
    if len(names) > MAX_NAMES or any(len(name) > MAX_CHARS for name in names):
        raise ValueError(f"at most {MAX_NAMES} names of {MAX_CHARS} letters")
    return names


def one_text(typed: str, missing: str) -> str:
    """What was typed as one text.  Raises ValueError(missing) where it is empty."""
    text = " ".join((typed or "").split())
    if not text:
        raise ValueError(missing)
    if len(text) > MAX_CHARS:
        raise ValueError(f"at most {MAX_CHARS} letters")
    return text


def numbers(typed: str) -> list[float]:
    """A region that was typed: 4 numbers or 2.  Raises ValueError."""
    try:
        found = [float(part) for part in re.split(r"[\s,;]+", typed.strip()) if part]
    except ValueError:
        raise ValueError(LAYOUT_ERROR) from None
    if len(found) not in (2, 4) or not np.isfinite(found).all():
        raise ValueError(LAYOUT_ERROR)
    return found


def heat_over(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The photo in gray under a map of colours, bright where `heat` (h, w) is high."""
    low, high = float(heat.min()), float(heat.max())
    share = (heat - low) / max(high - low, 1e-6)
    colours = (255 * matplotlib.colormaps["inferno"](share)[..., :3]).astype(np.uint8)
    over = Image.fromarray(colours).resize(image.size, Image.Resampling.BICUBIC)
    return Image.blend(image.convert("L").convert("RGB"), over, 0.6)


def outlined(row: Row, side_px: int = 480) -> Image.Image:
    """The photo of a row, from its thumbnail, with the region outlined."""
    image = Image.open(io.BytesIO(row.thumbnail)).convert("RGB")
    scale = side_px / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    x0, y0, x1, y1 = (np.array(row.box) * [*size, *size]).round().tolist()
    pen = ImageDraw.Draw(image)
    for outline, line in (("white", 8), ("#e4572e", 5)):
        pen.rectangle((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)), outline=outline, width=line)
    return image
