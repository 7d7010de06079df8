"""The exported folder: names of the weights, equal logits in LLaVA's own classes, equal tokens, equal pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration

from opencloc.mllm.conversation import Conversation, Turn
from opencloc.mllm.export import export_llava, llava_weights
from opencloc.mllm.model import RegionLlava
from tests.mllm.speakers import CHATML, tiny_model

QUESTION = "Where is the red dog?"


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 44, 3), dtype=np.uint8))


def opened(folder: Path) -> tuple[Any, dict[str, Any]]:
    llava: Any = LlavaForConditionalGeneration
    model, info = llava.from_pretrained(folder, output_loading_info=True)
    return model.eval(), info


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("sampler", ["roi", "points"])
def test_llava_opens_it_with_nothing_missing_and_equal_logits(
    family: str, tied: bool, sampler: str, tmp_path: Path
) -> None:
    """From a fresh model and from one that was saved and loaded."""
    model, processor = tiny_model(family, tied=tied, sampler=sampler)
    batch = processor([Conversation(image=photo(), turns=(Turn("user", QUESTION),))])
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path / "saved")
    reloaded = RegionLlava.from_pretrained(tmp_path / "saved").eval()
    for name, one in (("fresh", model), ("reloaded", reloaded)):
        plain, info = opened(export_llava(one, processor, tmp_path / name))
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        with torch.no_grad():
            assert torch.equal(plain(**batch).logits, expected)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("fresh", "reloaded")]
    assert weights[0] == weights[1]


def test_the_names_of_the_weights_are_those_of_llavas_checkpoints(tmp_path: Path) -> None:
    folder = export_llava(*tiny_model("clip"), tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    layers = {name for name in names if ".layers." in name}
    assert names - layers == {
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.embeddings.position_embedding.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "vision_tower.vision_model.pre_layrnorm.bias",
        "vision_tower.vision_model.post_layernorm.weight",
        "vision_tower.vision_model.post_layernorm.bias",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_1.bias",
        "multi_modal_projector.linear_2.weight",
        "multi_modal_projector.linear_2.bias",
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    }
    assert {name.partition(".layers.")[0] for name in layers} == {
        "vision_tower.vision_model.encoder",
        "language_model.model",
    }
    tied = llava_weights(tiny_model("clip", tied=True)[0].state_dict(), tied=True)
    assert names - set(tied) == {"language_model.lm_head.weight"}
    with pytest.raises(ValueError, match=r"no weight for model\.patch_positions"):
        llava_weights({"model.patch_positions": torch.zeros(1)}, tied=False)


def test_the_configuration_says_what_vllm_and_lmms_eval_look_for(tmp_path: Path) -> None:
    config = json.loads((export_llava(*tiny_model("clip"), tmp_path / "out") / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert config["image_seq_length"] == 16
    assert not {"sampler", "prompter", "region_token_index", "shared_positions"} & set(config)


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_processor_makes_the_tokens_and_nearly_the_pixels_of_training(
    family: str, template: str | None, tmp_path: Path
) -> None:
    model, ours = tiny_model(family, template=template)
    folder = export_llava(model, ours, tmp_path / "out")
    theirs = AutoProcessor.from_pretrained(folder, backend="pil")
    image, turns = photo(), (Turn("user", QUESTION), Turn("assistant", "a cat"), Turn("user", "and?"))
    turns = turns if template else turns[:1]  # without a template nothing keeps an answer apart from what is before it
    expected = ours([Conversation(image=image, turns=turns)])
    contents = [turn.text for turn in turns]
    as_strings = [{"role": t.role, "content": ("<image>\n" if i == 0 else "") + t.text} for i, t in enumerate(turns)]
    as_lists = [
        {"role": turn.role, "content": [{"type": "text", "text": text}, *([{"type": "image"}] if i == 0 else [])]}
        for i, (turn, text) in enumerate(zip(turns, contents, strict=True))
    ]
    for messages in (as_strings, as_lists):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        batch = theirs(images=image, text=text, return_tensors="pt")
        assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    pixels = theirs(images=image, text=text, return_tensors="pt")["pixel_values"]
    assert pixels.shape == expected["pixel_values"].shape
    difference = (pixels - expected["pixel_values"]).abs()
    assert difference.mean() < 0.1  # noise is the hardest image to resize alike
    plain, _ = opened(folder)
    generated = plain.generate(**batch, max_new_tokens=3)
    assert generated.shape[1] > batch["input_ids"].shape[1]


def test_the_template_writes_a_whole_conversation_as_training_saw_it(tmp_path: Path) -> None:
    model, ours = tiny_model("clip", template=CHATML)
    theirs = AutoProcessor.from_pretrained(export_llava(model, ours, tmp_path / "out"), backend="pil")
    turns = (Turn("user", "it's \\ {a} 'dog'"), Turn("assistant", "yes"), Turn("user", "é"), Turn("assistant", "no"))
    row = ours.encode(Conversation(image=None, turns=turns), for_training=True)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert theirs.tokenizer(text)["input_ids"] == row.input_ids
    with pytest.raises(Exception, match="only images and texts"):
        theirs.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)


def test_what_llava_cannot_compute_and_what_is_no_export_is_refused(tmp_path: Path) -> None:
    model, processor = tiny_model("clip", shared_positions=True)
    with pytest.raises(ValueError, match="shared_positions"):
        export_llava(model, processor, tmp_path / "out")
    model, processor = tiny_model("clip")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no earlier export"):
        export_llava(model, processor, tmp_path / "mine")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    export_llava(model, processor, tmp_path / "out")
    export_llava(model, processor, tmp_path / "out")
