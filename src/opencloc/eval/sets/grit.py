"""GRIT: web images whose captions' noun chunks and referring expressions have boxes, as img2dataset stores them.

GRIT is published as Parquet of urls.  `img2dataset --save_additional_columns '["noun_chunks", "ref_exps"]'` downloads
the images into tars `00000.tar` (`KEY.jpg`, `KEY.json`), or folders `00000/`, with `00000.parquet` beside each.
Annotations are taken from the Parquet where there is one, else from the JSON in the tar.

A noun chunk or expression is (start, end, x0, y0, x1, y1, confidence): its text is `caption[start:end]`, its box is
normalised to the image.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opencloc import files
from opencloc.data.sample import IMAGE_EXTENSIONS
from opencloc.data.tars.tar import index_shard
from opencloc.errors import and_skipped
from opencloc.eval.sets.item import (
    BAD_BOX,
    BOXES,
    FILES,
    IMAGES,
    NO_REGIONS,
    EvalSet,
    Item,
    Skipped,
    Stored,
    in_words,
)

COLUMNS = ("noun_chunks", "ref_exps")


def grit_retrieval(location: str, *, texts: str = "noun_chunks", num: int = 2000, images: str | None = None) -> EvalSet:
    """The first `num` images of a GRIT folder that have regions, in the order of their files.

    `texts`: `noun_chunks` or `ref_exps`.  `images`: folder with `KEY.jpg`, where they don't lie in tars.
    """
    if texts not in COLUMNS:
        raise ValueError(f"texts is {texts!r}, must be one of {', '.join(COLUMNS)}")
    skipped: Skipped = Counter()
    items: list[Item] = []
    for stored, row in _rows(location, texts, images, skipped):
        boxes, phrases = _regions(row, texts, stored.path, skipped)
        if not phrases:
            skipped[IMAGES, NO_REGIONS] += 1
            continue
        items.append(Item(image=stored, boxes=boxes, texts=phrases))
        if len(items) == num:
            break
    if not items:
        raise ValueError(f"{location}: no image with {texts}{and_skipped(in_words(skipped))}")
    return EvalSet(name=texts, items=items, num_items=len(items), skipped=skipped)


def _rows(location: str, column: str, images: str | None, skipped: Skipped) -> Iterator[tuple[Stored, dict[str, Any]]]:
    """Where each image lies, with its row of annotations."""
    paths = files.children(location) if files.is_folder(location) else [location]
    tars = [path for path in paths if path.endswith(".tar")]
    if tars and images is None:
        for tar in tars:
            yield from _rows_of_tar(tar, column, skipped)
        return
    folders = [images] if images else [f"{location}/images", location.rstrip("/")]
    for path in paths:
        if path.endswith(".parquet"):
            for row in _parquet_rows(path, column):
                if (image := _find_image(folders, str(row["key"]))) is None:
                    skipped[IMAGES, "missing, of a row"] += 1
                else:
                    yield Stored(path=image), row


def _rows_of_tar(tar: str, column: str, skipped: Skipped) -> Iterator[tuple[Stored, dict[str, Any]]]:
    parquet = tar.removesuffix(".tar") + ".parquet"
    rows = {str(row["key"]): row for row in _parquet_rows(parquet, column)} if files.exists(parquet) else None
    index = index_shard(tar)
    skipped.update({(FILES, reason): number for reason, number in index.problems.items()})
    for key, ((start, size), (json_start, json_size), _) in zip(index.keys, index.spans.tolist(), strict=True):
        row = None
        if rows is not None:
            row = rows.get(os.path.basename(key))
        elif json_size >= 0:
            row = _parse(files.read_bytes(tar, json_start, json_size))
            if row is None:
                skipped[IMAGES, "with a broken JSON"] += 1
                continue
        if row is None:
            skipped[IMAGES, "without annotations"] += 1
        else:
            yield Stored(path=tar, start=start, num_bytes=size), row


def _parse(data: bytes) -> dict[str, Any] | None:
    """The object in a JSON text, None if there is none."""
    try:
        row = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _parquet_rows(path: str, column: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, read piece by piece: key, caption and the column of spans."""
    wanted = ["key", "caption", column]
    with files.open_seekable(path) as stream:
        try:
            table = pq.ParquetFile(stream)
            names = table.schema_arrow.names
        except (pa.ArrowException, OSError, ValueError) as error:  # names of columns that are not UTF-8
            raise ValueError(f"{path}: not a Parquet file ({error})") from error
        if missing := set(wanted) - set(names):
            raise ValueError(f"{path}: no column {', '.join(sorted(missing))} among {', '.join(names)}")
        batches = table.iter_batches(columns=wanted)
        while (rows := _next_rows(path, batches)) is not None:
            yield from rows


def _next_rows(path: str, batches: Iterator[pa.RecordBatch]) -> list[dict[str, Any]] | None:
    try:
        batch = next(batches, None)
        return None if batch is None else batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:  # damaged pages, texts that are not UTF-8
        raise ValueError(f"{path}: damaged Parquet ({error})") from error


def _find_image(folders: list[str], key: str) -> str | None:
    """`KEY.jpg` in one of the folders, or in its folder of the shard (the first five digits of the key)."""
    paths = (
        f"{folder}/{inner}{key}.{extension}"
        for folder in folders
        for inner in ("", f"{key[:5]}/")
        for extension in IMAGE_EXTENSIONS
    )
    return next((path for path in paths if files.exists(path)), None)


def _regions(row: dict[str, Any], column: str, where: str, skipped: Skipped) -> tuple[np.ndarray, tuple[str, ...]]:
    """Boxes (R, 4) and texts of a row."""
    spans, caption = row.get(column), row.get("caption") or ""
    if isinstance(spans, str):  # img2dataset stores lists as text in JSON
        spans = (_parse(f'{{"spans": {spans}}}'.encode("utf-8", "replace")) or {}).get("spans")
    if not isinstance(spans or [], list) or not isinstance(caption, str):
        raise ValueError(f"{where}, key {row.get('key')}: needs a caption and a list of {column}")
    boxes, texts = [], []
    for span in spans or []:
        if not isinstance(span, list) or len(span) < 6 or not all(isinstance(x, int | float) for x in span[:6]):
            raise ValueError(f"{where}, key {row.get('key')}: {column} holds {span!r}, not start, end and four edges")
        try:
            text = caption[int(span[0]) : int(span[1])].strip()
            box = np.clip(np.array(span[2:6], dtype=np.float32), 0, 1)
        except (ValueError, OverflowError):  # not a number, or one of 400 digits
            skipped[BOXES, BAD_BOX] += 1
            continue
        if not text:
            skipped[BOXES, "without a text"] += 1
            continue
        boxes.append(box)
        texts.append(text)
    return np.array(boxes, dtype=np.float32).reshape(-1, 4), tuple(texts)
