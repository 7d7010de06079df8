"""`opencloc embed`: embeddings of images and their regions as one Parquet file, for other people's tools.

One row per embedding: `key` of the sample, `region` (-1 for the whole image by the image tower, else 0, 1, ...), `box`
(XYXY, normalised to the image), `text` (of the source, may be null) and `embedding`, L2-normalised, a list of fixed
size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field

from opencloc import files
from opencloc.config import Strict
from opencloc.data.sample import Sample, Source
from opencloc.data.sources.spec import open_source
from opencloc.errors import BadSample
from opencloc.model.cloc import ClocModel
from opencloc.progress import track
from opencloc.search.index import load_predictor, model_id_of
from opencloc.search.regions import grid_boxes

IMAGES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(Strict):
    """What is embedded, by which model."""

    source: str
    """The images: a folder, tars, or any KIND:LOCATION?key=value."""
    out: str
    """The Parquet file."""
    model: str = "tiny"
    """Folder or hub id of a CLOC, CLIP, SigLIP or SigLIP 2 checkpoint; `tiny` comes with the package."""
    regions: Literal["own", "grid", "none"] = "own"
    """The source's own regions with their texts, the grid of `opencloc index`, or images alone."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the embeddings."""
    num_images: Annotated[int, Field(ge=1)] | None = None
    """How many images; all of a source that has an end."""
    device: str = "auto"
    """cpu, cuda, cuda:NUMBER or auto."""


@dataclass(frozen=True, kw_only=True)
class EmbedReport:
    """What was written."""

    images: int
    regions: int
    skipped: Counter[str]  # images, by reason


def run_embed(config: EmbedConfig) -> EmbedReport:
    """What was written to `out`, which appears whole or not at all.

    Raises as `open_source` and `opencloc.load`, ValueError where no image can be used, OSError for a full disk.
    """
    source = open_source(config.source)
    size = source.size if config.num_images is None else min(config.num_images, source.size or config.num_images)
    if size is None:
        raise ValueError(f"{config.source} has no end: say how many by --num-images")
    model: Any = load_predictor(config.model, config.device)
    metadata = {"opencloc": f"model {config.model} ({model_id_of(config.model, config.device)})"}
    schema = pa.schema(
        {
            "key": pa.utf8(),
            "region": pa.int32(),
            "box": pa.list_(pa.float32(), 4),
            "text": pa.utf8(),
            "embedding": pa.list_(pa.float16() if config.dtype == "float16" else pa.float32(), model.model.embed_dim),
        },
        metadata=metadata,
    )
    images, regions, skipped = 0, 0, Counter(getattr(source, "skipped", {}))
    with files.new_file(Path(config.out)) as partial:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for batch in _batches(source, size, skipped):
                rows = _rows(model, batch, config.regions, schema)
                images, regions = images + len(batch), regions + len(rows) - len(batch)
                writer.write_table(rows)
        if not images:
            raise ValueError(f"{config.source}: no image can be used ({dict(skipped)})")
    return EmbedReport(images=images, regions=regions, skipped=skipped)


def _batches(source: Source, size: int, skipped: Counter[str]) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for number in track(range(size), "embedding"):
        try:
            batch.append(source[number])
        except BadSample as bad:
            skipped[bad.reason] += 1
        if len(batch) == IMAGES_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.no_grad()
def _rows(predictor: Any, batch: list[Sample], kind: str, schema: pa.Schema) -> pa.Table:
    model: ClocModel = predictor.model
    pixels, letterboxes = predictor.processor.letterbox([sample.image for sample in batch])
    features = model.encode_image(pixels.to(model.device))
    none = np.zeros((0, 4), dtype=np.float32)
    boxes = [sample.boxes if kind == "own" else grid_boxes() if kind == "grid" else none for sample in batch]
    regions = [features.embedding[:0]] * len(batch)
    if any(map(len, boxes)):
        squares = [
            letterbox.to_square(torch.from_numpy(own).clamp(0, 1)).clamp(0, 1).to(model.device)
            for own, letterbox in zip(boxes, letterboxes, strict=True)
        ]
        regions = model.encode_regions(features, squares)
    keys, numbers, texts, places, vectors = [], [], [], [], []
    for sample, whole, own, embedded in zip(batch, features.embedding, boxes, regions, strict=True):
        keys += [sample.key] * (1 + len(own))
        numbers += range(-1, len(own))
        texts += [None, *(sample.texts if kind == "own" else [None] * len(own))]
        places += [np.array([[0, 0, 1, 1]], dtype=np.float32), own]
        vectors += [whole[None], embedded]
    flat = torch.cat(vectors).float().cpu().numpy()
    if not np.isfinite(flat).all():
        raise ValueError("the model makes embeddings that are not finite: its weights are damaged")
    dtype = np.float16 if schema.field("embedding").type.value_type == pa.float16() else np.float32
    return pa.table(
        [
            pa.array(keys),
            pa.array(numbers, pa.int32()),
            pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(places).ravel()), 4),
            pa.array(texts, pa.utf8()),
            pa.FixedSizeListArray.from_arrays(pa.array(flat.astype(dtype).ravel()), flat.shape[1]),
        ],
        schema=schema,
    )
