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
from opencloc.boxes import box_problem
from opencloc.data.sample import IMAGE_EXTENSIONS
from opencloc.data.tars.tar import read_members
from opencloc.errors import BadSample
from opencloc.eval.sets.item import EvalSet, RegionTexts, Stored

NO_REGIONS = "image without regions"
COLUMNS = ("noun_chunks", "ref_exps")


def grit_retrieval(
    location: str, *, texts: str = "noun_chunks", num: int = 2000, images: str | None = None
) -> EvalSet[RegionTexts]:
    """The first `num` images of a GRIT folder that have regions, in the order of their files.

    `texts`: `noun_chunks` or `ref_exps`.  `images`: folder with `KEY.jpg`, where they don't lie in tars.
    """
    if texts not in COLUMNS:
        raise ValueError(f"texts is {texts!r}, must be one of {', '.join(COLUMNS)}")
    left_out: Counter[str] = Counter()
    items: list[RegionTexts] = []
    for stored, row in _rows(location, texts, images, left_out):
        boxes, phrases = _regions(row, texts, stored.path, left_out)
        if not phrases:
            left_out[NO_REGIONS] += 1
            continue
        items.append(RegionTexts(image=stored, boxes=boxes, texts=phrases))
        if len(items) == num:
            break
    if not items:
        raise ValueError(f"{location}: no image with {texts} (left out: {dict(left_out)})")
    return EvalSet(
        name=f"grit-retrieval {texts}",
        rules="every region against all region texts, and back; equal texts (but for case) are all hits",
        items=items,
        left_out=dict(+left_out),
    )


def _rows(
    location: str, column: str, images: str | None, left_out: Counter[str]
) -> Iterator[tuple[Stored, dict[str, Any]]]:
    """Where each image lies, with its row of annotations."""
    paths = files.children(location) if files.is_folder(location) else [location]
    tars = [path for path in paths if path.endswith(".tar")]
    if tars and images is None:
        for tar in tars:
            yield from _rows_of_tar(tar, column, left_out)
        return
    folders = [images] if images else [f"{location}/images", location.rstrip("/")]
    for path in paths:
        if path.endswith(".parquet"):
            for row in _parquet_rows(path, column):
                if (image := _find_image(folders, str(row["key"]))) is None:
                    left_out["row without an image"] += 1
                else:
                    yield Stored(path=image), row


def _rows_of_tar(tar: str, column: str, left_out: Counter[str]) -> Iterator[tuple[Stored, dict[str, Any]]]:
    parquet = tar.removesuffix(".tar") + ".parquet"
    rows = {str(row["key"]): row for row in _parquet_rows(parquet, column)} if files.exists(parquet) else None
    stored: dict[str, Stored] = {}
    records: dict[str, dict[str, Any]] = {}
    with files.open_seekable(tar) as stream:
        try:
            for member in read_members(stream, tar):
                key = member.key
                if member.extension in IMAGE_EXTENSIONS:
                    stored[key] = Stored(path=tar, start=member.offset, num_bytes=member.size)
                elif member.extension == "json" and rows is None:
                    stream.seek(member.offset)
                    records[key] = json.loads(stream.read(member.size))
        except BadSample as broken:  # what came before it counts
            left_out[broken.reason] += 1
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{tar}: {key}.json is not JSON ({error})") from error
    annotations = records if rows is None else rows
    for key, image in stored.items():
        row = annotations.get(os.path.basename(key) if rows is not None else key)
        if row is None:
            left_out["image without annotations"] += 1
        else:
            yield image, row


def _parquet_rows(path: str, column: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, read piece by piece: key, caption and the column of spans."""
    wanted = ["key", "caption", column]
    with files.open_seekable(path) as stream:
        try:
            table = pq.ParquetFile(stream)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a Parquet file ({error})") from error
        if missing := set(wanted) - set(table.schema_arrow.names):
            there = ", ".join(table.schema_arrow.names)
            raise ValueError(f"{path}: no column {', '.join(sorted(missing))} among {there}")
        for batch in table.iter_batches(columns=wanted):
            yield from batch.to_pylist()


def _find_image(folders: list[str], key: str) -> str | None:
    """`KEY.jpg` in one of the folders, or in its folder of the shard (the first five digits of the key)."""
    paths = (
        f"{folder}/{inner}{key}.{extension}"
        for folder in folders
        for inner in ("", f"{key[:5]}/")
        for extension in IMAGE_EXTENSIONS
    )
    return next((path for path in paths if files.exists(path)), None)


def _regions(
    row: dict[str, Any], column: str, where: str, left_out: Counter[str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Boxes (R, 4) and texts of a row."""
    spans = row.get(column)
    spans = json.loads(spans) if isinstance(spans, str) else spans or []  # img2dataset stores lists as text in JSON
    caption = row.get("caption") or ""
    boxes, texts = [], []
    for span in spans:
        if len(span) < 6:
            raise ValueError(f"{where}, key {row.get('key')}: {column} holds {span!r}, not start, end and four edges")
        text = caption[int(span[0]) : int(span[1])].strip()
        box = np.clip(np.array(span[2:6], dtype=np.float32), 0, 1)
        if not text or box_problem(box):
            left_out["empty text" if not text else "unsound box"] += 1
            continue
        boxes.append(box)
        texts.append(text)
    return np.array(boxes, dtype=np.float32).reshape(-1, 4), tuple(texts)
