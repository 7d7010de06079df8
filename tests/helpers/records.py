"""What two records of one image must have in common."""

from __future__ import annotations

import numpy as np

from opencloc.data.sample import Record


def assert_same_record(one: Record, other: Record) -> None:
    """The same key, texts and boxes.  Scores and images are the caller's."""
    for name in ("key", "captions", "alt_text", "texts"):
        assert getattr(one, name) == getattr(other, name), name
    assert np.array_equal(one.boxes, other.boxes)
