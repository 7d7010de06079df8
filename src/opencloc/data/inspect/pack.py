"""Self-contained shards from images and the labels beside them (`opencloc data pack`).

Image files go into the tars byte by byte; only formats that tars don't hold (GIF, BMP, AVIF) are encoded again.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace

from opencloc.data.sample import Sample
from opencloc.data.sources.labelled import StoredPhotos, labels_of, left_out, open_labelled
from opencloc.data.tars.shards import ShardWriter
from opencloc.errors import BadSample, and_skipped
from opencloc.progress import track


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Images and their labels as self-contained tars."""

    data: str
    """The images: a folder, tars, or any `KIND:LOCATION?key=value` of files."""
    out: str
    """Folder for the tars, on this machine; holds none yet, or those of the same command when it was killed."""
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
    skipped: dict[str, int]  # by reason

    def __str__(self) -> str:
        renamed = f", {self.renamed:,} of them renamed" if self.renamed else ""
        return f"{self.samples:,} samples in {len(self.paths):,} tars{renamed}{and_skipped(self.skipped)}"


def pack(config: PackConfig) -> PackReport:
    """Writes the tars and says what is in them.

    A sample that cannot be used (broken image, unsound box, no labels in the sidecar) is left out and counted.  Run
    again after a kill, the same command goes on after the last whole tar.

    Raises as `open_labelled`, `ValueError` if the data are not files or none of them can be used, and `FileExistsError`
    if the folder holds tars.
    """
    source = open_labelled(config.data, config.sidecar)
    if not isinstance(source, StoredPhotos):
        raise ValueError(f"{config.data}: only tars, folders and other image files can be packed")
    opened, reasons = left_out(source), Counter[str]()
    samples = renamed = start = 0
    job = asdict(config) | {"labels": labels_of(source), "size": source.size}
    with ShardWriter(config.out, samples_per_shard=config.samples_per_shard, job=job) as writer:
        if writer.progress:
            start, samples, renamed = (writer.progress[name] for name in ("next", "samples", "renamed"))
            reasons.update(writer.progress["left_out"])
            print(f"{config.out}: going on at image {start:,} of {source.size:,}", file=sys.stderr)
        for index in track(range(start, source.size), "packing"):
            try:
                sample, image_bytes = source[index], source.image_bytes(index)
            except BadSample as bad:
                reasons[bad.reason] += 1
            else:
                renamed += _write(writer, sample, image_bytes, index)
                samples += 1
            counts = {"samples": samples, "renamed": renamed, "left_out": dict(reasons)}
            writer.progress = {"next": index + 1, **counts}
        skipped = dict((opened + reasons).most_common())
        if not samples:
            raise ValueError(f"{config.data}: none of {source.size:,} samples can be packed{and_skipped(skipped)}")
    return PackReport(paths=tuple(writer.paths), samples=samples, renamed=renamed, skipped=skipped)


def _write(writer: ShardWriter, sample: Sample, image_bytes: bytes, index: int) -> bool:
    """Whether the sample had to be renamed.  Input tars may each number their samples from 0, for example."""
    try:
        writer.write(sample, image_bytes)
    except ValueError:
        writer.write(replace(sample, key=f"sample-{index}"), image_bytes)
        return True
    return False
