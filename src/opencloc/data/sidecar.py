"""Region annotations beside the images: one Parquet file per tar, joined by sample key.

The labels `vesl` of `00000.tar` lie in `00000.vesl.parquet`, and the figures of the run that made them in
`00000.vesl_stats.json`; several names may lie side by side.  Images are never touched.  A COCO JSON has
one such file beside it, an image folder one in it, or numbered parts of it.

| column  | type                 | meaning |
|---------|----------------------|---------|
| key     | string, unique       | the sample's key |
| caption | string, may be null  | the caption the phrases came from |
| boxes   | list of 4 x float32  | R boxes, XYXY, normalised to the image |
| texts   | list of string       | R region texts |
| scores  | list of float32      | R confidences in [0, 1] |
| error   | string, may be null  | why the sample has no labels; boxes, texts and scores are then empty |
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opencloc import files
from opencloc.data.sample import region_problem, text_problem
from opencloc.errors import BadSample

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4)), nullable=False),
        pa.field("texts", pa.list_(pa.string()), nullable=False),
        pa.field("scores", pa.list_(pa.float32()), nullable=False),
        pa.field("error", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class SidecarRow:
    """The labels of one sample.

    Raises `ValueError` on construction if boxes, texts and scores differ in number, one of them is unsound (as in
    `Sample`), or an error comes together with regions.
    """

    key: str
    caption: str | None = None
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), dtype=np.float32))  # (R, 4)
    texts: tuple[str, ...] = ()
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))  # (R,)
    error: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "boxes", np.asarray(self.boxes, dtype=np.float32).reshape(-1, 4))
        object.__setattr__(self, "scores", np.asarray(self.scores, dtype=np.float32).reshape(-1))
        problem = region_problem(self.boxes, self.texts, self.scores)
        problem = problem or text_problem(self.key, self.caption or "", self.error or "")
        if problem is None and self.error is not None and self.texts:
            problem = "error beside regions", f"{self.error}; {len(self.texts)} regions"
        if problem:
            raise ValueError(f"sidecar row {self.key!r}: {problem[0]} ({problem[1]})")


def sidecar_path(location: str, name: str, part: int | None = None) -> str:
    """Where the labels `name` of a tar, COCO JSON or image folder lie.

    `name` may carry a folder (`/labels/vesl`): the file then lies there instead of beside the images.  `part` numbers
    the pieces into which the labels of a folder or JSON may be cut.

    >>> sidecar_path("/data/00000.tar", "vesl")
    '/data/00000.vesl.parquet'
    >>> sidecar_path("/data/00000.tar", "/labels/vesl")
    '/labels/00000.vesl.parquet'
    >>> sidecar_path("/data/photos/", "vesl", part=3)
    '/data/photos/photos-00003.vesl.parquet'
    """
    stem = location.rstrip("/")
    if not stem.endswith((".tar", ".json")):
        stem = f"{stem}/{os.path.basename(stem) or 'images'}"
    for suffix in (".tar", ".json"):
        stem = stem.removesuffix(suffix)
    folder, name = os.path.split(name)
    if not name:
        raise ValueError(f"a sidecar needs a name such as 'vesl', or FOLDER/vesl; got {folder + '/'!r}")
    if folder:
        stem = f"{folder}/{os.path.basename(stem)}"
    return f"{stem}{'' if part is None else f'-{part:05d}'}.{name}.parquet"


def is_label_file(name: str) -> bool:
    """Whether a file of this name belongs to labels: a sidecar, its stats or its manifest."""
    return name.endswith((".parquet", "_stats.json", "_manifest.json"))


def stats_path(path: str) -> str:
    """The `_stats.json` of a sidecar file."""
    return path.removesuffix(".parquet") + "_stats.json"


def write_sidecar(path: str, rows: Iterable[SidecarRow], stats: Mapping[str, Any]) -> None:
    """Writes a sidecar, then its `_stats.json`; each appears whole or not at all.

    The stats come last: where they lie, the sidecar beside them is finished.  `path` as from `sidecar_path`; a local
    folder that doesn't exist is made.  Raises `ValueError` for a key that comes twice.
    """
    rows = list(rows)
    seen: set[str] = set()
    for row in rows:
        if row.key in seen:
            raise ValueError(f"{path}: key {row.key!r} comes twice")
        seen.add(row.key)
    columns = {
        "key": [row.key for row in rows],
        "caption": [row.caption for row in rows],
        "boxes": _box_column(rows),
        "texts": [list(row.texts) for row in rows],
        "scores": [row.scores for row in rows],
        "error": [row.error for row in rows],
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=SCHEMA), buffer, compression="zstd")
    figures = json.dumps(stats, indent=2, sort_keys=True).encode() + b"\n"
    files.write_bytes(path, buffer.getvalue())
    files.write_bytes(stats_path(path), figures)


def _box_column(rows: list[SidecarRow]) -> pa.Array:
    boxes = np.concatenate([row.boxes for row in rows]) if rows else np.zeros((0, 4), dtype=np.float32)
    offsets = np.cumsum([0, *(len(row.boxes) for row in rows)], dtype=np.int32)
    fours = pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1), type=pa.float32()), 4)
    return pa.ListArray.from_arrays(pa.array(offsets), fours)


class Sidecar(Mapping[str, SidecarRow]):
    """The rows of a sidecar by key, in the order of the file; each is made when it is asked for.

    A row that is unsound (box outside the image, numbers that don't match, bytes that are not UTF-8) comes with its
    `error` saying so and without regions.  Raises `FileNotFoundError`, or `ValueError` naming the file if it is no
    Parquet, its columns are not those of `SCHEMA`, a key comes twice, or there is a null where none is allowed.
    """

    def __init__(self, path: str) -> None:
        columns = _columns(path)
        self._numbers: dict[str, int] = {}
        for number, key in enumerate(columns["key"].cast(pa.binary()).to_pylist()):
            key = key.decode(errors="backslashreplace")  # one that is not UTF-8 names no sample
            if self._numbers.setdefault(key, number) != number:
                raise ValueError(f"{path}: key {key!r} comes twice")
        self._captions, self._texts, self._errors = (columns[name] for name in ("caption", "texts", "error"))
        self._boxes = columns["boxes"].values.values.to_numpy().reshape(-1, 4)
        self._scores = columns["scores"].values.to_numpy()
        self._box_ends, self._score_ends = (columns[name].offsets.to_numpy() for name in ("boxes", "scores"))

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __getitem__(self, key: str) -> SidecarRow:
        i = self._numbers[key]
        boxes = self._boxes[self._box_ends[i] : self._box_ends[i + 1]].copy()  # Arrow's memory is read-only
        scores = self._scores[self._score_ends[i] : self._score_ends[i + 1]].copy()
        try:
            caption, texts, error = (column[i].as_py() for column in (self._captions, self._texts, self._errors))
            return SidecarRow(key=key, caption=caption, boxes=boxes, texts=tuple(texts), scores=scores, error=error)
        except ValueError as problem:
            return SidecarRow(key=key, error=str(problem))


def read_sidecar(path: str) -> dict[str, SidecarRow]:
    """All rows of a sidecar by key, in the order of the file.  Unsound rows and errors as in `Sidecar`."""
    return dict(Sidecar(path))


def _columns(path: str) -> dict[str, Any]:
    """The Arrow columns of a sidecar, checked as `Sidecar` says."""
    data = files.read_bytes(path)
    try:
        table = pq.read_table(io.BytesIO(data))
        names = set(table.column_names)
    except (pa.ArrowException, OSError, ValueError) as error:  # names of columns that are not UTF-8
        raise ValueError(f"{path}: not a Parquet file ({error})") from error
    if names != set(SCHEMA.names):
        missing, unknown = sorted(set(SCHEMA.names) - names), sorted(names - set(SCHEMA.names))
        raise ValueError(f"{path}: columns differ from a sidecar's: missing {missing}, unknown {unknown}")
    try:
        table = table.select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{path}: columns don't have a sidecar's types ({error})") from error
    columns = {name: table[name].combine_chunks() for name in SCHEMA.names}
    inner = {name: columns[name].values for name in ("boxes", "texts", "scores")}
    for name, values in [*inner.items(), ("boxes", inner["boxes"].values)]:
        if values.null_count:
            raise ValueError(f"{path}: column {name} holds lists with null entries")
    return columns


def read_labels(location: str, name: str) -> dict[str, SidecarRow]:
    """The labels `name` of an image folder or COCO JSON: its one sidecar, or all its numbered parts.

    Raises as `read_sidecar`, and `ValueError` if a key lies in two parts.
    """
    rows: dict[str, SidecarRow] = {}
    for part in _label_files(location, name):
        found = read_sidecar(part)
        if twice := found.keys() & rows.keys():
            raise ValueError(f"{part}: key {min(twice)!r} lies in an earlier part too")
        rows |= found
    return rows


def label_sizes(location: str, name: str | None) -> dict[str, int | None]:
    """The sizes of the files that `read_labels` reads, by their names; none without a `name`."""
    paths = _label_files(location, name) if name is not None else []
    return {os.path.basename(path): files.version(path).size for path in paths}


def _label_files(location: str, name: str) -> list[str]:
    """The one sidecar of a folder or JSON, or its parts in order."""
    path = sidecar_path(location, name)
    if files.exists(path):
        return [path]
    folder, whole = os.path.split(path)
    ending = f".{os.path.basename(name)}.parquet"
    part_name = re.compile(re.escape(whole.removesuffix(ending)) + r"-\d{5}" + re.escape(ending))
    there = files.children(folder) if files.is_folder(folder or ".") else []
    parts = [part for part in there if part_name.fullmatch(os.path.basename(part))]
    if not parts:
        raise FileNotFoundError(f"{path}: no such sidecar, nor parts of it")
    return parts


def with_labels(record: Mapping[str, Any], row: SidecarRow | None, where: str) -> dict[str, Any]:
    """The fields of a `Sample` with the regions of its sidecar row instead of its own.

    A caption in the row that is none of the sample's own texts (a caption, all captions one to a line, the alt-text)
    takes the captions' place, and the first of those becomes the alt-text if there was none.  Raises `BadSample` ("not
    in the sidecar", "not labelled") where there is no row or it holds an error.
    """
    if row is None:
        raise BadSample("not in the sidecar", where)
    if row.error is not None:
        raise BadSample("not labelled", where, row.error)
    captions, alt_text = record["captions"], record.get("alt_text")
    if row.caption is not None and row.caption not in (*captions, "\n".join(captions), alt_text):
        alt_text = alt_text or (captions[0] if captions else None)
        captions = (row.caption,)
    return {"captions": captions, "alt_text": alt_text, "boxes": row.boxes, "texts": row.texts, "scores": row.scores}
