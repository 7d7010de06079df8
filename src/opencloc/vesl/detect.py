"""What a detector is to the label engine (step 3): any callable of this shape.

OWL-ViT and OWLv2 are in `owl.py`, Grounding DINO in `grounding_dino.py`; `detectors.py` finds one by its name.

Symbols: D detections of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

Dtype = Literal["bf16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What a detector found on one image: D boxes, each with a score for one of the phrases asked for.

    The same box may come several times with different phrases; the filters keep one.  Boxes may reach over the image's
    border; they are clipped later.  `texts` are the region texts where they are not the phrases: a detector whose boxes
    show one object each says "person" for the phrase "people".

    Raises ValueError if the arrays differ in length.
    """

    boxes: np.ndarray  # (D, 4) XYXY float32, normalised to the image
    scores: np.ndarray  # (D,) float32 in [0, 1]
    phrase: np.ndarray  # (D,) int64, which of the image's phrases
    texts: np.ndarray | None = None  # (D,) strings

    def __post_init__(self) -> None:
        object.__setattr__(self, "boxes", np.asarray(self.boxes, dtype=np.float32).reshape(-1, 4))
        object.__setattr__(self, "scores", np.asarray(self.scores, dtype=np.float32).reshape(-1))
        object.__setattr__(self, "phrase", np.asarray(self.phrase, dtype=np.int64).reshape(-1))
        if self.texts is not None:
            object.__setattr__(self, "texts", np.asarray(self.texts, dtype=object).reshape(-1))
        counts = len(self.boxes), len(self.scores), len(self.phrase)
        if len({*counts, len(self if self.texts is None else self.texts)}) != 1:
            raise ValueError("{} boxes, {} scores, {} phrase numbers: must be equally many".format(*counts))

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, which: np.ndarray) -> Detections:
        """The detections chosen by a mask or by indices."""
        texts = None if self.texts is None else self.texts[which]
        return Detections(boxes=self.boxes[which], scores=self.scores[which], phrase=self.phrase[which], texts=texts)


def no_detections() -> Detections:
    """Nothing found."""
    return Detections(boxes=np.zeros((0, 4)), scores=np.zeros(0), phrase=np.zeros(0))


@runtime_checkable
class Detector(Protocol):
    """Any callable that finds phrases on images.

    `detector(images, phrases)` takes a batch of RGB images of any sizes and as many sequences of phrases: image i has
    its own `phrases[i]` (at least one, lower-case).  It returns one `Detections` per image.  Its `phrase` numbers count
    within `phrases[i]`; its boxes are normalised to the original image, with padding and resizing undone.

    The result for an image must not depend on the rest of the batch: after an exception the engine calls again with one
    image at a time.  Detections below the configured score may be left out.  Each worker process builds one detector
    and calls it from one thread.

    An optional attribute `model_id: str` (name and revision) is recorded with every shard.
    """

    def __call__(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> Sequence[Detections]: ...
