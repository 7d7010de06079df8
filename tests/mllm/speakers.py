"""Small random multimodal models, and one that says what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPVisionConfig, LlamaConfig, SiglipVisionConfig

from opencloc.mllm.answers import Answerer
from opencloc.mllm.chat_format import chat_format
from opencloc.mllm.conversation import Conversation
from opencloc.mllm.model import RegionLlava, RegionLlavaConfig
from opencloc.mllm.processor import IMAGE, REGION, RegionLlavaProcessor, make_processor
from opencloc.model.processor import train_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = ["USER: What is [12, 34, 500, 999]? ASSISTANT: a red dog and a cat. yes no the image 0123456789"] * 3
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def language_tokenizer(template: str | None = None) -> Any:
    """A byte-level tokenizer of a language model, which adds a start token by itself."""
    tokenizer: Any = train_tokenizer(TEXTS, 400, 4096)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|im_start|>", "<|im_end|>"] if template else []
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, IMAGE, REGION]})
    if template:
        tokenizer.chat_template = template
    return tokenizer


def tiny_model(
    family: str = "clip", *, tied: bool = False, template: str | None = None, sampler: Any = "roi", **options: Any
) -> tuple[RegionLlava, RegionLlavaProcessor]:
    """A model of random weights that sees 32 px images in 8 px patches, and its processor."""
    tokenizer = language_tokenizer(template)
    vision = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[family](**SIZES, image_size=32, patch_size=8)
    text = LlamaConfig(**SIZES, vocab_size=448, num_key_value_heads=2, tie_word_embeddings=tied)
    config = RegionLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        region_token_index=tokenizer.convert_tokens_to_ids(REGION),
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if family == "clip" else "full",
        tie_word_embeddings=tied,
        sampler=sampler,
        **options,
    )
    torch.manual_seed(0)
    model = RegionLlava(config).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        for parameter in model.parameters():  # logits that differ from token to token
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, make_processor(tokenizer, chat_format(tokenizer), config)


def tiny_answerer(**options: Any) -> Answerer:
    return Answerer(*tiny_model(**options), batch_size=3)


class Parrot:
    """Answers as `say` says; of two answers the one for which `like` is greater is more likely."""

    def __init__(
        self, say: Callable[[Conversation], str], like: Callable[[Conversation], float] = lambda _: 0.0
    ) -> None:
        self.say, self.like = say, like

    def answer(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        return [self.say(conversation) for conversation in conversations]

    def log_likelihood(self, conversations: Sequence[Conversation]) -> list[float]:
        return [float(self.like(conversation)) for conversation in conversations]
