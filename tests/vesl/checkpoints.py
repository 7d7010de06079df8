"""Tiny random checkpoints in the real formats, saved to a folder, so that tests go through the real loading code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    SwinConfig,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = ["a", "the", "red", "blue", "big", "cat", "dog", "tree", "car", "man"]


def save_owl(folder: Path, kind: str = "owlv2", image_size: int = 64, seed: int = 0) -> Path:
    """OWLv2 or OWL-ViT with patch 16, a character tokenizer and 16 text tokens."""
    torch.manual_seed(seed)
    tokens = ["!", *LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], pad_token="!", model_max_length=16
    )
    text = {
        "vocab_size": len(tokens),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "bos_token_id": len(tokens) - 2,
        "eos_token_id": len(tokens) - 1,
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": 16,
    }
    v2 = kind == "owlv2"
    sizes: dict[str, Any] = {"text_config": text, "vision_config": vision, "projection_dim": 16}
    model = Owlv2ForObjectDetection(Owlv2Config(**sizes)) if v2 else OwlViTForObjectDetection(OwlViTConfig(**sizes))
    with torch.no_grad():  # random heads give boxes of any size; small ones stay near their patch, as trained ones do
        model.box_head.dense2.weight.mul_(0.05)
        model.class_head.logit_scale.weight.zero_()
        model.class_head.logit_shift.weight.zero_()
    size = {"height": image_size, "width": image_size}
    (Owlv2ImageProcessorPil if v2 else OwlViTImageProcessorPil)(size=size).save_pretrained(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_grounding_dino(folder: Path, max_text_len: int = 32, seed: int = 0) -> Path:
    """Grounding DINO with a small Swin and BERT, and a word tokenizer that has BERT's special ids."""
    torch.manual_seed(seed)
    tokens = [f"[unused{i}]" for i in range(1100)]
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    for i, token in {**special, **{200 + i: word for i, word in enumerate(WORDS)}}.items():
        tokens[i] = token
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=64)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=32,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_indices=[2, 3, 4],  # pyright: ignore[reportCallIssue]
        ),
        text_config=BertConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
        ),
        num_queries=12,
        encoder_layers=1,
        decoder_layers=2,
        d_model=32,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_text_len=max_text_len,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    GroundingDinoImageProcessorPil().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
