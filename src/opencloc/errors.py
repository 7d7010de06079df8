"""The error of one unusable sample, which bulk jobs count and pass over; messages without passwords."""

from __future__ import annotations

import re

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


def redacted(text: str) -> str:
    """The text with `***` in place of the passwords, keys, tokens and signatures that the URLs in it hold."""
    return _SECRET.sub(r"\1***", _USER.sub("***@", text))
