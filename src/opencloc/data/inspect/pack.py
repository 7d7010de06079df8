"""Self-contained shards from images and the labels beside them (`opencloc data pack`).

Owns the pass over a data set; the tar format is `shards.py`'s, the record inside `record.py`'s.  Image files go into
the tars byte by byte, nothing is encoded again, except formats that tars don't hold (GIF, BMP, AVIF).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from opencloc.data.sample import Sample
from opencloc.data.sources.coco import Coco
from opencloc.data.sources.folder import ImageFolder
from opencloc.data.sources.labelled import left_out, open_labelled
from opencloc.data.tars.shards import Shards, ShardWriter
from opencloc.errors import BadSample


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Images and their labels as self-contained tars."""

    data: str
    """The images: a folder, tars, or any `KIND:LOCATION?key=value` of files."""
    out: str
    """Folder for the tars, on this machine; must hold none yet."""
    sidecar: str | None = None
    """Name of the labels; None: the only ones that lie beside the images, else the images' own regions."""
    samples_per_shard: int = 1000
    """Samples per tar; at least 1."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {self.samples_per_shard}")


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What was packed."""

    paths: tuple[str, ...]  # of the tars
    samples: int
    renamed: int  # samples whose key another one of the same tar had, or a tar can't hold: now `sample-NUMBER`
    left_out: dict[str, int]  # by reason


def pack(config: PackConfig, progress: Callable[[int], None] | None = None) -> PackReport:
    """Writes the tars and says what is in them.

    A sample that cannot be used (broken image, unsound box, no labels in the sidecar) is left out and counted.  Each
    tar appears when it is complete; an interrupted run leaves those finished so far.  `progress` is called with 1 for
    every sample read.

    Raises as `open_labelled`, `ValueError` if the data are not files, and `FileExistsError` if the folder holds tars.
    """
    source = open_labelled(config.data, config.sidecar)
    if not isinstance(source, Shards | Coco | ImageFolder):
        raise ValueError(f"{config.data}: only tars, image folders and COCO folders can be packed")
    reasons = left_out(source)
    samples = renamed = 0
    with ShardWriter(config.out, samples_per_shard=config.samples_per_shard) as writer:
        for index in range(source.size):
            try:
                sample, image_bytes = source[index], source.image_bytes(index)
            except BadSample as bad:
                reasons[bad.reason] += 1
            else:
                renamed += _write(writer, sample, image_bytes, index)
                samples += 1
            if progress is not None:
                progress(1)
    return PackReport(paths=tuple(writer.paths), samples=samples, renamed=renamed, left_out=dict(reasons.most_common()))


def _write(writer: ShardWriter, sample: Sample, image_bytes: bytes, index: int) -> bool:
    """Whether the sample had to be renamed.  Input tars may each number their samples from 0, for example."""
    try:
        writer.write(sample, image_bytes)
    except ValueError:
        writer.write(replace(sample, key=f"sample-{index}"), image_bytes)
        return True
    return False
