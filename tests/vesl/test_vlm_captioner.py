"""Captions of a local vision-language model: a tiny one with random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opencloc.data.sample import Sample
from opencloc.errors import BadSample
from opencloc.vesl.captioners import (
    CaptionConfig,
    CaptionerError,
    VlmCaptioner,
    load_captioner,
)


def sample(key: str, color: str = "red", size: tuple[int, int] = (40, 20), **fields: Any) -> Sample:
    return Sample(key=key, image=Image.new("RGB", size, color), **fields)


# --- captions already there ---


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of two narrow towers with its processor, tokenizer and chat template, as saved by transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    bpe.train_from_iterator(["a dog"], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    narrow: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**narrow, num_hidden_layers=2, image_size=16, patch_size=8),
        text_config=LlamaConfig(
            **narrow, num_hidden_layers=2, num_key_value_heads=2, vocab_size=len(tokenizer), pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        ),
        image_token_index=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    for weight in model.parameters():  # random weights of unit gain: the image must change what is written
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.5 * weight.shape[-1] ** -0.5)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vlm")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def vlm(checkpoint: Path, **settings: Any) -> VlmCaptioner:
    settings = {"precision": "fp32", "device": "cpu", "batch_size": 4, "max_new_tokens": 6, **settings}
    captioner = load_captioner(CaptionConfig(captioner=str(checkpoint), **settings))
    assert isinstance(captioner, VlmCaptioner)
    return captioner


def noise(key: str, seed: int) -> Sample:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    return Sample(key=key, image=Image.fromarray(pixels))


def test_captions_of_a_local_model_dont_depend_on_the_batch(checkpoint: Path) -> None:
    samples = [noise(str(i), i) for i in range(6)]
    together = vlm(checkpoint, batch_size=4).caption(samples)
    alone = vlm(checkpoint, batch_size=1).caption(samples)
    assert together == alone
    assert len({caption for caption in together if isinstance(caption, str)}) > 1


def test_captions_equal_transformers_own_way(checkpoint: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    one = noise("k", 1)
    inputs = processor(images=one.image, text="user: <image>name it assistant: ", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    (expected,) = processor.batch_decode(tokens, skip_special_tokens=True)
    assert vlm(checkpoint, prompt="name it").caption([one]) == [expected.strip()]


def test_a_prompt_goes_as_it_is_to_a_processor_without_chat_template(checkpoint: Path) -> None:
    one = noise("k", 1)
    captioner = vlm(checkpoint, prompt="name it")
    expected = captioner.caption([one])
    captioner._processor.chat_template = None
    captioner._config = dataclasses.replace(captioner._config, prompt="user: <image>name it assistant: ")
    assert captioner.caption([one]) == expected


def test_one_image_that_breaks_the_model_fails_alone(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [noise(str(i), i) for i in range(3)]
    captioner = vlm(checkpoint)
    expected = captioner.caption(samples)
    real = captioner._inputs

    def breaks(images: list[Image.Image]):
        if any(image is samples[1].image for image in images):
            raise RuntimeError("out of memory")
        return real(images)

    monkeypatch.setattr(captioner, "_inputs", breaks)
    found = captioner.caption(samples)
    assert [found[0], found[2]] == [expected[0], expected[2]]
    assert isinstance(found[1], BadSample)
    assert found[1].reason == "captioner failed"
    assert found[1].where == "1"
    assert "out of memory" in found[1].detail


def test_bf16_loads_and_captions(checkpoint: Path) -> None:
    captioner = vlm(checkpoint, precision="bf16")
    assert captioner._model.dtype == torch.bfloat16
    assert isinstance(captioner.caption([noise("k", 0)])[0], str)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaptionerError, match=r"nowhere: no such folder"):
        vlm(tmp_path / "nowhere")
