"""Questions and answers made from any sample with regions, for training and for evaluation.

    refer     What is {region:0}?                              dog
    choose    What is {region:0}, a dog or a cat?              dog
    ground    Where is the dog?                                {box:0}
    phrases   Where are these: a dog; a cat?                   a dog {box:0}; a cat {box:1}
    exists    Is there a dog in the image?                     Yes / No
    verify    Is there a dog in the image? If so, where?       Yes, {box:0} / No
    caption   Describe the image.                              one of the captions

A conversation asks about each object once, so that no answer stands in an earlier turn.  Captions, which tell all, and
yes/no questions have conversations of their own.  Yes and no come equally often, and what is not there is drawn as
often as it is there elsewhere, so that neither the name nor the turns before tell the answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal

from opencloc.data.sample import Sample, Source
from opencloc.errors import BadSample
from opencloc.mllm.conversation import Conversation, Turn
from opencloc.model.prompts import Box
from opencloc.texts import canonical

Kind = Literal["refer", "choose", "ground", "phrases", "exists", "verify", "caption"]
KINDS: tuple[Kind, ...] = ("refer", "choose", "ground", "phrases", "exists", "verify", "caption")

YES, NO = "Yes", "No"
REFER = "What is {region:0}?"
CAPTION = "Describe the image."
NAMES_FROM = 500  # samples whose region texts say what might be there
_ALONE = ("exists", "verify", "caption")  # kinds that share a conversation with no other
_UNCOUNTED = frozenset(
    ("some", "the", "a", "an", "two", "three", "four", "five", "six", "several", "many", "his", "her", "their")
)


def refer(number: int = 0) -> str:
    """Asks what prompt `number` shows."""
    return f"What is {{region:{number}}}?"


def choose(names: Sequence[str], number: int = 0) -> str:
    """Asks which of the names prompt `number` shows."""
    return f"What is {{region:{number}}}, {' or '.join(map(with_article, names))}?"


def ground(name: str) -> str:
    """Asks for the box of the one thing of that name."""
    return f"Where is the {name}?"


def phrases(texts: Sequence[str]) -> str:
    """Asks for the boxes of several phrases."""
    return f"Where are these: {'; '.join(texts)}?"


def exists(name: str) -> str:
    """Asks whether something is there, as POPE does."""
    return f"Is there {with_article(name)} in the image?"


def verify(name: str) -> str:
    """Asks whether something is there, and for its box."""
    return f"{exists(name)} If so, where?"


def with_article(name: str) -> str:
    """The name with "a" or "an", unless it is plural or has a word of that kind already."""
    first, last = name.split()[0].lower(), name.split()[-1].lower()
    if first in _UNCOUNTED or first.isdecimal() or (last.endswith("s") and not last.endswith(("ss", "us"))):
        return name
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


class Questions:
    """`questions(sample, rng)`: a conversation about a sample, drawn by `rng` from questions of some kinds.

    `names`: what things are called in the data, as often as they are there; what is not in an image is drawn from them.
    """

    def __init__(self, names: Sequence[str], kinds: Sequence[Kind] = KINDS, max_turns: int = 5) -> None:
        self.names = list(names)
        self.kinds, self.max_turns = tuple(kinds), max_turns

    def __call__(self, sample: Sample, rng: random.Random) -> Conversation:
        """The conversation.  Raises `BadSample` for a sample of which nothing can be asked."""
        wanted: tuple[Kind, ...] = self.kinds
        if not sample.captions:
            wanted = tuple(kind for kind in wanted if kind != "caption")
        if not len(sample.boxes):
            wanted = tuple(kind for kind in wanted if kind == "caption")
        if not wanted:
            raise BadSample("nothing to ask about", sample.key, f"no regions or caption for {', '.join(self.kinds)}")
        first = wanted[rng.randrange(len(wanted))]
        turns: list[Turn] = []
        prompts: list[Box] = []
        if first == "caption":
            turns += _turns(CAPTION, sample.captions[rng.randrange(len(sample.captions))])
        elif first in ("exists", "verify"):
            self._presence(sample, rng, first, turns, prompts)
        else:
            mixed: list[Kind] = [kind for kind in wanted if kind not in _ALONE]
            self._regions(sample, rng, mixed, turns, prompts)
        if not turns:
            raise BadSample("nothing to ask about", sample.key, f"no {first} question can be made")
        return Conversation(image=sample.image, turns=tuple(turns), prompts=tuple(prompts), where=sample.key)

    def absent(self, sample: Sample, rng: random.Random, count: int) -> list[str]:
        """Up to `count` different names of things that neither a region nor a caption of the sample speaks of."""
        said = {word for text in (*sample.texts, *sample.captions) for word in _words(text)}
        found: dict[str, None] = {}
        for _ in range(20 * count):
            if len(found) == count or not self.names:
                break
            name = self.names[rng.randrange(len(self.names))]
            if not said.intersection(_words(name)):
                found[name] = None
        return list(found)

    def _presence(self, sample: Sample, rng: random.Random, kind: Kind, turns: list[Turn], prompts: list[Box]) -> None:
        """Questions about what is there and what is not, of each as many on average; each thing in one of them."""
        ask = exists if kind == "exists" else verify
        there = occurring_once(sample.texts)
        rng.shuffle(there)
        missing = self.absent(sample, rng, self.max_turns)
        while len(turns) < 2 * self.max_turns and there and missing:
            if rng.random() < 0.5:
                turns += _turns(ask(missing.pop()), NO)
                continue
            number = there.pop()
            text, answer = sample.texts[number], YES
            if kind == "verify":
                answer = f"{YES}, {{box:{len(prompts)}}}"
                prompts.append(Box(*map(float, sample.boxes[number])))
            turns += _turns(ask(text), answer)

    def _regions(
        self, sample: Sample, rng: random.Random, kinds: list[Kind], turns: list[Turn], prompts: list[Box]
    ) -> None:
        """Questions about one region after the other, each region in one of them."""
        once = set(occurring_once(sample.texts))
        left = list(range(len(sample.texts)))
        rng.shuffle(left)
        while left and len(turns) < 2 * self.max_turns:
            kind = kinds[rng.randrange(len(kinds))]
            number = left.pop()
            text = sample.texts[number]
            is_only = number in once
            at = len(prompts)
            prompts.append(Box(*map(float, sample.boxes[number])))
            if kind == "phrases" and is_only and left:
                group = [(text, at)]
                for other in [n for n in left if n in once][:2]:
                    left.remove(other)
                    group.append((sample.texts[other], len(prompts)))
                    prompts.append(Box(*map(float, sample.boxes[other])))
                answer = "; ".join(f"{text} {{box:{k}}}" for text, k in group)
                turns += _turns(phrases([text for text, _ in group]), answer)
            elif kind in ("ground", "phrases") and is_only:
                turns += _turns(ground(text), f"{{box:{at}}}")
            elif kind == "choose" and (others := self.absent(sample, rng, 1)):
                pair = [text, *others]
                rng.shuffle(pair)
                turns += _turns(choose(pair, at), text)
            elif "refer" in kinds or kind == "refer":
                turns += _turns(refer(at), text)


def occurring_once(texts: Sequence[str]) -> list[int]:
    """The numbers of the texts that no other text equals: of these things one can ask where they are."""
    often = Counter(map(canonical, texts))
    return [number for number, text in enumerate(texts) if often[canonical(text)] == 1]


def names_of(source: Source) -> list[str]:
    """What things are called in a source: a generated one says so, of others the first samples are looked at."""
    if (class_names := getattr(getattr(source, "config", None), "class_names", None)) is not None:
        return list(class_names())
    names: list[str] = []
    for index in islice(range(NAMES_FROM), source.size):
        try:
            sample: Any = source[index]
        except BadSample:
            continue  # counted when training meets it
        names += getattr(sample, "texts", ())
    return names


def _turns(question: str, answer: str) -> list[Turn]:
    return [Turn("user", question), Turn("assistant", answer)]


def _words(text: str) -> set[str]:
    """The words by which a text is told to speak of a thing: all but the shortest, without a plural's s."""
    return {word.strip(".,;").removesuffix("s") for word in canonical(text).split() if len(word) > 2}
