"""A run of seconds, shared by the tests of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from opencloc.config import DataConfig, ModelConfig, OptimConfig, TrainConfig


@pytest.fixture(scope="session")
def config(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainConfig]:
    """Folder and changed fields -> 6 steps of 8 scenes at 32 px."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    sizes: dict[str, Any] = {"width": 32, "layers": 1, "heads": 2}
    towers: dict[str, Any] = {
        f"{tower}_{size}": number for tower in ("vision", "text") for size, number in sizes.items()
    }
    model = ModelConfig(image_size=32, patch_size=8, **towers, text_length=16, embed_dim=16, tokenizer=str(folder))

    def make(out: Path, **changes: Any) -> TrainConfig:
        fields: dict[str, Any] = {
            "model": model,
            "data": DataConfig(train=("scenes:easy",), num_workers=0),
            "optim": OptimConfig(lr=1e-3, warmup_steps=2),
            "steps": 6,
            "batch_size": 8,
            "checkpoint_every": 2,
            "log_every": 1,
            "precision": "fp32",
            "device": "cpu",
        }
        return TrainConfig(out=str(out), **fields | changes)

    return make
