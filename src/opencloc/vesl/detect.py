"""What a detector is to the label engine (step 3), and how one is found by name.

OWL-ViT and OWLv2 are in `owl.py`, Grounding DINO in `grounding_dino.py`; your own is any callable of this shape.

Symbols: D detections of one image.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, Protocol, cast, runtime_checkable
from urllib.parse import parse_qsl

import numpy as np
import torch
from PIL import Image

from opencloc.devices import Precision, choose_device, computes_in_bf16

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


def load_detector(
    spec: str,
    *,
    resolution: int = 448,
    precision: Precision = "auto",
    device: str = "auto",
    score_threshold: float = 0.1,
) -> Detector:
    """The detector that `spec` names: a transformers model, or your own.

    `FILE.py:FACTORY` or, for an installed package, `package.module:FACTORY`, optionally with `?key=value&...`: the
    factory is called with those values as strings and returns a `Detector`.  The other parameters do not reach it.

    Anything else is the folder or hub id of an OWL-ViT, OWLv2 or (MM) Grounding DINO checkpoint.  It runs at
    `resolution` pixels on the long side and leaves out detections that score no more than `score_threshold`.

    Raises ValueError, naming `spec`, if it cannot be loaded.
    """
    try:
        if ":" in spec and not os.path.isdir(spec):
            return _user_detector(spec)
        where = choose_device(device)
        dtype: Dtype = "bf16" if computes_in_bf16(precision, where) else "fp32"
        return _transformers_detector(
            spec, resolution=resolution, dtype=dtype, device=where, score_threshold=score_threshold
        )
    except Exception as error:
        detail = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"detector {spec!r}: {detail}") from error


def _user_detector(spec: str) -> Detector:
    path, _, query = spec.partition("?")
    module_name, _, factory_name = path.rpartition(":")
    factory = getattr(_module(module_name), factory_name, None)
    if not callable(factory):
        raise ValueError(f"{module_name} has no callable {factory_name!r}")
    detector = factory(**dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))))
    if not callable(detector):
        raise ValueError(f"{factory_name} returned {type(detector).__name__}, not a callable")
    return cast(Detector, detector)


def _module(name: str) -> ModuleType:
    """The module of a file `NAME.py` or of an installed package."""
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or "/"):  # the module is there, something it imports is not
                raise
            raise ValueError(f"no module {name!r} is installed (a file is named with its path and .py)") from error
    if not os.path.isfile(name):
        raise FileNotFoundError(f"{name}: no such file")
    spec = importlib.util.spec_from_file_location(os.path.basename(name).removesuffix(".py"), name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _transformers_detector(
    path: str, *, resolution: int, dtype: Dtype, device: torch.device, score_threshold: float
) -> Detector:
    from opencloc.model.loading import load_config
    from opencloc.vesl.grounding_dino import GroundingDinoDetector
    from opencloc.vesl.owl import OwlDetector

    classes = {
        "owlvit": OwlDetector,
        "owlv2": OwlDetector,
        "grounding-dino": GroundingDinoDetector,
        "mm-grounding-dino": GroundingDinoDetector,
    }
    model_type = load_config(path).model_type
    if model_type not in classes:
        raise ValueError(f"is of type {model_type!r}; supported: {', '.join(classes)}")
    return classes[model_type](path, resolution=resolution, dtype=dtype, device=device, score_threshold=score_threshold)
