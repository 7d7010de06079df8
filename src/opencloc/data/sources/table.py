"""Photos with regions from a data set's own annotation files: the table that every reader makes, and its source.

A reader (`visual_genome`, `flickr_entities`, `refcoco`, `open_images`, `fg_clip`) says which image files there are and
which regions they have.  What holds for all of them is here:

* a phrase with several boxes is one region, the smallest box around all of them;
* a thing with several wordings is a region for each; the same wording of the same box counts once;
* a box around a group that is marked as such (`IsGroupOf`, `iscrowd`) is left out;
* a row that cannot be used costs itself alone and is counted in `skipped` by its reason;
* a box that reaches outside the image is clipped, and counted in `noticed` where it does by more than 2 %.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float32, Int64
from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from opencloc import files
from opencloc.data.sample import Sample
from opencloc.data.sources.coco_json import (
    BAD_BOX,
    BAD_FILE_NAME,
    BAD_IMAGE_SIZE,
    EMPTY_BOX,
    OUTSIDE,
    boxes_of,
    is_file_name,
)
from opencloc.errors import BadSample, and_skipped
from opencloc.images import decode_image
from opencloc.texts import is_text

GROUP, EMPTY_TEXT, BAD_TEXT = "group box", "empty region text", "text is not valid Unicode"
NO_IMAGE = "region of an image that is not listed"
_OUTSIDE_SHARE = 0.02
_MAX_SIDE_PX = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Table:
    """Images and their regions.  Symbols: N images, A regions, C distinct region texts.

    The regions of image i are `spans[i]` to `spans[i + 1]`.
    """

    names: tuple[str, ...]  # N image files, as paths below a folder
    sizes_px: Int64[np.ndarray, "N 2"]  # width and height as annotated; 0 where the files don't say
    captions: tuple[tuple[str, ...], ...]  # N
    texts: tuple[str, ...]  # C
    spans: Int64[np.ndarray, " N_plus_1"]
    boxes: Float32[np.ndarray, "A 4"]
    labels: Int64[np.ndarray, " A"]  # places in `texts`
    skipped: Counter[str]
    noticed: Counter[str]


class TableBuilder:
    """Collects images and regions one by one; `table` checks all of them at once.

    Boxes are XYXY in pixels of images whose size is known, as shares of the others.
    """

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()
        self._names: list[str] = []
        self._sizes: list[tuple[int, int]] = []
        self._captions: list[tuple[str, ...]] = []
        self._places: dict[str, int] = {}  # of texts
        self._rows: list[int] = []
        self._labels: list[int] = []
        self._boxes: list[Any] = []
        self._seen: set[tuple[Any, ...]] = set()  # of the last image

    def image(self, name: Any, size_px: tuple[Any, Any] | None = None, captions: Sequence[str] = ()) -> bool:
        """Begins an image, to which regions belong until the next one; False, and counted, if it cannot be used."""
        if not isinstance(name, str) or not is_file_name(name):
            self.skipped[BAD_FILE_NAME] += 1
            return False
        if size_px is not None and not all(type(side) is int and 1 <= side <= _MAX_SIDE_PX for side in size_px):
            self.skipped[BAD_IMAGE_SIZE] += 1
            return False
        self._names.append(name)
        self._sizes.append(size_px or (0, 0))
        self._captions.append(tuple(text.strip() for text in captions if text.strip() and is_text(text)))
        self._seen.clear()
        return True

    def region(self, box: Any, text: Any) -> None:
        """A region of the last image; counted by the reason if it cannot be used."""
        if not isinstance(text, str) or not (text := " ".join(text.split())):
            self.skipped[EMPTY_TEXT] += 1
        elif not is_text(text):
            self.skipped[BAD_TEXT] += 1
        else:
            box = box[:4] if isinstance(box, list) else box
            try:
                same = (text, *box)
                known = same in self._seen
            except TypeError:  # no four numbers, as will be seen
                same, known = (), False
            if not known:
                self._seen.add(same)
                self._rows.append(len(self._names) - 1)
                self._labels.append(self._places.setdefault(text, len(self._places)))
                self._boxes.append(box)

    def table(self, where: str) -> Table:
        """All of it.  Raises `ValueError` naming `where` if there is no image or no usable region."""
        return make_table(
            where,
            names=self._names,
            sizes_px=np.asarray(self._sizes, dtype=np.int64).reshape(-1, 2),
            captions=self._captions,
            texts=tuple(self._places),
            rows=np.asarray(self._rows, dtype=np.int64),
            labels=np.asarray(self._labels, dtype=np.int64),
            boxes=boxes_of(self._boxes),
            skipped=self.skipped,
        )


def make_table(
    where: str,
    *,
    names: Sequence[str],
    sizes_px: np.ndarray,
    captions: Sequence[tuple[str, ...]],
    texts: tuple[str, ...],
    rows: np.ndarray,
    labels: np.ndarray,
    boxes: np.ndarray,
    skipped: Counter[str],
) -> Table:
    """The table of regions in any order: boxes (A, 4) in the units of `TableBuilder`, of the images `rows` (A,)."""
    skipped, noticed = Counter(skipped), Counter[str]()
    sides = np.concatenate([sizes_px, sizes_px], axis=1)
    shares = boxes / np.maximum(sides, 1)[rows]
    with np.errstate(invalid="ignore"):
        clipped = np.clip(shares, 0.0, 1.0).astype(np.float32)
        far = ((shares < -_OUTSIDE_SHARE) | (shares > 1 + _OUTSIDE_SHARE)).any(axis=1)
    finite = np.isfinite(shares).all(axis=1)
    full = finite & (clipped[:, :2] < clipped[:, 2:]).all(axis=1)
    skipped[BAD_BOX] += int((~finite).sum())
    skipped[EMPTY_BOX] += int((finite & ~full).sum())
    noticed[OUTSIDE] += int((full & far).sum())
    chosen = np.flatnonzero(full)
    chosen = chosen[np.argsort(rows[chosen], kind="stable")]
    if not len(chosen):
        raise ValueError(f"{where}: no usable region on {len(names):,} images{and_skipped(+skipped)}")
    return Table(
        names=tuple(names),
        sizes_px=sizes_px,
        captions=tuple(captions),
        texts=texts,
        spans=np.searchsorted(rows[chosen], np.arange(len(names) + 1)),
        boxes=clipped[chosen],
        labels=labels[chosen],
        skipped=+skipped,
        noticed=+noticed,
    )


def around(boxes: Sequence[Sequence[float]]) -> list[float]:
    """The smallest box around several."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return [min(x0), min(y0), max(x1), max(y1)]


@checked(frozen=True, kw_only=True)
class AnnotatedConfig:
    """What all sources with annotation files of their own have in common."""

    images: str | None = None  # folder of the images; None: where the data set's own layout has them
    image_px: Annotated[int, Field(ge=1)] | None = (
        None  # decode JPEGs no larger than needed for this long side; None: in full
    )


class AnnotatedPhotos:
    """The images of a table by number.  Keys are file names without their extension.

    An image file that is missing, or has not the shape that its annotations refer to, is a `BadSample`.  `folders`:
    where the images may lie; the first that has one of them.  Raises `FileNotFoundError` if none has.
    """

    def __init__(
        self, location: str, config: AnnotatedConfig, table: Table, folders: Sequence[str], inputs: Sequence[str]
    ) -> None:
        self.location, self.config, self._table, self._inputs = location, config, table, tuple(inputs)
        self.images_path = folder_with([config.images] if config.images else folders, table.names)
        self.skipped = Counter(table.skipped)  # what was left out, by reason
        self.noticed = Counter(table.noticed)  # what is used and worth a look

    @property
    def size(self) -> int:
        return len(self._table.names)

    @property
    def num_regions(self) -> int:
        """How many regions all images have."""
        return len(self._table.labels)

    def __repr__(self) -> str:
        skipped = f", skipped {dict(self.skipped)}" if self.skipped else ""
        return f"AnnotatedPhotos({self.location!r}: {self.size} images, {self.config}{skipped})"

    def identity(self, index: int) -> str:
        """Name of a sample that stays the same wherever the images lie: its file name."""
        return self._table.names[index]

    def image_bytes(self, index: int) -> bytes:
        """The image of a sample as it is stored."""
        return image_file(f"{self.images_path}/{self._table.names[index]}")

    def label_sizes(self) -> dict[str, int | None]:
        """Sizes of the files that captions and regions come from."""
        sizes: dict[str, int | None] = {}
        for path in self._inputs:
            inside: Mapping[str, Any] = {"": files.version(path)} if not files.is_folder(path) else {}
            inside = inside or files.versions(path) or {}
            base = os.path.basename(path.rstrip("/"))
            sizes |= {f"{base}/{name}" if name else base: one.size for name, one in inside.items()}
        return sizes

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in 0 ... {self.size - 1} of {self!r}")
        table, name = self._table, self._table.names[index]
        where = f"{self.images_path}/{name}"
        regions = slice(table.spans[index], table.spans[index + 1])
        width_px, height_px = table.sizes_px[index].tolist()
        expected_px = (width_px, height_px) if width_px else None
        image = decode_image(self.image_bytes(index), where, self.config.image_px, expected_px=expected_px)
        return Sample(
            key=os.path.splitext(name)[0],
            image=image,
            captions=table.captions[index],
            boxes=table.boxes[regions].copy(),
            texts=tuple(table.texts[label] for label in table.labels[regions]),
            where=where,
        )


def image_file(path: str) -> bytes:
    """The bytes of an image file.  Raises `BadSample` where it is missing or unreadable."""
    try:
        return files.read_bytes(path)
    except FileNotFoundError as error:
        raise BadSample("missing image file", path) from error
    except OSError as error:
        raise BadSample("unreadable image file", path, str(error)) from error


def first_file(paths: Sequence[str], option: str) -> str:
    """The first of some paths that is there; raises `FileNotFoundError` naming all of them and the option."""
    for path in paths:
        if files.exists(path):
            return path
    raise FileNotFoundError(f"none of {', '.join(paths)} is there; say where by {option}=")


def folder_with(folders: Sequence[str], names: Sequence[str]) -> str:
    """The first folder that has one of the first images; without any, an only folder that exists."""
    for folder in folders:
        if any(files.exists(f"{folder}/{name}") for name in names[:20]):
            return folder.rstrip("/")
    if len(folders) == 1 and files.is_folder(folders[0]):
        return folders[0].rstrip("/")
    raise FileNotFoundError(f"no image such as {names[0]} in {', '.join(folders)}; name their folder by images=")
