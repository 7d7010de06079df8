"""OWL-ViT and OWLv2 as detectors (OWLv2 at 448 x 448 is the published choice, paper section 3.3).

Images are encoded once and compared with their own phrases only; embeddings of repeated phrases are kept across images.

Images are prepared here rather than by transformers' processor, which needs torchvision or scipy, works on one image at
a time in double precision, and pads with black where the checkpoints were trained on grey.

Symbols: B images, N patches, Q phrases of the image that has most, D detections, E width of the text embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForZeroShotObjectDetection

from opencloc.model.loading import load_model, load_processor, load_tokenizer
from opencloc.vesl.detect import Detections, Dtype, no_detections

PAD_GREY = (128, 128, 128)  # what OWLv2's own code pads with; boxes are relative to the padded square
TEXT_BATCH = 256  # phrases per pass of the text tower
TEXT_CACHE_SIZE = 32_768  # embeddings kept; 96 MiB at the width of the L/14 model


class OwlDetector:
    """OWL-ViT or OWLv2 from a local folder or hub id: a `Detector`.

    `resolution` (pixels of the square input) must be a multiple of the patch size; position embeddings are
    interpolated and the box prior is recomputed for its grid.  `dtype` applies to the two towers; the heads run in
    float32, since a sigmoid in bfloat16 would round boxes to 1/256 of the image.

    Raises ValueError for a resolution that is no multiple of the patch size.
    """

    def __init__(
        self,
        path: str,
        *,
        resolution: int,
        dtype: Dtype,
        device: torch.device,
        score_threshold: float,
        text_cache_size: int = TEXT_CACHE_SIZE,
    ) -> None:
        model = load_model(AutoModelForZeroShotObjectDetection, path, dtype=torch.float32)
        patch_px = model.config.vision_config.patch_size
        if resolution < patch_px or resolution % patch_px:
            raise ValueError(f"resolution must be a multiple of {path}'s patch size {patch_px}, got {resolution}")
        for name, part in model.named_children():
            if name not in ("box_head", "class_head"):
                part.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        self._model = model.eval().to(device)
        self._resolution = resolution
        self._score_threshold = score_threshold
        self._pads = model.config.model_type == "owlv2"  # OWL-ViT's checkpoints are used with squashed images
        self._tokenizer = load_tokenizer(path)
        pixels = load_processor(path, AutoImageProcessor)
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) * 255
            for values in (pixels.image_mean, pixels.image_std)
        )
        self.text_cache = TextCache(self._embed, text_cache_size)
        revision = getattr(model.config, "_commit_hash", None)
        name = f"{path}@{revision}" if revision else path
        self.model_id = f"{name}, {resolution} px, {dtype}"

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        if not any(phrases):
            return [no_detections() for _ in images]
        features = self._model.image_embedder(self._pixels(images), interpolate_pos_encoding=True)[0].float()
        flat = features.flatten(1, 2)
        logits, _ = self._model.class_predictor(flat, *self._queries(phrases))
        boxes = self._model.box_predictor(flat, features, interpolate_pos_encoding=True)
        return self._select(logits, boxes, images)

    def _pixels(self, images: Sequence[Image.Image]) -> Float[Tensor, "B 3 S S"]:
        """Normalised pixels of the square inputs, in the dtype of the vision tower."""
        size = (self._resolution, self._resolution)
        squares = [(_pad_to_square(image) if self._pads else image.convert("RGB")) for image in images]
        stacked = np.stack([np.asarray(square.resize(size, Image.Resampling.BILINEAR)) for square in squares])
        pixels = torch.from_numpy(stacked).to(self._mean.device).permute(0, 3, 1, 2).float()
        return ((pixels - self._mean) / self._std).to(self._model.layer_norm.weight.dtype)

    def _queries(self, phrases: Sequence[Sequence[str]]) -> tuple[Float[Tensor, "B Q E"], Bool[Tensor, "B Q"]]:
        """Embeddings of every image's own phrases, padded to the most phrases, and which of them are real."""
        embedded = self.text_cache([phrase for own in phrases for phrase in own])
        counts = torch.tensor([len(own) for own in phrases], device=embedded.device)
        mask = torch.arange(int(max(map(len, phrases))), device=embedded.device) < counts[:, None]
        queries = embedded.new_zeros(*mask.shape, embedded.shape[-1])
        queries[mask] = embedded
        return queries, mask

    def _embed(self, phrases: Sequence[str]) -> Float[Tensor, "P E"]:
        """Unit-length embeddings of some phrases; the text tower reads at most 16 tokens, longer ones are cut."""
        text_config = self._model.config.text_config
        parts = []
        for start in range(0, len(phrases), TEXT_BATCH):
            tokens = self._tokenizer(
                list(phrases[start : start + TEXT_BATCH]),
                padding="max_length",
                truncation=True,
                max_length=text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self._mean.device)
            output = self._model.owlv2 if hasattr(self._model, "owlv2") else self._model.owlvit
            pooled = output.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
            parts.append(torch.nn.functional.normalize(pooled.float(), dim=-1))
        return torch.cat(parts)

    def _select(
        self, logits: Float[Tensor, "B N Q"], centred: Float[Tensor, "B N 4"], images: Sequence[Image.Image]
    ) -> list[Detections]:
        """Every (patch, phrase) pair above the threshold, image by image, boxes normalised to the image."""
        scores = logits.sigmoid()
        if not torch.isfinite(scores).all() or not torch.isfinite(centred).all():
            raise FloatingPointError("the detector's output is not finite")
        image, patch, phrase = (scores > self._score_threshold).nonzero(as_tuple=True)
        centre, size = centred[image, patch].split(2, dim=-1)
        corners = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
        found = torch.cat([corners, scores[image, patch, phrase, None]], dim=-1).cpu().numpy()
        phrase, ends = phrase.cpu().numpy(), torch.bincount(image, minlength=len(images)).cumsum(0).cpu().numpy()
        detections = []
        for part, own, picture in zip(np.split(found, ends[:-1]), np.split(phrase, ends[:-1]), images, strict=True):
            boxes = part[:, :4] * (_square_in_image(picture) if self._pads else 1.0)
            detections.append(Detections(boxes=boxes, scores=part[:, 4], phrase=own))
        return detections


class TextCache:
    """Embeddings of phrases, each computed once while it stays among the `size` most recently used.

    `embed` maps distinct phrases to a tensor (P, E).  Rows live in one table on the device, so that looking up a
    batch is a single gather.  `hits` and `misses` count distinct phrases per call.
    """

    def __init__(self, embed: Callable[[Sequence[str]], Tensor], size: int) -> None:
        self._embed = embed
        self._size = size
        self._row: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._table: Tensor | None = None  # (size, E)
        self.hits = self.misses = 0

    def __call__(self, phrases: Sequence[str]) -> Float[Tensor, "P E"]:
        """Embeddings of `phrases`, in order, repeats allowed."""
        distinct = dict.fromkeys(phrases)
        new = [phrase for phrase in distinct if phrase not in self._row]
        self.misses += len(new)
        self.hits += len(distinct) - len(new)
        if len(distinct) > self._size:  # one batch has more than fits: don't keep any
            place = {phrase: i for i, phrase in enumerate(distinct)}
            return self._embed(list(distinct))[[place[phrase] for phrase in phrases]]
        for phrase in distinct:
            if phrase in self._row:
                self._row.move_to_end(phrase)
        if new:
            self._insert(new, self._embed(new))
        assert self._table is not None
        return self._table[[self._row[phrase] for phrase in phrases]]

    def _insert(self, phrases: Sequence[str], embeddings: Tensor) -> None:
        if self._table is None:
            self._table = embeddings.new_empty(self._size, embeddings.shape[-1])
        rows = []
        for phrase in phrases:
            full = len(self._row) == self._size
            rows.append(self._row.popitem(last=False)[1] if full else len(self._row))
            self._row[phrase] = rows[-1]
        self._table[rows] = embeddings


def _pad_to_square(image: Image.Image) -> Image.Image:
    """The RGB image with grey bars at the bottom or on the right."""
    image = image.convert("RGB")
    long_px = max(image.size)
    if image.width == image.height:
        return image
    square = Image.new("RGB", (long_px, long_px), PAD_GREY)
    square.paste(image, (0, 0))
    return square


def _square_in_image(image: Image.Image) -> np.ndarray:
    """(4,) float32: width and height of the padded square in units of the image's, for XYXY boxes."""
    long_px = max(image.size)
    return np.tile(np.array([long_px / image.width, long_px / image.height], dtype=np.float32), 2)
