"""What a detector is to the label engine (VESL step 3), and how one is found by name.

Owns the `Detector` protocol, the value it returns and `load_detector`.  It knows no model: OWL-ViT and OWLv2 are in
`owl.py`, Grounding DINO in `grounding_dino.py`, and the user's own detector is any callable with this shape.  What
becomes of the detections is decided in `filters.py`.

Symbols: D detections of one image.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast, runtime_checkable
from urllib.parse import parse_qsl

import numpy as np
import torch
from PIL import Image

Dtype = Literal["bf16", "fp32"]
AutoDtype = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What a detector found on one image: D boxes, each with a score for one of the phrases asked for.

    The same box may occur several times with different phrases; `filters.best_phrase` keeps one.  Boxes may reach
    over the image's border, they are clipped later.

    Raises ValueError if the three arrays don't fit each other.
    """

    boxes: np.ndarray  # (D, 4) XYXY float32, normalised to the image
    scores: np.ndarray  # (D,) float32 in [0, 1]
    phrase: np.ndarray  # (D,) int64, which of the image's phrases

    def __post_init__(self) -> None:
        object.__setattr__(self, "boxes", np.asarray(self.boxes, dtype=np.float32).reshape(-1, 4))
        object.__setattr__(self, "scores", np.asarray(self.scores, dtype=np.float32).reshape(-1))
        object.__setattr__(self, "phrase", np.asarray(self.phrase, dtype=np.int64).reshape(-1))
        counts = len(self.boxes), len(self.scores), len(self.phrase)
        if len(set(counts)) != 1:
            raise ValueError("{} boxes, {} scores, {} phrase numbers: must be equally many".format(*counts))

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, which: np.ndarray) -> Detections:
        """The detections chosen by a mask or by indices."""
        return Detections(boxes=self.boxes[which], scores=self.scores[which], phrase=self.phrase[which])


def no_detections() -> Detections:
    """Nothing found."""
    return Detections(boxes=np.zeros((0, 4)), scores=np.zeros(0), phrase=np.zeros(0))


@runtime_checkable
class Detector(Protocol):
    """Any callable that finds phrases on images.  Your own detector needs this one method and nothing else.

    `detector(images, phrases)` takes a batch of RGB images of any sizes and as many sequences of phrases, image i
    having its own `phrases[i]` (at least one, lower-case).  It returns one `Detections` per image, whose `phrase`
    numbers count within `phrases[i]` and whose boxes are normalised to the original image, padding and resizing
    undone.

    The result for an image must not depend on the rest of the batch: the engine regroups images freely, and after an
    exception it calls again with one image at a time to find the one at fault.  Scores below the configured threshold
    may be left out to save copying.  The detector is built once per worker process and called from one thread.

    An optional attribute `model_id: str` (name and revision) is recorded with every shard.
    """

    def __call__(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> Sequence[Detections]: ...


def load_detector(
    spec: str,
    *,
    resolution: int = 448,
    dtype: AutoDtype = "auto",
    device: str = "auto",
    score_threshold: float = 0.1,
) -> Detector:
    """The detector that `spec` names: a transformers model, or the user's own.

    `package.module:factory`, optionally `?key=value&...`: the factory is called with those values as string keyword
    arguments and returns a `Detector`; the other parameters here don't reach it.  The module is imported from the
    current folder or the installed packages.

    Anything else is a local folder or hub id of an OWL-ViT, OWLv2 or (MM) Grounding DINO checkpoint, run at
    `resolution` pixels on the long side in `dtype` (`auto`: bf16 on a GPU, fp32 on the CPU), leaving out detections
    that score no more than `score_threshold`.

    Raises ValueError, naming `spec`, if there is no such module, factory or model, or the model is of another type.
    """
    if ":" in spec and not os.path.exists(spec):
        return _user_detector(spec)
    where = resolve_device(device)
    if dtype == "auto":
        dtype = "bf16" if where.type == "cuda" else "fp32"  # many CPUs emulate bf16, a hundred times slower
    return _transformers_detector(
        spec, resolution=resolution, dtype=dtype, device=where, score_threshold=score_threshold
    )


def resolve_device(device: str) -> torch.device:
    """`auto` as the first CUDA device, else the CPU; any other name as torch reads it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """The torch type of a configured precision."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]


def _user_detector(spec: str) -> Detector:
    path, _, query = spec.partition("?")
    module_name, _, factory_name = path.partition(":")
    if os.getcwd() not in sys.path:  # as uvicorn and pytest do; the installed command has no current folder there
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not module_name.startswith(error.name or "/"):  # the module is there, something it imports isn't
            raise
        raise ValueError(f"detector {spec!r}: no module {module_name!r}") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise ValueError(f"detector {spec!r}: {module_name} has no callable {factory_name!r}")
    arguments = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    detector = factory(**arguments)
    if not callable(detector):
        raise ValueError(f"detector {spec!r}: {factory_name} returned {type(detector).__name__}, not a callable")
    return cast(Detector, detector)


def _transformers_detector(
    path: str, *, resolution: int, dtype: Dtype, device: torch.device, score_threshold: float
) -> Detector:
    from transformers import AutoConfig

    from opencloc.vesl.grounding_dino import GroundingDinoDetector
    from opencloc.vesl.owl import OwlDetector

    classes = {
        "owlvit": OwlDetector,
        "owlv2": OwlDetector,
        "grounding-dino": GroundingDinoDetector,
        "mm-grounding-dino": GroundingDinoDetector,
    }
    try:
        model_type = AutoConfig.from_pretrained(path).model_type
    except (OSError, ValueError) as error:
        raise ValueError(
            f"detector {path!r} is neither package.module:factory nor a transformers checkpoint: {error}"
        ) from error
    if model_type not in classes:
        raise ValueError(f"detector {path!r} is of type {model_type!r}; supported: {', '.join(classes)}")
    return classes[model_type](path, resolution=resolution, dtype=dtype, device=device, score_threshold=score_threshold)
