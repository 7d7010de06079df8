"""Writing samples into a folder of tars, such that they can be read back, in a job that goes on after a kill."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opencloc import files
from opencloc.data.sample import ImageFormat, Sample, encode_image, encode_record
from opencloc.data.tars.tar import KEY
from opencloc.data.tars.urls import UNFINISHED


class TarWriter:
    """Writes the samples of one tar, a context manager: the tar appears under its name when the block ends well.

    Without a sample there is no tar.
    """

    def __init__(self, path: str) -> None:
        self.path, self.keys = path, set[str]()
        self._tar: tarfile.TarFile | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, key: str, members: Mapping[str, bytes]) -> str:
        """Adds the files of a sample, by extension, and returns its key in the tar, where dots became underscores.

        Raises `ValueError` for a key that a tar cannot hold or already holds, and for one that would leave the folder
        into which the tar is unpacked.
        """
        folder, name = os.path.split(key)
        name = name.replace(".", "_")
        stored = f"{folder}/{name}" if folder else name
        if not KEY.match(f"{stored}.jpg") or re.search(r"^/|\\|\0", stored) or ".." in stored.split("/"):
            raise ValueError(f"{key!r} cannot be the key of a tar member")
        if stored in self.keys:
            raise ValueError(f"key {stored!r} comes twice in {self.path}")
        self.keys.add(stored)
        if self._tar is None:
            partial = self._stack.enter_context(files.new_file(Path(self.path)))
            self._tar = self._stack.enter_context(tarfile.open(partial, "w", format=tarfile.PAX_FORMAT))  # noqa: SIM115
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"{stored}.{suffix}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        return stored


class ShardWriter:
    """Writes samples into `FOLDER/00000.tar`, `00001.tar`, ... of `samples_per_shard` each.

    A context manager for a local folder.  A tar appears under its name when it is complete.  Until the block ends well,
    a file `_unfinished.json` lies beside the tars, and readers refuse the folder.  The same samples give the same bytes
    (no times, no owners).

    `job`: what is written, as JSON.  A writer of the same job goes on after the last whole tar of one that was killed:
    `progress` then is what the other had set when that tar was complete.  Raises `FileExistsError` if the folder holds
    tars that this job did not begin: old and new ones would mix.
    """

    def __init__(
        self,
        folder: str,
        *,
        samples_per_shard: int = 1000,
        image_format: ImageFormat = "jpg",
        quality: int = 95,
        job: Mapping[str, Any] | None = None,
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; at least 1")
        self.folder = folder
        self.paths: list[str] = []  # of the finished tars
        self.progress: dict[str, Any] = {}  # the caller's, kept with every finished tar
        self._samples_per_shard = samples_per_shard
        self._image_format: ImageFormat = image_format
        self._quality = quality
        self._job = None if job is None else json.loads(json.dumps(job))
        self._tar: TarWriter | None = None  # the one being written
        self._file = contextlib.ExitStack()  # gives it its name

    def __enter__(self) -> ShardWriter:
        os.makedirs(self.folder, exist_ok=True)
        files.sweep(Path(self.folder))
        there = sorted(name for name in os.listdir(self.folder) if name.endswith(".tar"))
        with contextlib.suppress(FileNotFoundError):
            begun = json.loads(Path(self.folder, UNFINISHED).read_text())
            if begun.get("tars", True) and (self._job is None or begun.get("job") != self._job):
                raise FileExistsError(f"{self.folder} holds an unfinished job with other settings")
            self.progress = begun["progress"]
            self.paths = [os.path.join(self.folder, f"{number:05d}.tar") for number in range(begun["tars"])]
            if os.path.exists(self._path):  # complete, but its progress was not kept
                os.unlink(self._path)
            there = []
        if there:
            raise FileExistsError(f"{self.folder} holds tars already ({there[0]}, ...): choose an empty folder")
        self._mark()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self._finish()
        else:
            self._file.__exit__(kind, error, trace)
        if kind is None or not self.paths:
            os.unlink(os.path.join(self.folder, UNFINISHED))

    def write(self, sample: Sample, image_bytes: bytes | None = None) -> str:
        """Adds a sample and returns its key in the tar, where dots of the file name became underscores.

        `image_bytes`: the image as a file, stored as it is if it is JPEG, PNG or WebP; without, or for other formats,
        `sample.image` is encoded.  Raises `ValueError` for a key that a tar cannot hold or already holds, and for one
        that would leave the folder into which the tar is unpacked.
        """
        if self._tar is not None and len(self._tar.keys) == self._samples_per_shard:
            self._finish()
        extension = _image_extension(image_bytes) if image_bytes is not None else None
        if image_bytes is None or extension is None:
            extension = self._image_format
            image_bytes = encode_image(sample.image, self._image_format, self._quality)
        if self._tar is None:
            self._tar = self._file.enter_context(TarWriter(self._path))
        return self._tar.add(sample.key, {extension: image_bytes, "json": encode_record(sample)})

    @property
    def _path(self) -> str:
        return os.path.join(self.folder, f"{len(self.paths):05d}.tar")

    def _finish(self) -> None:
        if self._tar is not None and self._tar.keys:
            self._file.close()
            self.paths.append(self._path)
            self._tar = None
            self._mark()

    def _mark(self) -> None:
        """Says that the folder is not finished, and how far it is."""
        state = {"job": self._job, "tars": len(self.paths), "progress": self.progress}
        files.write_json(os.path.join(self.folder, UNFINISHED), state)


def _image_extension(data: bytes) -> str | None:
    """`jpg`, `png` or `webp` by the first bytes of a file, None for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None
