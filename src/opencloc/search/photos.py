"""Where the photos of a library come from: which there are, in which version, and the reading of one.

A local folder is walked here, since a library holds whatever people keep in folders; everything else is a source of
`opencloc.data`, by number.  Photos are upright, as viewers show them.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from PIL import Image

from opencloc import files
from opencloc.data.sample import encode_image
from opencloc.data.sources.coco import Coco
from opencloc.data.sources.spec import open_source, parse_spec
from opencloc.data.tars.shards import Shards
from opencloc.errors import BadSample
from opencloc.images import decode_image
from opencloc.texts import is_text

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "avif")
THUMBNAIL_PX = 256  # long side
_EXIF_DATES = (0x9003, 0x9004, 0x0132)  # DateTimeOriginal, DateTimeDigitized, DateTime
_EXIF_IFD = 0x8769


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One photo that is there, unread."""

    path: str  # of the file; of what is no file of its own a name that stays the same
    size: int = 0  # of the file, or of the tar it is in; 0 where nobody knows
    mtime: int = 0  # in nanoseconds since 1970; likewise
    number: int | None = None  # in its source; None for a file


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a source holds."""

    source: str  # the one name of the source: a folder's absolute path, else its spec
    entries: tuple[Entry, ...]
    skipped: Counter[str]  # what is no photo of the library, by reason
    unreadable: tuple[str, ...] = ()  # folders that could not be listed: nobody knows what is in them


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One photo, read."""

    entry: Entry
    image: Image.Image  # RGB, upright
    digest: str  # of its bytes, or of its pixels where it has none: 32 hexadecimal digits
    date: datetime | None  # when it was taken, by EXIF; else when its file was changed; None where nobody knows
    thumbnail: bytes  # JPEG

    @property
    def id(self) -> int:
        """The number of this content: equal photos have one."""
        return photo_id(self.digest)


def photo_id(digest: str) -> int:
    """63 bits of the digest: two photos of ten million share one with a probability of 5 in a million."""
    return int(digest[:16], 16) >> 1


def list_photos(spec: str, num_images: int | None = None) -> Listing:
    """The photos of a folder (at any depth, each folder once, whichever links lead there) or of any other source.

    `num_images`: how many of a source that has no end (generated scenes).

    Raises as `open_source`, ValueError for a source without an end and no number, for one with an end and a number, and
    for a folder without a photo, `OSError` for a folder that cannot be read.
    """
    kind, location, options = parse_spec(spec)
    local = files.local_path(location)
    if kind == "folder" and local is not None and not options:
        if num_images is not None:
            raise ValueError(f"--num-images is for sources without an end: {spec} is indexed whole")
        return _walk(os.path.abspath(local))
    source: Any = open_source(spec)
    size = source.size
    if size is not None and num_images is not None:
        raise ValueError(
            f"--num-images is for sources without an end: {spec} has {size:,} images, and is indexed whole"
        )
    if size is None:
        if num_images is None:
            raise ValueError(f"{spec} has no end: say how many by --num-images")
        size = num_images
    if isinstance(source, Coco):
        names = [source.identity(number) for number in range(size)]
        entries = [_file(f"{source.images_path}/{name}", number) for number, name in enumerate(names)]
    elif isinstance(source, Shards):
        entries = list(_tar_entries(source))
    else:
        entries = [Entry(path=f"{spec}#{number}", number=number) for number in range(size)]
    skipped = Counter(getattr(source, "problems", getattr(source, "skipped", {})))
    return Listing(source=spec, entries=tuple(entries), skipped=skipped)


def _file(path: str, number: int | None = None) -> Entry:
    try:
        version = files.version(path)
    except OSError:  # will be missed when it is read
        return Entry(path=path, number=number)
    return Entry(path=path, size=version.size or 0, mtime=_mtime(version.tag), number=number)


def _mtime(tag: str) -> int:
    """A version's tag as a number: a time in nanoseconds of local files, of others a hash."""
    return int(tag) if tag.isdigit() else photo_id(hashlib.blake2b(tag.encode(), digest_size=16).hexdigest())


def _tar_entries(source: Shards) -> Iterator[Entry]:
    number = 0
    for url, count in zip(source.urls, source.counts.tolist(), strict=True):
        tar = _file(url)
        for _ in range(count):
            try:
                name = f"{os.path.dirname(url)}/{source.identity(number)}"
            except BadSample:  # of the whole tar: counted when it is read
                name = f"{url}#{number}"
            yield Entry(path=name, size=tar.size, mtime=tar.mtime, number=number)
            number += 1


def _walk(folder: str) -> Listing:
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    os.listdir(folder)  # an unreadable folder is an error, one further down is counted
    entries, skipped, unreadable = list[Entry](), Counter[str](), list[str]()
    seen = set[tuple[int, int]]()

    def failed(error: OSError) -> None:
        unreadable.append(os.fsdecode(error.filename))
        skipped["unreadable folder"] += 1

    for root, folders, names in os.walk(folder, followlinks=True, onerror=failed):
        status = os.stat(root)
        if (here := (status.st_dev, status.st_ino)) in seen:  # by another link, or round in a circle
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.rpartition(".")[2].lower() not in EXTENSIONS or name.startswith("."):
                skipped["not an image"] += 1
            elif not is_text(name) or not is_text(root):
                skipped["name is not utf-8"] += 1
            else:
                entries.append(_file(os.path.join(root, name)))
    if not entries:
        raise ValueError(f"{folder}: no photo (*.{', *.'.join(EXTENSIONS)})")
    return Listing(source=folder, entries=tuple(entries), skipped=skipped, unreadable=tuple(unreadable))


def read_photo(source: str, entry: Entry) -> Photo:
    """One photo, decoded.  Raises `BadSample`."""
    data: bytes | None = None
    if entry.number is None:
        try:
            data = files.read_bytes(entry.path)
        except OSError as error:
            raise BadSample("unreadable file", entry.path, error.strerror or str(error)) from error
    else:
        opened: Any = _source(source)
        if hasattr(opened, "image_bytes"):
            try:
                data = opened.image_bytes(entry.number)
            except OSError as error:
                raise BadSample("unreadable file", entry.path, error.strerror or str(error)) from error
        else:
            image = opened[entry.number].image
    if data is not None:
        image = decode_image(data, entry.path, oriented=True)
        digest = hashlib.blake2b(data, digest_size=16)
    else:
        digest = hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16)
    small = image.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return Photo(
        entry=entry,
        image=image,
        digest=digest.hexdigest(),
        date=_date(data, entry.mtime),
        thumbnail=encode_image(small, "jpg", 85),
    )


@functools.lru_cache(maxsize=2)
def _source(spec: str) -> Any:
    return open_source(spec)


def _date(data: bytes | None, mtime: int) -> datetime | None:
    if data is not None:
        try:
            exif = Image.open(io.BytesIO(data)).getexif()
            every = {**exif, **exif.get_ifd(_EXIF_IFD)}
            text = next(str(every[tag]) for tag in _EXIF_DATES if every.get(tag))
            return datetime.strptime(text.strip("\0 ")[:19], "%Y:%m:%d %H:%M:%S")
        except Exception:  # none there, or damaged: viewers pass over it too
            pass
    if not 0 < mtime < 2**62:  # not of a file
        return None
    return datetime.fromtimestamp(mtime / 1e9)  # cameras write local time without a zone: so do we
