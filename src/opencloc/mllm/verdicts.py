"""What an answer says: names, yes or no, objects.  Pure functions over texts; what can't be read is None or empty.

Every rule is strict, so that a model gains nothing by hedging: an answer that names two options names neither, "yes and
no" is unread, a word counts only as a whole word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from opencloc.texts import canonical

_ARTICLE = re.compile(r"^(?:a|an|the)\s+")
_YES_NO = re.compile(r"\b(yes|no|not)\b")
_BRACKETS = re.compile(r"\s*\[[^\]]*\]")


def bare_name(answer: str) -> str:
    """The answer as a name: canonical, without boxes, the article before and the full stop behind it."""
    text = canonical(_BRACKETS.sub("", answer)).strip(" .!\"'")
    return _ARTICLE.sub("", text)


def named(answer: str, names: Sequence[str]) -> list[int]:
    """Numbers of the names that the answer holds as whole words, each once, in the order of the names.

    The longest name that fits a place takes it: "a hot dog" holds "hot dog", no "dog".  A name counts in the singular
    and in the plain plural (`s` or `es`).
    """
    by_name = {}
    for number, name in enumerate(names):
        by_name.setdefault(canonical(name), number)
    by_name.pop("", None)
    if not by_name:
        return []
    longest_first = "|".join(re.escape(name) for name in sorted(by_name, key=len, reverse=True))
    found = re.finditer(rf"(?<!\w)({longest_first})(?:s|es)?(?!\w)", canonical(answer))
    return sorted({by_name[match[1]] for match in found})


def says_yes(answer: str) -> bool | None:
    """Whether the answer's first sentence says yes; None where it says neither yes nor no, or both.

    "No", "not" and POPE's other marks of denial are no; a sentence of other words is unread, which POPE's own script
    takes for yes.
    """
    sentence = re.split(r"[.!?\n]", canonical(answer), maxsplit=1)[0]
    said = {word == "yes" for word in _YES_NO.findall(sentence)}
    return said.pop() if len(said) == 1 else None
