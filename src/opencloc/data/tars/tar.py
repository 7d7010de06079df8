"""One tar of samples, as bytes: streaming its samples, and indexing where they lie.

The format is `KEY.jpg|jpeg|png|webp` + `KEY.json` and/or `KEY.txt`, as img2dataset writes it.  As in the `webdataset`
library a key is the member's folder and name up to the first dot, consecutive members of one key make a sample, and
members that begin with a dot or have none are ignored.  Only plain (uncompressed) tars are read.

In place of an image a sample may have `KEY.features.safetensors`, what a vision tower made of it
(`opencloc.data.sources.features`).

A tar without its end marker is truncated: its last sample may lack members, so it is dropped and reported.
"""

from __future__ import annotations

import io
import itertools
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from opencloc import files
from opencloc.data.sample import IMAGE_EXTENSIONS, Sample, parse_record
from opencloc.errors import BadSample
from opencloc.images import decode_image

KEY = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$")  # webdataset's base_plus_ext
FEATURES = "features.safetensors"  # the extension of what a vision tower made of an image
DUPLICATE_KEY, NOT_ADJACENT = "duplicate key", "members of a sample are not adjacent"
# What tarfile raises for damaged headers, whose sizes can be negative or larger than any memory.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, MemoryError)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A file in a tar."""

    key: str
    extension: str  # lower case
    offset: int  # of the data, in bytes
    size: int


def read_members(stream: io.BufferedIOBase, url: str) -> Iterator[Member]:
    """The members of a tar that belong to samples, from its headers alone; `stream` can seek.

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
            match = KEY.match(info.name)
            room = length - info.offset_data
            if match and info.isreg() and not info.issparse():
                size = max(0, min(info.size, room))
                yield Member(key=match[1], extension=match[2].lower(), offset=info.offset_data, size=size)
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
    members: dict[str, Member]
    data: dict[str, bytes]

    @property
    def image_extension(self) -> str | None:
        return next((extension for extension in self.members if extension in (*IMAGE_EXTENSIONS, FEATURES)), None)


def _groups(stream: io.BufferedIOBase, url: str, *, load: bool) -> Iterator[_Group | BadSample]:
    """The samples of a tar in order, reading strictly forward; a `BadSample` for what is no sample."""
    seen: dict[str, bool] = {}  # by key: whether it had an image
    try:
        for key, members in itertools.groupby(read_members(stream, url), key=lambda member: member.key):
            group = _Group(key=key, members={}, data={})
            again = Counter[str]()
            for member in members:  # raises where the tar breaks off, so a last group is dropped
                if member.extension in group.members:
                    again[member.extension] += 1
                    continue
                group.members[member.extension] = member
                if load and member.extension in (*IMAGE_EXTENSIONS, FEATURES, "json", "txt"):
                    stream.seek(member.offset)
                    group.data[member.extension] = stream.read(member.size)
            has_image = group.image_extension is not None
            if key not in seen:
                yield group
            elif has_image and seen[key]:
                yield BadSample(DUPLICATE_KEY, url, f"{key} came earlier in this tar")
            else:
                detail = f"{', '.join(group.members)} of {key}: write the files of each sample one after the other"
                yield BadSample(NOT_ADJACENT, url, detail)
            for _ in range(max(again.values(), default=0)):
                yield BadSample(DUPLICATE_KEY, url, f"{key} has members of one name")
            seen[key] = seen.get(key, False) or has_image
    except BadSample as broken:
        yield broken


def iter_shard(url: str, max_px: int | None = None) -> Iterator[Sample | BadSample]:
    """The samples of one tar in order, each read once, strictly forward; nothing is raised for what is broken.

    A sample that cannot be used comes as a `BadSample` whose `where` is its key.  One whose `where` is `url` belongs to
    no key: "duplicate key" and "members of a sample are not adjacent" (the first members of the key came as a sample),
    "truncated tar" and "not a tar" (always the last).  `max_px` as in `decode_image`.  Raises `FileNotFoundError` and
    other `OSError` of the file itself.
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
                    image = decode_stored(group.data[extension], group.key, max_px)
                    yield Sample(key=group.key, image=image, **record)
                except BadSample as bad:
                    yield bad


def decode_stored(data: bytes, where: str, max_px: int | None) -> Image.Image:
    """`decode_image` of what a tar holds; raises `BadSample` "features in place of the image" where it is that."""
    if data[8:10] == b'{"':  # safetensors: the length of a header in JSON, then the header
        raise BadSample("features in place of the image", where, "only training reads them, as features:LOCATION")
    return decode_image(data, where, max_px)


def _no_image(group: _Group) -> BadSample:
    return BadSample("no image", group.key, f"members: {', '.join(sorted(group.members))}")


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Where the samples of one tar lie in it.  S samples, all of them with an image (or features)."""

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
