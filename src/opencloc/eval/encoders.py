"""Encoders as the evaluation sees them: images, texts and boxes in, embeddings of one space out.

Three ways to embed a region, so that any CLIP-like checkpoint can be scored with the same boxes:

* `ClocEncoder`: the model's Prompter on the image tokens (paper section 3.2);
* `CropEncoder`: every box cut out of the original image and encoded as an image of its own;
* `RoiEncoder`: RoIAlign over the patch tokens, each pushed through the tower's own pooling into the joint space.

Images and crops are letterboxed alike for every encoder.  This file owns the move of boxes from the image to the square
that the model sees and back; it knows nothing of tasks or scores.

Symbols: B images, P boxes or texts of one image, C texts, E width of the joint embedding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from opencloc.boxes import Letterbox
from opencloc.model.cloc import ClocModel, ImageFeatures
from opencloc.model.processor import ClocProcessor
from opencloc.model.roi import roi_align

RegionWay = Literal["prompter", "crop", "roi"]

TEXTS_AT_ONCE = 256
CROPS_AT_ONCE = 64
ROI_SIZE = 4  # bins per side; their mean is the region


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """A batch of encoded images: all that any number of boxes and texts needs."""

    embedding: Float[Tensor, "B E"]  # of the whole images, L2-normalised
    state: Any  # the encoder's own: tokens, feature maps, or the images themselves


@runtime_checkable
class Encoder(Protocol):
    """What the evaluation needs of an encoder.  Boxes are XYXY, normalised to the image; embeddings L2-normalised.

    `encode_images` runs once per image, then `encode_regions` and `ground` any number of times on what it returned.
    Models are expected in eval mode.
    """

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    def encode_images(self, images: Sequence[Image.Image]) -> EncodedImages: ...
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "C E"]: ...
    def encode_regions(self, encoded: EncodedImages, boxes: Sequence[np.ndarray]) -> list[Tensor]:
        """For each image's boxes (P, 4) their embeddings (P, E)."""
        ...

    def ground(self, encoded: EncodedImages, texts: Sequence[Tensor]) -> list[Tensor] | None:
        """For each image's text embeddings (P, E) their boxes (P, 4); None if this encoder cannot ground."""
        ...


class _Towers:
    """What the three share: a model in eval mode with its processor, and texts through its text tower."""

    def __init__(self, model: ClocModel, processor: ClocProcessor, *, name: str) -> None:
        self.name, self._model, self._processor = name, model, processor

    @property
    def device(self) -> torch.device:
        return self._model.device

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "C E"]:
        parts = [
            self._model.encode_text(self._processor.tokenize(texts[i : i + TEXTS_AT_ONCE]).to(self.device))
            for i in range(0, len(texts), TEXTS_AT_ONCE)
        ]
        return torch.cat(parts)

    def _encode_squares(self, images: Sequence[Image.Image]) -> tuple[ImageFeatures, list[Letterbox]]:
        pixels, letterboxes = self._processor.letterbox(images)
        return self._model.encode_image(pixels.to(self.device)), letterboxes


class ClocEncoder(_Towers):
    """A CLOC model with its Prompter: the image is encoded once, boxes and texts prompt its tokens."""

    def encode_images(self, images: Sequence[Image.Image]) -> EncodedImages:
        features, letterboxes = self._encode_squares(images)
        return EncodedImages(embedding=features.embedding, state=(features, letterboxes))

    def encode_regions(self, encoded: EncodedImages, boxes: Sequence[np.ndarray]) -> list[Tensor]:
        features, letterboxes = encoded.state
        squares = [_to_square(b, letterbox, self.device) for b, letterbox in zip(boxes, letterboxes, strict=True)]
        if not any(map(len, squares)):
            return [encoded.embedding.new_zeros(0, encoded.embedding.shape[1]) for _ in squares]
        return self._model.encode_regions(features, squares)

    def ground(self, encoded: EncodedImages, texts: Sequence[Tensor]) -> list[Tensor] | None:
        if not self._model.has_text_prompts:
            return None
        features, letterboxes = encoded.state
        width = encoded.embedding.shape[1]
        padded = encoded.embedding.new_zeros(len(texts), max([1, *map(len, texts)]), width)
        for row, embeddings in zip(padded, texts, strict=True):
            if len(embeddings):
                row[: len(embeddings)] = embeddings
        boxes = self._model.ground(features, padded).float()
        return [
            letterbox.to_image(found[: len(embeddings)])
            for letterbox, found, embeddings in zip(letterboxes, boxes, texts, strict=True)
        ]


class CropEncoder(_Towers):
    """The towers alone: a region is its box cut out of the original image, letterboxed and encoded as an image.

    The box is rounded to whole pixels, at least one, without any context around it; a long box keeps its shape.
    """

    def encode_images(self, images: Sequence[Image.Image]) -> EncodedImages:
        features, _ = self._encode_squares(images)
        return EncodedImages(embedding=features.embedding, state=list(images))

    def encode_regions(self, encoded: EncodedImages, boxes: Sequence[np.ndarray]) -> list[Tensor]:
        crops = (crop(image, box) for image, rows in zip(encoded.state, boxes, strict=True) for box in rows)
        parts = [encoded.embedding[:0]]
        for batch in _batches(crops, CROPS_AT_ONCE):
            parts.append(self._encode_squares(batch)[0].embedding)
        return list(torch.cat(parts).split([len(rows) for rows in boxes]))

    def ground(self, encoded: EncodedImages, texts: Sequence[Tensor]) -> None:
        return None


class RoiEncoder(_Towers):
    """The towers alone: a region is the mean of RoIAlign (4 x 4 bins) over the dense embeddings of the image.

    Dense embeddings are the patch tokens, each on its own through the tower's pooling and projection.
    """

    def encode_images(self, images: Sequence[Image.Image]) -> EncodedImages:
        features, letterboxes = self._encode_squares(images)
        dense = self._model.dense_embedding(features).float()
        maps = dense.transpose(1, 2).unflatten(2, features.grid)  # (B, E, rows, columns)
        return EncodedImages(embedding=features.embedding, state=(maps, letterboxes))

    def encode_regions(self, encoded: EncodedImages, boxes: Sequence[np.ndarray]) -> list[Tensor]:
        maps, letterboxes = encoded.state
        regions = []
        for feature_map, letterbox, rows in zip(maps, letterboxes, boxes, strict=True):
            square = _to_square(rows, letterbox, self.device)
            bins = roi_align(feature_map[None], square[None], ROI_SIZE)[0]
            regions.append(F.normalize(bins.mean((-2, -1)), dim=-1))
        return regions

    def ground(self, encoded: EncodedImages, texts: Sequence[Tensor]) -> None:
        return None


def load_encoder(
    path: str | Path, regions: RegionWay, *, name: str | None = None, device: str | torch.device = "cpu"
) -> Encoder:
    """The encoder in a folder: a CLOC checkpoint, or a CLIP, SigLIP or SigLIP 2 one in transformers' format.

    `regions` says how boxes are embedded; `prompter` needs a CLOC checkpoint.  The name defaults to the folder's and
    the way.  Nothing is fetched.  Raises ValueError for anything else, naming the folder and what is possible.
    """
    folder = Path(path)
    if regions not in get_args(RegionWay):
        raise ValueError(f"regions is {regions!r}, must be one of {', '.join(get_args(RegionWay))}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no checkpoint folder: there is no config.json in it")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    model: Any  # transformers' wrappers hide the types of `to` and `float`
    if kind == "cloc":
        model, processor = ClocModel.from_pretrained(folder), ClocProcessor.from_pretrained(folder)
    elif regions == "prompter":
        raise ValueError(
            f"{folder} holds a {kind!r} model, which has no Prompter: choose regions='crop' or 'roi', "
            "or give a CLOC checkpoint"
        )
    else:
        model, processor = ClocModel.from_clip(folder), ClocProcessor.from_clip(folder)
    model.eval().float()  # checkpoints in half precision too: the run says what it computes in
    encoder = {"prompter": ClocEncoder, "crop": CropEncoder, "roi": RoiEncoder}[regions]
    return encoder(model.to(device), processor, name=name or f"{folder.resolve().name}, {regions}")


def crop(image: Image.Image, box: np.ndarray) -> Image.Image:
    """The box (4,), normalised to the image, cut out at whole pixels: rounded to the nearest, at least one each way."""
    left, right = _whole_pixels(float(box[0]), float(box[2]), image.width)
    top, bottom = _whole_pixels(float(box[1]), float(box[3]), image.height)
    return image.crop((left, top, right, bottom))


def _whole_pixels(low: float, high: float, size_px: int) -> tuple[int, int]:
    first = min(max(round(low * size_px), 0), size_px - 1)
    return first, min(max(round(high * size_px), first + 1), size_px)


def _to_square(boxes: np.ndarray, letterbox: Letterbox, device: torch.device) -> Float[Tensor, "P 4"]:
    """Boxes of the image in the frame of the square; samples allow boxes a hair outside, the model doesn't."""
    return letterbox.to_square(torch.from_numpy(boxes).float().clamp(0, 1)).clamp(0, 1).to(device)


def _batches(images: Iterator[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    while batch := list(islice(images, size)):
        yield batch
