"""Processor and tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerFast

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


def test_images_of_any_form_are_taken_and_nothing_gives_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = ClocProcessor(tokenizer, image_size=32)
    image = Image.new("RGB", (30, 20), "red")
    pixels = processor(images=[image, np.asarray(image)])["pixel_values"]
    assert torch.equal(pixels[0], pixels[1])
    nothing = processor(images=[], text=[])
    assert nothing["pixel_values"].shape == (0, 3, 32, 32)
    assert len(nothing["input_ids"]) == 0


def test_padding_is_nearly_zero_once_normalised(tokenizer: PreTrainedTokenizerFast) -> None:
    pixels, (letterbox,) = ClocProcessor(tokenizer, image_size=32).letterbox([Image.new("L", (64, 16), 255)])
    assert pixels[0, :, 0].abs().max() < 0.02
    assert pixels[0, :, 16].min() > 1
    assert (letterbox.width_px, letterbox.height_px) == (64, 16)
