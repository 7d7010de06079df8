"""The error of one unusable sample, which bulk jobs count and pass over, and what messages are made of."""

from __future__ import annotations

import re
from collections.abc import Mapping

_USER = re.compile(r"(?<=://)[^/@\s]*@")
_SECRET = re.compile(
    r"([?&][^=&?\s]*(?:key|token|secret|passw|signature|sig|credential)[^=&?\s]*=)[^&\s'\"]+", re.IGNORECASE
)


class BadSample(ValueError):
    """One sample cannot be used.  Bulk jobs count it by `reason` (a short fixed phrase) and go on.

    `str(error)` names the sample (file, tar member, key) and the detail; `reason` is what is counted.
    """

    def __init__(self, reason: str, where: str, detail: str = "") -> None:
        self.reason = reason
        self.where = where
        self.detail = detail
        super().__init__(f"{where}: {reason}" + (f" ({detail})" if detail else ""))

    def __reduce__(self):  # crosses process borders
        return type(self), (self.reason, self.where, self.detail)


def counted(counts: Mapping[str, int]) -> str:
    """What was counted, as `bad box (2), empty box (1)`."""
    return ", ".join(f"{what} ({number:,})" for what, number in counts.items())


def and_skipped(counts: Mapping[str, int]) -> str:
    """The end of a sentence that says what was skipped and why; empty if nothing was."""
    return f"; skipped: {counted(counts)}" if counts else ""


def redacted(text: str) -> str:
    """The text with `***` in place of the passwords, keys, tokens and signatures that the URLs in it hold."""
    return _SECRET.sub(r"\1***", _USER.sub("***@", text))
