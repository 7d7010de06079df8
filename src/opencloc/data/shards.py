"""WebDataset tars: finding, indexing, streaming, reading by number, writing.

Owns the tar format: `KEY.jpg|jpeg|png|webp` + `KEY.json` and/or `KEY.txt`, as img2dataset writes them.  What stands in
the members is `record.py`'s, labels beside the tar are `sidecar.py`'s.

As in the `webdataset` library a key is the member's folder and name up to the first dot, consecutive members of one key
make a sample, and members that begin with a dot or have none are ignored.  Only plain (uncompressed) tars are read.

A tar without its end marker is truncated: its last sample may lack members, so it is dropped and reported.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from opencloc.data import files
from opencloc.data.record import (
    IMAGE_EXTENSIONS,
    ImageFormat,
    decode_image,
    encode_image,
    encode_record,
    image_extension,
    parse_record,
)
from opencloc.data.sample import BadSample, Sample
from opencloc.data.sidecar import SidecarRow, read_sidecar, sidecar_path, with_labels

__all__ = [
    "ShardIndex",
    "ShardWriter",
    "Shards",
    "ShardsConfig",
    "decode_image",
    "expand_urls",
    "index_shard",
    "iter_shard",
]

_KEY = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$")  # webdataset's base_plus_ext
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")
# What tarfile raises for damaged headers, whose sizes can be negative or larger than any memory.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, MemoryError)
_SIDECARS_KEPT = 64  # per process; a sidecar of 10,000 samples takes some 20 MB


def expand_urls(pattern: str | Sequence[str]) -> list[str]:
    """The tars that a pattern means, in order.

    A pattern is a file, a folder (its `*.tar`), a glob, or any of these with braces (`{00000..00007}.tar`, `{a,b}`), on
    this machine or at an fsspec URL; or several of them.  Raises `FileNotFoundError` naming what is not there, and
    `ValueError` for a brace range that runs backwards.
    """
    if not isinstance(pattern, str):
        return [url for one in pattern for url in expand_urls(one)]
    found: list[str] = []
    for url in _expand_braces(pattern):
        if files.is_folder(url):
            tars = [path for path in files.children(url) if path.endswith(".tar")]
            if not tars:
                raise FileNotFoundError(f"{url}: no *.tar in this folder")
            found += tars
        elif files.exists(url):
            found.append(url)
        elif re.search(r"[*?\[]", url):
            tars = files.glob(url)
            if not tars:
                raise FileNotFoundError(f"{url}: no file matches")
            found += tars
        else:
            raise FileNotFoundError(f"{url}: no such shard" + (f" (from {pattern})" if url != pattern else ""))
    return found


def _expand_braces(pattern: str) -> list[str]:
    if not (match := _BRACES.search(pattern)):
        return [pattern]
    if span := _RANGE.match(match[1]):
        first, last = int(span[1]), int(span[2])
        if last < first:
            raise ValueError(f"{pattern}: range {{{match[1]}}} runs backwards")
        width = len(span[1]) if span[1].startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        choices = match[1].split(",")
    tails = _expand_braces(pattern[match.end() :])
    return [f"{pattern[: match.start()]}{choice}{tail}" for choice in choices for tail in tails]


@dataclass(frozen=True, kw_only=True)
class _Member:
    key: str
    extension: str  # lower case
    offset: int  # of the data, in bytes
    size: int


def _members(stream: io.BufferedIOBase, url: str) -> Iterator[_Member]:
    """The members of a tar that belong to samples, from its headers alone.

    A member comes out before it is known whether the tar goes on to its end; the next one, or the end of the iteration,
    says so.  Raises `BadSample` ("not a tar", "truncated tar").
    """
    length = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    try:
        tar = tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="replace")  # noqa: SIM115
    except _TAR_ERRORS as error:
        raise BadSample("not a tar", url, str(error)) from error
    try:
        for info in tar:
            match = _KEY.match(info.name)
            room = length - info.offset_data
            if match and info.isreg() and not info.issparse():
                size = max(0, min(info.size, room))
                yield _Member(key=match[1], extension=match[2].lower(), offset=info.offset_data, size=size)
            if not 0 <= info.size <= room:
                raise tarfile.ReadError(f"{info.name} claims {info.size} bytes, {room} are there")
    except _TAR_ERRORS as error:
        raise BadSample("truncated tar", url, str(error)) from error
    stream.seek(tar.offset)
    if stream.read(512) != bytes(512):
        raise BadSample("truncated tar", url, f"no end marker at byte {tar.offset}")


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Consecutive members of one key by extension (the first of each), and their bytes where they were asked for."""

    key: str
    members: dict[str, _Member]
    data: dict[str, bytes]

    @property
    def image_extension(self) -> str | None:
        return next((extension for extension in self.members if extension in IMAGE_EXTENSIONS), None)


def _groups(stream: io.BufferedIOBase, url: str, *, load: bool) -> Iterator[_Group | BadSample]:
    """The samples of a tar in order, reading strictly forward; a `BadSample` for what is no sample."""
    seen: set[str] = set()
    try:
        for key, members in itertools.groupby(_members(stream, url), key=lambda member: member.key):
            group = _Group(key=key, members={}, data={})
            for member in members:  # raises where the tar breaks off, so a last group is dropped
                if member.extension in group.members:
                    continue
                group.members[member.extension] = member
                if load and member.extension in (*IMAGE_EXTENSIONS, "json", "txt"):
                    stream.seek(member.offset)
                    group.data[member.extension] = stream.read(member.size)
            if key in seen:
                yield BadSample("duplicate key", url, f"{key} came earlier in this tar")
            else:
                seen.add(key)
                yield group
    except BadSample as broken:
        yield broken


def iter_shard(url: str, max_px: int | None = None) -> Iterator[Sample | BadSample]:
    """The samples of one tar in order, each read once, strictly forward; nothing is raised for what is broken.

    A sample that cannot be used comes as a `BadSample` whose `where` is its key.  One whose `where` is `url` belongs to
    no key: "duplicate key" (the first holder of the key came as a sample), "truncated tar" and "not a tar" (always the
    last).  `max_px` as in `decode_image`.  Raises `FileNotFoundError` and other `OSError` of the file itself.
    """
    with files.open_seekable(url) as stream:
        for group in _groups(stream, url, load=True):
            if isinstance(group, BadSample):
                yield group
            elif (extension := group.image_extension) is None:
                yield _no_image(group)
            else:
                try:
                    record = parse_record(group.key, group.data.get("json"), group.data.get("txt"))
                    image = decode_image(group.data[extension], group.key, max_px)
                    yield record.sample(group.key, image, group.key)
                except BadSample as bad:
                    yield bad


def _no_image(group: _Group) -> BadSample:
    return BadSample("no image", group.key, f"members: {', '.join(sorted(group.members))}")


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Where the samples of one tar lie in it.  S samples, all of them with an image."""

    url: str
    keys: tuple[str, ...]
    spans: np.ndarray  # (S, 3, 2) int64: (offset, size) in bytes of image, json, txt; size -1 where there is none
    problems: Counter[str]  # what is no sample, by reason


def index_shard(url: str) -> ShardIndex:
    """The index of a tar, from one pass over its headers; what is broken is counted in `problems`.

    Raises `FileNotFoundError` and other `OSError` of the file itself.
    """
    keys, spans, problems = [], [], Counter[str]()
    with files.open_seekable(url) as stream:
        for group in _groups(stream, url, load=False):
            if isinstance(group, BadSample):
                problems[group.reason] += 1
            elif (extension := group.image_extension) is None:
                problems[_no_image(group).reason] += 1
            else:
                keys.append(group.key)
                found = (group.members.get(name) for name in (extension, "json", "txt"))
                spans.append([(member.offset, member.size) if member else (0, -1) for member in found])
    return ShardIndex(
        url=url, keys=tuple(keys), spans=np.asarray(spans, dtype=np.int64).reshape(-1, 3, 2), problems=problems
    )


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """How tars are read."""

    sidecar: str | None = None  # name of the labels beside the tars, or FOLDER/name; they replace the tars' own regions
    image_px: int | None = None  # decode JPEGs no larger than needed for this long side; None: in full


class Shards:
    """The samples of many tars by number, in the order of the tars.

    Opening makes one pass over the headers; afterwards a sample is one read.  Samples without an image have no number
    and are counted in `problems`, as is whatever else is broken in a tar.

    Raises `FileNotFoundError` for a tar or sidecar that isn't there, `ValueError` if no tar holds any sample.
    """

    def __init__(self, location: str | Sequence[str], config: ShardsConfig | None = None) -> None:
        self.location = location
        self.config = config or ShardsConfig()
        self.urls = expand_urls(location)
        if self.config.sidecar is not None:
            paths = [sidecar_path(url, self.config.sidecar) for url in self.urls]
            if missing := [path for path in paths if not files.exists(path)]:
                raise FileNotFoundError(f"{missing[0]}: no such sidecar ({len(missing)} of {len(paths)} are missing)")
        self._indices = [index_shard(url) for url in self.urls]
        self._ends = np.cumsum([len(index.keys) for index in self._indices])
        if not self.size:
            raise ValueError(f"{location}: no sample with an image in {len(self.urls)} tars; {dict(self.problems)}")
        self._sidecars: dict[int, dict[str, SidecarRow]] = {}  # by shard, the last few

    @property
    def size(self) -> int:
        return int(self._ends[-1])

    @property
    def problems(self) -> Counter[str]:
        """What the tars hold that is no sample, by reason."""
        return sum((index.problems for index in self._indices), Counter())

    def __repr__(self) -> str:
        return f"Shards({self.location!r}: {self.size} samples in {len(self.urls)} tars, {self.config})"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_sidecars": {}}

    def identity(self, index: int) -> str:
        """Name of a sample that stays the same wherever the tars lie: tar name and key."""
        shard, row = self._locate(index)
        return f"{os.path.basename(self._indices[shard].url)}/{self._indices[shard].keys[row]}"

    def image_bytes(self, index: int) -> bytes:
        """The image of a sample as it is stored."""
        return self._read(index)[0]

    def __getitem__(self, index: int) -> Sample:
        shard, row = self._locate(index)
        key = self._indices[shard].keys[row]
        where = f"{self._indices[shard].url}/{key}"
        image, json_bytes, text = self._read(index)
        record = parse_record(where, json_bytes, text)
        if self.config.sidecar is not None:
            record = with_labels(record, self._labels(shard).get(key), where)
        decoded = decode_image(image, where, self.config.image_px)
        return record.sample(key, decoded, where)

    def _locate(self, index: int) -> tuple[int, int]:
        """(number of the shard, row in it) of a sample."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in 0 ... {self.size - 1} of {self!r}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def _read(self, index: int) -> tuple[bytes, bytes | None, bytes | None]:
        """Bytes of image, json and txt, by one read over the members of the sample."""
        shard, row = self._locate(index)
        found = self._indices[shard]
        spans = found.spans[row].tolist()
        start = min(offset for offset, size in spans if size >= 0)
        end = max(offset + size for offset, size in spans if size >= 0)
        where = f"{found.url}/{found.keys[row]}"
        try:
            data = files.read_bytes(found.url, start, end - start)
        except OSError as error:
            raise BadSample("unreadable shard", where, str(error)) from error
        if len(data) < end - start:
            raise BadSample("unreadable shard", where, "the tar became shorter since it was indexed")
        image, json_bytes, text = (
            data[offset - start : offset - start + size] if size >= 0 else None for offset, size in spans
        )
        assert image is not None
        return image, json_bytes, text

    def _labels(self, shard: int) -> dict[str, SidecarRow]:
        assert self.config.sidecar is not None
        if shard not in self._sidecars:
            while len(self._sidecars) >= _SIDECARS_KEPT:
                self._sidecars.pop(next(iter(self._sidecars)))
            path = sidecar_path(self._indices[shard].url, self.config.sidecar)
            try:
                self._sidecars[shard] = read_sidecar(path)
            except (OSError, ValueError) as error:
                raise BadSample("unreadable sidecar", path, str(error)) from error
        return self._sidecars[shard]


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
        if not _KEY.match(f"{key}.jpg") or "\0" in key:
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
