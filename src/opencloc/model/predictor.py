"""Predictor: regions of photos in a few lines.  Photos, pixel boxes and strings in, embeddings, names and boxes out.

The image is encoded once by `encode`; everything after it prompts what was encoded.

Symbols: P prompts, C names, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from cachetools import LRUCache
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from opencloc.boxes import Letterbox, clipped_px
from opencloc.devices import choose_device
from opencloc.images import as_array, as_mask, mask_square, open_image
from opencloc.model.cloc import ClocModel, ImageFeatures
from opencloc.model.loading import load_config, load_model, load_processor
from opencloc.model.processor import ClocProcessor
from opencloc.model.prompts import Box, Mask, Point, Prompt, Text
from opencloc.texts import canonical, class_name

IMAGES_AT_ONCE = 16
TEXTS_AT_ONCE = 256
TEXTS_KEPT = 16_384  # embeddings of texts in memory: 64 MB at E = 1,024
COLOURS = ("#c1272d", "#0071bc", "#007a3d", "#93278f", "#a05a00", "#2e3192")
SMALLEST = 1 / 64  # side of a box, of the square

# What `ground` compares a text with: windows of the image at three scales, and everyday names (COCO's classes).
WINDOWS = [
    [x * step, y * step, x * step + 2 * step, y * step + 2 * step]
    for step in (1 / 2, 1 / 4, 1 / 8)
    for y in range(round(1 / step) - 1)
    for x in range(round(1 / step) - 1)
]
EVERYDAY = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush"
)


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """One encoded image: its features, its pixels (RGB, upright) and where they lie in the model's square."""

    features: ImageFeatures
    image: Image.Image
    letterbox: Letterbox


def load(path: str | Path, device: str = "cpu") -> Predictor:
    """The `Predictor` of a folder or hub id: a CLOC checkpoint, or any CLIP, SigLIP or SigLIP 2 checkpoint.

    `tiny` is a small CLOC model of generated scenes that comes with the package; a folder of that name comes first.

    The latter have no Prompter: boxes, points and masks are embedded by the tower's own pooling, drawn to the region,
    and texts cannot be grounded.  `device` is cpu, cuda, cuda:NUMBER or auto.
    """
    return Predictor.from_pretrained(path, device)


class Predictor:
    """A model with its processor, for photos and pixels.

        predictor = opencloc.load("tiny")
        photo = predictor.encode("dogs.jpg")
        names, probabilities = predictor.classify(photo, boxes_px=[[10, 20, 200, 180]], names=["dog", "cat"])
        boxes_px, scores = predictor.ground(photo, ["a dog", "a unicorn"])

    Boxes are XYXY, points XY, in pixels of the image as viewers show it.  A box that reaches at most 1 pixel or 1 % of
    the side over an edge is clipped.  A string is one text, never a list of letters; white space in texts is folded.
    Embeddings are ordinary tensors on the model's device, without gradients, and can be trained on.
    """

    def __init__(self, model: ClocModel, processor: ClocProcessor) -> None:
        self.model, self.processor = model.eval(), processor
        self._texts: LRUCache[str, Tensor] = LRUCache(TEXTS_KEPT)

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "cpu") -> Predictor:
        """As `opencloc.load`."""
        place = choose_device(str(device))
        model: Any
        if load_config(path).model_type == "cloc":
            model, processor = load_model(ClocModel, path), load_processor(path, ClocProcessor)
        else:
            model, processor = ClocModel.from_clip(path, prompter="pool"), ClocProcessor.from_clip(path)
        return cls(model.float().to(place), processor)

    # -- encoding ------------------------------------------------------------------------------------------------

    @overload
    def encode(self, image: list[Any] | tuple[Any, ...]) -> list[EncodedImage]: ...
    @overload
    def encode(self, image: Any) -> EncodedImage: ...

    @torch.no_grad()
    def encode(self, image: Any) -> EncodedImage | list[EncodedImage]:
        """The image encoded, once for all prompts; for a list of images a list.

        An image is a PIL image, a path, bytes of a file, a uint8 array (H, W, 3) or (H, W), or a uint8 tensor
        (3, H, W).  EXIF orientation is applied.  Raises as `opencloc.images.open_image` does.
        """
        if not isinstance(image, list | tuple):
            return self.encode([image])[0]
        encoded: list[EncodedImage] = []
        for start in range(0, len(image), IMAGES_AT_ONCE):
            photos = [open_image(one) for one in image[start : start + IMAGES_AT_ONCE]]
            pixels, letterboxes = self.processor.letterbox(photos)
            features = self.model.encode_image(pixels.to(self.model.device))
            _check_embeddings(features.embedding, "image")
            for i, (photo, letterbox) in enumerate(zip(photos, letterboxes, strict=True)):
                own = features.map(lambda x, i=i: x[i : i + 1])
                encoded.append(EncodedImage(features=own, image=photo, letterbox=letterbox))
        return encoded

    @torch.no_grad()
    def embed_texts(self, texts: str | Sequence[str]) -> Float[Tensor, "C E"]:
        """L2-normalised text embeddings.  They are kept, so that the same names cost nothing the next time.

        Raises ValueError for an empty text, TypeError for what is no string.
        """
        wanted = _texts(texts)
        found = {text: self._texts[text] for text in wanted if text in self._texts}
        missing = [text for text in dict.fromkeys(wanted) if text not in found]
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            chunk = missing[start : start + TEXTS_AT_ONCE]
            embeddings = self.model.encode_text(self.processor.tokenize(chunk).to(self.model.device))
            _check_embeddings(embeddings, "text")
            found.update(zip(chunk, embeddings.unbind(), strict=True))
        self._texts.update(found)
        if not wanted:
            return torch.zeros(0, self.model.embed_dim, device=self.model.device)
        return torch.stack([found[text] for text in wanted])

    @torch.no_grad()
    def embed(
        self,
        image: EncodedImage,
        prompts: Sequence[Prompt] = (),
        *,
        boxes_px: Any = (),
        points_px: Any = (),
        masks: Sequence[Any] = (),
        texts: str | Sequence[str] = (),
    ) -> Float[Tensor, "P E"]:
        """L2-normalised region embeddings, one per prompt.

        `prompts`: any mix of `Box` and `Point` in pixels, `Mask` (as `opencloc.images.as_mask` takes it), `Text` of a
        string or an embedding, and tuples of these, which make one prompt of several parts.  The keywords are short for
        lists of one kind, boxes (P, 4), points (P, 2), masks and strings; they come after `prompts` in this order.

        Raises ValueError for a box, point or mask that does not fit the image, and where the model has no text prompts
        or untrained region parts; TypeError for what is no prompt.
        """
        _check_encoded(image)
        listed = [prompts] if isinstance(prompts, Box | Point | Mask | Text) else _list(prompts, "prompts")
        boxes = np.array(_rows(boxes_px, 4, "boxes_px"), dtype=np.float64).reshape(-1, 4)
        listed += [Box(*box) for box in clipped_px(boxes, *image.image.size).tolist()]
        listed += [Point(*point) for point in _rows(points_px, 2, "points_px")]
        listed += [Mask(mask) for mask in _list(masks, "masks")]
        listed += [Text(text) for text in _texts(texts)]
        regions = self.model.encode_regions(image.features, [[self._in_square(image, p) for p in listed]])[0]
        _check_embeddings(regions, "region")
        return regions

    def _in_square(self, image: EncodedImage, prompt: Any) -> Prompt:
        """A prompt in pixels of the image as a prompt for the model."""
        width, height = image.image.size
        if isinstance(prompt, tuple):
            parts: Any = tuple(self._in_square(image, part) for part in prompt)
            return parts
        if isinstance(prompt, Box):
            box = clipped_px(_numbers(prompt, (prompt.x0, prompt.y0, prompt.x1, prompt.y1))[None], width, height)[0]
            return Box(*image.letterbox.to_square(box / [width, height, width, height]).tolist())
        if isinstance(prompt, Point):
            point = _numbers(prompt, (prompt.x, prompt.y))
            if not ((point >= 0) & (point <= [width, height])).all():
                raise ValueError(f"{prompt} does not lie in the image of {width} x {height} pixels")
            return Point(*image.letterbox.to_square(point / [width, height]).tolist())
        if isinstance(prompt, Mask):
            return Mask(torch.from_numpy(mask_square(as_mask(prompt.mask, height, width))))
        if isinstance(prompt, Text):
            if not self.model.has_text_prompts:  # before the text is encoded for nothing
                return prompt
            return prompt if isinstance(prompt.text, Tensor) else Text(self.embed_texts([prompt.text])[0])
        raise TypeError(f"{prompt!r} is no prompt: give Box, Point, Mask, Text or tuples of them")

    # -- answers -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def classify(
        self,
        image: EncodedImage,
        boxes_px: Any,
        names: str | Sequence[str],
        *,
        text_embeddings: Float[Tensor, "C E"] | None = None,
    ) -> tuple[list[str], Float[np.ndarray, "P C"]]:
        """(best name of each box, probabilities over the names).

        `text_embeddings` stand for the names where given, in their order, say means over several phrasings.  Without
        names both results are empty.
        """
        names = _list(names, "names")
        if text_embeddings is None:
            text_embeddings = self.embed_texts([class_name(name) if isinstance(name, str) else name for name in names])
        if text_embeddings.shape != (len(names), self.model.embed_dim):
            raise ValueError(
                f"text_embeddings of shape {tuple(text_embeddings.shape)} for {len(names)} names: "
                f"needs ({len(names)}, {self.model.embed_dim})"
            )
        if not torch.isfinite(text_embeddings).all():
            raise ValueError("text_embeddings that are not finite")
        regions = self.embed(image, boxes_px=boxes_px)
        logits = self.model.scale("region") * regions @ text_embeddings.to(regions).T
        probabilities = logits.softmax(-1).cpu().numpy()
        best = probabilities.argmax(-1) if names else []
        return [names[int(i)] for i in best], probabilities

    @torch.no_grad()
    def ground(
        self, image: EncodedImage, texts: str | Sequence[str]
    ) -> tuple[Float[np.ndarray, "P 4"], Float[np.ndarray, " P"]]:
        """(box of each text in pixels of the image, score in [0, 1] that it is there at all).

        The box says where the text would be; a text that is not in the image gets one too, and a low score.  The score
        is a sigmoid of (fit - level) x the model's logit scale.  Fit: the best cosine of the text with the embedding of
        its own box or of a window of the image (sides of 1, 1/2 and 1/4 in steps of half a side, 59 of them), so that
        a text whose box went wrong is still found.  Level: what one in ten everyday names (`EVERYDAY`) reaches in the
        same image.  So 0.5 means a better fit than nine in ten names have, of which few are there.
        `results/presence` has its AUC.  Raises ValueError where the model has no text prompts.
        """
        _check_encoded(image)
        if not self.model.has_text_prompts:
            raise ValueError(self.model.no_text_prompts())
        embeddings = self.embed_texts(texts)
        if not len(embeddings):
            return np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.float32)
        square = self.model.ground(image.features, embeddings[None])[0].float()
        width, height = image.image.size
        boxes = image.letterbox.to_image(square.cpu()).numpy() * np.array([width, height] * 2, dtype=np.float32)
        return boxes, self._presence(image, embeddings, square).cpu().numpy()

    @torch.no_grad()
    def heatmap(self, image: EncodedImage, texts: str | Sequence[str]) -> Float[np.ndarray, "P H W"]:
        """Cosine of each text with every place of the image, in [-1, 1]: where in the image it is.

        One value for each pixel of the image as the model sees it, its long side resized to the model's: between the
        centres of patches the values are interpolated.  To lay it over the image, resize it to the image's size.
        Raises ValueError where the model has no heat maps.
        """
        _check_encoded(image)
        features, side = image.features, self.processor.image_size
        heat = self.model.heatmap(features, self.embed_texts(texts)[None])[0].unflatten(-1, features.grid)
        x0, y0, x1, y1 = (
            round(edge * side) for edge in image.letterbox.to_square(torch.tensor([0.0, 0.0, 1.0, 1.0])).tolist()
        )
        square = F.interpolate(heat[None], (side, side), mode="bilinear", align_corners=False)[0]
        return square[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].cpu().numpy()

    def _presence(
        self, image: EncodedImage, texts: Float[Tensor, "P E"], boxes: Float[Tensor, "P 4"]
    ) -> Float[Tensor, " P"]:
        """The score of `ground`, given the box of each text in the square."""
        low = boxes[:, :2].clamp(max=1 - SMALLEST)  # a box at the very edge may have no area
        own = torch.cat([low, torch.maximum(boxes[:, 2:], low + SMALLEST)], -1)
        windows = image.letterbox.to_square(torch.tensor(WINDOWS)).to(own)
        regions = self.model.encode_regions(image.features, torch.cat([windows, own])[None])[0]
        windowed, own_regions = regions.split([len(windows), len(own)])
        fit = torch.maximum((texts @ windowed.T).amax(-1), (texts * own_regions).sum(-1))
        level = (self.embed_texts(EVERYDAY.split(", ")) @ windowed.T).amax(-1).quantile(0.9)
        return torch.sigmoid(self.model.scale("region") * (fit - level))

    @staticmethod
    def draw(
        image: Any,
        boxes_px: Any,
        labels: Sequence[str] = (),
        scores: Sequence[float] | np.ndarray | None = None,
    ) -> Image.Image:
        """A copy of the image with the boxes drawn on it, each with its label and score."""
        photo = (image.image if isinstance(image, EncodedImage) else open_image(image)).copy()
        boxes = _rows(boxes_px, 4, "boxes_px")
        captions = _captions(len(boxes), labels, scores)
        pen, side = ImageDraw.Draw(photo), max(photo.size)
        font, line = ImageFont.load_default(max(10.0, side / 40)), max(1, side // 250)
        for i, (box, caption) in enumerate(zip(boxes, captions, strict=True)):
            colour = COLOURS[i % len(COLOURS)]
            x0, y0, x1, y1 = (float(value) for value in box)
            pen.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline=colour, width=line)
            if caption:
                left, top, right, bottom = pen.textbbox((0, 0), caption, font=font, anchor="lt")
                x = max(0.0, min(x0, photo.width - right - 4))
                y = max(0.0, y0 - bottom - 4)
                pen.rectangle((x, y, x + right - left + 4, y + bottom - top + 4), fill=colour)
                pen.text((x + 2, y + 2), caption, fill="white", font=font, anchor="lt")
        return photo

    @staticmethod
    def to_detections(
        boxes_px: Any, labels: Sequence[str] = (), scores: Sequence[float] | np.ndarray | None = None
    ) -> Any:
        """The boxes as `supervision.Detections`, labels under `data["class_name"]`.

        `class_id` numbers the distinct labels in their order of appearance.  Raises ImportError without supervision.
        """
        try:
            import supervision  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ImportError("to_detections needs the package supervision: pip install supervision") from None
        boxes = np.array(_rows(boxes_px, 4, "boxes_px"), dtype=np.float32).reshape(-1, 4)
        _captions(len(boxes), labels, scores)  # the numbers agree
        order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        return supervision.Detections(
            xyxy=boxes,
            confidence=None if scores is None else np.asarray(scores, dtype=np.float32),
            class_id=np.array([order[label] for label in labels], dtype=int) if len(labels) else None,
            data={"class_name": np.array(labels)} if len(labels) else {},
        )


def _captions(count: int, labels: Sequence[str], scores: Sequence[float] | np.ndarray | None) -> list[str]:
    """What is written at each box.  Raises ValueError where the numbers differ."""
    labels = _list(labels, "labels")
    scores = [] if scores is None else _list(scores, "scores")
    for what, given in (("labels", labels), ("scores", scores)):
        if len(given) not in (0, count):
            raise ValueError(f"{len(given)} {what} for {count} boxes")
    texts = labels or [""] * count
    try:
        marks = [f"{float(score):.2f}" for score in scores] or [""] * count
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"scores are real numbers, not {scores!r}"[:300]) from None
    return [f"{text} {mark}".strip() for text, mark in zip(texts, marks, strict=True)]


def _check_encoded(image: Any) -> None:
    if not isinstance(image, EncodedImage):
        raise TypeError(f"image is what `encode` returned for one image, not {type(image).__name__}")


def _check_embeddings(embeddings: Float[Tensor, "P E"], what: str) -> None:
    """Raises ValueError for an embedding that is not finite or zero: whatever is made of it means nothing."""
    if not bool(torch.isfinite(embeddings).all() & embeddings.any(-1).all()):
        raise ValueError(f"the model makes {what} embeddings that are not finite or are zero: its weights are damaged")


def _list(values: Any, what: str) -> list[Any]:
    """The values as a list; a string is one value."""
    if isinstance(values, str):
        return [values]
    if not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:  # of arrays and tensors
        raise TypeError(f"{what} are a list, not {values!r}")
    return list(values)


def _texts(texts: Any) -> list[str]:
    """One string or many as a list in the one form of a text."""
    listed = _list(texts, "texts")
    for i, text in enumerate(listed):
        if not isinstance(text, str):
            raise TypeError(f"text {i} is {text!r}: texts are strings")
        if not text.strip():
            raise ValueError(f"text {i} is empty")
    return [canonical(text) for text in listed]


def _rows(values: Any, count: int, what: str) -> list[list[Any]]:
    """Rows of `count` numbers each, from any array, tensor or list."""
    if values is None:
        raise TypeError(f"{what} is None: give rows of {count} numbers, or nothing")
    try:
        array = as_array(values)
    except ValueError:  # rows of several lengths
        raise ValueError(f"{what} are not rows of {count} numbers each: {values!r}"[:300]) from None
    if array.shape[:1] == (0,) and array.ndim <= 2:
        return []
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{what} of type {array.dtype}: rows of {count} numbers are taken")
    if array.ndim != 2 or array.shape[1] != count:
        raise ValueError(f"{what} of shape {array.shape}: needs rows of {count} numbers, (P, {count})")
    return array.tolist()


def _numbers(prompt: Any, values: Sequence[Any]) -> np.ndarray:
    try:
        return np.array([float(value) for value in values])
    except (TypeError, ValueError):
        raise TypeError(f"{prompt!r}: coordinates are real numbers") from None
