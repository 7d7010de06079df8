"""Encoders as the evaluation sees them: images, texts and boxes in, embeddings of one space out.

Five ways to embed a region, so that any CLIP-like checkpoint can be scored with the same boxes (`RegionWay`):

* `prompter` (`ClocEncoder`): the model's Prompter on the image tokens (paper section 3.2);
* `pool` (the same, with the `pool` Prompter): the tower's own pooling, its attention held to the region;
* `maskclip` (`MaskClipEncoder`): the mean over the region of what that pooling reads off each patch, its value path;
* `roi` (`RoiEncoder`): RoIAlign over the patch tokens, each pushed through the tower's pooling on its own;
* `crop` (`CropEncoder`): every box cut out of the original image and encoded as an image of its own.

All but `crop` need one pass for an image.  `prompter`, `pool` and `maskclip` also take masks.

By default images and crops are letterboxed alike for every encoder, so that all see the same pixels; a checkpoint that
was trained on squashed or centre-cropped images can be shown those instead (`View`), as its own paper scored it.  Boxes
are moved here from the image to the square that the model sees, and back.

Symbols: B images, P boxes or texts of one image, C texts, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from opencloc.boxes import Letterbox
from opencloc.images import crop, mask_square
from opencloc.model import towers
from opencloc.model.cloc import ClocConfig, ClocModel, ImageFeatures
from opencloc.model.loading import load_config, load_model, load_processor
from opencloc.model.processor import ClocProcessor
from opencloc.model.prompter import roi_align
from opencloc.model.prompts import Mask

RegionWay = Literal["prompter", "crop", "roi", "maskclip", "pool"]
View = Literal["letterbox", "squash", "centre"]
_WAYS = ", ".join(get_args(RegionWay))

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

    def encode_masks(self, encoded: EncodedImages, masks: Sequence[Sequence[np.ndarray]]) -> list[Tensor] | None:
        """For each image's P masks (height, width) their embeddings (P, E); None if this encoder takes no masks."""
        ...

    def ground(self, encoded: EncodedImages, texts: Sequence[Tensor]) -> list[Tensor] | None:
        """For each image's text embeddings (P, E) their boxes (P, 4); None if this encoder cannot ground."""
        ...


class _Towers:
    """What all share: a model in eval mode with its processor, and texts through its text tower."""

    def __init__(self, model: ClocModel, processor: ClocProcessor, *, name: str, view: View = "letterbox") -> None:
        self.name, self._model, self._processor = name, model, processor
        self._view: View = view

    @property
    def device(self) -> torch.device:
        return self._model.device

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "C E"]:
        parts = [
            self._model.encode_text(self._processor.tokenize(texts[i : i + TEXTS_AT_ONCE]).to(self.device))
            for i in range(0, len(texts), TEXTS_AT_ONCE)
        ]
        return torch.cat(parts)

    def encode_masks(self, encoded: EncodedImages, masks: Sequence[Sequence[np.ndarray]]) -> list[Tensor] | None:
        return None

    def ground(self, encoded: EncodedImages, texts: Sequence[Tensor]) -> list[Tensor] | None:
        return None

    def _in_square(self, mask: np.ndarray) -> Bool[Tensor, "H W"]:
        """A mask of the image over the square that the model sees."""
        return torch.from_numpy(mask if self._view == "squash" else mask_square(mask)).to(self.device)

    def _encode_squares(self, images: Sequence[Image.Image]) -> tuple[ImageFeatures, list[Letterbox]]:
        pixels, letterboxes = _see(self._processor, images, self._view)
        return self._model.encode_image(pixels.to(self.device)), letterboxes


class ClocEncoder(_Towers):
    """A model with its Prompter: the image is encoded once; boxes, masks and texts prompt its tokens."""

    def encode_images(self, images: Sequence[Image.Image]) -> EncodedImages:
        features, letterboxes = self._encode_squares(images)
        return EncodedImages(embedding=features.embedding, state=(features, letterboxes))

    def encode_regions(self, encoded: EncodedImages, boxes: Sequence[np.ndarray]) -> list[Tensor]:
        features, letterboxes = encoded.state
        squares = [_to_square(b, letterbox, self.device) for b, letterbox in zip(boxes, letterboxes, strict=True)]
        if not any(map(len, squares)):
            return [encoded.embedding.new_zeros(0, encoded.embedding.shape[1]) for _ in squares]
        return self._model.encode_regions(features, squares)

    def encode_masks(self, encoded: EncodedImages, masks: Sequence[Sequence[np.ndarray]]) -> list[Tensor] | None:
        prompts = [[Mask(self._in_square(mask)) for mask in of_image] for of_image in masks]
        if not any(prompts):
            return [encoded.embedding.new_zeros(0, encoded.embedding.shape[1]) for _ in prompts]
        return self._model.encode_regions(encoded.state[0], prompts)

    def ground(self, encoded: EncodedImages, texts: Sequence[Tensor]) -> list[Tensor] | None:
        if not (self._model.has_text_prompts and self._model.config.grounding_trained):
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


class MaskClipEncoder(_Towers):
    """The towers alone: a region is the area-weighted mean of the patches in the joint space by the value path.

    As MaskCLIP (Zhou et al. 2022, arXiv 2112.01071) reads patches.  The model has the `pool` Prompter.
    """

    def encode_images(self, images: Sequence[Image.Image]) -> EncodedImages:
        features, letterboxes = self._encode_squares(images)
        assert features.pool_input is not None
        patches = towers.patch_embeddings(self._model.clip, features.pool_input).float()
        return EncodedImages(embedding=features.embedding, state=(patches, features.grid, letterboxes))

    def encode_regions(self, encoded: EncodedImages, boxes: Sequence[np.ndarray]) -> list[Tensor]:
        patches, grid, letterboxes = encoded.state
        squares = [_to_square(rows, letterbox, self.device) for rows, letterbox in zip(boxes, letterboxes, strict=True)]
        pairs = zip(squares, patches, strict=True)
        return [F.normalize(coverage(rows, grid) @ of_image, dim=-1) for rows, of_image in pairs]

    def encode_masks(self, encoded: EncodedImages, masks: Sequence[Sequence[np.ndarray]]) -> list[Tensor] | None:
        patches, grid, _ = encoded.state
        regions = []
        for of_image, asked in zip(patches, masks, strict=True):
            weights = [F.adaptive_avg_pool2d(self._in_square(mask)[None].float(), grid).flatten() for mask in asked]
            rows = torch.stack(weights) @ of_image if weights else of_image[:0]
            regions.append(F.normalize(rows, dim=-1))
        return regions


ENCODERS = {
    "prompter": ClocEncoder,
    "crop": CropEncoder,
    "roi": RoiEncoder,
    "maskclip": MaskClipEncoder,
    "pool": ClocEncoder,
}


def load_encoder(
    path: str | Path,
    regions: RegionWay,
    *,
    name: str | None = None,
    device: str | torch.device = "cpu",
    view: View = "letterbox",
) -> Encoder:
    """The encoder in a folder (or of a hub id): a CLOC checkpoint, or a CLIP, SigLIP or SigLIP 2.

    `regions` says how boxes are embedded; `prompter` needs a CLOC checkpoint whose region part was trained.  `view`
    says how an image (or crop) becomes the square that the model sees: `letterbox`; `squash`, both sides resized, as
    SigLIP does; `centre`, the short side resized and the middle taken, as CLIP does, which regions can't be pooled
    from.  The name defaults to the folder's and the way.  Raises ValueError for anything else, naming the folder and
    what is possible, and as `model.loading` for what cannot be loaded.
    """
    config = check_regions(path, regions, view)
    model: Any  # transformers' wrappers hide the types of `to` and `float`
    if config.model_type == "cloc":
        model, processor = load_model(ClocModel, path), load_processor(path, ClocProcessor)
    else:
        model, processor = ClocModel.from_clip(path, prompter="pool"), ClocProcessor.from_clip(path)
    if regions in ("pool", "maskclip") and model.config.prompter != "pool":
        pooling = ClocConfig(clip_config=model.config.clip_config, prompter="pool")
        model = ClocModel(pooling, towers_model=model.clip)
    model.eval().float()  # checkpoints in half precision too: the run says what it computes in
    return ENCODERS[regions](
        model.to(device), processor, name=name or f"{Path(path).resolve().name}, {regions}", view=view
    )


def check_regions(path: str | Path, regions: RegionWay, view: View) -> Any:
    """The checkpoint's configuration, if regions can be embedded in this way; raises as `load_encoder`."""
    for what, value, kind in (("regions", regions, RegionWay), ("view", view, View)):
        if value not in get_args(kind):
            raise ValueError(f"{what} is {value!r}, must be one of {', '.join(get_args(kind))}")
    if view == "centre" and regions != "crop":
        raise ValueError(
            f"view='centre' hides what lies at the edges of an image: regions must be 'crop', not {regions!r}"
        )
    config = load_config(path)
    if regions == "prompter":
        if config.model_type != "cloc":
            raise ValueError(
                f"{path} holds a {config.model_type!r} model, which has no Prompter: choose another way of {_WAYS}, "
                "or give a CLOC checkpoint"
            )
        if not _regions_trained(config):
            raise ValueError(f"{path}: its Prompter was never trained (region weight 0): choose another way of {_WAYS}")
    return config


def natural_way(path: str | Path) -> RegionWay:
    """How a checkpoint embeds regions if nothing is said: by its Prompter where it has a trained one, else by crops."""
    config = load_config(path)
    return "prompter" if config.model_type == "cloc" and _regions_trained(config) else "crop"


def _regions_trained(config: Any) -> bool:
    return getattr(config, "regions_trained", True)


def _see(
    processor: ClocProcessor, images: Sequence[Image.Image], view: View
) -> tuple[Float[Tensor, "B 3 S S"], list[Letterbox]]:
    """Normalised pixels of the square that the model sees, and for each image where it lies in the square."""
    if view == "letterbox":
        return processor.letterbox(images)
    side = processor.image_size
    if view == "squash":
        squares = [image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for image in images]
    else:
        squares = [centre_square(image, side) for image in images]
    fills = Letterbox(width_px=1, height_px=1)  # squashed, an image fills the square; of `centre` no boxes are asked
    stacked = torch.from_numpy(np.stack([np.asarray(square) for square in squares]))
    return processor.normalize(stacked), [fills] * len(squares)


def centre_square(image: Image.Image, side_px: int) -> Image.Image:
    """The middle of the image after its short side was resized (bicubic) to `side_px`: CLIP's own preprocessing."""
    short = min(image.size)
    width, height = (max(side_px, int(side_px * length / short)) for length in image.size)
    left, top = (width - side_px) // 2, (height - side_px) // 2
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + side_px, top + side_px))


def _to_square(boxes: np.ndarray, letterbox: Letterbox, device: torch.device) -> Float[Tensor, "P 4"]:
    """Boxes of the image in the frame of the square; samples allow boxes a hair outside, the model doesn't."""
    return letterbox.to_square(torch.from_numpy(boxes).float().clamp(0, 1)).clamp(0, 1).to(device)


def coverage(boxes: Float[Tensor, "P 4"], grid: tuple[int, int]) -> Float[Tensor, "P N"]:
    """The share of every patch that each box covers, patches row by row."""
    along = []
    for axis, count in ((1, grid[0]), (0, grid[1])):
        edges = torch.arange(count, device=boxes.device)
        low, high = boxes[:, axis, None] * count, boxes[:, axis + 2, None] * count
        along.append((torch.minimum(high, edges + 1) - torch.maximum(low, edges)).clamp_min(0))
    return (along[0][:, :, None] * along[1][:, None, :]).flatten(1)


def _batches(images: Iterator[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    while batch := list(islice(images, size)):
        yield batch
