"""Captions for the label engine (VESL step 1): what a captioner is, how one is chosen, and the captions already there.

Owns the `Captioner` protocol and its configuration.  A vision-language model on this machine is `caption_vlm.py`, one
behind an HTTP server `caption_server.py`.  What becomes of the captions is decided in `phrases.py` and `label.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from opencloc.config import Strict
from opencloc.data.sample import Sample
from opencloc.errors import BadSample
from opencloc.vesl.detect import Dtype, resolve_device

PROMPT = (
    "Describe this image in detail in two or three sentences. Name every visible object with its color, size and "
    "material, and say where it is. Do not guess what cannot be seen."
)
ExistingText = Literal["caption", "all-captions", "alt-text"]


class CaptionerError(RuntimeError):
    """Captioning cannot work for any image: no such model, a refused key, a server that cannot be reached."""


@runtime_checkable  # the tests check all annotations while they run
class Captioner(Protocol):
    """Makes one caption per image.

    Built once per worker process and called from one thread.  `model_id` names the model, for the manifest.
    """

    model_id: str

    def caption(self, samples: Sequence[Sample]) -> list[str | BadSample]:
        """The captions of some samples in order, with a `BadSample` in the place of one that could not be made.

        What one sample causes is returned, never raised.  Raises `CaptionerError` for what concerns every sample.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(Strict):
    """Where captions come from (step 1)."""

    captioner: str = "existing"
    """`existing`: the samples' own; `http://HOST:PORT/v1`: an OpenAI-compatible server; else a vision-language model,
    as a local folder or hub id."""
    existing_text: ExistingText = "caption"
    """For `existing`: the first caption, all of them one after the other, or the alt-text."""
    prompt: str = PROMPT
    """What a model is asked."""
    max_new_tokens: int = 128
    """Length limit of a caption, in the model's tokens; at least 1."""
    batch_size: int = 16
    """Images per pass of a local model; at least 1."""
    dtype: Dtype = "bf16"
    """Precision of a local model."""
    device: str = "auto"
    """Where a local model runs: `auto` (CUDA where there is one), `cpu`, `cuda:1`, ..."""
    server_model: str | None = None
    """The model's name on the server; None: the only one it has."""
    concurrency: int = 32
    """Requests in flight to the server at a time; at least 1."""
    retries: int = 6
    """How often a request is repeated after a failure that may pass; at least 0."""
    timeout_s: float = 120.0
    """Seconds a server may take for one answer; more than 0."""
    image_px: int = 1024
    """Longest side of the images sent to a server; at least 1."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the server's key, if it needs one."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "concurrency", "image_px"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.retries < 0:
            raise ValueError(f"retries must be at least 0, got {self.retries}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be more than 0, got {self.timeout_s}")


def load_captioner(config: CaptionConfig) -> Captioner:
    """The captioner that a configuration describes, ready to use.

    Raises `CaptionerError` naming model or server if it cannot be used.
    """
    if config.captioner == "existing":
        return ExistingCaptioner(config.existing_text)
    if config.captioner.startswith(("http://", "https://")):
        from opencloc.vesl.caption_server import ServerCaptioner

        return ServerCaptioner(config)
    from opencloc.vesl.caption_vlm import VlmCaptioner

    return VlmCaptioner(
        config.captioner,
        prompt=config.prompt,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        dtype=config.dtype,
        device=resolve_device(config.device),
    )


class ExistingCaptioner:
    """Takes what the samples already have: a `Captioner`.

    `all-captions` puts each on a line of its own, and phrases don't reach across lines.
    """

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
