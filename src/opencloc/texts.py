"""The one form of a text: what training, labelling, evaluation and Predictor compare, count and encode."""

from __future__ import annotations

import unicodedata


def canonical(text: str) -> str:
    """The text in Unicode's composed form (NFC), lower case, with runs of white space as one space.

    Raises ValueError for a text that holds half a surrogate pair, which no encoding can write.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r} is no valid Unicode text: {error.reason} at {error.start}") from None
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def class_name(name: str) -> str:
    """The bare name of a class as a data set writes it: underscores are spaces (LVIS's `alarm_clock`)."""
    return " ".join(name.replace("_", " ").split())


def is_text(text: str) -> bool:
    """Whether a text can be encoded: half a surrogate pair, which JSON can escape, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
