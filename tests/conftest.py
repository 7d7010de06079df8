"""Shared by all tests: shapes are checked, small models and tokenizers, where real photos lie."""

from __future__ import annotations

import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes and types of every call are checked, an int passing for a float.  Before anything of opencloc is imported.
_checker = types.ModuleType("_opencloc_checker")
_checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # pyright: ignore[reportAttributeAccessIssue]
sys.modules[_checker.__name__] = _checker
install_import_hook("opencloc", "_opencloc_checker.check")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)
# A suite that a script runs in the background ignores Ctrl-C, and the programs it starts would too.
signal.signal(signal.SIGINT, signal.default_int_handler)

from transformers import CLIPConfig, PreTrainedTokenizerFast, Siglip2Config, SiglipConfig  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from opencloc.model.processor import train_tokenizer  # noqa: E402

disable_progress_bar()
# No test depends on how fast the machine is, nor on luck; tests/fuzz is for what nobody thought of.
settings.register_profile("shared-machine", deadline=None, derandomize=True)
settings.load_profile("shared-machine")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["a red dog and a blue cat", "two trains in the snow", "a photo of a pizza"] * 5, 300, 16)


@pytest.fixture(scope="session")
def tower_config(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Any]:
    """Family -> configuration of the smallest towers: 32 px images in 8 px patches."""

    def make(family: str) -> Any:
        text = SIZES | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        vision = SIZES | {"patch_size": 8}
        if family == "clip":
            return CLIPConfig(text_config=text, vision_config=vision | {"image_size": 32}, projection_dim=24)
        text["projection_size"] = 32
        if family == "siglip":
            return SiglipConfig(text_config=text, vision_config=vision | {"image_size": 32})
        return Siglip2Config(text_config=text, vision_config=vision | {"num_patches": 16})

    return make


@pytest.fixture(scope="session")
def photos() -> Path:
    """Folder of the real photos (coco740, caltech101)."""
    root = Path(os.environ.get("OPENCLOC_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "coco740").is_dir():
        pytest.skip(f"no real photos: {root}/coco740 does not exist (set OPENCLOC_DATA)")
    return root
