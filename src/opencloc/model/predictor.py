"""Predictor: regions of photos in a few lines.  PIL images, file paths, pixel boxes and strings in, numpy out.

Owns the step from a user's pixels to the model's square and back, and nothing else: the image is encoded once by
`encode`, everything after prompts what was encoded.

Symbols: P prompts, C names, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from opencloc.boxes import Letterbox
from opencloc.model.cloc import ClocModel, ImageFeatures
from opencloc.model.processor import ClocProcessor
from opencloc.model.prompts import Box, Mask, Point, Prompt, Text

Coordinates = Sequence[Sequence[float]] | np.ndarray  # (P, 4) boxes or (P, 2) points


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """One encoded image: its features and where it lies in the model's square."""

    features: ImageFeatures
    letterbox: Letterbox


class Predictor:
    """A CLOC model with its processor.

        predictor = Predictor.from_pretrained("runs/quickstart/cloc/model")
        photo = predictor.encode("dogs.jpg")
        names, scores = predictor.classify(photo, boxes_px=[[10, 20, 200, 180]], names=["dog", "cat"])
        boxes_px = predictor.ground(photo, ["a dog"])

    Boxes are XYXY in pixels of the image given.
    """

    def __init__(self, model: ClocModel, processor: ClocProcessor) -> None:
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Predictor:
        """The predictor for a CLOC checkpoint (a folder or hub id)."""
        model: Any = ClocModel.from_pretrained(folder, use_safetensors=True)
        return cls(model.to(device), ClocProcessor.from_pretrained(folder))

    @torch.inference_mode()
    def encode(self, image: Image.Image | str | Path) -> EncodedImage:
        """The image encoded, once for all prompts.  Raises ValueError naming a file that is no readable image."""
        if not isinstance(image, Image.Image):
            try:
                with Image.open(image) as file:
                    image = file.convert("RGB")
            except (UnidentifiedImageError, SyntaxError, OSError) as error:
                if isinstance(error, FileNotFoundError):
                    raise
                raise ValueError(f"{image} is not a readable image: {error}") from error
        pixels, (letterbox,) = self.processor.letterbox([image])
        return EncodedImage(features=self.model.encode_image(pixels.to(self.model.device)), letterbox=letterbox)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "C E"]:
        """L2-normalised text embeddings."""
        return self.model.encode_text(self.processor.tokenize(texts).to(self.model.device))

    @torch.inference_mode()
    def embed(
        self,
        image: EncodedImage,
        *,
        boxes_px: Coordinates = (),
        points_px: Coordinates = (),
        masks: Sequence[np.ndarray] = (),
        texts: Sequence[str] = (),
    ) -> Float[Tensor, "P E"]:
        """L2-normalised region embeddings, one per prompt: boxes, then points, masks (H, W of the image) and texts.

        Raises ValueError for a box or point outside the image, an empty box or mask, a mask of another size.
        """
        prompts: list[Prompt] = [Box(*box) for box in self._to_square(image, boxes_px, 4)]
        prompts += [Point(*point) for point in self._to_square(image, points_px, 2)]
        prompts += [self._mask(image, mask) for mask in masks]
        if texts:
            prompts += [Text(embedding) for embedding in self.embed_texts(texts)]
        return self.model.encode_regions(image.features, [prompts])[0]

    def classify(
        self, image: EncodedImage, boxes_px: Coordinates, names: Sequence[str]
    ) -> tuple[list[str], np.ndarray]:
        """(best name of each box, probabilities (P, C) over the names)."""
        regions, classes = self.embed(image, boxes_px=boxes_px), self.embed_texts(names)
        scale = self.model.region_logit_scale.detach().exp()
        probabilities = (scale * regions @ classes.T).softmax(-1).cpu().numpy()
        return [names[int(i)] for i in probabilities.argmax(-1)], probabilities

    @torch.inference_mode()
    def ground(self, image: EncodedImage, texts: Sequence[str]) -> np.ndarray:
        """The box of each text, (P, 4) in pixels of the image."""
        boxes = self.model.ground(image.features, self.embed_texts(texts)[None])[0].float().cpu()
        return image.letterbox.to_image(boxes).numpy() * self._size(image.letterbox, 4)

    def _to_square(self, image: EncodedImage, coordinates_px: Coordinates, count: int) -> list[list[float]]:
        """Pixel boxes or points of the image, checked, in the square."""
        if len(coordinates_px) == 0:
            return []
        values = np.asarray(coordinates_px, dtype=np.float64).reshape(len(coordinates_px), -1)
        size = self._size(image.letterbox, count)
        what = "box" if count == 4 else "point"
        for i, row in enumerate(values):
            sound = len(row) == count and np.isfinite(row).all() and (row >= 0).all() and (row <= size).all()
            if not sound or (count == 4 and (row[2:] <= row[:2]).any()):
                raise ValueError(
                    f"{what} {i} is {row.tolist()}: needs {count} numbers "
                    f"{'with x0 < x1, y0 < y1 ' if count == 4 else ''}inside the image of "
                    f"{image.letterbox.width_px} x {image.letterbox.height_px} pixels"
                )
        return image.letterbox.to_square(values / size).tolist()

    def _mask(self, image: EncodedImage, mask: np.ndarray) -> Mask:
        letterbox = image.letterbox
        if mask.shape != (letterbox.height_px, letterbox.width_px):
            raise ValueError(
                f"a mask of shape {mask.shape} on an image of height {letterbox.height_px}, width {letterbox.width_px}"
            )
        long_px = max(mask.shape)
        top, left = (long_px - mask.shape[0]) // 2, (long_px - mask.shape[1]) // 2
        square = torch.zeros(long_px, long_px)
        square[top : top + mask.shape[0], left : left + mask.shape[1]] = torch.from_numpy(mask).float()
        return Mask(square)

    @staticmethod
    def _size(letterbox: Letterbox, count: int) -> np.ndarray:
        return np.tile([letterbox.width_px, letterbox.height_px], count // 2).astype(np.float64)
