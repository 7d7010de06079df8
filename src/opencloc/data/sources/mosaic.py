"""Mosaics: many image-text pairs become one image whose tiles are regions with texts.

Any source of photos with captions gives region-text data this way, without a single human box.  A k x k mosaic has
k * k regions.  The text of a tile is its photo's caption; the mosaic's caption names all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal, Protocol, runtime_checkable

import numpy as np
from cachetools import FIFOCache
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass

from opencloc.data.sample import Sample, Source
from opencloc.errors import BadSample, counted

_JITTER = 0.15  # a grid line moves by up to this share of a tile, so that boxes differ between mosaics
_ZOOM = 1.4  # photos are kept this much larger than the largest tile: random crops then enlarge nothing
_DISTINCT_TRIES = 8  # draws per tile to find a text that the mosaic hasn't yet
_USABLE_TRIES = 100  # draws per tile to find a photo that can be used


@runtime_checkable
class NamedSource(Source, Protocol):
    """A source of known size that can name a sample without reading it."""

    def identity(self, index: int) -> str:
        """A name of the sample that stays the same wherever the data lies."""
        ...


@dataclass(frozen=True, kw_only=True)
class MosaicConfig:
    """Which mosaics.  Raises `ValueError` for options out of range."""

    grid: Annotated[str, Field(pattern="^[1-8](-[1-8])?$")] = "2-3"  # tiles per side: "2", or a range such as "2-3"
    image_px: Annotated[int, Field(le=4096)] = 96  # side of the square mosaic, at least 16 for each tile
    seed: Annotated[int, Field(ge=0)] = 0
    split: Literal["train", "test", "all"] = "all"  # by a hash of the photo's name: the same whatever the seed
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of the photos
    augment: bool = False  # random crops and horizontal flips of each tile instead of centre crops
    cache_mb: Annotated[int, Field(ge=0)] = 512  # decoded small photos kept per process

    def __post_init__(self) -> None:
        low, high = self.tiles_per_side
        if low > high:
            raise ValueError(f"grid is {self.grid}: the range runs backwards")
        if self.image_px < 16 * high:
            raise ValueError(f"image_px is {self.image_px}: {high} tiles per side need at least {16 * high}")

    @property
    def tiles_per_side(self) -> tuple[int, int]:
        """(fewest, most) tiles per side."""
        return int(self.grid[0]), int(self.grid[-1])


def is_test(identity: str, test_share: float) -> bool:
    """Whether the photo of this name is held out for testing; the same in every process and with every seed."""
    digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < test_share * 2**64


class Mosaic:
    """Endless mosaics of the photos of another source; number i is a pure function of the config and i.

    Each tile is filled by a crop of its photo, so its box is the tile; boxes cover the image without gap or overlap.
    Texts within a mosaic differ where a few draws find different ones.  Photos that cannot be used are replaced by
    others and counted, once each, in `skipped`.
    """

    def __init__(self, photos: NamedSource, config: MosaicConfig | None = None) -> None:
        self.photos = photos
        self.config = config or MosaicConfig()
        if photos.size is None:
            raise ValueError(f"mosaics need a source of known size, not {photos!r}")
        split, share = self.config.split, self.config.test_share
        wanted = [
            index
            for index in range(photos.size)
            if split == "all" or is_test(photos.identity(index), share) == (split == "test")
        ]
        if not wanted:
            raise ValueError(f"no photo of {photos!r} is in the split {split!r}")
        self._pool = np.asarray(wanted)
        fewest, _ = self.config.tiles_per_side
        self._photo_px = math.ceil(largest_tile_px(self.config.image_px, fewest) * _ZOOM)
        self._forget()

    def _forget(self) -> None:
        """Starts with nothing read: what a process has read is its own."""
        limit = self.config.cache_mb * 2**20
        self._kept = FIFOCache[int, tuple[np.ndarray, str]](limit, getsizeof=lambda kept: kept[0].nbytes)
        self._unusable: dict[int, str] = {}  # reason by number of the photo

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_kept", "_unusable")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def size(self) -> None:
        """Endless."""
        return None

    @property
    def num_photos(self) -> int:
        """How many photos the mosaics of this split are made of."""
        return len(self._pool)

    @property
    def skipped(self) -> Counter[str]:
        """The photos that this process could not use so far, by reason."""
        return Counter(self._unusable.values())

    def __repr__(self) -> str:
        return f"Mosaic({self.num_photos} photos of {self.photos!r}, {self.config})"

    def __getitem__(self, index: int) -> Sample:
        if index < 0:
            raise IndexError(f"{index}: mosaics are numbered from 0")
        config = self.config
        rng = np.random.default_rng([config.seed, ("train", "test", "all").index(config.split), index])
        fewest, most = config.tiles_per_side
        cells = _cells(rng, int(rng.integers(fewest, most + 1)), config.image_px)
        canvas = Image.new("RGB", (config.image_px, config.image_px))
        texts: list[str] = []
        for x0, y0, x1, y1 in cells:
            photo, text = self._draw(rng, texts)
            texts.append(text)
            tile = _fill(Image.fromarray(photo), (x1 - x0, y1 - y0), rng if config.augment else None)
            canvas.paste(tile, (x0, y0))
        return Sample(
            key=f"mosaic-{config.split}-{config.seed}-{index}",
            image=canvas,
            captions=(mosaic_caption(texts),),
            boxes=np.asarray(cells, dtype=np.float32) / config.image_px,
            texts=tuple(texts),
        )

    def _draw(self, rng: np.random.Generator, texts: Sequence[str]) -> tuple[np.ndarray, str]:
        """A photo and its text, one that is not among `texts` if a few draws find it."""
        usable = None
        distinct_tries = 0
        for _ in range(_USABLE_TRIES):
            try:
                usable = self._photo(int(self._pool[rng.integers(len(self._pool))]))
            except BadSample:
                if len(self._unusable) == len(self._pool):
                    break
                continue
            distinct_tries += 1
            if usable[1] not in texts or distinct_tries == _DISTINCT_TRIES:
                break
        if usable is None:
            raise BadSample("no usable photo", repr(self.photos), counted(self.skipped))
        return usable

    def _photo(self, number: int) -> tuple[np.ndarray, str]:
        """A photo shrunk to what tiles need, and its text; raises `BadSample`."""
        if number in self._kept:
            return self._kept[number]
        if number in self._unusable:
            raise BadSample(self._unusable[number], self.photos.identity(number))
        try:
            sample = self.photos[number]
            if not sample.captions:
                raise BadSample("no caption", self.photos.identity(number))
        except BadSample as bad:
            self._unusable[number] = bad.reason
            raise
        image, shrink = sample.image, self._photo_px / min(sample.image.size)
        if shrink < 1:
            width, height = (max(1, round(side * shrink)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        kept = np.asarray(image), sample.captions[0]
        with contextlib.suppress(ValueError):  # larger than the whole cache
            self._kept[number] = kept
        return kept


def mosaic_caption(texts: Sequence[str]) -> str:
    """A caption that names every text once, in the order of the tiles.

    >>> mosaic_caption(["dog", "airplane", "dog", "laptop"])
    'a photo of dog, airplane and laptop'
    """
    *first, last = dict.fromkeys(texts)
    return f"a photo of {', '.join(first)} and {last}" if first else f"a photo of {last}"


def largest_tile_px(image_px: int, tiles_per_side: int) -> int:
    """The longest side, in pixels, that a tile can have."""
    return image_px if tiles_per_side == 1 else math.ceil(image_px / tiles_per_side * (1 + 2 * _JITTER))


def _cells(rng: np.random.Generator, tiles_per_side: int, image_px: int) -> list[tuple[int, int, int, int]]:
    """Pixel boxes of the tiles, row by row: rows of uneven height, each cut at places of its own."""
    rows = _lines(rng, tiles_per_side, image_px)
    return [
        (x0, y0, x1, y1)
        for y0, y1 in itertools.pairwise(rows)
        for columns in [_lines(rng, tiles_per_side, image_px)]
        for x0, x1 in itertools.pairwise(columns)
    ]


def _lines(rng: np.random.Generator, tiles_per_side: int, image_px: int) -> list[int]:
    inner = np.arange(1, tiles_per_side) + rng.uniform(-_JITTER, _JITTER, tiles_per_side - 1)
    return [0, *np.rint(inner * image_px / tiles_per_side).astype(int).tolist(), image_px]


def _fill(photo: Image.Image, size: tuple[int, int], rng: np.random.Generator | None) -> Image.Image:
    """The largest central crop of the photo in the tile's shape; with `rng` a smaller one anywhere, maybe flipped."""
    width, height = photo.size
    scale = min(width / size[0], height / size[1])
    across = down = 0.5
    if rng is not None:
        zoom, across, down, flip = rng.random(4)
        scale *= math.sqrt(0.5 + 0.5 * zoom)  # 50 to 100 % of the largest crop's area
        if flip < 0.5:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    crop_width, crop_height = size[0] * scale, size[1] * scale
    left, top = max(0.0, (width - crop_width) * across), max(0.0, (height - crop_height) * down)
    box = (left, top, min(left + crop_width, width), min(top + crop_height, height))
    return photo.resize(size, Image.Resampling.BICUBIC, box=box)
