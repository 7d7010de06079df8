"""Captions from a vision-language model on this machine, through transformers.

Owns batching, prompting and decoding for anything that `AutoModelForImageTextToText` loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from opencloc.data.sample import Sample
from opencloc.errors import BadSample
from opencloc.vesl.caption import CaptionerError
from opencloc.vesl.detect import Dtype, torch_dtype


class VlmCaptioner:
    """A vision-language model from a local folder or hub id: a `Captioner`.  Decoding is greedy, so it repeats.

    Where the processor has a chat template, the prompt is one user turn of image and text; otherwise it is passed to
    the processor as it is, and must hold the image token itself where the model wants one.

    Raises `CaptionerError` if the checkpoint doesn't load, or cannot caption a plain gray image with this prompt.
    """

    def __init__(
        self, path: str, *, prompt: str, max_new_tokens: int, batch_size: int, dtype: Dtype, device: torch.device
    ) -> None:
        self.model_id = path
        self._prompt = prompt
        self._max_new_tokens = max_new_tokens
        self._batch_size = batch_size
        try:
            self._processor = AutoProcessor.from_pretrained(path)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                path, dtype=torch_dtype(dtype), use_safetensors=True
            )
            self._model = model.eval().to(device)
            tokenizer = self._processor.tokenizer
            tokenizer.padding_side = "left"  # generation goes on from the last token of every row
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            # A prompt that doesn't fit the model would otherwise fail image by image for the whole data set.
            self._generate([Image.new("RGB", (64, 48), "gray")], max_new_tokens=1)
        except Exception as error:
            raise CaptionerError(f"captioner {path!r} cannot be used: {type(error).__name__}: {error}") from error

    def caption(self, samples: Sequence[Sample]) -> list[str | BadSample]:
        captions: list[str | BadSample] = []
        for start in range(0, len(samples), self._batch_size):
            batch = samples[start : start + self._batch_size]
            try:
                texts = self._generate([sample.image for sample in batch], self._max_new_tokens)
                captions += [_checked(text, sample) for text, sample in zip(texts, batch, strict=True)]
            except Exception:  # one at a time, to find the image at fault
                captions += [self._one(sample) for sample in batch]
        return captions

    def _one(self, sample: Sample) -> str | BadSample:
        try:
            return _checked(self._generate([sample.image], self._max_new_tokens)[0], sample)
        except Exception as error:
            return BadSample("captioner failed", sample.key, f"{type(error).__name__}: {error}")

    @torch.inference_mode()
    def _generate(self, images: list[Image.Image], max_new_tokens: int) -> list[str]:
        inputs = {name: self._moved(value) for name, value in self._inputs(images).items()}
        tokens = self._model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        prompt = inputs.get("input_ids")
        # Decoder-only models repeat the prompt in their output, encoder-decoder ones and some others don't.
        if prompt is not None and torch.equal(tokens[:, : prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1] :]
        return self._processor.batch_decode(tokens, skip_special_tokens=True)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self._model.device, self._model.dtype if value.is_floating_point() else None)

    def _inputs(self, images: list[Image.Image]) -> Mapping[str, Any]:
        if getattr(self._processor, "chat_template", None) is None:
            return self._processor(images=images, text=[self._prompt] * len(images), padding=True, return_tensors="pt")
        text = {"type": "text", "text": self._prompt}
        turns = [[{"role": "user", "content": [{"type": "image", "image": image}, text]}] for image in images]
        return self._processor.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )


def _checked(text: str, sample: Sample) -> str | BadSample:
    return text.strip() or BadSample("empty caption", sample.key, "the model wrote nothing")
