"""Scenes of pairs: things that only their neighbour tells apart (`context=next_to`)."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from opencloc.data.sample import Sample
from opencloc.data.scenes.scenes import SceneConfig, Scenes

NEXT_TO: dict[str, Any] = {"context": "next_to", "num_things": 16}
Split = Literal["train", "unseen_combinations", "unseen_things"]
SPLITS: tuple[Split, ...] = get_args(Split)


def take(count: int, **options: Any) -> list[Sample]:
    scenes = Scenes(SceneConfig(**NEXT_TO, **options))
    return [scenes[i] for i in range(count)]


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of two boxes along the axis on which they are farther apart."""
    return float(np.maximum(a[:2] - b[2:], b[:2] - a[2:]).max())


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(SPLITS),
    st.integers(12, 80),
    st.integers(2, 8),
    st.sampled_from([32, 64, 200]),
    st.integers(0, 10**6),
)
def test_what_a_thing_stands_next_to_is_what_lies_nearest(
    split: Split, num_things: int, most: int, image_px: int, index: int
) -> None:
    config = SceneConfig(
        context="next_to", split=split, num_things=num_things, min_objects=2, max_objects=most, image_px=image_px
    )
    sample = Scenes(config)[index]
    names = set(config.class_names())
    assert len(sample.texts) in range(2, most + 1, 2)
    assert len(set(sample.texts)) == len(sample.texts)
    assert set(sample.texts) <= names
    for number, (box, text) in enumerate(zip(sample.boxes, sample.texts, strict=True)):
        others = [other for other in range(len(sample.texts)) if other != number]
        distances = [gap(box, sample.boxes[other]) for other in others]
        nearest = others[int(np.argmin(distances))]
        thing, beside = re.split(r" next to (?:an?|some) ", text)
        assert re.split(r" next to (?:an?|some) ", sample.texts[nearest]) == [beside, thing]
        assert min(distances) <= 0.03 + 2 / image_px
        assert all(far >= 0.12 - 2 / image_px for far in sorted(distances)[1:])


def test_the_crop_of_a_thing_does_not_tell_its_text() -> None:
    scenes = take(400)
    beside = [tuple(re.split(r" next to (?:an?|some) ", text)) for sample in scenes for text in sample.texts]
    by_thing = {thing: {other for one, other in beside if one == thing} for thing, _ in beside}
    assert all(len(others) >= 10 for others in by_thing.values())  # whatever a thing looks like, many texts fit it
    twice = [len({text.split(" next to ")[0] for text in sample.texts}) < 4 for sample in scenes]
    assert 0.45 < sum(twice) / len(twice) < 0.75  # the same thing beside different ones, in one scene


def test_pairs_are_large_and_their_class_list_is_short() -> None:
    boxes = np.concatenate([sample.boxes for sample in take(100)])
    assert (boxes[:, 2:] - boxes[:, :2]).max(axis=1).min() > 0.25
    names = {split: set(SceneConfig(split=split, **NEXT_TO).class_names()) for split in SPLITS}
    assert {split: len(texts) for split, texts in names.items()} == {
        "train": 212,
        "unseen_combinations": 28,
        "unseen_things": 240,
    }
    assert not names["train"] & names["unseen_combinations"]
    held_out = {text.split(" next to ")[0] for text in names["unseen_combinations"]}
    assert held_out == set(SceneConfig(**NEXT_TO).things())


def test_every_pair_is_shown_and_named_once_in_the_caption() -> None:
    config = SceneConfig(**NEXT_TO)
    scenes = Scenes(config)
    assert {text for i in range(600) for text in scenes[i].texts} == set(config.class_names())
    for sample in take(50):
        assert sample.captions[0].count(" next to ") == len(sample.texts) // 2
        assert sum(text in sample.captions[0] for text in sample.texts) == len(sample.texts) // 2


def test_label_noise_of_pairs_is_that_of_all_scenes() -> None:
    clean, noisy = take(200), take(200, wrong_text=0.3)
    names = set(SceneConfig(**NEXT_TO).class_names())
    pairs = [pair for a, b in zip(clean, noisy, strict=True) for pair in zip(a.texts, b.texts, strict=True)]
    wrong = [b for a, b in pairs if a != b]
    assert set(wrong) <= names
    assert abs(len(wrong) / len(pairs) - 0.3) < 4 * (0.3 * 0.7 / len(pairs)) ** 0.5
    kept = sum(len(sample.texts) for sample in take(200, missing_region=0.25))
    assert abs(kept / len(pairs) - 0.75) < 4 * (0.25 * 0.75 / len(pairs)) ** 0.5
    jittered = take(200, box_jitter=0.1)
    assert all((a.boxes != b.boxes).any() for a, b in zip(clean, jittered, strict=True))
