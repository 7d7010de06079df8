"""The plug-in of lmms-eval (EvolvingLMMs-Lab): `--model opencloc --model_args pretrained=FOLDER`.

lmms-eval finds it by the entry-point group `lmms_eval.models`.  It is not needed by anything here, and is imported only
when lmms-eval asks for the class.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from opencloc.images import open_image
from opencloc.mllm.answers import Answerer
from opencloc.mllm.conversation import Conversation, Turn

MAX_NEW_TOKENS = 1024  # where a task does not say


def manifests() -> Any:
    """What lmms-eval's registry takes: the name of the model and of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id="opencloc", chat_class_path="opencloc.mllm.lmms.OpenclocModel")


def __getattr__(name: str) -> Any:
    if name == "OpenclocModel":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def conversation_of(messages: Sequence[Any], where: str) -> Conversation:
    """The conversation of lmms-eval's messages: dicts of a role and a list of texts and images, one image at most.

    A system message's text stands before the first question.  Raises ValueError naming `where` for several images, for
    video and audio.
    """
    image, system, turns = None, "", []
    for message in messages:
        role, content = message["role"], message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = []
        for part in parts:
            if part["type"] == "text":
                texts.append(part["text"])
            elif part["type"] == "image" and image is None:
                image = open_image(part["url"])
            else:
                what = "a second image" if part["type"] == "image" else part["type"]
                raise ValueError(f"{where}: {what}; this model takes one image per conversation")
        text = "\n".join(texts).replace("<image>", "").strip()
        if role == "system":
            system = f"{text}\n"
        else:
            turns.append(Turn(role, system + text))
            system = ""
    return Conversation(image=image, turns=tuple(turns), where=where)


@functools.cache
def _model_class() -> type:
    """The class, made when lmms-eval is there to make it of."""
    from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]

    class OpenclocModel(lmms):  # pyright: ignore[reportUntypedBaseClass]
        """A multimodal model of opencloc that answers lmms-eval's tasks."""

        is_simple = False

        def __init__(
            self, pretrained: str, device: str = "auto", batch_size: int | str = 1, dtype: str = "auto", **options: Any
        ) -> None:
            """`pretrained`: a folder of `opencloc mllm`; `dtype`: auto, fp32 or bf16."""
            super().__init__()
            if options:
                raise ValueError(f"unknown model_args: {', '.join(options)}")
            precision: Any = {"float32": "fp32", "bfloat16": "bf16"}.get(dtype, dtype)
            self.answerer = Answerer.from_pretrained(
                pretrained, device, batch_size=int(batch_size), precision=precision
            )

        def generate_until(self, requests: list[Any]) -> list[str]:
            """The answers, each up to the first of its task's stop strings."""
            by_length: dict[int, list[int]] = {}
            asked: list[Conversation] = []
            stops: list[list[str]] = []
            for number, request in enumerate(requests):
                # (context, doc_to_messages, generation, doc id, task, split); older versions pass no context
                to_messages, settings, doc_id, task, split = request.args[-5:]
                where = f"{task}, document {doc_id}"
                asked.append(conversation_of(to_messages(self.task_dict[task][split][doc_id]), where))
                until = settings.get("until") or []
                stops.append([until] if isinstance(until, str) else list(until))
                by_length.setdefault(int(settings.get("max_new_tokens", MAX_NEW_TOKENS)), []).append(number)
            answers: dict[int, str] = {}
            for length, numbers in by_length.items():
                found = self.answerer.answer([asked[i] for i in numbers], length)
                answers.update(zip(numbers, found, strict=True))
            return [_cut(answers[i], stops[i]) for i in range(len(requests))]

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """(log-probability of each continuation, whether greedy decoding would say it)."""
            asked = []
            for request in requests:
                context, to_target, to_visual, doc_id, task, split = request.args
                document = self.task_dict[task][split][doc_id]
                target = to_target if isinstance(to_target, str) else to_target(document)
                images = [{"type": "image", "url": visual} for visual in to_visual(document)]
                messages = [
                    {"role": "user", "content": [*images, {"type": "text", "text": context}]},
                    {"role": "assistant", "content": [{"type": "text", "text": target}]},
                ]
                asked.append(conversation_of(messages, f"{task}, document {doc_id}"))
            return self.answerer.score(asked)

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            """Tasks of several rounds are not taken."""
            raise NotImplementedError("opencloc answers tasks of one round")

    return OpenclocModel


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in filter(None, stops):
        text = text.partition(stop)[0]
    return text.strip()
