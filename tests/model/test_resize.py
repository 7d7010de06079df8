"""Checkpoints at another image size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFilter
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast

from opencloc.model import towers
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.processor import ClocProcessor
from opencloc.model.resize import at_image_size, interpolated

Pair = tuple[ClocModel, ClocProcessor]
MakePair = Callable[..., Pair]
BOXES = torch.tensor([[[0.1, 0.2, 0.6, 0.9], [0.5, 0.0, 1.0, 0.4]]])


@pytest.fixture
def make(tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast) -> MakePair:
    def make(family: str = "clip", **region: Any) -> Pair:
        torch.manual_seed(0)
        config = tower_config(family)
        model = ClocModel(ClocConfig(clip_config=config, **region)).eval()
        table, _ = towers.position_table(model.clip)
        torch.nn.init.normal_(table.weight)  # as large as the patches: what it does is seen
        return model, ClocProcessor.for_towers(config, tokenizer)

    return make


def smooth_photo() -> Image.Image:
    noise = torch.randint(0, 255, (12, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy()).resize((256, 256), Image.Resampling.BICUBIC)
    return image.filter(ImageFilter.GaussianBlur(12))


@pytest.mark.parametrize("family", towers.FAMILIES)
def test_its_own_size_leaves_a_model_as_it_is(make: MakePair, family: str) -> None:
    model, processor = make(family)
    assert at_image_size(model, processor, 32) == (model, processor)


@pytest.mark.parametrize("image_size", [24, 40, 64])
@pytest.mark.parametrize("family", towers.FAMILIES)
def test_a_resized_tower_gives_what_transformers_gives_for_larger_images(
    make: MakePair, family: str, image_size: int
) -> None:
    model, processor = make(family)
    resized, resized_processor = at_image_size(model, processor, image_size)
    assert resized.grid == (image_size // 8, image_size // 8)
    pixels, _ = resized_processor.letterbox([smooth_photo()])
    assert pixels.shape[-1] == image_size
    with torch.no_grad():
        if family == "siglip2":
            shapes = torch.tensor([resized.grid])
            patches = towers.patchify(pixels, 8)
            mask = torch.ones(patches.shape[:2], dtype=torch.int32)
            theirs = model.clip.vision_model(
                pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes
            ).pooler_output
        else:
            theirs = model.clip.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
        torch.testing.assert_close(resized.encode_image(pixels).embedding, normalize(theirs, dim=-1))


@pytest.mark.parametrize("family", towers.FAMILIES)
def test_a_resized_model_is_saved_and_loaded_at_its_new_size(make: MakePair, tmp_path: Path, family: str) -> None:
    for part in at_image_size(*make(family), 48):
        part.save_pretrained(tmp_path)
    again, processor = ClocModel.from_pretrained(tmp_path).eval(), ClocProcessor.from_pretrained(tmp_path)
    assert (processor.image_size, again.grid) == (48, (6, 6))
    assert towers.image_size(again.config.clip_config) == 48
    model, _ = at_image_size(*make(family), 48)
    pixels, _ = processor.letterbox([smooth_photo()])
    with torch.no_grad():
        expected = model.encode_regions(model.encode_image(pixels), BOXES)
        torch.testing.assert_close(again.encode_regions(again.encode_image(pixels), BOXES), expected)


def test_only_the_position_table_changes_and_the_class_token_keeps_its_row(make: MakePair) -> None:
    model, processor = make("clip")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    resized, _ = at_image_size(model, processor, 64)
    changed = [name for name, value in resized.state_dict().items() if value.shape != before[name].shape]
    assert [name.rpartition("embeddings.")[2] for name in changed] == ["position_embedding.weight"]
    after = resized.state_dict()
    assert torch.equal(after[changed[0]][0], before[changed[0]][0])
    assert all(torch.equal(after[name], value) for name, value in before.items() if name not in changed)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())  # the old one is intact


@pytest.mark.parametrize("antialiased", [True, False])
@pytest.mark.parametrize("side", [8, 12, 20])
def test_a_table_that_rises_evenly_keeps_its_values_at_the_same_places(side: int, antialiased: bool) -> None:
    def evenly(count: int) -> torch.Tensor:
        places = (torch.arange(count) + 0.5) / count
        return (places[:, None] + 2 * places)[..., None]

    inside = slice(side // 4, -side // 4)  # at the border there is nothing to interpolate with
    found = interpolated(evenly(10), side, antialiased=antialiased)[inside, inside]
    torch.testing.assert_close(found, evenly(side)[inside, inside], atol=0.02, rtol=0)


@pytest.mark.parametrize("prompter", ["cross", "encoder"])
def test_a_trained_prompter_keeps_the_frequencies_of_its_basis_and_a_fresh_one_takes_the_finer_ones(
    make: MakePair, tmp_path: Path, prompter: str
) -> None:
    places = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    for trained in (True, False):
        model, processor = make(prompter=prompter, regions_trained=trained)
        resized, _ = at_image_size(model, processor, 64)
        resized.save_pretrained(tmp_path / str(trained))
        again = ClocModel.from_pretrained(tmp_path / str(trained))
        same = torch.equal(again.prompt_encoder.basis(places), model.prompt_encoder.basis(places))
        assert same == trained
        assert again.prompter.memory.max_cycles == again.prompt_encoder.max_cycles == (2.0 if trained else 4.0)


@pytest.mark.parametrize("image_size", [20, 4, 0, -8])
def test_sizes_that_are_no_multiple_of_the_patch_are_refused(make: MakePair, image_size: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of its patches, 8 pixels; got {image_size}"):
        at_image_size(*make(), image_size)


def test_a_table_that_is_no_square_is_refused(
    tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    config = tower_config("siglip2")
    config.vision_config.num_patches = 12
    processor = ClocProcessor.for_towers(config, tokenizer)
    with pytest.raises(ValueError, match="12 rows, which is no square of patches"):
        at_image_size(ClocModel(ClocConfig(clip_config=config, shared_positions=False)), processor, 64)


def test_dtype_mode_and_attention_stay(make: MakePair) -> None:
    model, processor = make()
    model.set_attn_implementation("eager")
    resized, _ = at_image_size(model.bfloat16().train(), processor, 48)
    assert (resized.dtype, resized.training) == (torch.bfloat16, True)
    assert resized.clip.text_model.config._attn_implementation == "eager"
