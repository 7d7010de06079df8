"""What every reader of an evaluation set gives: images by their place on disk, each with what is asked of it.

One item is one image, whatever number of boxes or texts is asked of it, so an image is decoded and encoded once.
Annotations are read at once, images one batch at a time (`load`), so a set need not fit in memory.  Owns the rule for
images that are missing or broken: counted by reason, and too many of them end the run.

Symbols: R regions of one image, K boxes of one phrase.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

from opencloc import files
from opencloc.errors import BadSample
from opencloc.images import decode_image

READERS = 4  # threads that read and decode images


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where the bytes of an image lie."""

    path: str  # of a file, or of the tar that holds it
    start: int = 0  # first byte
    num_bytes: int | None = None  # None: to the end of the file
    expected_px: tuple[int, int] | None = None  # width and height that the annotations refer to


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image of an evaluation set."""

    image: Stored


@dataclass(frozen=True, kw_only=True)
class Labelled(Item):
    """An image of one class."""

    label: int  # place in the class names


@dataclass(frozen=True, kw_only=True)
class Captioned(Item):
    """An image with captions."""

    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Regions(Item):
    """Boxes of known classes."""

    boxes: np.ndarray  # (R, 4) XYXY float32, normalised to the image
    labels: np.ndarray  # (R,) int64, places in the class names
    areas_px: np.ndarray  # (R,) the annotation's own areas in pixels


@dataclass(frozen=True, kw_only=True)
class RegionTexts(Item):
    """Boxes with a text each."""

    boxes: np.ndarray  # (R, 4)
    texts: tuple[str, ...]  # R


@dataclass(frozen=True, kw_only=True)
class Choices(Item):
    """Boxes with several texts each, of which the first is true."""

    boxes: np.ndarray  # (R, 4)
    choices: tuple[tuple[str, ...], ...]  # R


@dataclass(frozen=True, kw_only=True)
class Phrases(Item):
    """Texts to be found in the image."""

    texts: tuple[str, ...]
    truths: tuple[np.ndarray, ...]  # for each text its boxes (K, 4)


ItemT = TypeVar("ItemT", bound=Item)


@dataclass(frozen=True, kw_only=True)
class EvalSet(Generic[ItemT]):
    """An evaluation set: its images and the rules by which it was read."""

    name: str  # the task and the split, as tables show it
    rules: str  # what is asked, of which boxes, against which texts: a sentence or two
    items: Sequence[ItemT]
    left_out: dict[str, int]  # annotations that are not asked for, by reason
    class_names: tuple[str, ...] = ()
    class_groups: tuple[str, ...] = ()  # of each class its group (LVIS: rare, common, frequent), or empty
    templates: tuple[str, ...] = ()  # with `{}` for the class name


def read_image(stored: Stored) -> Image.Image:
    """The image as RGB; raises `BadSample` if it is missing, broken or of another size than annotated."""
    try:
        data = files.read_bytes(stored.path, stored.start, stored.num_bytes)
    except FileNotFoundError as error:
        raise BadSample("missing image file", stored.path) from error
    except OSError as error:
        raise BadSample("unreadable image file", stored.path, str(error)) from error
    return decode_image(data, stored.path, expected_px=stored.expected_px)


@dataclass(kw_only=True)
class Unread:
    """What became of the images that could not be read."""

    allowed: int  # more than so many end the run
    reasons: Counter[str] = field(default_factory=Counter)

    def count(self, bad: BadSample) -> None:
        """Counts one; raises ValueError naming it when there are too many."""
        self.reasons[bad.reason] += 1
        if self.reasons.total() > self.allowed:
            count = self.reasons.total()
            raise ValueError(
                f"{count} images could not be read, at most {self.allowed} may be missing; the last: {bad}"
            )


def load(items: Sequence[Any], batch_size: int, unread: Unread) -> Iterator[list[tuple[int, Image.Image]]]:
    """Batches of (number of the item, its image), in order, read ahead by threads; unusable images are left out."""
    waiting: deque[tuple[int, Future[Image.Image]]] = deque()
    numbers = iter(range(len(items)))
    with ThreadPoolExecutor(READERS) as pool:
        try:
            batch: list[tuple[int, Image.Image]] = []
            while True:
                waiting.extend(
                    (number, pool.submit(read_image, items[number].image))
                    for number in islice(numbers, 2 * batch_size - len(waiting))
                )
                if not waiting:
                    break
                number, future = waiting.popleft()
                try:
                    batch.append((number, future.result()))
                except BadSample as bad:
                    unread.count(bad)
                if len(batch) == batch_size:
                    yield batch
                    batch = []
            if batch:
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)


def first_folder(folders: Sequence[str], names: Sequence[str]) -> str:
    """The first of `folders` that holds one of the first few files `names`.

    Raises `FileNotFoundError` listing the folders that were tried.
    """
    for folder in folders:
        if any(files.exists(f"{folder}/{name}") for name in names[:20]):
            return folder
    wanted = names[0] if names else "images"
    raise FileNotFoundError(f"no {wanted} in {', '.join(folders)}: say where the images lie by ?images=FOLDER")


def first_file(paths: Sequence[str], option: str) -> str:
    """The first of `paths` that exists; raises `FileNotFoundError` listing all of them, with the option that helps."""
    for path in paths:
        if files.exists(path) and not files.is_folder(path):
            return path
    raise FileNotFoundError(f"no such file: {', '.join(paths)}" + (f" (?{option}=FILE says which)" if option else ""))


def base_name(path: str) -> str:
    """File name without folder and extension."""
    return os.path.splitext(os.path.basename(path))[0]


def pixel_areas(boxes: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    """Areas in pixels of normalised boxes (R, 4) of an image of (width, height)."""
    sides = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64) * size_px
    return sides[:, 0] * sides[:, 1]
