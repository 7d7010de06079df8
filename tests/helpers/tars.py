"""Small images and tars that several tests read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import fsspec
import numpy as np
from PIL import Image


def picture(seed: int = 0, width: int = 12, height: int = 7) -> Image.Image:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tar_bytes(shard: int, count: int) -> bytes:
    """A tar of `count` samples, whose pixels and captions say where they stand."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for row in range(count):
            image = file_bytes(Image.new("RGB", (8, 8), (shard, row, 0)))
            for extension, data in (("png", image), ("txt", f"{shard}/{row}".encode())):
                info = tarfile.TarInfo(f"{row:03d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tars(folder: Path, sizes: list[int]) -> Path:
    """The folder, with a tar of each of these numbers of samples."""
    folder.mkdir(exist_ok=True)
    for shard, size in enumerate(sizes):
        (folder / f"{shard}.tar").write_bytes(tar_bytes(shard, size))
    return folder


def put_remote(name: str, sizes: list[int]) -> str:
    """The address of a folder in memory, with a tar of each of these numbers of samples."""
    for shard, size in enumerate(sizes):
        fsspec.filesystem("memory").pipe_file(f"/{name}/{shard}.tar", tar_bytes(shard, size))
    return f"memory://{name}"
