"""What a language model's chat template puts around questions and answers, as five strings.

    head + question + ask + lead + answer + end + between + question + ask + lead + answer + end

So every piece is tokenised on its own: the ids of an answer are those of the answer, whatever stands around it, and a
prompt is the beginning of what was trained on.  Templates that write earlier turns differently from the last one
(Qwen 3 drops its empty thoughts) are followed in the form of the last turn, for all turns.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

# Given to templates: no thoughts before an answer, and a date that stays the same (Llama 3 writes today's).
_OPTIONS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
_TEXTS = ("Question-One", "Answer-One", "Question-Two", "Answer-Two")


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """The strings around the turns; `lead` and `end` are learned with the answers, the others are given."""

    head: str
    ask: str
    end: str
    between: str
    lead: str = ""  # a space that the template writes before an answer, but not at the end of a prompt (Mistral)


def chat_format(tokenizer: Any, where: str = "the tokenizer") -> ChatFormat:
    """The format of a tokenizer's chat template, or LLaVA's (`USER: ... ASSISTANT: ...`) if it has none.

    Raises ValueError naming `where` for a template that changes the texts or ends an answer by no special token, and
    where there is neither a template nor an end token.
    """
    if not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise ValueError(f"{where}: the tokenizer has neither a chat template nor an end token")
        start = tokenizer.bos_token or ""
        return ChatFormat(head=f"{start}USER: ", ask=" ASSISTANT: ", end=tokenizer.eos_token, between="USER: ")
    _, a1, q2, a2 = _TEXTS
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, _TEXTS, strict=True)]

    def render(count: int, ask: bool) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask, **_OPTIONS)

    try:
        whole, asked = render(4, ask=False), render(3, ask=True)
    except Exception as error:  # a template may raise whatever it likes
        raise ValueError(f"{where}: its chat template takes no two questions and answers: {error}") from error
    places = [whole.find(text) for text in _TEXTS]
    if -1 in places or places != sorted(places) or any(whole.count(text) != 1 for text in _TEXTS) or q2 not in asked:
        raise ValueError(f"{where}: its chat template does not leave the texts of questions and answers as they are")
    head, after = whole[: places[0]], whole[places[3] + len(a2) :]
    ask, before = asked[asked.index(q2) + len(q2) :], whole[places[2] + len(q2) : places[3]]
    if not before.startswith(ask):
        raise ValueError(f"{where}: its chat template writes another prompt than stands before an answer")
    between = whole[places[1] + len(a1) : places[2]]
    common = os.path.commonprefix([between, after])  # noqa: RUF071 (of strings, as wanted)
    ends = [common.find(token) + len(token) for token in tokenizer.all_special_tokens if token in common]
    if not ends:
        raise ValueError(f"{where}: its chat template ends an answer by no special token")
    end = common[: min(ends)]
    return ChatFormat(head=head, ask=ask, end=end, between=between[len(end) :], lead=before[len(ask) :])
