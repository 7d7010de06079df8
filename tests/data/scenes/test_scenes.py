"""The generated world: purity, exact boxes, held-out parts, label noise, wording, shards."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from opencloc.data.sample import Sample, Source
from opencloc.data.scenes import scenes as scenes_module
from opencloc.data.scenes import sentences, sprites
from opencloc.data.scenes.scenes import SceneConfig, Scenes, held_out_colour, write_scenes
from opencloc.data.scenes.things import CHARACTERS, UNCOUNTED

NOISE = {"box_jitter": 0.1, "wrong_text": 0.3, "missing_region": 0.2}

options = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["easy", "rich"]),
        "seed": st.integers(0, 10**9),
        "image_px": st.sampled_from([32, 64, 100]),
        "num_things": st.sampled_from([12, 120, 400]),
        "min_objects": st.integers(1, 3),
        "max_objects": st.integers(3, 8),
        "attributes": st.sets(st.sampled_from(["size", "position"])).map(lambda words: ("colour", *sorted(words))),
        "split": st.sampled_from(["train", "unseen_combinations", "unseen_things"]),
        "style": st.sampled_from(["plain", "sketch"]),
        "captions": st.sampled_from(["exact", "alt_text"]),
    }
)
indices = st.integers(0, 10**6)


def digest(sample: Sample) -> str:
    fields = [sample.key, sample.image.tobytes(), sample.captions, sample.alt_text, sample.boxes.tolist(), sample.texts]
    return hashlib.sha256(repr(fields).encode()).hexdigest()


WORLDS: list[tuple[dict[str, Any], str]] = [  # options, digest of the first 20 scenes
    ({}, "22362ce45a8ae028"),
    ({"mode": "easy", "split": "unseen_combinations"}, "c4a22e1514779a87"),
    (
        {"num_things": 30, "attributes": ("colour",), "box_jitter": 0.1, "wrong_text": 0.1, "missing_region": 0.25},
        "e08f25a2ae670173",
    ),
    (
        {
            "attributes": ("size", "position"),
            "style": "sketch",
            "split": "unseen_things",
            "captions": "alt_text",
            "max_objects": 8,
        },
        "e1154e4b008190f0",
    ),
    ({"context": "next_to", "num_things": 16}, "990f8723f1bbf716"),
]


@pytest.mark.parametrize(("options", "expected"), WORLDS)
def test_a_published_world_stays_the_same_to_the_last_byte(options: dict[str, Any], expected: str) -> None:
    scenes = "".join(digest(sample) for sample in take(20, **options))
    assert hashlib.sha256(scenes.encode()).hexdigest()[:16] == expected


def take(count: int, **options: Any) -> list[Sample]:
    scenes = Scenes(SceneConfig(**options))
    return [scenes[i] for i in range(count)]


@settings(deadline=None, max_examples=15)
@given(options, indices)
def test_a_scene_depends_on_nothing_but_config_and_number(options: dict[str, Any], index: int) -> None:
    config = SceneConfig(**options)
    used = Scenes(config)
    _ = used[index + 1], used[index]  # what was drawn before must not matter
    copy = pickle.loads(pickle.dumps(used))
    assert digest(used[index]) == digest(Scenes(config)[index]) == digest(copy[index])
    assert digest(used[index]) != digest(used[index + 1])
    assert digest(used[index]) != digest(Scenes(dataclasses.replace(config, seed=config.seed + 1))[index])


def test_another_process_makes_the_same_scenes() -> None:
    program = (
        "from opencloc.data.scenes.scenes import *; from hashlib import sha256;"
        "s = Scenes(SceneConfig(attributes=('colour',), wrong_text=0.5, box_jitter=0.1))[7];"
        "print(sha256(repr((s.image.tobytes(), s.captions, s.boxes.tolist(), s.texts)).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    sample = Scenes(SceneConfig(attributes=("colour",), wrong_text=0.5, box_jitter=0.1))[7]
    fields = repr((sample.image.tobytes(), sample.captions, sample.boxes.tolist(), sample.texts))
    assert out.stdout.strip() == hashlib.sha256(fields.encode()).hexdigest()


@settings(deadline=None, max_examples=15)
@given(options, indices)
def test_every_scene_keeps_what_its_config_says(options: dict[str, Any], index: int) -> None:
    config = SceneConfig(**options)
    sample = Scenes(config)[index]
    assert sample.image.size == (config.image_px, config.image_px)
    assert sample.image.mode == "RGB"
    assert config.min_objects <= len(sample.texts) <= config.max_objects
    assert set(sample.texts) <= set(config.class_names())
    assert len(set(sample.texts)) == len(sample.texts)


@settings(deadline=None, max_examples=25)
@given(options, indices)
def test_boxes_are_exactly_what_is_drawn(options: dict[str, Any], index: int) -> None:
    config = SceneConfig(**dict(options, min_objects=1, max_objects=1))
    changed = np.zeros((config.image_px, config.image_px), dtype=bool)
    with pytest.MonkeyPatch.context() as patch:
        for ground in ("black", "white"):  # whatever is not transparent differs from one of them
            plain = Image.new("RGB", (config.image_px, config.image_px), ground)
            patch.setattr(scenes_module, "_background", lambda *_, plain=plain: plain.copy())
            sample = Scenes(config)[index]
            changed |= np.asarray(ImageChops.difference(sample.image, plain)).any(axis=-1)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    drawn = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(sample.boxes[0] * config.image_px, drawn, atol=1e-4)


@pytest.mark.parametrize("mode", ["easy", "rich"])
def test_objects_hardly_cover_each_other(mode: str) -> None:
    for sample in take(150, mode=mode):
        for a, b in itertools.combinations(sample.boxes, 2):
            width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
            smaller = min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2]))
            assert max(width, 0) * max(height, 0) <= 0.2 * smaller  # 0.08 before rounding to pixels


@pytest.mark.parametrize("option", [{"style": "sketch"}, {"captions": "alt_text"}, NOISE, {"image_px": 256}])
def test_an_option_changes_nothing_but_its_own_matter(option: dict[str, Any]) -> None:
    for default, other in zip(take(20), take(20, **option), strict=True):
        assert (other.image == default.image) == (option.keys() not in ({"style"}, {"image_px"}))
        assert (other.captions == default.captions) == ("captions" not in option)
        assert other.alt_text == default.alt_text
        if option is not NOISE:
            assert other.texts == default.texts
            np.testing.assert_allclose(other.boxes, default.boxes, atol=2.5 / 64)


def test_images_of_the_two_styles_differ() -> None:
    plain = take(10, attributes=("colour",))
    sketches = take(10, attributes=("colour",), style="sketch")
    for one, other in zip(plain, sketches, strict=True):
        assert np.abs(np.asarray(one.image, float) - np.asarray(other.image, float)).mean() > 10


@pytest.mark.parametrize("mode", ["easy", "rich"])
def test_held_out_parts_are_disjoint_whatever_the_seed(mode: str) -> None:
    def config(split: str, seed: int = 0) -> SceneConfig:
        return SceneConfig(mode=mode, split=split, seed=seed, attributes=("colour",), num_things=60)  # type: ignore[arg-type]

    train, combinations, things = (config(s) for s in ("train", "unseen_combinations", "unseen_things"))
    assert not set(train.combinations()) & set(combinations.combinations())
    assert not set(train.things()) & set(things.things())
    assert not set(train.class_names()) & (set(combinations.class_names()) | set(things.class_names()))
    assert {thing for thing, _ in combinations.combinations()} == {thing for thing, _ in train.combinations()}
    assert {colour for _, colour in train.combinations()} == set(sprites.COLOURS)
    assert all(colour == held_out_colour(thing) for thing, colour in combinations.combinations())
    shown: dict[str, set[str]] = {}
    for split, seed in itertools.product(("train", "unseen_combinations", "unseen_things"), (1, 2)):
        assert config(split, seed).class_names() == config(split).class_names()
        scenes = Scenes(config(split, seed))
        shown.setdefault(split, set()).update(text for i in range(40) for text in scenes[i].texts)
    assert not shown["train"] & (shown["unseen_combinations"] | shown["unseen_things"])


def test_class_lists_have_the_promised_sizes() -> None:
    assert len(SceneConfig().class_names()) == 120
    assert len(SceneConfig(mode="easy").class_names()) == 64
    assert "red circle" in SceneConfig(mode="easy", split="unseen_combinations").class_names()
    assert len(SceneConfig(attributes=("colour", "size", "position")).class_names()) == 120 * 8 * 2 * 9
    assert set(SceneConfig(num_things=50).class_names()) < set(SceneConfig(num_things=100).class_names())
    assert len(SceneConfig(split="unseen_things", num_things=400).class_names()) == len(CHARACTERS) // 8


def test_every_class_is_shown() -> None:
    for config in (SceneConfig(), SceneConfig(mode="easy")):
        scenes = Scenes(config)
        assert {text for i in range(400) for text in scenes[i].texts} == set(config.class_names())


def test_label_noise_has_the_rates_asked_for() -> None:
    count = 300
    clean, missing = take(count), take(count, missing_region=0.2)
    objects = sum(len(sample.texts) for sample in clean)
    kept = sum(len(sample.texts) for sample in missing)
    assert abs(1 - kept / objects - 0.2) < 4 * (0.2 * 0.8 / objects) ** 0.5
    pairs = [
        pair
        for a, b in zip(clean, take(count, wrong_text=0.3), strict=True)
        for pair in zip(a.texts, b.texts, strict=True)
    ]
    wrong = [b for a, b in pairs if a != b]
    assert abs(len(wrong) / objects - 0.3) < 4 * (0.3 * 0.7 / objects) ** 0.5
    assert len(set(wrong)) > 90  # of 120, drawn some 360 times
    moves = []
    for a, b in zip(clean, take(count, box_jitter=0.05), strict=True):
        inner = ((a.boxes > 0.15) & (a.boxes < 0.85)).all(axis=1)  # nothing to clip
        side = a.boxes[:, 2:] - a.boxes[:, :2]
        moves.append(((b.boxes - a.boxes) / np.tile(side, 2))[inner])
    moved = np.concatenate(moves)
    assert abs(moved.mean()) < 4 * 0.05 / moved.size**0.5
    assert abs(moved.std() - 0.05) < 4 * 0.05 / (2 * moved.size) ** 0.5


@settings(deadline=None, max_examples=30)
@given(indices, st.floats(0, 0.5), st.floats(0, 1), st.floats(0, 1))
def test_noisy_labels_are_still_sound_samples(index: int, jitter: float, wrong: float, missing: float) -> None:
    sample = Scenes(SceneConfig(box_jitter=jitter, wrong_text=wrong, missing_region=missing))[index]  # Sample checks
    assert len(sample.boxes) == len(sample.texts)


def test_all_regions_may_be_missing_while_the_caption_stays() -> None:
    sample = Scenes(SceneConfig(missing_region=1.0))[0]
    assert sample.texts == ()
    assert sample.captions == Scenes(SceneConfig())[0].captions


@settings(deadline=None, max_examples=25)
@given(options, indices)
def test_an_exact_caption_names_every_object_in_english(options: dict[str, Any], index: int) -> None:
    sample = Scenes(SceneConfig(**dict(options, captions="exact")))[index]
    (caption,) = sample.captions
    for text in sample.texts:
        assert re.search(rf"\b(a|an|some) {re.escape(text)}\b", caption), caption
    assert not re.search(r"\ba [aeio]|\ban [^aeiouh]", caption), caption
    if options["mode"] == "easy":
        assert "some " not in caption


@pytest.mark.parametrize(
    ("text", "countable", "phrase"),
    [
        ("dog", True, "a dog"),
        ("orange dog", True, "an orange dog"),
        ("red apple", True, "a red apple"),
        ("apple", True, "an apple"),
        ("umbrella", True, "an umbrella"),
        ("unicorn", True, "a unicorn"),  # vowel letter, consonant sound
        ("hourglass", True, "an hourglass"),  # the other way round
        ("house", True, "a house"),
        ("blue socks", False, "some blue socks"),
    ],
)
def test_noun_phrases(text: str, countable: bool, phrase: str) -> None:
    assert sentences.noun_phrase(text, countable) == phrase


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_caption_lists_with_commas_and_one_and(count: int) -> None:
    phrases = ["a dog", "a cat", "a car"][:count]
    caption = sentences.caption(phrases, Random(0))
    assert all(phrase in caption for phrase in phrases)
    assert caption.count(",") == max(0, count - 2)
    assert caption.count(" and ") == min(1, count - 1)


def test_alt_texts_tell_less_than_captions() -> None:
    samples = take(100, captions="alt_text")
    assert all(sample.captions == (sample.alt_text,) for sample in samples)
    named = [sum(text in sample.captions[0] for text in sample.texts) for sample in samples]
    present = [len(sample.texts) for sample in samples]
    assert 0.2 < sum(named) / sum(present) < 0.6
    assert 0 in named


def test_size_and_position_words_are_true() -> None:
    for sample in take(100, attributes=("size", "position"), image_px=128):
        for (x0, y0, x1, y1), text in zip(sample.boxes, sample.texts, strict=True):
            assert text.split()[0] == ("small" if max(x1 - x0, y1 - y0) < 0.31 else "large")
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            near_a_border = min(abs(v - edge) for v in (x, y) for edge in (1 / 3, 2 / 3)) < 0.02
            words = set(text.split())
            told = tuple(next((w for w in pair if w in words), None) for pair in (("left", "right"), ("top", "bottom")))
            true = (
                (None, "left", "right")[(x < 1 / 3) + 2 * (x > 2 / 3)],
                (None, "top", "bottom")[(y < 1 / 3) + 2 * (y > 2 / 3)],
            )
            assert near_a_border or told == true


def test_things_have_short_distinct_names_that_clash_with_no_attribute() -> None:
    assert len(CHARACTERS) == len(set(CHARACTERS.values())) > 500
    assert set(CHARACTERS) >= UNCOUNTED
    taken = {*sprites.COLOURS, *sprites.SHAPES, "small", "large", "left", "right", "top", "bottom", "middle"}
    for name in CHARACTERS:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)?( [a-z]+)?", name), name
        assert name not in taken
        assert not set(name.split()) & set(sprites.COLOURS), name


def test_every_thing_looks_different() -> None:
    pictures = {name: sprites.draw(name, None, 24, "plain") for name in CHARACTERS}
    pictures |= {name: sprites.draw(name, "red", 24, "plain") for name in sprites.SHAPES}
    assert len({(p.size, p.tobytes()) for p in pictures.values()}) == len(pictures)
    for name, picture in pictures.items():
        assert max(picture.size) in (23, 24), name
        opaque = np.asarray(picture)[..., 3] > 0
        assert all(border.any() for border in (opaque[0], opaque[-1], opaque[:, 0], opaque[:, -1])), name


@pytest.mark.parametrize("colour", sprites.COLOURS)
def test_a_coloured_thing_has_that_colour(colour: str) -> None:
    palette = np.array(list(sprites.COLOURS.values()), dtype=float)
    things = (*sorted(CHARACTERS)[::9], *sprites.SHAPES)
    wrong = []
    for thing in things:
        pixels = np.asarray(sprites.draw(thing, colour, 48, "plain"), dtype=float).reshape(-1, 4)
        pixels = pixels[(pixels[:, 3] > 250)][:, :3]
        bright = pixels[pixels.sum(axis=1) >= np.median(pixels.sum(axis=1))]
        direction = np.median(bright, axis=0)
        nearest = int(np.argmin(np.abs(palette - direction).sum(axis=1)))
        if list(sprites.COLOURS)[nearest] != colour:
            wrong.append((thing, list(sprites.COLOURS)[nearest]))
    assert len(wrong) <= 0.1 * len(things), wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "hard"}, "mode\n  Input should be 'easy' or 'rich'"),
        ({"attributes": ("color",)}, "attributes.0\n  Input should be 'colour', 'size' or 'position'"),
        ({"image_px": 16}, "image_px\n  Input should be greater than or equal to 32"),
        ({"num_things": 5000}, "num_things\n  Input should be less than or equal to "),
        ({"min_objects": 4, "max_objects": 3}, "max_objects is 3, below min_objects, 4"),
        ({"missing_region": float("nan")}, "missing_region\n  Input should be less than or equal to 1"),
        ({"split": "unseen_combinations"}, 'needs "colour" among the attributes'),
        ({"context": "next_to", "mode": "easy"}, 'goes with mode "rich" and without attributes'),
        ({"context": "next_to", "attributes": ("size",)}, 'goes with mode "rich" and without attributes'),
        ({"context": "next_to", "max_objects": 3}, "no even number lies between 3 and 3 objects"),
    ],
)
def test_a_bad_option_is_refused_with_its_value_and_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SceneConfig(**options)


def test_scenes_are_an_endless_source() -> None:
    source: Source = Scenes(SceneConfig())
    assert source.size is None
    assert len(source[10**12].texts) >= 3
    with pytest.raises(IndexError):
        source[-1]


def test_written_shards_hold_the_same_scenes(tmp_path: Path) -> None:
    config = SceneConfig(box_jitter=0.05)
    paths = write_scenes(config, 5, str(tmp_path / "a"), images_per_shard=2)
    assert [os.path.basename(path) for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    assert sorted(os.listdir(tmp_path / "a")) == ["00000.tar", "00001.tar", "00002.tar"]
    index = 0
    for path in paths:
        with tarfile.open(path) as tar:
            names = tar.getnames()
            for image_name, json_name in zip(names[::2], names[1::2], strict=True):
                sample = Scenes(config)[index]
                assert (image_name, json_name) == (f"{sample.key}.png", f"{sample.key}.json")
                assert Image.open(tar.extractfile(image_name)).convert("RGB") == sample.image  # type: ignore[arg-type]
                record = json.load(tar.extractfile(json_name))  # type: ignore[arg-type]
                assert (record["caption"], record["alt_text"]) == (sample.captions[0], sample.alt_text)
                assert [region["text"] for region in record["regions"]] == list(sample.texts)
                boxes = np.array([region["box"] for region in record["regions"]], dtype=np.float32)
                np.testing.assert_array_equal(boxes, sample.boxes)
                index += 1
    assert index == 5
    again = write_scenes(config, 5, str(tmp_path / "b"), images_per_shard=2)
    assert [Path(p).read_bytes() for p in paths] == [Path(p).read_bytes() for p in again]


def test_shards_are_not_written_over(tmp_path: Path) -> None:
    write_scenes(SceneConfig(), 1, str(tmp_path))
    with pytest.raises(FileExistsError):
        write_scenes(SceneConfig(), 1, str(tmp_path))
    with pytest.raises(ValueError, match="num_images is 0"):
        write_scenes(SceneConfig(), 0, str(tmp_path / "new"))
