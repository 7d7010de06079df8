"""The generated world: scenes of named things with exact boxes, captions, label noise and held-out parts.

Here is what a scene shows and how it is labelled; `arrange` says where things lie, `sprites` draws them, `things` names
them, `sentences` speaks of them.  `Scenes(config)[i]` is a pure function of the config and i.

Every kind of choice has its own random stream, so that options can be compared on the same scenes: drawing style,
resolution, kind of captions and label noise do not change which things lie where.

The emoji are by OpenMoji, licence CC BY-SA 4.0 (see `sprites`); scenes made from them fall under the same licence.
"""

from __future__ import annotations

import colorsys
import hashlib
import sys
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Annotated, Literal

import numpy as np
from cachetools import LRUCache
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from opencloc.data.sample import Sample
from opencloc.data.scenes import arrange, sentences, sprites
from opencloc.data.scenes.things import CHARACTERS, UNCOUNTED
from opencloc.data.tars.writer import ShardWriter
from opencloc.progress import track

Attribute = Literal["colour", "size", "position"]

_HELD_OUT_SHARE = 8  # one thing in 8 is held out
_EASY_SEEN, _EASY_HELD_OUT = sprites.SHAPES[:8], sprites.SHAPES[8:]
_LONG_SIDE = (0.22, 0.47)  # of the image side: 14 to 30 pixels of 64
_SMALL, _LARGE = (0.22, 0.28), (0.35, 0.44)  # where size has a word, nothing lies in between
_SPRITE_BYTES = 128 * 2**20  # of drawn sprites that a process keeps
_POSITIONS = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _rich_things() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(Things that training may show, held-out things), each in an order that depends on the names only."""
    ordered = sorted(CHARACTERS, key=_hash)
    held_out = len(ordered) // _HELD_OUT_SHARE
    return tuple(ordered[held_out:]), tuple(ordered[:held_out])


_RICH_SEEN, _RICH_HELD_OUT = _rich_things()
_NUMBERS = {thing: number for number, thing in enumerate(_RICH_SEEN)}


def held_out_colour(thing: str) -> str:
    """The one colour in which training never shows this thing."""
    colours = tuple(sprites.COLOURS)
    number = sprites.SHAPES.index(thing) if thing in sprites.SHAPES else _hash("colour of " + thing)
    return colours[number % len(colours)]


def held_out_pair(one: str, other: str) -> bool:
    """Whether training never shows these two things beside each other: so it is with one pair in 8, whatever its order.

    Every thing has such a partner where there are 16 things or more.
    """
    return (_NUMBERS[one] + _NUMBERS[other]) % _HELD_OUT_SHARE == 0


@checked(frozen=True, kw_only=True)
class SceneConfig:
    """Which scenes: what they show, how they are drawn, how they are labelled.

    Raises `ValueError` for options that are out of range or do not go together.
    """

    mode: Literal["easy", "rich"] = "rich"  # easy: shapes in 9 colours ("red circle"); rich: emoji ("dog")
    seed: int = 0
    image_px: Annotated[int, Field(ge=32, le=4096)] = 64  # side of the square image; changes nothing else of a scene
    # rich: how many things there are; each set contains the smaller ones
    num_things: Annotated[int, Field(ge=12, le=len(_RICH_SEEN))] = 120
    min_objects: Annotated[int, Field(ge=1, le=8)] = 3
    max_objects: Annotated[int, Field(ge=1, le=8)] = 5
    attributes: tuple[Attribute, ...] = ()  # words added to region texts; easy mode always has the colour
    # next_to: things are large and stand in pairs, so their number is even, and a text says beside what its thing
    # stands ("dog next to a drum"), which the crop of its box doesn't show; half the scenes show a thing twice.  Rich
    # mode without attributes; of n things there are n (n - 1) texts
    context: Literal["none", "next_to"] = "none"
    split: Literal["train", "unseen_combinations", "unseen_things"] = "train"  # the same whatever the seed
    style: sprites.Style = "plain"
    captions: Literal["exact", "alt_text"] = "exact"  # alt_text: as on web pages, in the caption's place
    # each edge moves by normal noise, its deviation this share of the box's width or height
    box_jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    wrong_text: Annotated[float, Field(ge=0, le=1)] = 0.0  # probability that a region has the text of something else
    missing_region: Annotated[float, Field(ge=0, le=1)] = 0.0  # probability that an object has no region

    def __post_init__(self) -> None:
        if self.max_objects < self.min_objects:
            raise ValueError(f"max_objects is {self.max_objects}, below min_objects, {self.min_objects}")
        if self.split == "unseen_combinations" and not (self.coloured or self.paired):
            needed = '"colour" among the attributes, mode "easy", or context "next_to"'
            raise ValueError(f'split is "unseen_combinations"; that needs {needed}')
        if self.paired and (self.mode == "easy" or self.attributes):
            raise ValueError('context "next_to" goes with mode "rich" and without attributes')
        if self.paired and self.max_objects // 2 < (self.min_objects + 1) // 2:
            limits = f"{self.min_objects} and {self.max_objects}"
            raise ValueError(f'context "next_to" pairs things; no even number lies between {limits} objects')

    @property
    def noisy(self) -> bool:
        """Whether regions differ from the truth."""
        return max(self.box_jitter, self.wrong_text, self.missing_region) > 0

    @property
    def paired(self) -> bool:
        """Whether region texts name the thing beside."""
        return self.context == "next_to"

    @property
    def coloured(self) -> bool:
        """Whether region texts name a colour."""
        return self.mode == "easy" or "colour" in self.attributes

    def things(self) -> tuple[str, ...]:
        """The things that scenes of this split show."""
        unseen = self.split == "unseen_things"
        if self.mode == "easy":
            return _EASY_HELD_OUT if unseen else _EASY_SEEN
        return (_RICH_HELD_OUT if unseen else _RICH_SEEN)[: self.num_things]

    def combinations(self) -> tuple[tuple[str, str | None], ...]:
        """The (thing, its colour or the thing beside it) pairs of this split; None where texts name neither."""
        things, shown = self.things(), self._is_shown
        if self.paired:
            return tuple((one, other) for one in things for other in things if one != other and shown(one, other))
        if not self.coloured:
            return tuple((thing, None) for thing in things)
        return tuple((thing, colour) for thing in things for colour in sprites.COLOURS if shown(thing, colour))

    def _is_shown(self, thing: str, other: str) -> bool:
        """Whether this split shows a thing with this colour, or beside this other thing."""
        if self.split == "unseen_things":
            return True
        held_out = held_out_pair(thing, other) if self.paired else other == held_out_colour(thing)
        return held_out == (self.split == "unseen_combinations")

    def class_names(self) -> tuple[str, ...]:
        """Every region text of this split, sorted: the class list of zero-shot recognition."""
        sizes = ("small ", "large ") if "size" in self.attributes else ("",)
        places = [" " + p for row in _POSITIONS for p in row] if "position" in self.attributes else [""]
        bare = (_bare_text(thing, other, self.paired) for thing, other in self.combinations())
        return tuple(sorted(size + text + place for text in bare for size in sizes for place in places))


def _bare_text(thing: str, other: str | None, paired: bool = False) -> str:
    if paired and other:
        return f"{thing} next to {sentences.noun_phrase(other, other not in UNCOUNTED)}"
    return f"{other} {thing}" if other else thing


@dataclass(frozen=True, kw_only=True)
class _Object:
    """One thing of a scene; sizes and places as shares of the image side."""

    thing: str
    colour: str | None
    beside: str | None  # the thing that it stands next to, where texts say so
    long_side: float
    left: float
    top: float
    size_word: str  # "" where the config has none
    place_words: str

    @property
    def text(self) -> str:
        bare = _bare_text(self.thing, self.beside or self.colour, self.beside is not None)
        return " ".join(w for w in (self.size_word, bare, self.place_words) if w)

    @property
    def pair(self) -> tuple[str, str | None]:
        """Its entry in `SceneConfig.combinations`."""
        return self.thing, self.beside or self.colour


class Scenes:
    """An endless `Source` of generated scenes.

    A box is the exact extent of what is drawn (the outermost pixels that are not fully transparent), also where another
    thing covers a little of it.
    """

    size: int | None = None

    def __init__(self, config: SceneConfig) -> None:
        self.config = config
        self._combinations = config.combinations()
        self._sprites = LRUCache[tuple[str, str | None, int], Image.Image](
            _SPRITE_BYTES, getsizeof=lambda sprite: 4 * sprite.width * sprite.height
        )

    def __reduce__(self):  # a worker's copy draws its own sprites
        return type(self), (self.config,)

    def __getitem__(self, index: int) -> Sample:
        """Scene number `index`, any number >= 0."""
        if index < 0:
            raise IndexError(f"scene {index}: scenes are numbered from 0")
        config = self.config
        scene = f"{config.seed}/{config.split}/{index}"
        layout = _pairs_layout if config.paired else _layout
        objects = layout(config, self._combinations, Random(f"{scene}/layout"))
        image = _background(config, Random(f"{scene}/background"))
        boxes = np.array([self._paste(image, obj) for obj in objects], dtype=np.float32) / config.image_px
        texts = tuple(obj.text for obj in objects)
        if config.noisy:
            boxes, texts = self._mislabel(boxes, objects, Random(f"{scene}/noise"))
        caption = alt_text = _alt_text(objects, Random(f"{scene}/alt_text"))
        if config.captions == "exact":
            named = objects[::2] if config.paired else objects  # of a pair the first, which names the other
            phrases = [sentences.noun_phrase(obj.text, obj.thing not in UNCOUNTED) for obj in named]
            caption = sentences.caption(phrases, Random(f"{scene}/caption"))
        key = f"{config.mode}-{config.split}-{config.seed}-{index:09d}"
        return Sample(key=key, image=image, captions=(caption,), alt_text=alt_text, boxes=boxes, texts=texts)

    def _paste(self, image: Image.Image, obj: _Object) -> tuple[int, int, int, int]:
        """The pixel box that the object fills, after drawing it there."""
        px = self.config.image_px
        drawn = obj.thing, obj.colour, max(1, round(obj.long_side * px))
        if (sprite := self._sprites.get(drawn)) is None:
            sprite = self._sprites[drawn] = sprites.draw(*drawn, self.config.style)
        left = min(round(obj.left * px), px - sprite.width)
        top = min(round(obj.top * px), px - sprite.height)
        image.paste(sprite, (left, top), sprite)
        return left, top, left + sprite.width, top + sprite.height

    def _mislabel(self, boxes: np.ndarray, objects: list[_Object], rng: Random) -> tuple[np.ndarray, tuple[str, ...]]:
        """Boxes and texts with the configured noise; every region draws the same numbers whatever the rates are."""
        config, pairs = self.config, self._combinations
        kept, texts = [], []
        for box, obj in zip(boxes, objects, strict=True):
            missing, wrong = rng.random() < config.missing_region, rng.random() < config.wrong_text
            other = int(rng.random() * (len(pairs) - 1))
            moves = [rng.gauss(0.0, 1.0) for _ in range(4)]
            if missing:
                continue
            if wrong:  # one of the others, all equally likely
                thing, with_it = pairs[other if pairs[other] != obj.pair else -1]
                obj = replace(obj, thing=thing, **{"beside" if config.paired else "colour": with_it})
            kept.append(_jittered(box, config.box_jitter * np.array(moves)))
            texts.append(obj.text)
        return np.array(kept, dtype=np.float32).reshape(-1, 4), tuple(texts)


def _jittered(box: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """The box with each edge moved by `moves` times its side, inside the image, no side below a quarter of its own."""
    low, high = box[:2], box[2:]
    side = high - low
    new_low = np.clip(low + side * moves[:2], 0, 1 - side / 4)
    new_high = np.clip(high + side * moves[2:], new_low + side / 4, 1)
    return np.concatenate([new_low, new_high])


def _layout(config: SceneConfig, combinations: tuple[tuple[str, str | None], ...], rng: Random) -> list[_Object]:
    """Which things lie where, large ones first: (thing, colour) pairs distinct, boxes apart but for a little."""
    count = config.min_objects + int(rng.random() * (config.max_objects - config.min_objects + 1))
    chosen: list[tuple[str, str | None]] = []
    while len(chosen) < count:
        pair = combinations[int(rng.random() * len(combinations))]
        if pair not in chosen:
            chosen.append(pair)
    sizes: list[tuple[float, int, str]] = []  # (smallest long side, steps above it, word)
    for _ in chosen:
        word, (low, high) = "", _LONG_SIDE
        if "size" in config.attributes:
            word, (low, high) = ("small", _SMALL) if rng.random() < 0.5 else ("large", _LARGE)
        sizes.append((low, int(rng.random() * ((high - low) / arrange.SIZE_STEP + 1)), word))
    sizes.sort(key=lambda size: size[0] + size[1] * arrange.SIZE_STEP, reverse=True)
    shrink = min(1.0, (5 / config.max_objects) ** 0.5)
    ranges = [(shrink * low, shrink * (low + steps * arrange.SIZE_STEP)) for low, steps, _ in sizes]
    places = arrange.scattered([sprites.aspect(thing) for thing, _ in chosen], ranges, shrink * arrange.SIZE_STEP, rng)
    objects = []
    for (thing, colour), (_, _, size_word), (left, top, right, bottom) in zip(chosen, sizes, places, strict=True):
        place_words = ""
        if "position" in config.attributes:
            place_words = _POSITIONS[min(2, int(1.5 * (top + bottom)))][min(2, int(1.5 * (left + right)))]
        objects.append(
            _Object(
                thing=thing,
                colour=colour,
                beside=None,
                long_side=max(right - left, bottom - top),
                left=left,
                top=top,
                size_word=size_word,
                place_words=place_words,
            )
        )
    return objects


def _pairs_layout(config: SceneConfig, combinations: tuple[tuple[str, str | None], ...], rng: Random) -> list[_Object]:
    """Things two by two, each pair of them at most once; in half the scenes one thing stands in two pairs."""
    fewest, most = (config.min_objects + 1) // 2, config.max_objects // 2
    count = fewest + int(rng.random() * (most - fewest + 1))
    again = rng.random() < 0.5
    chosen: list[tuple[str, str | None]] = []
    while len(chosen) < count:
        among = combinations
        if again and len(chosen) == 1:
            shared, place = chosen[0][int(rng.random() * 2)], int(rng.random() * 2)
            among = tuple(p for p in combinations if p[place] == shared and p[1 - place] not in chosen[0])
        one, other = (among or combinations)[int(rng.random() * len(among or combinations))]
        if (one, other) not in chosen and (other, one) not in chosen:
            chosen.append((one, other))
    things = [thing for pair in chosen for thing in pair if thing]
    besides = [thing for one, other in chosen for thing in (other, one)]
    places = arrange.in_pairs([sprites.aspect(thing) for thing in things], rng)
    return [
        _Object(
            thing=thing,
            colour=None,
            beside=beside,
            long_side=max(right - left, bottom - top),
            left=left,
            top=top,
            size_word="",
            place_words="",
        )
        for thing, beside, (left, top, right, bottom) in zip(things, besides, places, strict=True)
    ]


def _alt_text(objects: list[_Object], rng: Random) -> str:
    return sentences.alt_text(
        [_bare_text(obj.thing, obj.colour if rng.random() < 0.5 else None) for obj in objects], rng
    )


def _background(config: SceneConfig, rng: Random) -> Image.Image:
    """A plain, graded or softly mottled ground in related colours, the same pattern at any resolution."""
    cells = (1, 2, 3, 6)[int(rng.random() * 4)]
    hue, saturation, value = rng.random(), 0.05 + 0.33 * rng.random(), 0.72 + 0.26 * rng.random()
    spread = 1.0
    if config.style == "sketch":
        saturation, value, spread = 0.1 * saturation, 0.85 + 0.5 * (value - 0.72), 0.25
    colours = bytearray()
    for _ in range(cells * cells):
        h = hue + spread * 0.16 * (rng.random() - 0.5)
        s = saturation + spread * 0.3 * (rng.random() - 0.5)
        v = value + spread * 0.24 * (rng.random() - 0.5)
        rgb = colorsys.hsv_to_rgb(h % 1, min(1.0, max(0.0, s)), min(1.0, max(0.0, v)))
        colours += bytes(round(255 * channel) for channel in rgb)
    grid = Image.frombytes("RGB", (cells, cells), bytes(colours))
    return grid.resize((config.image_px, config.image_px), Image.Resampling.BICUBIC)


def write_scenes(config: SceneConfig, num_images: int, out_dir: str, images_per_shard: int = 1000) -> list[str]:
    """Paths of the WebDataset tars 00000.tar, 00001.tar, ... with scenes 0 to `num_images` - 1 as lossless PNG.

    The same arguments give the same bytes.  After a kill, the same call goes on after the last whole tar.

    Raises ValueError if a number is below 1, FileExistsError if the folder already holds other tars.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; at least 1")
    scenes = Scenes(config)
    job = {"scenes": asdict(config), "num_images": num_images, "images_per_shard": images_per_shard}
    with ShardWriter(out_dir, samples_per_shard=images_per_shard, image_format="png", job=job) as writer:
        if start := writer.progress.get("next", 0):
            print(f"{out_dir}: going on at image {start:,} of {num_images:,}", file=sys.stderr)
        for index in track(range(start, num_images), "drawing scenes"):
            writer.write(scenes[index])
            writer.progress = {"next": index + 1}
    return writer.paths
