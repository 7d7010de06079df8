"""Crops show what lies in their boxes, under the region's text."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from opencloc.data.sample import Sample
from opencloc.data.scenes.scenes import SceneConfig, Scenes
from opencloc.data.sources.crops import Crops, CropsConfig
from opencloc.data.sources.spec import open_source
from opencloc.errors import BadSample


class Listed:
    def __init__(self, *samples: Sample) -> None:
        self._samples = samples
        self.size = len(samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def halves() -> Sample:
    pixels = np.zeros((10, 20, 3), dtype=np.uint8)
    pixels[:, 10:] = 255
    boxes = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1]], dtype=np.float32)
    return Sample(key="a", image=Image.fromarray(pixels), captions=("both",), boxes=boxes, texts=("black", "white"))


def test_a_crop_shows_its_region_and_is_captioned_by_its_text() -> None:
    crops = Crops(Listed(halves()), CropsConfig())
    seen = set()
    for number in range(30):
        sample = crops[number]
        assert sample.image.size == (10, 10)
        assert np.unique(np.asarray(sample.image)).tolist() == [0 if sample.captions == ("black",) else 255]
        assert len(sample.boxes) == 0
        seen |= set(sample.captions)
    assert seen == {"black", "white"}


def test_the_same_number_is_the_same_crop_and_another_seed_another() -> None:
    scenes = Scenes(SceneConfig(num_things=12))
    first, again, other = (Crops(scenes, CropsConfig(seed=seed)) for seed in (0, 0, 1))
    captions = [[crops[i].captions for i in range(20)] for crops in (first, again, other)]
    assert captions[0] == captions[1]
    assert captions[0] != captions[2]


def test_every_sample_of_a_finite_source_comes_up() -> None:
    samples = [
        Sample(
            key=str(i),
            image=Image.new("RGB", (4, 4)),
            boxes=np.array([[0, 0, 1, 1]], dtype=np.float32),
            texts=(f"thing {i}",),
        )
        for i in range(5)
    ]
    crops = Crops(Listed(*samples), CropsConfig())
    assert {crops[i].captions[0] for i in range(60)} == {f"thing {i}" for i in range(5)}


def test_a_sample_without_regions_is_a_bad_sample() -> None:
    crops = Crops(Listed(Sample(key="bare", image=Image.new("RGB", (4, 4)), captions=("x",))), CropsConfig())
    with pytest.raises(BadSample, match="bare: no regions"):
        crops[0]


def test_numbers_below_zero_are_refused() -> None:
    with pytest.raises(IndexError, match="-1"):
        Crops(Listed(halves()), CropsConfig())[-1]


def test_crops_of_any_source_are_opened_by_name() -> None:
    crops = open_source("crops:scenes:easy?seed=3?seed=5", image_px=32)
    scenes = Scenes(SceneConfig(mode="easy", seed=3, image_px=128))
    assert isinstance(crops, Crops)
    assert crops.config == CropsConfig(seed=5)
    assert crops[7].captions[0] in scenes[7].texts
    assert crops[7].image.width > 16
