"""What the towers give of single patches, against the towers' own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModel

from opencloc.model import towers


@pytest.mark.parametrize("family", towers.FAMILIES)
def test_patch_embedding_is_what_the_pooling_attention_reads_off_that_patch_alone(
    tower_config: Callable[[str], Any], family: str
) -> None:
    torch.manual_seed(0)
    clip: Any = AutoModel.from_config(tower_config(family)).eval()
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases too: they start at zero
    with torch.no_grad():
        with towers.recorded_pool_input(clip) as inputs:
            _, tokens = towers.vision_forward(clip, torch.randn(2, 3, 32, 32))
        found = towers.patch_embeddings(clip, inputs[0])
        assert found.shape == (2, 16, towers.embed_dim(clip.config))
        for n in range(16):
            alone = inputs[0][:, -16:][:, n : n + 1]  # attention over one token returns its value
            if family == "clip":
                layer = clip.vision_model.encoder.layers[-1]
                seen = layer.self_attn(hidden_states=layer.layer_norm1(alone), attention_mask=None)[0]
                expected = clip.visual_projection(clip.vision_model.post_layernorm(seen))[:, 0]
            else:
                expected = clip.vision_model.head(tokens[:, n : n + 1])
            torch.testing.assert_close(found[:, n], expected, atol=1e-5, rtol=1e-5)
