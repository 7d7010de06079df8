"""What differs between CLIP, SigLIP and SigLIP 2: how each gives pooled embeddings and tokens.

The towers are transformers' own classes, untouched: every checkpoint of theirs loads, and every export is theirs again.
Only this file and the export name a family.

Symbols: B images, U texts, N patches, T text tokens, D width of the vision tower, E width of the joint embedding,
S side of the square image in pixels, K patches kept of the N.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig

from opencloc.model.packing import PackedTexts

FAMILIES = ("clip", "siglip", "siglip2")
VISION_PARTS = ("vision_model.", "visual_projection.")  # what the names of the vision tower's weights begin with


def check_family(config: PreTrainedConfig) -> None:
    """Raises ValueError unless the config is one of `FAMILIES`."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"towers must be one of {', '.join(FAMILIES)}; got a {config.model_type!r} config")


def embed_dim(config: Any) -> int:
    """Width E of the joint embedding."""
    return config.projection_dim if config.model_type == "clip" else config.vision_config.hidden_size


def patch_grid(config: Any) -> tuple[int, int]:
    """(rows, columns) of patches."""
    vision = config.vision_config
    side = round(vision.num_patches**0.5) if config.model_type == "siglip2" else vision.image_size // vision.patch_size
    return side, side


def image_size(config: Any) -> int:
    """Side S of the square image in pixels."""
    return patch_grid(config)[0] * config.vision_config.patch_size


def set_image_size(config: Any, image_size: int) -> None:
    """Writes the side of the square image in pixels, a multiple of the patch, into a configuration."""
    vision = config.vision_config
    if config.model_type == "siglip2":
        vision.num_patches = (image_size // vision.patch_size) ** 2
    else:
        vision.image_size = image_size


def max_text_length(config: Any) -> int:
    """Most tokens a text may have, special tokens included."""
    return config.text_config.max_position_embeddings


def pads_to_max_length(config: Any) -> bool:
    """SigLIP reads the embedding off the last position, padding or not: every text has the full length."""
    return config.model_type != "clip"


def pooled_position(config: Any, ids: Sequence[int]) -> int:
    """Index of the token that CLIP's text tower reads the embedding off, by transformers' rule."""
    end = config.text_config.eos_token_id
    # configurations older than transformers 4.31 say 2 and mean the highest id
    is_end = [i == (max(ids) if end == 2 else end) for i in ids]
    return is_end.index(True) if any(is_end) else 0


def vision_forward(
    towers: Any, pixels: Float[Tensor, "B 3 S S"], kept: Int[Tensor, "B K"] | None = None
) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B N D"]]:
    """(pooled and projected embedding, not normalised; patch tokens before pooling and projection).

    `kept`: of each image, the patches that go through the layers; the tokens are then theirs alone, (B, K, D).
    """
    if kept is None:
        return _vision_forward(towers, pixels, None)
    _, before = position_table(towers)

    def keep(_module: torch.nn.Module, _inputs: Any, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B J D"]:
        patches = x[:, before:].gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        return torch.cat([x[:, :before], patches], 1)

    hook = towers.vision_model.embeddings.register_forward_hook(keep)
    try:
        return _vision_forward(towers, pixels, kept)
    finally:
        hook.remove()


def _vision_forward(
    towers: Any, pixels: Float[Tensor, "B 3 S S"], kept: Int[Tensor, "B K"] | None
) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B N D"]]:
    if towers.config.model_type == "clip":
        out = towers.vision_model(pixel_values=pixels)
        return towers.visual_projection(out.pooler_output), out.last_hidden_state[:, 1:]
    if towers.config.model_type == "siglip":
        out = towers.vision_model(pixel_values=pixels)
        return out.pooler_output, out.last_hidden_state
    rows, columns = patch_grid(towers.config)
    patches = patchify(pixels, towers.config.vision_config.patch_size)
    shapes = torch.tensor([[rows, columns]]).expand(pixels.shape[0], -1)
    mask = torch.ones((patches if kept is None else kept).shape[:2], dtype=torch.int32, device=pixels.device)
    out = towers.vision_model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes)
    return out.pooler_output, out.last_hidden_state


def patchify(pixels: Float[Tensor, "B 3 S S"], patch: int) -> Float[Tensor, "B N C"]:
    """Flattened patches as SigLIP 2's image processor makes them: row by row, each (row, column, channel)."""
    batch, channels, height, width = pixels.shape
    x = pixels.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def text_forward(towers: Any, texts: Int[Tensor, "U T"] | PackedTexts) -> Float[Tensor, "U E"]:
    """Pooled and projected text embedding, not normalised.  Packed texts get what they would get one to a row.

    No attention mask for padding: CLIP's attention is causal and reads the end-of-text token, so padding behind it
    changes nothing; SigLIP was trained attending to its padding, and cannot be packed.
    """
    if isinstance(texts, Tensor):
        return towers.get_text_features(input_ids=texts).pooler_output
    assert not pads_to_max_length(towers.config)
    mask = texts.attention()
    if towers.text_model.config._attn_implementation == "eager":  # which adds its mask to the scores
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, float("-inf"))
    text = towers.text_model  # part by part: its own forward refuses rows longer than a text and pools one token a row
    x = text.embeddings.token_embedding(texts.input_ids) + text.embeddings.position_embedding(texts.position_ids)
    x = text.encoder(inputs_embeds=x, attention_mask=mask, is_causal=True).last_hidden_state
    return towers.text_projection(text.final_layer_norm(x.flatten(0, 1)[texts.end]))


def dense_embedding(towers: Any, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N E"]:
    """Every patch token on its own through the tower's pooling and projection.

    CLIP: final norm and projection, made for the class token.  SigLIP: the pooling head attending to one token only.
    """
    if towers.config.model_type == "clip":
        return towers.visual_projection(towers.vision_model.post_layernorm(tokens))
    return patch_embeddings(towers, tokens)


def patch_embeddings(towers: Any, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B N E"]:
    """Every patch in the joint space, not normalised: what the tower's pooling would read off that patch alone.

    `tokens`: what the pooling reads (`recorded_pool_input`).  The value path of its attention (MaskCLIP, Zhou et al.
    2022, arXiv 2112.01071).  CLIP: of the last layer, without residual and MLP, then final norm and projection.
    SigLIP: of the pooling head, with the head's MLP.
    """
    if towers.config.model_type == "clip":
        layer = towers.vision_model.encoder.layers[-1]
        values = layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(tokens[:, 1:])))
        return towers.visual_projection(towers.vision_model.post_layernorm(values))
    head = towers.vision_model.head
    weight, bias = (x.chunk(3)[2] for x in (head.attention.in_proj_weight, head.attention.in_proj_bias))
    x = head.attention.out_proj(torch.nn.functional.linear(tokens, weight, bias))
    return x + head.mlp(head.layernorm(x))


def pools_tokens(config: Any) -> bool:
    """Whether the pooling reads the patch tokens themselves (SigLIP), not what comes before the last layer (CLIP)."""
    return config.model_type != "clip"


@contextmanager
def recorded_pool_input(towers: Any) -> Iterator[list[Float[Tensor, "B L D"]]]:
    """A list that receives, from every forward pass inside, the tokens that `pool` takes (CLIP: class token first)."""
    inputs: list[Tensor] = []
    vision = towers.vision_model
    pools = vision.encoder.layers[-1] if towers.config.model_type == "clip" else vision.head
    hook = pools.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        yield inputs
    finally:
        hook.remove()


def pool(towers: Any, tokens: Float[Tensor, "B L D"], bias: Float[Tensor, "B P N"]) -> Float[Tensor, "B P E"]:
    """The tower's pooled embedding, not normalised, with `bias` added to the attention of the pooling to the patches.

    A bias of 0 gives the image embedding.  CLIP pools in its last layer, by the class token; it still attends to itself
    and keeps its residual.
    """
    bias = bias.to(tokens.dtype)
    if towers.config.model_type != "clip":
        head = towers.vision_model.head
        query = head.probe.expand(tokens.shape[0], bias.shape[1], -1)
        mask = bias.repeat_interleave(head.attention.num_heads, 0)
        x = head.attention(query, tokens, tokens, attn_mask=mask, need_weights=False)[0]
        return x + head.mlp(head.layernorm(x))
    layer = towers.vision_model.encoder.layers[-1]
    attention, x = layer.self_attn, layer.layer_norm1(tokens)
    query, key, value = (
        project(part).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for project, part in ((attention.q_proj, x[:, :1]), (attention.k_proj, x), (attention.v_proj, x))
    )
    query = query.expand(-1, -1, bias.shape[1], -1)
    mask = torch.nn.functional.pad(bias, (1, 0))[:, None]
    seen = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    x = tokens[:, :1] + attention.out_proj(seen.transpose(1, 2).flatten(2))
    x = x + layer.mlp(layer.layer_norm2(x))
    return towers.visual_projection(towers.vision_model.post_layernorm(x))


def position_table(towers: Any) -> tuple[torch.nn.Embedding, int]:
    """(position embedding of the vision tower, how many rows come before the patches)."""
    return towers.vision_model.embeddings.position_embedding, 1 if towers.config.model_type == "clip" else 0


def keep_weights(towers: Any) -> None:
    """Keeps transformers from drawing the weights anew, which it does to a module that does not say it has them."""
    for module in towers.modules():
        module._is_hf_initialized = True
