"""The sample: one image with its captions and regions, and what a source of samples is.

This file owns the contract between everything that makes samples (readers, generated scenes, mosaics) and everything
that uses them (training loader, label engine, evaluation).  It reads no files.

Symbols: R regions of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from opencloc.boxes import box_problem
from opencloc.errors import BadSample


def _no_boxes() -> np.ndarray:
    return np.zeros((0, 4), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with what is known about it.

    Raises `BadSample` on construction if a box is not finite, lies outside the image or is empty, if a region text
    is empty, or if boxes, texts and scores differ in number.
    """

    key: str
    image: Image.Image  # RGB, decoded
    captions: tuple[str, ...] = ()  # any number of captions of the whole image
    alt_text: str | None = None  # what the web page said, if it differs from the captions
    boxes: np.ndarray = field(default_factory=_no_boxes)  # (R, 4) XYXY float32, normalised to the image
    texts: tuple[str, ...] = ()  # R region texts
    scores: np.ndarray | None = None  # (R,) float32 in [0, 1]; None where boxes are human

    def __post_init__(self) -> None:
        boxes = np.asarray(self.boxes, dtype=np.float32).reshape(-1, 4)
        object.__setattr__(self, "boxes", boxes)
        if len(boxes) != len(self.texts) or (self.scores is not None and len(self.scores) != len(boxes)):
            count = "no" if self.scores is None else len(self.scores)
            raise BadSample(
                "boxes, texts and scores differ in number",
                self.key,
                f"{len(boxes)} boxes, {len(self.texts)} texts, {count} scores",
            )
        for number, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
            if 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1:
                continue
            if problem := box_problem(boxes[number]):  # else it is only within rounding of a sound box
                raise BadSample("bad box", self.key, problem)
        for number, text in enumerate(self.texts):
            if not text or text.isspace():
                raise BadSample("empty region text", self.key, f"box {boxes[number].tolist()}")


@runtime_checkable
class Source(Protocol):
    """Samples by number.  `source[i]` is a pure function of i: same number, same sample, in any process.

    `source[i]` raises `BadSample` for a sample that cannot be used and nothing else that one sample could cause.
    Sources are cheap to pickle (workers get a copy) and hold no open files across a fork.
    """

    @property
    def size(self) -> int | None:
        """How many samples there are: valid numbers are 0 ... size - 1.  None: endless, every number >= 0 is valid."""
        ...

    def __getitem__(self, index: int) -> Sample: ...


def class_names(samples: Sequence[Sample]) -> tuple[str, ...]:
    """The distinct region texts of some samples, sorted."""
    return tuple(sorted({text for sample in samples for text in sample.texts}))
