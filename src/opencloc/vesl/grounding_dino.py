"""Grounding DINO and MM Grounding DINO as detectors.

An image's phrases are joined by full stops into a prompt, and the scores of its tokens become scores of phrases.  Every
image is padded to the same square, since transformers' processor pads to the largest image of the batch and the
backbone sees the padding: results would depend on the batch.

Symbols: R prompts (one per image, more where an image's phrases don't fit one), K object queries, T text tokens,
P phrases of the prompt that has most, S pixels of the square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForZeroShotObjectDetection

from opencloc.model.loading import load_model, load_processor, load_tokenizer
from opencloc.vesl.detect import Detections, Dtype, no_detections


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    """As many phrases of one image as fit the text encoder."""

    image: int
    phrases: tuple[int, ...]  # their numbers within the image's phrases
    token_ids: tuple[tuple[int, ...], ...]  # theirs, without separators


class GroundingDinoDetector:
    """Grounding DINO from a local folder or hub id: a `Detector`.

    `resolution` is the long side in pixels, at least 32; the checkpoints were trained with a short side of 800.
    A phrase's score is the mean over its tokens, as in the authors' evaluation on COCO.  `dtype` bf16 runs under
    autocast, since the deformable attention is not written for half precision throughout.

    Raises ValueError for a resolution below 32.
    """

    def __init__(
        self, path: str, *, resolution: int, dtype: Dtype, device: torch.device, score_threshold: float
    ) -> None:
        if resolution < 32:
            raise ValueError(f"resolution must be at least 32 for {path}, got {resolution}")
        model = load_model(AutoModelForZeroShotObjectDetection, path, dtype=torch.float32)
        self._model = model.eval().to(device)
        self._device = device
        self._bf16 = dtype == "bf16"
        self._resolution = resolution
        self._score_threshold = score_threshold
        self._tokenizer = load_tokenizer(path)
        self._separator = self._tokenizer.convert_tokens_to_ids(".")
        pixels = load_processor(path, AutoImageProcessor)
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) * 255
            for values in (pixels.image_mean, pixels.image_std)
        )
        revision = getattr(model.config, "_commit_hash", None)
        name = f"{path}@{revision}" if revision else path
        self.model_id = f"{name}, {resolution} px, {dtype}"

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        prompts = [prompt for i, own in enumerate(phrases) for prompt in self._prompts(i, own)]
        if not prompts:
            return [no_detections() for _ in images]
        pixels, pixel_mask = self._pixels(images)
        rows = torch.tensor([prompt.image for prompt in prompts], device=self._device)
        token_ids, phrase_of_token = self._tokens(prompts)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
            output = self._model(
                pixel_values=pixels[rows],
                pixel_mask=pixel_mask[rows],
                input_ids=token_ids,
                attention_mask=(token_ids != self._tokenizer.pad_token_id).long(),
            )
        token_scores = output.logits.float().sigmoid()[..., : token_ids.shape[1]]
        member = torch.nn.functional.one_hot(phrase_of_token + 1)[..., 1:].float()  # (R, T, P); -1 belongs to none
        scores = token_scores @ (member / member.sum(dim=1, keepdim=True).clamp_min(1))
        return self._select(scores, output.pred_boxes.float(), prompts, len(images))

    def _prompts(self, image: int, phrases: Sequence[str]) -> list[_Prompt]:
        """The phrases of an image, dealt out to as few prompts as the text encoder's length allows."""
        room = self._model.config.max_text_len - 2  # [CLS] and [SEP]
        prompts: list[_Prompt] = []
        chosen: list[int] = []
        token_ids: list[tuple[int, ...]] = []
        used = 0
        for number, phrase in enumerate(phrases):
            # A full stop or question mark inside a phrase would be read as its end.
            plain = phrase.replace(".", " ").replace("?", " ")
            own = tuple(self._tokenizer(plain, add_special_tokens=False)["input_ids"][: room - 1])
            if not own:
                continue
            if used + len(own) + 1 > room:
                prompts.append(_Prompt(image=image, phrases=tuple(chosen), token_ids=tuple(token_ids)))
                chosen, token_ids, used = [], [], 0
            chosen.append(number)
            token_ids.append(own)
            used += len(own) + 1
        if chosen:
            prompts.append(_Prompt(image=image, phrases=tuple(chosen), token_ids=tuple(token_ids)))
        return prompts

    def _tokens(self, prompts: Sequence[_Prompt]) -> tuple[Int64[Tensor, "R T"], Int64[Tensor, "R T"]]:
        """Padded token ids `[CLS] phrase . phrase . [SEP]`, and for every token which of the prompt's phrases."""
        tokenizer = self._tokenizer
        rows, owners = [], []
        for prompt in prompts:
            row, owner = [tokenizer.cls_token_id], [-1]
            for number, own in enumerate(prompt.token_ids):
                row += [*own, self._separator]
                owner += [number] * len(own) + [-1]
            rows.append(torch.tensor([*row, tokenizer.sep_token_id]))
            owners.append(torch.tensor([*owner, -1]))
        pad = torch.nn.utils.rnn.pad_sequence
        token_ids = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        return token_ids.to(self._device), pad(owners, batch_first=True, padding_value=-1).to(self._device)

    def _pixels(self, images: Sequence[Image.Image]) -> tuple[Float[Tensor, "B 3 S S"], Int64[Tensor, "B S S"]]:
        """Normalised pixels at the top left of the square, zero elsewhere, and 1 where there is image."""
        side = self._resolution
        pixels = torch.zeros(len(images), 3, side, side, device=self._device)
        mask = torch.zeros(len(images), side, side, dtype=torch.int64, device=self._device)
        for i, image in enumerate(images):
            scale = side / max(image.size)
            width, height = (max(1, round(px * scale)) for px in image.size)
            small = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
            values = torch.from_numpy(np.array(small)).to(self._device).permute(2, 0, 1).float()
            pixels[i, :, :height, :width] = (values - self._mean[0]) / self._std[0]
            mask[i, :height, :width] = 1
        return pixels, mask

    def _select(
        self,
        scores: Float[Tensor, "R K P"],
        centred: Float[Tensor, "R K 4"],
        prompts: Sequence[_Prompt],
        num_images: int,
    ) -> list[Detections]:
        """Every (object query, phrase) pair above the threshold; boxes are already relative to the unpadded image."""
        if not torch.isfinite(scores).all() or not torch.isfinite(centred).all():
            raise FloatingPointError("the detector's output is not finite")
        row, query, phrase = (scores > self._score_threshold).nonzero(as_tuple=True)
        centre, size = centred[row, query].split(2, dim=-1)
        boxes = torch.cat([centre - size / 2, centre + size / 2], dim=-1).cpu().numpy()
        values = scores[row, query, phrase].cpu().numpy()
        image = np.array([prompt.image for prompt in prompts])[row.cpu().numpy()]
        pairs = zip(row.tolist(), phrase.tolist(), strict=True)
        number = np.array([prompts[r].phrases[p] for r, p in pairs], dtype=np.int64)
        return [
            Detections(boxes=boxes[image == i], scores=values[image == i], phrase=number[image == i])
            for i in range(num_images)
        ]
