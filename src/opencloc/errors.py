"""The error of one unusable sample, which bulk jobs count and pass over."""

from __future__ import annotations


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
