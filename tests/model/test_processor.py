"""Processor and tokenizer, and the Predictor that photos go through."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerFast

from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.predictor import Predictor
from opencloc.model.processor import ClocProcessor, train_tokenizer


def test_texts_are_lower_cased_padded_and_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = ClocProcessor(tokenizer, image_size=32, max_text_length=6)
    ids = processor.tokenize(["A Red DOG", "a red dog", "dog", "dog " * 50])
    assert torch.equal(ids[0], ids[1])
    assert ids.shape == (4, 6)
    end = tokenizer.eos_token_id
    assert torch.eq(ids, torch.tensor(end)).sum(1).tolist() == [1, 1, 1, 1]  # cut texts keep their end
    full = ClocProcessor(tokenizer, image_size=32, max_text_length=9, pad_to_max_length=True)
    assert full.tokenize(["dog"]).shape == (1, 9)


def test_padding_comes_last_whatever_the_tokenizer_is_set_to(tokenizer: PreTrainedTokenizerFast) -> None:
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"  # the default of transformers' Siglip2Tokenizer
    texts = ["a red dog", "two trains in the snow"]
    for full in (False, True):
        expected, found = (
            ClocProcessor(t, image_size=32, max_text_length=12, pad_to_max_length=full).tokenize(texts)
            for t in (tokenizer, left)
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["dog", "  "], "text 1 is empty"), ("", "text 0 is empty"), (["\ud800"], "no valid"), ([3], "not a string")],
)
def test_what_is_no_text_is_refused(tokenizer: PreTrainedTokenizerFast, texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClocProcessor(tokenizer)(text=texts)


def test_spaces_case_and_unicode_forms_make_no_difference_and_a_string_is_one_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    processor = ClocProcessor(tokenizer, max_text_length=64)
    ids = processor.tokenize(["a red \u00e9t\u00e9", " A  red\n e\u0301te\u0301\t"])
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(processor.tokenize("a red \u00e9t\u00e9"), ids[:1])


def test_any_text_can_be_tokenised_and_ids_are_in_the_order_clip_needs(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ClocProcessor(tokenizer, max_text_length=64).tokenize(["日本 ☃ ñandú"])
    assert str(tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)).strip() == "日本 ☃ ñandú"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)


def test_tokenizer_of_the_same_texts_is_the_same() -> None:
    texts = ["a red dog", "two blue cats and a dog"] * 3
    a, b = (train_tokenizer(texts, 300, 16) for _ in range(2))
    assert a.get_vocab() == b.get_vocab()


def test_saved_processor_loads_equal(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    processor = ClocProcessor(tokenizer, image_size=48, max_text_length=7, image_mean=(0.5, 0.5, 0.5))
    processor.save_pretrained(tmp_path)
    for loaded in (ClocProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, ClocProcessor)
        assert (loaded.image_size, loaded.max_text_length, loaded.image_mean) == (48, 7, (0.5, 0.5, 0.5))
        batch = loaded(images=Image.new("RGB", (30, 20)), text="a red dog")
        assert batch["pixel_values"].shape == (1, 3, 48, 48)
        assert torch.equal(batch["input_ids"], processor.tokenize(["a red dog"]))


def test_padding_is_nearly_zero_once_normalised(tokenizer: PreTrainedTokenizerFast) -> None:
    pixels, (letterbox,) = ClocProcessor(tokenizer, image_size=32).letterbox([Image.new("L", (64, 16), 255)])
    assert pixels[0, :, 0].abs().max() < 0.02
    assert pixels[0, :, 16].min() > 1
    assert (letterbox.width_px, letterbox.height_px) == (64, 16)


@pytest.fixture
def predictor(tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast) -> Predictor:
    torch.manual_seed(0)
    clip = tower_config("clip")
    return Predictor(ClocModel(ClocConfig(clip_config=clip)), ClocProcessor.for_towers(clip, tokenizer))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_predictor_gives_the_models_own_embeddings(predictor: Predictor, photo: Path) -> None:
    image = predictor.encode(photo)
    # box of the left half of an 80 x 40 image: in the square, x from 0 to 0.5, y from 0.25 to 0.75
    with torch.inference_mode():
        expected = predictor.model.encode_regions(image.features, torch.tensor([[[0.0, 0.25, 0.5, 0.75]]]))[0]
    torch.testing.assert_close(predictor.embed(image, boxes_px=[[0, 0, 40, 40]]), expected)
    mask = np.zeros((40, 80), dtype=bool)
    mask[:, :40] = True
    mixed = predictor.embed(image, boxes_px=[[0, 0, 40, 40]], points_px=[[20, 20]], masks=[mask], texts=["a red dog"])
    assert mixed.shape == (4, 24)
    torch.testing.assert_close(mixed[:1], expected)


def test_predictor_names_and_grounds_in_pixels(predictor: Predictor, photo: Path) -> None:
    image = predictor.encode(Image.open(photo))
    names, probabilities = predictor.classify(image, [[0, 0, 40, 40], [10, 5, 70, 35]], ["a dog", "a cat", "snow"])
    assert probabilities.shape == (2, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert names == [["a dog", "a cat", "snow"][i] for i in probabilities.argmax(1)]
    boxes = predictor.ground(image, ["a dog", "snow"])
    assert boxes.shape == (2, 4)
    assert (boxes[:, [0, 2]] <= 80).all()
    assert (boxes[:, [1, 3]] <= 40).all()


@pytest.mark.parametrize(
    ("box", "message"),
    [([0, 0, 90, 10], "80 x 40"), ([0, 0, float("nan"), 1], "box 0"), ([5, 5, 5, 9], "box"), ([1, 2, 3], "4 numbers")],
)
def test_predictor_refuses_bad_boxes(predictor: Predictor, photo: Path, box: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor.embed(predictor.encode(photo), boxes_px=[box])


def test_predictor_names_a_file_that_is_no_image(predictor: Predictor, tmp_path: Path, photo: Path) -> None:
    (tmp_path / "no.jpg").write_text("hello")
    with pytest.raises(ValueError, match=r"no\.jpg is not a readable image"):
        predictor.encode(tmp_path / "no.jpg")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut\.png is not a readable image"):
        predictor.encode(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError):
        predictor.encode(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="mask of shape"):
        predictor.embed(predictor.encode(photo), masks=[np.ones((4, 4), dtype=bool)])


def test_predictor_loads_what_training_saves(predictor: Predictor, tmp_path: Path, photo: Path) -> None:
    predictor.model.save_pretrained(tmp_path / "m")
    predictor.processor.save_pretrained(tmp_path / "m")
    loaded = Predictor.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(loaded.encode(photo).features.embedding, predictor.encode(photo).features.embedding)
