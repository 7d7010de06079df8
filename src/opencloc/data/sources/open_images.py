"""Open Images: boxes of 600 classes from CSV, 14.6 million of them on 1.7 million training photos.

Read are `*SPLIT-annotations-bbox.csv` (`ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,...,IsGroupOf,...`,
edges as shares of the image) and `*class-descriptions*.csv` (`/m/011k07,Tortoise`), as published; photos lie in
`SPLIT/ID.jpg`.  Texts are the class names in lower case.
"""

from __future__ import annotations

import io
import os
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv
from pydantic.dataclasses import dataclass

from opencloc import files
from opencloc.data.sources.kept import kept
from opencloc.data.sources.table import GROUP, AnnotatedConfig, AnnotatedPhotos, Table, make_table
from opencloc.texts import class_name

NO_NAME = "class without a name"
_EDGES = ("XMin", "YMin", "XMax", "YMax")


@dataclass(frozen=True, kw_only=True)
class OpenImagesConfig(AnnotatedConfig):
    """Which photos of Open Images."""

    split: str = "train"  # train, validation or test


def open_open_images(location: str, config: OpenImagesConfig) -> AnnotatedPhotos:
    """The photos that have boxes.  Raises `FileNotFoundError`, and `ValueError` naming a malformed file."""
    inputs = [
        _one_file(location, f"{config.split}-annotations-bbox.csv"),
        _one_file(location, "class-descriptions-boxable.csv", "class-descriptions.csv"),
    ]
    table = kept(Table, inputs, lambda: _read(*inputs), config.split)
    folders = [f"{location}/{config.split}", f"{location}/images/{config.split}", f"{location}/images"]
    return AnnotatedPhotos(location, config, table, folders, inputs)


def _one_file(location: str, *endings: str) -> str:
    """The file of the location, or its folder `annotations` or `csv`, whose name ends so (`oidv6-...`)."""
    folders = [place for part in ("", "/annotations", "/csv") if files.is_folder(place := location + part)]
    for ending in endings:
        for folder in folders:
            for path in files.children(folder):
                if os.path.basename(path).endswith(ending):
                    return path
    raise FileNotFoundError(f"{location}: no file *{' or *'.join(endings)}")


def _read(boxes_path: str, classes_path: str) -> Table:
    edges = dict.fromkeys(_EDGES, pa.string())  # a malformed number is to cost its own row only
    columns = {"ImageID": pa.string(), "LabelName": pa.string(), "IsGroupOf": pa.string()} | edges
    skipped = Counter[str]()
    table = _csv(boxes_path, columns, skipped)
    ids, labels = (table[name].combine_chunks().dictionary_encode() for name in ("ImageID", "LabelName"))
    names = _class_names(classes_path)
    texts = tuple(dict.fromkeys(names.values()))
    place = {text: number for number, text in enumerate(texts)}
    by_label = np.asarray(
        [place[names[one]] if one in names else -1 for one in labels.dictionary.to_pylist()], np.int64
    )
    label = by_label[labels.indices.to_numpy()] if len(by_label) else np.zeros(0, np.int64)
    group = np.asarray(table["IsGroupOf"].to_numpy() == "1")
    skipped[NO_NAME] += int((label < 0).sum())
    skipped[GROUP] += int((group & (label >= 0)).sum())
    chosen = (label >= 0) & ~group
    boxes = np.stack([_numbers(table[edge].combine_chunks()) for edge in _EDGES], axis=1)
    images = [f"{one}.jpg" for one in ids.dictionary.to_pylist()]
    return make_table(
        boxes_path,
        names=images,
        sizes_px=np.zeros((len(images), 2), dtype=np.int64),
        captions=[()] * len(images),
        texts=texts,
        rows=ids.indices.to_numpy().astype(np.int64)[chosen],
        labels=label[chosen],
        boxes=boxes[chosen],
        skipped=skipped,
    )


def _csv(path: str, columns: dict[str, pa.DataType], skipped: Counter[str]) -> pa.Table:
    """The columns of a CSV with a header; rows of another number of fields are counted."""

    def malformed(row: csv.InvalidRow) -> str:
        skipped["malformed row"] += 1
        return "skip"

    options = csv.ConvertOptions(include_columns=list(columns), column_types=columns)
    parse = csv.ParseOptions(invalid_row_handler=malformed)
    try:
        return csv.read_csv(io.BytesIO(files.read_bytes(path)), convert_options=options, parse_options=parse)
    except (pa.ArrowException, KeyError) as error:
        raise ValueError(f"{path}: not a CSV with the columns {', '.join(columns)} ({error})") from error


def _numbers(column: pa.Array) -> np.ndarray:
    """Texts as numbers, NaN for those that are none."""
    try:
        return pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        return np.asarray([_number(text) for text in column.to_pylist()])


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _class_names(path: str) -> dict[str, str]:
    """Class names by label, as `/m/011k07` -> `tortoise`; the header that some versions have names no label."""
    pairs = (line.partition(",") for line in files.read_text(path).splitlines())
    names = {label.strip(): class_name(name.strip().strip('"')).lower() for label, _, name in pairs}
    return {label: name for label, name in names.items() if name and label.startswith("/")}
