"""What a task of `opencloc.mllm.tasks` works with: who is asked, about what, and what was said."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from opencloc.eval.metrics import Scorer
from opencloc.eval.sets.item import EvalSet, Loaded, Skipped
from opencloc.mllm.conversation import Conversation, RegionPrompt, Turn
from opencloc.mllm.judge import Case
from opencloc.texts import canonical


@runtime_checkable  # the tests check all annotations while they run
class Speaker(Protocol):
    """Answers questions about images; what is scored."""

    def answer(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """The answer to the last turn of each conversation, a user's, by greedy decoding."""
        ...

    def log_likelihood(self, conversations: Sequence[Conversation]) -> list[float]:
        """Log-probability of the last turn of each conversation, an assistant's, its end included."""
        ...


@dataclass(kw_only=True)
class Interview:
    """What a task works with, and what it tells besides its scores."""

    speaker: Speaker
    data: EvalSet
    resamples: int
    names: Mapping[str, int] = field(default_factory=dict)  # what things are called here, canonical, and how often
    caption_tokens: int = 128
    category: str = ""  # of Ferret-Bench
    finish: Callable[[list[Case]], list[Any] | None] = lambda _: None  # judged points by case, where there is a judge
    skipped: Skipped = field(default_factory=Counter)
    num_images: int = 0  # that had a question
    answers: list[dict[str, Any]] = field(default_factory=list)  # each question with its answer and the verdict
    cases: list[Case] = field(default_factory=list)  # of Ferret-Bench

    def scorer(self, images: np.ndarray) -> Scorer:
        """The scorer of all questions, by the numbers of their images."""
        self.num_images = len(np.unique(images))
        return Scorer(images, resamples=self.resamples)

    def ask(self, asked: Sequence[tuple[Loaded, str, tuple[RegionPrompt, ...]]], max_new_tokens: int) -> list[str]:
        """The answers to questions, each with its image and what its regions mean."""
        return self.speaker.answer(
            [Conversation(image=one.image, turns=(Turn("user", text),), prompts=p) for one, text, p in asked],
            max_new_tokens,
        )

    def note(self, one: Loaded, question: str, answer: str, **verdict: Any) -> None:
        """Keeps what was said, for answers.jsonl."""
        self.answers.append({"image": one.number, "question": question, "answer": answer} | verdict)


def absent(ask: Interview, one: Loaded, count: int) -> list[str]:
    """Up to `count` of the set's names that neither a region nor a caption of the image speaks of.

    They are drawn as often as they are there elsewhere, so that being frequent tells nothing, and are the same in every
    run.  A name that holds a region's name, or is held by it, is out: "hot dog" is no fair false name beside "dog".
    """
    texts = [_words(text) for text in one.item.texts]
    said = " ; ".join([*texts, *map(_words, one.item.captions)])
    names = [name for name in ask.names if _words(name) not in said and f"{_words(name)[:-1]}s " not in said]
    names = [name for name in names if not any(text in _words(name) for text in texts)]
    if not names or not count:
        return []
    often = np.array([ask.names[name] for name in names], dtype=np.float64)
    random = np.random.default_rng([0, one.number])
    return [names[i] for i in random.choice(len(names), min(count, len(names)), replace=False, p=often / often.sum())]


def _words(text: str) -> str:
    """The words of a text, canonical, with spaces around each."""
    words = re.findall(r"[^\W_]+", canonical(text))
    return f" {' '.join(words)} "
