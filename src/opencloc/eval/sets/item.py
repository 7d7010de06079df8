"""What every evaluation set is: items (images, each with what is asked of it) and the rules by which they were read.

One item is one image, whatever number of boxes or texts is asked of it, so an image is decoded and encoded once.
Images are read one batch at a time (`load`), so a set need not fit in memory.  What cannot be used is counted in a
`Skipped`, by unit (images, boxes or texts) and reason.

Symbols: R regions of one image, K boxes of one phrase.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from opencloc import files
from opencloc.boxes import box_problem
from opencloc.data.sources.coco_json import is_file_name
from opencloc.errors import BadSample
from opencloc.images import decode_image, is_oriented
from opencloc.texts import canonical, is_text

READERS = 4  # threads that read and decode images

UNITS = IMAGES, BOXES, TEXTS, FILES = "images", "boxes", "texts", "files"  # of what is skipped
NO_REGIONS, NO_CAPTIONS = "without regions", "without captions"
BAD_TEXT, EMPTY_TEXT, BAD_BOX, EMPTY_BOX = "not valid Unicode", "empty", "bad box", "empty box"
NO_PIXEL = "without a pixel in the image of segments"
RESIZED, ORIENTED = "resized since annotation, boxes scaled", "with an EXIF orientation, seen as stored"

Skipped = Counter[tuple[str, str]]  # (unit, reason) -> how many


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where the bytes of an image lie."""

    path: str  # of a file, or of the tar that holds it
    start: int = 0  # first byte
    num_bytes: int | None = None  # None: to the end of the file


def _no_boxes() -> np.ndarray:
    return np.zeros((0, 4), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image and what is asked of it; a reader fills in what its task needs.

    Boxes are XYXY float32, normalised to the image as it was annotated.
    """

    image: Stored | Image.Image
    annotated_px: tuple[int, int] | None = None  # width and height that boxes refer to, if they may not be the image's
    label: int = 0  # of the whole image: place in the set's class names
    captions: tuple[str, ...] = ()
    boxes: np.ndarray = field(default_factory=_no_boxes)  # (R, 4)
    texts: tuple[str, ...] = ()  # R: what each box is called
    choices: tuple[tuple[str, ...], ...] = ()  # R: several texts each, of which the first is true
    queries: tuple[str, ...] = ()  # texts to be found in the image
    truths: tuple[np.ndarray, ...] = ()  # for each query its boxes (K, 4)
    segments: Stored | None = None  # of a PNG whose pixels are numbers of segments, R + 256 G + 65,536 B
    segment_ids: tuple[int, ...] = ()  # R: the segment of each box in it
    pairs: tuple[tuple[str, str, str], ...] = ()  # of the whole image: (category, true text, false text)
    claims: tuple[tuple[str, bool], ...] = ()  # of the whole image: (text, whether it is true)
    questions: tuple[str, ...] = ()  # to be answered in words
    answers: tuple[str, ...] = ()  # for each question the right answer, or the one to compare with
    question_ids: tuple[int, ...] = ()  # for each question its number in the set's own files, if it has any
    context: str = ""  # what a judge of the answers is told of the image
    skipped: Skipped = field(default_factory=Counter)  # of this image


@runtime_checkable
class Items(Protocol):
    """Items by number: a list, or a source whose items are made when they are asked for."""

    def __getitem__(self, index: int, /) -> Item: ...


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """An evaluation set, whatever it was read from."""

    name: str  # the split or source, as tables show it beside the task
    items: Items  # a number that cannot be used raises BadSample
    num_items: int | None  # None: endless
    num_images: int | None = None  # how many are used if nothing is said; None: all
    rules: str = ""  # how it was read, beside the rules of the task
    skipped: Skipped = field(default_factory=Counter)  # annotations and images that are not asked for
    class_names: tuple[str, ...] = ()  # empty: the distinct texts of the regions
    class_groups: tuple[
        str, ...
    ] = ()  # of each class its group (LVIS: rare, common, frequent; things, stuff), or empty
    templates: tuple[str, ...] = ()  # with `{}` for the class name
    readers: int = READERS


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An item with its image."""

    number: int
    item: Item
    image: Image.Image
    annotated_px: tuple[int, int]  # width and height of the image as it was annotated
    noted: tuple[str, ...] = ()  # what is unusual about the image
    segments: np.ndarray | None = None  # (height, width): the number of the segment that each pixel belongs to

    def masks(self) -> list[np.ndarray]:
        """The mask (height, width) of each box, where there are segments."""
        return [] if self.segments is None else [self.segments == one for one in self.item.segment_ids]


@dataclass(kw_only=True)
class Unread:
    """What became of the images that could not be read."""

    allowed: int  # more than so many end the run
    reasons: Counter[str] = field(default_factory=Counter)

    def count(self, bad: BadSample) -> None:
        """Counts one; raises ValueError naming it when there are too many."""
        self.reasons[bad.reason] += 1
        if (total := self.reasons.total()) > self.allowed:
            raise ValueError(
                f"{total} images could not be read, at most {self.allowed} may be missing (--max-missing); "
                f"the last: {bad}"
            )


def load(data: EvalSet, num_images: int | None, batch_size: int, unread: Unread) -> Iterator[list[Loaded]]:
    """The first `num_images` usable images in batches, in order, read ahead by threads; the others are counted."""
    waiting: deque[Future[Loaded]] = deque()
    numbers = iter(range(data.num_items)) if data.num_items is not None else count()
    left = data.num_items if num_images is None else num_images
    assert left is not None
    batch: list[Loaded] = []
    with ThreadPoolExecutor(data.readers) as pool:
        try:
            while left:
                while len(waiting) < min(2 * batch_size, left) and (number := next(numbers, None)) is not None:
                    waiting.append(pool.submit(_load_one, data.items, number))
                if not waiting:
                    break
                try:
                    batch.append(waiting.popleft().result())
                except BadSample as bad:
                    unread.count(bad)
                    continue
                left -= 1
                if len(batch) == batch_size:
                    yield batch
                    batch = []
            if batch:
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)


def _load_one(items: Items, number: int) -> Loaded:
    item = items[number]
    segments = None
    if item.segments is not None:
        red, green, blue = np.asarray(read_image(item.segments, item.annotated_px), dtype=np.int32).transpose(2, 0, 1)
        segments = red + 256 * green + 65_536 * blue
    item = sound(item, segments)
    image = item.image if isinstance(item.image, Image.Image) else read_image(item.image, item.annotated_px)
    annotated_px = item.annotated_px or image.size
    noted = (RESIZED,) * (annotated_px != image.size) + (ORIENTED,) * is_oriented(image)
    return Loaded(number=number, item=item, image=image, annotated_px=annotated_px, noted=noted, segments=segments)


def read_image(stored: Stored, expected_px: tuple[int, int] | None = None) -> Image.Image:
    """The image as RGB, as it is stored (EXIF orientation is not applied).

    Raises `BadSample` if it is missing, broken or of another shape than `expected_px` (width, height).
    """
    try:
        data = files.read_bytes(stored.path, stored.start, stored.num_bytes)
    except FileNotFoundError as error:
        raise BadSample("missing image file", stored.path) from error
    except OSError as error:
        raise BadSample("unreadable image file", stored.path, str(error)) from error
    return decode_image(data, stored.path, expected_px=expected_px)


def sound(item: Item, segments: np.ndarray | None = None) -> Item:
    """The item without boxes that are empty, outside or not finite and without texts that are no text; counted.

    With segments (Loaded's) also without the boxes of those that have no pixel.
    """
    skipped: Skipped = Counter(item.skipped)
    drawn = np.ones(len(item.boxes), dtype=bool) if segments is None else np.isin(item.segment_ids, segments)
    kept = []
    for row, box in enumerate(item.boxes):
        texts = (*item.texts[row : row + 1], *(item.choices[row] if item.choices else ()))
        if (problem := _box_reason(box)) is not None:
            skipped[BOXES, problem] += 1
        elif not all(map(is_text, texts)):
            skipped[BOXES, f"text {BAD_TEXT}"] += 1
        elif not drawn[row]:
            skipped[BOXES, NO_PIXEL] += 1
        else:
            kept.append(row)
    asked = []
    for row, (text, truth) in enumerate(zip(item.queries, item.truths, strict=True)):
        if problems := [problem for box in truth if (problem := _box_reason(box)) is not None]:
            skipped[TEXTS, problems[0]] += 1
        elif not is_text(text):
            skipped[TEXTS, BAD_TEXT] += 1
        else:
            asked.append(row)
    captions = tuple(filter(is_text, item.captions))
    pairs = tuple(pair for pair in item.pairs if all(map(is_text, pair)))
    claims = tuple(claim for claim in item.claims if is_text(claim[0]))
    for given, usable in ((item.captions, captions), (item.pairs, pairs), (item.claims, claims)):
        skipped[TEXTS, BAD_TEXT] += len(given) - len(usable)
    return replace(
        item,
        captions=captions,
        boxes=np.asarray(item.boxes, dtype=np.float32).reshape(-1, 4)[kept],
        texts=tuple(item.texts[row] for row in kept) if item.texts else (),
        choices=tuple(item.choices[row] for row in kept) if item.choices else (),
        segment_ids=tuple(item.segment_ids[row] for row in kept) if item.segment_ids else (),
        pairs=pairs,
        claims=claims,
        queries=tuple(item.queries[row] for row in asked),
        truths=tuple(item.truths[row] for row in asked),
        skipped=+skipped,
    )


def _box_reason(box: np.ndarray) -> str | None:
    """What is wrong with a box, in fixed words."""
    if box_problem(box) is None:
        return None
    is_empty = bool(np.isfinite(box).all()) and bool((box[2:] <= box[:2]).any())
    return EMPTY_BOX if is_empty else BAD_BOX


def merge_names(names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """(the distinct names in canonical form, in order; a sentence on those that come more than once, or nothing).

    Names that are no valid text are left out.
    """
    times = Counter(canonical(name) for name in names if is_text(name))
    times.pop("", None)
    twice = [name for name, number in times.items() if number > 1]
    said = f"categories of one name are one class: {', '.join(map(repr, twice[:5]))}" if twice else ""
    return tuple(times), said + (", ..." if len(twice) > 5 else "")


def first_folder(folders: Sequence[str], names: Sequence[str], option: str = "images") -> str:
    """The first of `folders` that holds one of the first few files `names`.

    Raises `FileNotFoundError` listing the folders that were tried.
    """
    for folder in folders:
        if any(files.exists(f"{folder}/{name}") for name in names[:20] if is_file_name(name)):
            return folder
    wanted = repr(names[0])[1:-1] if names else option
    raise FileNotFoundError(f"no {wanted} in {', '.join(folders)}: say where the {option} lie by ?{option}=FOLDER")


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


def in_words(skipped: Skipped) -> dict[str, int]:
    """A `Skipped` by words such as `images: without regions`."""
    return {
        f"{unit}: {reason}": number for unit, reasons in by_unit(skipped).items() for reason, number in reasons.items()
    }


def by_unit(skipped: Skipped) -> dict[str, dict[str, int]]:
    """A `Skipped` as plain dicts: unit -> reason -> how many, in the order of the units."""
    return {
        unit: {reason: number for (of, reason), number in sorted(skipped.items()) if of == unit and number}
        for unit in UNITS
        if any(of == unit and number for (of, _), number in skipped.items())
    }
