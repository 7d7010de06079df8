"""Encoders and language models of random weights on disk, and multimodal models built of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from opencloc.mllm.boxes_text import coordinate_numbers
from opencloc.mllm.build import BuildConfig, build
from opencloc.mllm.config import MllmDataConfig, MllmOptimConfig, MllmTrainConfig, Rates
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.export import export_clip
from opencloc.model.processor import ClocProcessor, train_tokenizer
from tests.mllm.families import SPECIAL, TEMPLATES

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}
TEXTS = ["USER: What is [12, 34, 500, 999]? ASSISTANT: a red circle and a blue square. Yes No image 0123456789"] * 3
Make = Callable[..., Any]


def speech_tokenizer(family: str | None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of a language model, with the chat template of a family or none."""
    tokenizer = train_tokenizer(TEXTS, 340, 4096)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[family]})
        tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> folder of a small random language model with its tokenizer.

    `plain` is a llama without template, `numbers` one that has the 64 numbers of boxes as tokens.
    """
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            tokenizer = speech_tokenizer(family if family in CONFIGS else None)
            if family == "numbers":
                tokenizer.add_tokens([str(number) for number in coordinate_numbers(64)])
            config = CONFIGS.get(family, LlamaConfig)(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                tie_word_embeddings=family != "mistral",
                initializer_range=0.2,  # logits that differ
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            torch.manual_seed(1)
            made[family] = tmp_path_factory.mktemp(family)
            AutoModelForCausalLM.from_config(config).save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def encoder(
    tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`cloc`, `clip`, `siglip` -> folder of a random encoder of 32 px images in 8 px patches."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "model"
            torch.manual_seed(2)
            towers = tower_config("siglip" if kind == "siglip" else "clip")
            model = ClocModel(ClocConfig(clip_config=towers))
            processor = ClocProcessor.for_towers(towers, tokenizer)
            if kind == "cloc":
                model.save_pretrained(made[kind])
                processor.save_pretrained(made[kind])
            else:
                export_clip(model, processor, made[kind])
        return made[kind]

    return make


@pytest.fixture(scope="session")
def built(
    encoder: Callable[[str], Path], language: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """Sampler (and fields of `BuildConfig`) -> folder of a model of a CLOC encoder and a llama without template."""
    made: dict[str, Path] = {}

    def make(sampler: str = "prompter", *, kind: str = "cloc", family: str = "plain", **fields: Any) -> Path:
        key = repr((sampler, kind, family, sorted(fields.items())))
        if key not in made:
            config = BuildConfig(
                encoder=str(encoder(kind)),
                llm=str(language(family)),
                out=str(tmp_path_factory.mktemp("built") / "model"),
                sampler=sampler,  # pyright: ignore[reportArgumentType]
            )
            made[key] = build(replace(config, **fields))
        return made[key]

    return make


@pytest.fixture(scope="session")
def stage(built: Make) -> Make:
    """Folder and changed fields -> 4 steps of 4 conversations about easy scenes."""

    def make(out: Path, **changes: Any) -> MllmTrainConfig:
        fields: dict[str, Any] = {
            "model": str(built()),
            "data": MllmDataConfig(train=("scenes:easy",), num_workers=0),
            "rates": Rates(projector=1e-3, sampler=1e-3, language_model=1e-3),
            "optim": MllmOptimConfig(warmup_steps=2),
            "steps": 4,
            "batch_size": 4,
            "checkpoint_every": 2,
            "log_every": 1,
            "precision": "fp32",
            "device": "cpu",
        }
        return MllmTrainConfig(out=str(out), **fields | changes)

    return make
