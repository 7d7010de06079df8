"""Features: tars that hold, in place of images, what a frozen vision tower made of them (`opencloc data features`).

A sample is `KEY.features.safetensors` and `KEY.json`, the latter as beside an image.  The former holds, in float16,

| tensor       | shape  | meaning |
|--------------|--------|---------|
| `tokens`     | (N, D) | patch tokens before pooling and projection |
| `embedding`  | (E,)   | of the whole image, L2-normalised |
| `pool_input` | (L, D) | CLIP for `pool` and `pool_cross` alone: what the tower's pooling reads |
| `size_px`    | (2,)   | width and height of the image, in int32, which say where it lies in the square |

`features.json` beside the tars says which tower made them.  Only training on that frozen tower reads them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from opencloc import files
from opencloc.config import Count, Strict, from_json
from opencloc.data.sample import Record
from opencloc.data.tars.shards import Shards, ShardsConfig
from opencloc.errors import BadSample
from opencloc.model.outputs import ImageFeatures

INFO = "features.json"


@dataclass(frozen=True, kw_only=True)
class FeaturesInfo(Strict):
    """What `features.json` says: how the features beside it were made."""

    model: str
    """The checkpoint, as it was named."""
    vision_tower: str
    """Hash of the weights of its vision tower (`opencloc.model.fingerprint`)."""
    image_size: Count
    """Side of the square in pixels."""
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    grid: tuple[Count, Count]
    """Rows and columns of patches."""
    shapes: dict[str, tuple[Count, ...]]
    """Of each tensor of an image."""
    dtype: Literal["float16"] = "float16"
    """In which they are stored."""
    precision: Literal["bf16", "fp32"]
    """In which the tower computed."""
    data: str
    """The source whose images were encoded."""
    num_images: Count
    """How many of it, those included that could not be used."""


@dataclass(frozen=True, kw_only=True)
class EncodedSample(Record):
    """What is known about an image, and its features in place of its pixels."""

    size_px: tuple[int, int]  # width and height of the image
    features: ImageFeatures  # B = 1, float16


class Features(Shards):
    """The encoded samples of tars by number, as `Shards` has images.

    `source[i]` raises `BadSample` ("broken features") also for features that are not as `info` says.  Raises as
    `Shards`, `FileNotFoundError` for tars without `features.json`, and `ValueError` if the tars of several folders were
    not made in one way, or if `config.image_px` is not the size that their images had.
    """

    def __init__(self, location: str | Sequence[str], config: ShardsConfig | None = None) -> None:
        super().__init__(location, config)
        folders = list(dict.fromkeys(map(os.path.dirname, self.urls)))
        self.info, *others = map(read_info, folders)
        for folder, other in zip(folders[1:], others, strict=True):
            if how_made(other) != how_made(self.info):
                raise ValueError(f"{folder} and {folders[0]} hold features that were not made in one way: see {INFO}")
        if (wanted := self.config.image_px) not in (None, self.info.image_size):
            raise ValueError(f"{location}: features of images of {self.info.image_size} pixels, {wanted} are needed")

    def __getitem__(self, index: int) -> EncodedSample:  # pyright: ignore[reportIncompatibleMethodOverride]
        key, where, data, record = self._stored(index)
        width, height, features = self._decode(data, where)
        return EncodedSample(key=key, size_px=(width, height), features=features, where=where, **record)

    def _decode(self, data: bytes, where: str) -> tuple[int, int, ImageFeatures]:
        """(width, height, features) of an image."""
        try:
            found = load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise BadSample("broken features", where, str(error)) from error
        shapes = {name: (*value.shape, value.dtype) for name, value in found.items()}
        expected = {name: (*shape, torch.float16) for name, shape in self.info.shapes.items()}
        if shapes != expected | {"size_px": (2, torch.int32)} or min(size := found.pop("size_px").tolist()) < 1:
            raise BadSample("broken features", where, f"holds {shapes}, not what {INFO} says")
        if not all(end.isfinite() for value in found.values() for end in value.aminmax()):  # NaN is both
            raise BadSample("broken features", where, "holds numbers that are not finite")
        return *size, ImageFeatures(grid=self.info.grid, **{name: value[None] for name, value in found.items()})


def read_info(folder: str) -> FeaturesInfo:
    """What the `features.json` of a folder says.  Raises `FileNotFoundError`, or `ValueError` if it is damaged."""
    path = f"{folder or '.'}/{INFO}"
    try:
        return from_json(FeaturesInfo, files.read_bytes(path), path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: not there; a folder of features is one that `opencloc data features` has finished"
        ) from None


def how_made(info: FeaturesInfo) -> dict[str, object]:
    """What features must have in common to be trained on together: all but the names of model and data."""
    return {name: value for name, value in vars(info).items() if name not in ("model", "data", "num_images")}
