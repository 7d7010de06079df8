"""A detector by its name: a transformers checkpoint, or a function of your own."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import cast
from urllib.parse import parse_qsl

import torch

from opencloc.devices import Precision, choose_device, computes_in_bf16
from opencloc.model.loading import load_config
from opencloc.vesl.detect import Detector, Dtype
from opencloc.vesl.grounding_dino import GroundingDinoDetector
from opencloc.vesl.owl import OwlDetector


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
