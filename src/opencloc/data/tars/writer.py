"""Writing samples into tars, such that `tar.py` reads them back."""

from __future__ import annotations

import io
import os
import tarfile

from opencloc.data.record import ImageFormat, encode_image, encode_record, image_extension
from opencloc.data.sample import Sample
from opencloc.data.tars.tar import KEY


class ShardWriter:
    """Writes samples into `FOLDER/00000.tar`, `00001.tar`, ... of `samples_per_shard` each.

    A context manager for a local folder.  A tar appears under its name when it is complete; if the block ends by an
    exception the one being written is removed.  The same samples give the same bytes (no times, no owners).  Raises
    `FileExistsError` if the folder holds tars already: old and new ones would mix.
    """

    def __init__(
        self, folder: str, *, samples_per_shard: int = 1000, image_format: ImageFormat = "jpg", quality: int = 95
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; at least 1")
        self.folder = folder
        self.paths: list[str] = []  # of the finished tars
        self._samples_per_shard = samples_per_shard
        self._image_format: ImageFormat = image_format
        self._quality = quality
        self._keys: set[str] = set()  # in the tar being written
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> ShardWriter:
        os.makedirs(self.folder, exist_ok=True)
        if old := sorted(name for name in os.listdir(self.folder) if name.endswith(".tar")):
            raise FileExistsError(f"{self.folder} holds tars already ({old[0]}, ...): choose an empty folder")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._tar is None:
            return
        if kind is None:
            self._finish()
        else:
            self._tar.close()
            os.unlink(self._temporary)

    def write(self, sample: Sample, image_bytes: bytes | None = None) -> str:
        """Adds a sample and returns its key in the tar, where dots of the file name became underscores.

        `image_bytes`: the image as a file, stored as it is if it is JPEG, PNG or WebP; without, or for other formats,
        `sample.image` is encoded.  Raises `ValueError` for a key that a tar cannot hold or already holds.
        """
        folder, name = os.path.split(sample.key)
        name = name.replace(".", "_")
        key = f"{folder}/{name}" if folder else name
        if not KEY.match(f"{key}.jpg") or "\0" in key:
            raise ValueError(f"{sample.key!r} cannot be the key of a tar member")
        if key in self._keys:
            raise ValueError(f"key {key!r} comes twice in {self._path}")
        extension = image_extension(image_bytes) if image_bytes is not None else None
        if image_bytes is None or extension is None:
            extension = self._image_format
            image_bytes = encode_image(sample.image, self._image_format, self._quality)
        if self._tar is None:
            self._tar = tarfile.open(self._temporary, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._keys.add(key)
        for suffix, data in ((extension, image_bytes), ("json", encode_record(sample))):
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        if len(self._keys) == self._samples_per_shard:
            self._finish()
        return key

    @property
    def _path(self) -> str:
        return os.path.join(self.folder, f"{len(self.paths):05d}.tar")

    @property
    def _temporary(self) -> str:
        return os.path.join(self.folder, f".{len(self.paths):05d}.tar.{os.getpid()}.tmp")

    def _finish(self) -> None:
        assert self._tar is not None
        self._tar.close()
        os.replace(self._temporary, self._path)
        self.paths.append(self._path)
        self._tar = None
        self._keys = set()
