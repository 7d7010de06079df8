"""Hashes of weights: the same for the same, others for others, whatever lies beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.export import export_clip
from opencloc.model.fingerprint import model_id, vision_tower_id
from opencloc.model.processor import ClocProcessor
from opencloc.model.towers import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_the_vision_tower_counts_and_no_other(family: str, tower_config: Callable[[str], Any]) -> None:
    model = ClocModel(ClocConfig(clip_config=tower_config(family)))
    before, whole_before = vision_tower_id(model.clip), model_id(model)
    for name, weight in model.named_parameters():
        old = weight.detach().clone()
        weight.data.add_(0.5)
        is_vision = "vision_model." in name or "visual_projection." in name
        assert (vision_tower_id(model.clip) != before) == is_vision, name
        assert model_id(model) != whole_before
        weight.data.copy_(old)
    assert vision_tower_id(model.clip) == before


def test_a_clip_and_the_model_on_it_have_one_vision_tower(
    tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    towers = tower_config("clip")
    model = ClocModel(ClocConfig(clip_config=towers))
    clip = export_clip(model, ClocProcessor.for_towers(towers, tokenizer), tmp_path / "clip")
    assert vision_tower_id(ClocModel.from_clip(clip, prompter="pool").clip) == vision_tower_id(model.clip)
    double: Any = ClocModel.from_clip(clip).to(torch.float64)  # pyright: ignore
    assert vision_tower_id(double.clip) == vision_tower_id(model.clip)  # of the same numbers in another type
