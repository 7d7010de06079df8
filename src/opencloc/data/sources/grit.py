"""GRIT: web photos whose captions' noun chunks and referring expressions have boxes, as img2dataset stores them.

`img2dataset --save_additional_columns '["noun_chunks", "ref_exps"]'` writes tars `00000.tar` with `KEY.jpg` and
`KEY.json`; both columns stand in the JSON (there as text), and in `00000.parquet` beside the tar, which is not needed.
A chunk is (start, end, x0, y0, x1, y1, confidence): its text is `caption[start:end]`, its box a share of the image.  A
phrase with several boxes has a chunk for each; here it is one region around them, as confident as the least of them.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
from pydantic.dataclasses import dataclass

from opencloc.data.sources.table import around
from opencloc.data.tars.shards import Shards, ShardsConfig
from opencloc.errors import BadSample

_SPAN = {int, float}


@dataclass(frozen=True, kw_only=True)
class GritConfig(ShardsConfig):
    """Which texts of GRIT are regions."""

    texts: Literal["noun_chunks", "ref_exps", "both"] = "both"


class Grit(Shards):
    """Tars of GRIT, as `Shards` but for where regions come from.

    A chunk that cannot be used (no four edges, no text, an empty box) is a `BadSample` of its image: "bad chunk".
    """

    config: GritConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, location: str, config: GritConfig | None = None) -> None:
        super().__init__(location, config or GritConfig())

    def parse(self, where: str, json_bytes: bytes | None, text: bytes | None) -> dict[str, Any]:
        record = super().parse(where, json_bytes, text)
        content = json.loads(json_bytes) if json_bytes is not None else {}  # sound, or the line above had raised
        columns = ("noun_chunks", "ref_exps") if self.config.texts == "both" else (self.config.texts,)
        found: dict[str, list[list[float]]] = {}
        for column in columns:
            chunks: dict[tuple[int, int], list[list[float]]] = {}
            for span in _spans(where, column, content.get(column)):
                chunks.setdefault((int(span[0]), int(span[1])), []).append(span[2:])
            for (start, end), boxes in chunks.items():
                text_of = " ".join(str(content.get("caption") or "")[start:end].split())
                if not text_of:
                    raise BadSample("bad chunk", where, f"{column} names no text by {start} to {end}")
                found.setdefault(text_of, []).append([*around([b[:4] for b in boxes]), min(b[4] for b in boxes)])
        rows = [(text, row) for text, several in found.items() for row in _distinct(several)]
        boxes = np.asarray([row[:4] for _, row in rows], dtype=np.float32).reshape(-1, 4).clip(0, 1)
        scores = np.asarray([row[4] for _, row in rows], dtype=np.float32).clip(0, 1)
        return record | {"boxes": boxes, "texts": tuple(text for text, _ in rows), "scores": scores if rows else None}


def _distinct(rows: list[list[float]]) -> list[list[float]]:
    """The rows with different boxes: an expression that is a noun chunk too counts once."""
    return list({tuple(row[:4]): row for row in rows}.values())


def _spans(where: str, column: str, spans: Any) -> list[list[float]]:
    """(start, end, four edges, confidence) of a column, which img2dataset stores as a list or its text."""
    if isinstance(spans, str):
        try:
            spans = json.loads(spans)
        except (ValueError, RecursionError) as error:
            raise BadSample("bad chunk", where, f"{column} is no list: {error}") from error
    spans = [] if spans is None else spans
    if not isinstance(spans, list):
        raise BadSample("bad chunk", where, f"{column} is no list but {type(spans).__name__}")
    for span in spans:
        sound = isinstance(span, list) and len(span) in (6, 7) and _SPAN.issuperset(map(type, span))
        if not sound or not all(abs(number) < 1e6 for number in span):
            raise BadSample("bad chunk", where, f"{column} holds {str(span)[:80]}, not start, end, four edges")
    return [[*span, 1.0][:7] for span in spans]
