"""Mosaics: tiles cover the image exactly and show what their texts say; held-out photos stay held out."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opencloc.boxes import area
from opencloc.data.sample import Sample
from opencloc.data.sources.mosaic import Mosaic, MosaicConfig, is_test, largest_tile_px, mosaic_caption
from opencloc.data.tars.shards import Shards
from opencloc.errors import BadSample


class Colours:
    """Photos of one plain colour each, whose caption is that colour; every `bad_every`-th is broken."""

    def __init__(self, size: int = 60, bad_every: int = 0, num_texts: int = 60) -> None:
        self.size = size
        self._bad_every, self._num_texts = bad_every, num_texts

    def identity(self, index: int) -> str:
        return f"photo {index}"

    def colour(self, index: int) -> tuple[int, int, int]:
        return (index % self._num_texts, 3 * index % 256, 255 - index)

    def __getitem__(self, index: int) -> Sample:
        if self._bad_every and index % self._bad_every == 0:
            raise BadSample("broken image", self.identity(index))
        image = Image.new("RGB", (30 + index, 40), self.colour(index))
        return Sample(key=f"{index}", image=image, captions=(f"colour {index % self._num_texts}",))


def same(a: Sample, b: Sample) -> bool:
    return (
        a.key == b.key and a.texts == b.texts and a.image.tobytes() == b.image.tobytes() and (a.boxes == b.boxes).all()
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 4), st.integers(0, 2), st.integers(64, 130), st.booleans())
def test_tiles_cover_the_image_exactly_once(index: int, low: int, more: int, image_px: int, augment: bool) -> None:
    config = MosaicConfig(grid=f"{low}-{low + more}", image_px=max(image_px, 16 * (low + more)), augment=augment)
    sample = Mosaic(Colours(), config)[index]
    assert low**2 <= len(sample.boxes) <= (low + more) ** 2
    assert round(len(sample.boxes) ** 0.5) ** 2 == len(sample.boxes)
    cover = np.zeros((config.image_px, config.image_px), dtype=int)
    pixels = sample.boxes * config.image_px
    np.testing.assert_allclose(pixels, np.rint(pixels), atol=1e-4)
    for x0, y0, x1, y1 in np.rint(pixels).astype(int):
        cover[y0:y1, x0:x1] += 1
        assert max(x1 - x0, y1 - y0) <= largest_tile_px(config.image_px, low)
    assert (cover == 1).all()


@pytest.mark.parametrize("augment", [False, True])
def test_every_tile_shows_the_photo_whose_text_it_has(augment: bool) -> None:
    photos = Colours()
    sample = Mosaic(photos, MosaicConfig(grid="3", augment=augment))[5]
    pixels = np.asarray(sample.image)
    for box, text in zip(np.rint(sample.boxes * 96).astype(int), sample.texts, strict=True):
        x0, y0, x1, y1 = box
        number = int(text.removeprefix("colour "))
        assert (pixels[y0:y1, x0:x1] == photos.colour(number)).all()


def test_boxes_are_no_fixed_lattice() -> None:
    mosaic = Mosaic(Colours(), MosaicConfig(grid="2"))
    widths = {float(mosaic[i].boxes[0, 2]) for i in range(40)}
    assert len(widths) > 8
    assert 0.3 < min(widths) < 0.46
    assert 0.54 < max(widths) < 0.7


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=6), st.booleans())
def test_a_mosaic_depends_on_its_number_alone(order: list[int], augment: bool) -> None:
    config = MosaicConfig(augment=augment)
    fresh = {index: Mosaic(Colours(bad_every=3), config)[index] for index in order}
    used = Mosaic(Colours(bad_every=3), config)
    assert all(same(used[index], fresh[index]) for index in order)
    copy = pickle.loads(pickle.dumps(used))
    tiny = Mosaic(Colours(bad_every=3), MosaicConfig(augment=augment, cache_mb=0))
    for index in order:
        assert same(copy[index], fresh[index])
        assert same(tiny[index], fresh[index])


def test_seeds_and_numbers_make_different_mosaics() -> None:
    images = {Mosaic(Colours(), MosaicConfig(seed=seed))[i].image.tobytes() for seed in range(3) for i in range(10)}
    assert len(images) == 30


def shown(config: MosaicConfig, count: int = 60) -> set[str]:
    mosaic = Mosaic(Colours(200, num_texts=200), config)
    return {text for index in range(count) for text in mosaic[index].texts}


def test_held_out_photos_are_never_in_training_mosaics() -> None:
    train, test = (
        set().union(*(shown(MosaicConfig(split=split, seed=seed, test_share=0.3)) for seed in range(3)))
        for split in ("train", "test")
    )
    assert not train & test
    assert train | test == {f"colour {i}" for i in range(200)}
    assert shown(MosaicConfig(split="all"), 200) == train | test


@settings(max_examples=30, deadline=None)
@given(st.text(), st.floats(0.01, 0.98))
def test_a_photo_held_out_stays_so_when_more_are_held_out(identity: str, share: float) -> None:
    assert is_test(identity, share) <= is_test(identity, share + 0.01)


def test_the_share_of_held_out_photos_is_the_one_asked_for() -> None:
    assert abs(sum(is_test(f"{i}", 0.2) for i in range(5000)) / 5000 - 0.2) < 0.02


def test_the_split_is_the_same_in_every_version() -> None:
    assert [i for i in range(40) if is_test(f"00000.tar/{i:06d}", 0.1)] == [6, 15, 18, 32]


def test_texts_of_a_mosaic_differ_where_the_photos_allow() -> None:
    many = Mosaic(Colours(), MosaicConfig(grid="3"))
    assert all(len(set(many[i].texts)) == 9 for i in range(50))
    two = Mosaic(Colours(num_texts=2), MosaicConfig(grid="2"))
    assert all(len(two[i].texts) == 4 and len(set(two[i].texts)) == 2 for i in range(50))


def test_captions_name_every_text_once_in_order() -> None:
    assert mosaic_caption(["dog", "airplane", "dog", "laptop"]) == "a photo of dog, airplane and laptop"
    assert mosaic_caption(["dog", "cat"]) == "a photo of dog and cat"
    assert mosaic_caption(["dog", "dog"]) == "a photo of dog"
    sample = Mosaic(Colours(), MosaicConfig())[0]
    assert sample.captions == (mosaic_caption(sample.texts),)


def test_unusable_photos_are_replaced_and_counted() -> None:
    mosaic = Mosaic(Colours(40, bad_every=2, num_texts=40), MosaicConfig())
    texts = {text for i in range(60) for text in mosaic[i].texts}
    assert texts == {f"colour {i}" for i in range(1, 40, 2)}
    assert mosaic.skipped == Counter({"broken image": 20})
    broken = Mosaic(Colours(bad_every=1), MosaicConfig())
    with pytest.raises(BadSample, match="no usable photo"):
        broken[0]


def test_photos_without_a_caption_are_counted(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.txt").write_text("dog")
    from opencloc.data.sources.folder import ImageFolder

    mosaic = Mosaic(ImageFolder(str(tmp_path)), MosaicConfig(grid="2"))
    assert mosaic[0].texts == ("dog",) * 4
    assert mosaic.skipped == Counter({"no caption": 2})


def test_the_cache_stays_within_its_bytes() -> None:
    mosaic = Mosaic(Colours(2000), MosaicConfig(image_px=256, cache_mb=1))
    for i in range(60):
        mosaic[i]
    assert 2**19 < sum(kept[0].nbytes for kept in mosaic._kept.values()) <= 2**20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "0"}, "grid"),
        ({"grid": "3-2"}, "grid is 3-2: the range runs backwards"),
        ({"grid": "2-"}, "grid"),
        ({"grid": "two"}, "grid"),
        ({"image_px": 40}, "image_px is 40: 3 tiles per side need at least 48"),
        ({"test_share": 1.0}, "test_share"),
        ({"cache_mb": -1}, "cache_mb"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MosaicConfig(**options)


def test_a_split_without_photos_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no photo of .* is in the split 'test'"):
        Mosaic(Colours(1), MosaicConfig(split="test"))


def test_real_photos_make_mosaics_with_held_out_ones_apart(photos: Path) -> None:
    tars = Shards(str(photos / "caltech101"))
    train, test = (Mosaic(tars, MosaicConfig(split=split)) for split in ("train", "test"))
    assert tars.size == train.num_photos + test.num_photos == 6941
    assert test.num_photos == 687
    sample = test[3]
    assert sample.image.size == (96, 96)
    assert float(area(sample.boxes).sum()) == pytest.approx(1, abs=1e-5)
    assert not test.skipped
