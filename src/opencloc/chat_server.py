"""A model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a commercial one): messages in, one text out.

The `openai` client repeats what may pass (time-outs, broken connections, status 408, 409, 429 and 5xx), with growing
waits or as `Retry-After` asks.
"""

from __future__ import annotations

import os
from typing import Any

_FATAL = {401, 403, 404, 405}  # statuses that every question would get: wrong key, address or model name


class ServerError(OSError):
    """The server answers no question: a refused key, a wrong address, no connection."""


class NoAnswer(ValueError):
    """One question went without an answer.  `refused`: the server found fault with it; else the server failed."""

    def __init__(self, refused: bool, detail: str) -> None:
        self.refused = refused
        super().__init__(detail)


class ChatServer:
    """A connection to the server, which may be used from many threads.

    `what` names it in errors, as "caption server"; `model` None: the only one it has; `model_option`: what a user
    sets to name one; `api_key_env`: the environment variable that holds the key.  Raises `ServerError` where it has
    several models or does not tell.
    """

    def __init__(
        self,
        what: str,
        url: str,
        model: str | None,
        *,
        model_option: str,
        api_key_env: str,
        timeout_s: float,
        retries: int,
    ) -> None:
        from openai import OpenAI

        self._name, self._key_env, self._option = f"{what} {url.rstrip('/')}", api_key_env, model_option
        key = os.environ.get(api_key_env) or "none"  # vLLM asks for none, the client insists on one
        try:
            self._client = OpenAI(base_url=url.rstrip("/"), api_key=key, timeout=timeout_s, max_retries=retries)
            self.model = model or self._only_model()
        except ServerError:
            self.close()
            raise
        except Exception as error:
            raise ServerError(f"{self._name}: {error}") from error

    def ask(self, messages: Any, max_tokens: int) -> str:
        """The answer, by greedy decoding.  Raises `ServerError` for what concerns every question, else `NoAnswer`."""
        import openai

        try:
            answer = self._client.chat.completions.create(
                model=self.model, messages=messages, max_tokens=max_tokens, temperature=0
            )
            return answer.choices[0].message.content or ""
        except openai.APIError as error:
            self._raise_if_fatal(error)
            status = getattr(error, "status_code", 500)
            refused = 400 <= status < 500 and status not in (408, 409, 429)
            raise NoAnswer(refused, _complaint(error)) from error
        except Exception as error:  # an answer of another shape
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise NoAnswer(False, f"unusable answer: {reason}") from error

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _only_model(self) -> str:
        import openai

        try:
            models = [model.id for model in self._client.models.list().data]
        except Exception as error:
            if isinstance(error, openai.APIError):
                self._raise_if_fatal(error)
            raise ServerError(f"{self._name} does not say which models it has: set {self._option}") from error
        if len(models) != 1:
            raise ServerError(f"{self._name} has the models {models}: choose {self._option}")
        return models[0]

    def _raise_if_fatal(self, error: Any) -> None:
        status = getattr(error, "status_code", None)
        if status in _FATAL:
            hint = f"; the key is read from ${self._key_env}" + (
                "" if os.environ.get(self._key_env) else ", which is not set"
            )
            raise ServerError(f"{self._name}: {_complaint(error)}{hint * (status in (401, 403))}") from error
        if type(error.__cause__).__name__ == "ConnectError":  # of httpx or httpx2, as the client's version has it
            raise ServerError(f"{self._name} cannot be reached: {error.__cause__}") from error


def _complaint(error: Any) -> str:
    """Status and text of a server's answer, or what happened instead of one."""
    response = getattr(error, "response", None)
    said = str(error) if response is None else f"status {response.status_code}: {response.text}"
    return " ".join(said.split())[:300]
