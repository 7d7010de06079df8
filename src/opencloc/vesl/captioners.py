"""Captions (step 1 of labelling): those that are there, a vision-language model's, or a caption server's."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from opencloc.chat_server import ChatServer, NoAnswer, ServerError
from opencloc.config import Strict
from opencloc.data.sample import Sample
from opencloc.devices import Precision, choose_device, computes_in_bf16
from opencloc.errors import BadSample, redacted

PROMPT = (
    "Describe this image in detail in two or three sentences. Name every visible object with its color, size and "
    "material, and say where it is. Do not guess what cannot be seen."
)
ExistingText = Literal["caption", "all-captions", "alt-text"]
_JPEG_QUALITY = 90


class CaptionerError(RuntimeError):
    """Captioning works for no image: no such model, a refused key, a server that cannot be reached."""


@runtime_checkable  # the tests check all annotations while they run
class Captioner(Protocol):
    """Makes one caption per image.

    Each worker process builds one and calls it from one thread.  `model_id` names the model in the statistics.
    """

    model_id: str

    def caption(self, samples: Sequence[Sample]) -> list[str | BadSample]:
        """The captions of the samples in order, with a `BadSample` where one could not be made.

        Raises `CaptionerError` for what concerns every sample.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(Strict):
    """Where captions come from (step 1)."""

    captioner: str = "existing"
    """`existing`: the samples' own; `http://HOST:PORT/v1`: an OpenAI-compatible server; else the folder or hub id of a
    vision-language model."""
    existing_text: ExistingText = "caption"
    """For `existing`: the first caption, all of them, or the alt-text."""
    prompt: str = PROMPT
    """What a model is asked."""
    max_new_tokens: int = 128
    """Longest caption, in the model's tokens."""
    batch_size: int = 16
    """Images per pass of a local model."""
    precision: Precision = "auto"
    """Of a local model.  `auto`: bf16 where the hardware has it."""
    device: str = "auto"
    """Where a local model runs: `auto` (the GPU if there is one), `cpu`, `cuda:1`, ..."""
    server_model: str | None = None
    """The model's name on the server; None: the only one it has."""
    concurrency: int = 32
    """Requests to the server at a time."""
    retries: int = 6
    """How often a request is repeated after a failure that may pass."""
    timeout_s: float = 120.0
    """Seconds that the server has for one answer."""
    image_px: int = 1024
    """Longest side of the images sent to the server."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "concurrency", "image_px"):
            if getattr(self, name) < 1:
                raise ValueError(f"captions.{name} must be at least 1, got {getattr(self, name)}")
        if self.retries < 0 or not self.timeout_s > 0:
            raise ValueError(f"captions: retries {self.retries} must be >= 0 and timeout_s {self.timeout_s} > 0")
        if self.uses_server and (redacted(self.captioner) != self.captioner or "?" in self.captioner):
            raise ValueError(
                f"captions.captioner {redacted(self.captioner)} must hold no password or key: put the key into the "
                f"environment variable {self.api_key_env} (another name: --captions.api-key-env)"
            )

    @property
    def uses_server(self) -> bool:
        """Whether `captioner` is the address of a server."""
        return self.captioner.startswith(("http://", "https://"))


def load_captioner(config: CaptionConfig) -> Captioner:
    """The captioner that a configuration describes.

    Raises `CaptionerError`, naming the model or server, if it cannot be used.
    """
    if config.captioner == "existing":
        return ExistingCaptioner(config.existing_text)
    return ServerCaptioner(config) if config.uses_server else VlmCaptioner(config)


class ExistingCaptioner:
    """Takes what the samples have already.  `all-captions` gives each a line; phrases do not reach across lines."""

    def __init__(self, text: ExistingText = "caption") -> None:
        self._text: ExistingText = text
        self.model_id = f"existing {text}"

    def caption(self, samples: Sequence[Sample]) -> list[str | BadSample]:
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> str | BadSample:
        if self._text == "alt-text":
            text, missing = sample.alt_text or "", "no alt-text"
        else:
            captions = sample.captions[:1] if self._text == "caption" else sample.captions
            text, missing = "\n".join(captions), "no caption"
        return text if text.strip() else BadSample(missing, sample.key)


class ServerCaptioner:
    """A model behind an OpenAI-compatible server.

    What fails after the client's repetitions is that image's failure.  What would fail for every image (a wrong key,
    address or model, no connection) raises `CaptionerError`.
    """

    def __init__(self, config: CaptionConfig) -> None:
        self._config = config
        url = config.captioner.rstrip("/")
        try:
            self._server = ChatServer(
                "caption server",
                url,
                config.server_model,
                model_option="captions.server_model",
                api_key_env=config.api_key_env,
                timeout_s=config.timeout_s,
                retries=config.retries,
            )
        except ServerError as error:
            raise CaptionerError(str(error)) from error
        self.model_id = f"{self._server.model} at {url}"

    def caption(self, samples: Sequence[Sample]) -> list[str | BadSample]:
        pool = ThreadPoolExecutor(self._config.concurrency)
        try:
            return list(pool.map(self._one, samples))
        finally:
            pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Closes the connections."""
        self._server.close()

    def _one(self, sample: Sample) -> str | BadSample:
        try:
            return _checked(self._server.ask(self._question(sample.image), self._config.max_new_tokens), sample)
        except ServerError as error:
            raise CaptionerError(str(error)) from error
        except NoAnswer as error:
            reason = "caption server refused the image" if error.refused else "caption server failed"
            return BadSample(reason, sample.key, str(error))
        except Exception as error:  # an image that cannot be encoded
            return BadSample("caption server failed", sample.key, f"unusable answer: {_one_line(error)}")

    def _question(self, image: Image.Image) -> Any:
        content = [
            {"type": "image_url", "image_url": {"url": _data_url(image, self._config.image_px)}},
            {"type": "text", "text": self._config.prompt},
        ]
        return [{"role": "user", "content": content}]


class VlmCaptioner:
    """A vision-language model on this machine.  Decoding is greedy, so it repeats.

    Where the processor has a chat template, the prompt is one user turn of image and text.  Otherwise the processor
    gets the prompt as it is, which must hold the image token where the model wants one.

    Raises `CaptionerError` if the checkpoint does not load, or cannot caption a plain gray image with this prompt.
    """

    def __init__(self, config: CaptionConfig) -> None:
        from transformers import AutoModelForImageTextToText

        from opencloc.model.loading import load_model, load_processor

        self._config, self.model_id = config, config.captioner
        try:
            device = choose_device(config.device)
            dtype = torch.bfloat16 if computes_in_bf16(config.precision, device) else torch.float32
            self._processor = load_processor(config.captioner)
            self._model = load_model(AutoModelForImageTextToText, config.captioner, dtype=dtype).eval().to(device)
            tokenizer = self._processor.tokenizer
            tokenizer.padding_side = "left"  # generation goes on from the last token of every row
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            # A prompt that does not fit the model would otherwise fail for every image.
            self._generate([Image.new("RGB", (64, 48), "gray")], max_new_tokens=1)
        except Exception as error:
            raise CaptionerError(f"captioner {config.captioner!r} cannot be used: {_one_line(error)}") from error

    def caption(self, samples: Sequence[Sample]) -> list[str | BadSample]:
        captions: list[str | BadSample] = []
        for start in range(0, len(samples), self._config.batch_size):
            captions += self._batch(samples[start : start + self._config.batch_size])
        return captions

    def _batch(self, batch: Sequence[Sample]) -> list[str | BadSample]:
        try:
            texts = self._generate([sample.image for sample in batch], self._config.max_new_tokens)
        except Exception as error:
            if len(batch) == 1:
                return [BadSample("captioner failed", batch[0].key, f"{type(error).__name__}: {error}")]
            return [answer for sample in batch for answer in self._batch([sample])]  # which image was it?
        return [_checked(text, sample) for text, sample in zip(texts, batch, strict=True)]

    @torch.inference_mode()
    def _generate(self, images: list[Image.Image], max_new_tokens: int) -> list[str]:
        inputs = {name: self._moved(value) for name, value in self._inputs(images).items()}
        tokens = self._model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        prompt = inputs.get("input_ids")
        # Decoder-only models repeat the prompt in their output, encoder-decoder ones and some others do not.
        if prompt is not None and torch.equal(tokens[:, : prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1] :]
        return self._processor.batch_decode(tokens, skip_special_tokens=True)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self._model.device, self._model.dtype if value.is_floating_point() else None)

    def _inputs(self, images: list[Image.Image]) -> Mapping[str, Any]:
        prompt = self._config.prompt
        if getattr(self._processor, "chat_template", None) is None:
            return self._processor(images=images, text=[prompt] * len(images), padding=True, return_tensors="pt")
        text = {"type": "text", "text": prompt}
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _data_url(image: Image.Image, max_px: int) -> str:
    image = image.convert("RGB")
    if max(image.size) > max_px:
        image.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
