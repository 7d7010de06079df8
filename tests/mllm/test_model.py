"""RegionLlava and `build`: plain LLaVA where nobody points, one pass of the tower, errors that name the row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlavaConfig, LlavaForConditionalGeneration

from opencloc.mllm.boxes_text import coordinate_numbers
from opencloc.mllm.build import BuildConfig, build
from opencloc.mllm.conversation import Conversation, Turn
from opencloc.mllm.model import RegionLlava
from opencloc.mllm.processor import RegionLlavaProcessor
from opencloc.model.prompts import Box, Point
from tests.mllm.conftest import CONFIGS

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8))
ASKED = Conversation(image=PHOTO, turns=(Turn("user", "What is this?"),))
POINTED = Conversation(
    image=PHOTO, turns=(Turn("user", "{region:0} or {region:1}?"),), prompts=(Box(0, 0, 0.5, 1), Point(0.9, 0.5))
)
SAMPLERS = ["prompter", "roi", "points"]


def load(folder: Path) -> tuple[Any, RegionLlavaProcessor]:
    return RegionLlava.from_pretrained(folder).eval(), RegionLlavaProcessor.from_pretrained(folder)


def plain_llava(model: RegionLlava) -> LlavaForConditionalGeneration:
    """transformers' own class with the same weights."""
    config = model.config
    names = ("vision_config", "text_config", "image_token_index", "image_seq_length", "vision_feature_layer")
    names += ("vision_feature_select_strategy", "tie_word_embeddings")
    plain = LlavaForConditionalGeneration(LlavaConfig(**{name: getattr(config, name) for name in names})).eval()
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert missing == []
    assert all(name.startswith("model.sampler.") for name in unexpected)
    return plain


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("kind", ["cloc", "clip", "siglip"])
@torch.no_grad()
def test_without_regions_logits_are_plain_llavas(kind: str, layer: int, built: Callable[..., Path]) -> None:
    model, processor = load(built("roi", kind=kind, layer=layer))
    batch = processor([ASKED, Conversation(image=None, turns=(Turn("user", "Hello?"),))])
    assert torch.equal(model(**batch).logits, plain_llava(model)(**batch).logits)


@torch.no_grad()
def test_swapping_the_sampler_leaves_image_only_logits_equal(built: Callable[..., Path]) -> None:
    logits = []
    for sampler in SAMPLERS:
        model, processor = load(built(sampler))
        projector = {n: torch.full_like(p, 0.01) for n, p in model.model.multi_modal_projector.state_dict().items()}
        model.model.multi_modal_projector.load_state_dict(projector)  # which is new in every model
        logits.append(model(**processor(ASKED)).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("family", [*CONFIGS, "plain", "numbers"])
@torch.no_grad()
def test_language_model_inside_is_the_one_that_was_given(
    family: str, built: Callable[..., Path], language: Callable[[str], Path]
) -> None:
    model, processor = load(built(family=family))
    bare = AutoModelForCausalLM.from_pretrained(language(family)).eval()
    ids = torch.arange(3, 40)[None]
    rows = bare.config.vocab_size
    torch.testing.assert_close(
        model(input_ids=ids).logits[..., :rows], bare(input_ids=ids).logits, atol=1e-4, rtol=1e-4
    )
    assert processor.image_token_id >= rows
    assert model.generation_config.eos_token_id == processor.end_ids[-1]


@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.no_grad()
def test_regions_change_the_answer_and_their_order_is_that_of_the_text(
    sampler: str, built: Callable[..., Path]
) -> None:
    model, processor = load(built(sampler, refer="token"))
    batch = processor(POINTED)
    logits = model(**batch).logits[0, -1]
    swapped = dict(batch) | {name: batch[name].flip(1) for name in ("region_boxes", "region_kinds")}
    assert not torch.allclose(model(**swapped).logits[0, -1], logits, atol=1e-4)
    places = batch["input_ids"][0] == processor.region_token_id
    embeddings = {}
    model.model.language_model.register_forward_pre_hook(
        lambda _, __, given: embeddings.update(given), with_kwargs=True
    )
    model(**batch)
    first = embeddings["inputs_embeds"][0][places]
    model(**swapped)
    torch.testing.assert_close(embeddings["inputs_embeds"][0][places], first.flip(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_generation_is_what_the_whole_forward_passes_say(sampler: str, built: Callable[..., Path]) -> None:
    """Greedy tokens, one by one by whole passes without a cache, for a batch of rows of different lengths."""
    model, processor = load(built(sampler))
    conversations = [POINTED, ASKED]
    batch = processor(conversations)
    made = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=[])
    for row, conversation in enumerate(conversations):
        alone = dict(processor(conversation))
        for token in made[row, batch["input_ids"].shape[1] :].tolist():
            with torch.no_grad():
                assert int(model(**alone).logits[0, -1].argmax()) == token
            alone["input_ids"] = torch.cat([alone["input_ids"], torch.tensor([[token]])], 1)
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])


def test_beams_share_an_image(built: Callable[..., Path]) -> None:
    model, processor = load(built())
    batch = processor([POINTED, ASKED])
    both = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, num_beams=3, do_sample=False)
    alone = model.generate(**processor(POINTED), max_new_tokens=4, min_new_tokens=4, num_beams=3, do_sample=False)
    assert both[0, -4:].tolist() == alone[0, -4:].tolist()


def test_one_pass_of_the_tower_feeds_projector_and_sampler(built: Callable[..., Path]) -> None:
    model, processor = load(built())
    calls: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**processor([POINTED, ASKED]), max_new_tokens=3)
    assert len(calls) == 1


def test_wrong_numbers_of_tokens_name_the_row(built: Callable[..., Path]) -> None:
    model, processor = load(built())
    batch = processor([ASKED, POINTED])
    with pytest.raises(ValueError, match="row 1 has 2 region tokens for 1 regions"):
        model(**dict(batch) | {"region_kinds": torch.tensor([[-1, -1], [0, -1]])})
    with pytest.raises(ValueError, match="tokens: 32, features: 16"):
        model(**dict(batch) | {"pixel_values": batch["pixel_values"][:1]})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_part_gets_a_gradient_even_without_an_image(sampler: str, built: Callable[..., Path]) -> None:
    """So that ranks that shard the model wait for one another at the same places."""
    model, processor = load(built(sampler))
    model.train()
    rows = [Conversation(image=None, turns=(Turn("user", "Hello?"), Turn("assistant", "Yes")))]
    expected = model.eval()(**processor(rows, for_training=True)).loss
    loss = model.train()(**processor(rows, for_training=True)).loss
    assert torch.equal(loss, expected)
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    unused = ("post_layernorm", "prompt_encoder.point_kind", "encoder.layers.1.")
    assert [name for name in without if not any(part in name for part in unused)] == []


def test_loss_alone_is_the_same_with_the_same_gradients(built: Callable[..., Path]) -> None:
    model, processor = load(built())
    turns = (*ASKED.turns, Turn("assistant", "a red circle"))
    rows = [
        Conversation(image=PHOTO, turns=(*turns, *turns)),
        Conversation(image=PHOTO, turns=turns),
        Conversation(image=None, turns=(Turn("user", "Hello?"), Turn("assistant", "Yes"))),
    ]
    batch = processor(rows, for_training=True)
    found = []
    for options in ({}, {"num_items_in_batch": torch.tensor(9)}):
        for loss_only in (False, True):
            model.zero_grad()
            output = model(**batch, **options | {"loss_only": loss_only})
            assert (output.logits is None) == loss_only
            output.loss.backward()
            found.append([output.loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, alone in zip(found[::2], found[1::2], strict=True):
        torch.testing.assert_close(alone, plain)


def test_saved_names_are_the_same_however_often_it_is_saved(built: Callable[..., Path], tmp_path: Path) -> None:
    folder = built()
    model, _ = load(folder)
    model.save_pretrained(tmp_path / "again")
    first, second = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_shared_positions_speak_of_places_alike(built: Callable[..., Path]) -> None:
    """The number nearest to a patch's place on the diagonal has the embedding most like the patch's position."""
    model, processor = load(built(family="numbers", shared_positions=True, coordinate_steps=64))
    positions = model.model.patch_positions
    assert positions is not None
    side = model.model.grid[0]
    diagonal = positions.weight[:: side + 1]
    numbers = coordinate_numbers(64)
    ids = [processor.tokenizer.convert_tokens_to_ids(str(n)) for n in numbers]
    table = model.get_input_embeddings().weight[ids]
    likeness = torch.nn.functional.cosine_similarity(diagonal[:, None], table[None], dim=-1)
    nearest = torch.tensor(numbers)[likeness.argmax(1)] / 999
    torch.testing.assert_close(nearest, (torch.arange(side) + 0.5) / side, atol=0.02, rtol=0)
    words = model.get_input_embeddings().weight[[i for i in range(len(processor.tokenizer)) if i not in ids]]
    assert positions.weight.std() == pytest.approx(float(words.std()), rel=0.1)
    shown = positions(torch.randn(side**2, words.shape[1]) * 50) - positions.weight
    assert shown.std() == pytest.approx(float(words.std()), rel=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": "clip"}, "has no Prompter: use sampler roi or points"),
        ({"llm": "gpt2"}, "must be one of llama, qwen2, qwen3, mistral"),
        ({"encoder": "gpt2"}, "must be a cloc, clip or siglip checkpoint"),
        ({"layer": -7}, "layer must be at least -2"),
        ({"shared_positions": True, "coordinate_steps": 7}, "whole numbers as tokens"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(
    fields: dict[str, Any],
    message: str,
    encoder: Callable[[str], Path],
    language: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    foreign = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20)).save_pretrained(foreign)
    names = {"clip": str(encoder("clip")), "gpt2": str(foreign)}
    values: dict[str, Any] = {
        "encoder": str(encoder("cloc")),
        "llm": str(language("plain")),
        "out": str(tmp_path / "out"),
    }
    changes: dict[str, Any] = {
        name: names.get(value, value) if isinstance(value, str) else value for name, value in fields.items()
    }
    with pytest.raises(ValueError, match=message):
        build(BuildConfig(**values | changes))
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(
    built: Callable[..., Path], encoder: Callable[[str], Path], language: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match="is there already"):
        build(BuildConfig(encoder=str(encoder("cloc")), llm=str(language("plain")), out=str(built())))


def test_other_models_are_not_taken_for_one(encoder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="not one of `opencloc mllm build`"):
        RegionLlava.from_pretrained(encoder("cloc"))
