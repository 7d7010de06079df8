"""The English of the generated world: noun phrases, captions and the alt-texts of imagined web pages."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

_CAPTIONS = (
    "{list}",
    "{list}",
    "a picture of {list}",
    "an image showing {list}",
    "a scene with {list}",
    "{list} side by side",
    "this picture shows {list}",
)
_ALT_TEXTS = (
    "{a} stock photo",
    "{a} and {b} wallpaper hd",
    "buy {a} online, free shipping",
    "best {a} of 2019",
    "{a} vector clip art",
    "IMG_{n}.jpg",
    "photo by user{n}",
    "{b} with {a}",
    "how to draw {a} step by step",
    "{a} {b} {c} sticker set",
)


def noun_phrase(text: str, countable: bool) -> str:
    """The text with its article: "a dog", "an apple", "some socks"."""
    if not countable:
        return f"some {text}"
    vowel_sound = text.startswith("hour") or (text[0] in "aeiou" and not text.startswith("uni"))
    return f"{'an' if vowel_sound else 'a'} {text}"


def caption(noun_phrases: Sequence[str], rng: Random) -> str:
    """A sentence with all the noun phrases, in any order."""
    phrases = list(noun_phrases)
    rng.shuffle(phrases)
    listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return _CAPTIONS[int(rng.random() * len(_CAPTIONS))].format(list=listed)


def alt_text(names: Sequence[str], rng: Random) -> str:
    """What a web page might say: up to three of the names, or none, among words that say nothing of the picture."""
    shuffled = list(names)
    rng.shuffle(shuffled)
    a, b, c = (shuffled[k % len(shuffled)] for k in range(3))
    template = _ALT_TEXTS[int(rng.random() * len(_ALT_TEXTS))]
    return template.format(a=a, b=b, c=c, n=1000 + int(9000 * rng.random()))
