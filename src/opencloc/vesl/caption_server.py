"""Captions from an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a commercial one).

Owns the requests: images as JPEG data URLs, several in flight at a time, and what happens when the server is slow,
busy or broken.  Starting and scaling the server is the user's.
"""

from __future__ import annotations

import base64
import io
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
from PIL import Image

from opencloc.data.sample import Sample
from opencloc.errors import BadSample
from opencloc.vesl.caption import CaptionConfig, CaptionerError

Answer = TypeVar("Answer")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0
_MAY_PASS = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # HTTP statuses worth a repetition
_FATAL = {401, 403, 404, 405}  # would come for every image: key, address or model name are wrong
_JPEG_QUALITY = 90


class _Failed(Exception):
    """One attempt failed.  `wait_s`: how long the server asked to wait, None if it didn't say."""

    def __init__(self, detail: str, *, may_pass: bool, wait_s: float | None = None) -> None:
        super().__init__(detail)
        self.may_pass = may_pass
        self.wait_s = wait_s


class ServerCaptioner:
    """A model behind `URL/chat/completions`: a `Captioner`.

    A timeout, a broken connection, status 408, 409, 425, 429 or 5xx and an answer that is no proper JSON are repeated
    after exponentially growing waits with jitter, or after what the server asks for in `Retry-After` (at most a
    minute).  Another status in 4xx is that image's failure.  Status 401, 403, 404 or 405, and a server that no
    connection was possible to, raise `CaptionerError`: they would fail every image.
    """

    def __init__(self, config: CaptionConfig) -> None:
        self._config = config
        self._url = config.captioner.rstrip("/")
        try:
            httpx.URL(self._url)
        except httpx.InvalidURL as error:
            raise CaptionerError(f"caption server {self._url!r}: {error}") from error
        key = os.environ.get(config.api_key_env)
        self._client = httpx.Client(
            timeout=httpx.Timeout(config.timeout_s, connect=min(config.timeout_s, 10.0)),
            limits=httpx.Limits(max_connections=config.concurrency),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        try:
            self._model = config.server_model or self._only_model()
        except CaptionerError:
            self.close()
            raise
        self.model_id = f"{self._model} at {self._url}"

    def caption(self, samples: Sequence[Sample]) -> list[str | BadSample]:
        pool = ThreadPoolExecutor(self._config.concurrency)
        try:
            return list(pool.map(self._one, samples))
        finally:
            pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Closes the connections; they would otherwise stay open as long as this object lives."""
        self._client.close()

    def _one(self, sample: Sample) -> str | BadSample:
        try:
            text = self._request("chat/completions", _read_message, self._question(sample.image))
        except _Failed as failed:
            reason = "caption server failed" if failed.may_pass else "caption server refused the image"
            return BadSample(reason, sample.key, str(failed))
        except OSError as error:  # an image that cannot be encoded
            return BadSample("captioner failed", sample.key, str(error))
        return text.strip() or BadSample("empty caption", sample.key, "the model wrote nothing")

    def _question(self, image: Image.Image) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": _data_url(image, self._config.image_px)}},
            {"type": "text", "text": self._config.prompt},
        ]
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._config.max_new_tokens,
            "temperature": 0,
        }

    def _only_model(self) -> str:
        try:
            models = self._request("models", _read_models)
        except _Failed as failed:
            raise CaptionerError(f"the server doesn't tell its models ({failed}); set server_model") from failed
        if len(models) != 1:
            raise CaptionerError(f"{self._url} has the models {models}; choose one as server_model")
        return models[0]

    def _request(self, path: str, read: Callable[[Any], Answer], body: dict[str, Any] | None = None) -> Answer:
        """What `read` finds in the answer's JSON, after as many attempts as are allowed; `_Failed` by the last one."""
        for attempt in range(self._config.retries + 1):
            try:
                return self._attempt(f"{self._url}/{path}", read, body)
            except _Failed as failed:
                if not failed.may_pass or attempt == self._config.retries:
                    if isinstance(failed.__cause__, httpx.ConnectError):
                        raise CaptionerError(f"caption server: {failed} ({attempt + 1} attempts)") from failed
                    raise
                wait_s = _FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.0)
                if failed.wait_s is not None:
                    wait_s = failed.wait_s + random.uniform(0.0, 0.1)
                time.sleep(min(wait_s, _LONGEST_WAIT_S))
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, url: str, read: Callable[[Any], Answer], body: dict[str, Any] | None) -> Answer:
        try:
            response = self._client.request("GET" if body is None else "POST", url, json=body)
        except httpx.RequestError as error:
            raise _Failed(f"{url}: {type(error).__name__}: {error}", may_pass=True) from error
        status = response.status_code
        if status in _FATAL:
            key = self._config.api_key_env
            hint = f"; the key is read from ${key}" + ("" if os.environ.get(key) else ", which is not set")
            raise CaptionerError(f"{url}: {_complaint(response)}{hint if status in (401, 403) else ''}")
        if not response.is_success:
            may_pass = status in _MAY_PASS
            raise _Failed(f"{url}: {_complaint(response)}", may_pass=may_pass, wait_s=_retry_after_s(response))
        try:
            return read(response.json())
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise _Failed(f"{url}: not the expected JSON: {response.text[:200]!r}", may_pass=True) from error


def _data_url(image: Image.Image, max_px: int) -> str:
    image = image.convert("RGB")
    if max(image.size) > max_px:
        image = image.copy()
        image.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _read_message(answer: Any) -> str:
    content = answer["choices"][0]["message"]["content"]
    if not isinstance(content, str | None):
        raise TypeError(f"content is {type(content).__name__}")
    return content or ""


def _read_models(answer: Any) -> list[str]:
    return [str(model["id"]) for model in answer["data"]]


def _complaint(response: httpx.Response) -> str:
    """Status and message of an error, cut to what fits a line."""
    return f"status {response.status_code}: {' '.join(response.text.split())[:200]}"


def _retry_after_s(response: httpx.Response) -> float | None:
    """Seconds that a `Retry-After` header asks for, given as a number or as a date; None without a readable one."""
    value = response.headers.get("Retry-After", "").strip()
    if value.replace(".", "", 1).isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
