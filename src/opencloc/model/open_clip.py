"""OpenCLIP's own folders as transformers' CLIPModel: `open_clip_config.json` and `open_clip_model.safetensors`.

The ViT towers of OpenCLIP are those of transformers under other names, so every tensor is moved to its place there.
Nothing is guessed: a setting or a tensor that has no place is an error that names it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig  # no CLIP classes: they may be on their way in just now

from opencloc.images import MEAN_RGB, STD_RGB

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

# What transformers' CLIP does in any case: other settings must say so, or nothing.
_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "output_dict"}
_TOWER = {"width", "layers", "mlp_ratio", "norm_kwargs"}
_VISION = _TOWER | {"head_width", "patch_size", "image_size", "patch_dropout"}
_TEXT = _TOWER | {"heads", "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "pad_id"}
_USUAL = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "global_average_pool": (False,)}

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def is_open_clip(path: str | Path) -> bool:
    """Whether a folder has OpenCLIP's files, and not transformers' weights beside them."""
    folder = Path(path)
    return (folder / CONFIG).is_file() and not any(folder.glob("model*.safetensors"))


def read_config(path: str | Path) -> PreTrainedConfig:
    """transformers' configuration of an OpenCLIP folder.

    Raises ValueError naming the setting that transformers' CLIP has no place for: towers of timm, ResNets, language
    models as text towers, other poolings.
    """
    cfg = _settings(path)["model_cfg"]
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    if timm := vision.get("timm_model_name"):
        raise ValueError(
            f"{path}: the vision tower is timm's {timm!r}, which transformers' CLIP cannot hold"
            + (": take Google's own checkpoint of this SigLIP in transformers' format" if "siglip" in timm else "")
        )
    if name := text.get("hf_model_name"):
        raise ValueError(f"{path}: the text tower is {name!r}, not CLIP's")
    for part, settings, known in (("", cfg, _MODEL), ("vision_cfg.", vision, _VISION), ("text_cfg.", text, _TEXT)):
        for key, value in settings.items():
            if not (key in known or not value or key.startswith(("timm_", "hf_")) or value in _USUAL.get(key, ())):
                raise ValueError(f"{path}: {part}{key} is {value!r}, which transformers' CLIP has no place for")
    side, layers = vision.get("image_size", 224), vision.get("layers", 12)
    sides = side if isinstance(side, list) else [side, side]
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(layers, int):
        raise ValueError(f"{path}: needs a ViT that sees a square; it has image_size {side} and layers {layers}")
    width, act = vision.get("width", 768), "quick_gelu" if cfg.get("quick_gelu") else "gelu"
    from transformers import CLIPConfig

    return CLIPConfig(
        projection_dim=cfg["embed_dim"],
        vision_config=_tower(vision, 768, width // vision.get("head_width", 64), act)
        | {"patch_size": vision.get("patch_size", 16), "image_size": sides[0]},
        text_config=_tower(text, 512, text.get("heads", 8), act)
        | {"max_position_embeddings": text.get("context_length", 77), "vocab_size": text.get("vocab_size", 49408)}
        | {"eos_token_id": 2},  # to transformers' CLIP: the embedding is that of the highest id, OpenCLIP's rule too
    )


def load(path: str | Path, **options: Any) -> Any:
    """What `CLIPModel.from_pretrained` returns for these options, with the weights of an OpenCLIP folder.

    Raises ValueError naming tensors that have no place in transformers' CLIP.
    """
    config: Any = read_config(path)
    if not (file := Path(path) / WEIGHTS).is_file():
        raise ValueError(f"{path}: there is no {WEIGHTS}")
    state: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, value in load_file(file).items():
        found = _placed(name.removeprefix("text."), value)
        unknown += [] if found else [name]
        state |= found
    if unknown:
        names = ", ".join(unknown[:5]) + ", ..." * (len(unknown) > 5)
        raise ValueError(f"{path}: {WEIGHTS} has {len(unknown)} tensors with no place in CLIP: {names}")
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(None, config=config, state_dict=state, **options)


def image_settings(path: str | Path) -> dict[str, Any]:
    """Mean and deviation of the pixels, as transformers' image processors call them; OpenAI's where none are given."""
    settings = _settings(path).get("preprocess_cfg") or {}
    return {"image_mean": settings.get("mean", MEAN_RGB), "image_std": settings.get("std", STD_RGB)}


def tokenizer_name(path: str | Path) -> str | None:
    """The folder or hub id of the tokenizer, for folders that hold none of their own."""
    return _settings(path)["model_cfg"]["text_cfg"].get("hf_tokenizer_name") or None


def _settings(path: str | Path) -> dict[str, Any]:
    try:
        settings = json.loads((Path(path) / CONFIG).read_bytes())
        parts = settings["model_cfg"], settings["model_cfg"]["vision_cfg"], settings["model_cfg"]["text_cfg"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: {CONFIG} is not OpenCLIP's: it needs model_cfg with both towers") from error
    if not all(isinstance(part, dict) for part in parts) or not isinstance(parts[0].get("embed_dim"), int):
        raise ValueError(f"{path}: {CONFIG} is not OpenCLIP's: it needs model_cfg with embed_dim and both towers")
    return settings


def _tower(cfg: dict[str, Any], width: int, heads: int, act: str) -> dict[str, Any]:
    width = cfg.get("width", width)
    return {
        "hidden_size": width,
        "intermediate_size": int(width * cfg.get("mlp_ratio", 4.0)),
        "num_hidden_layers": cfg.get("layers", 12),
        "num_attention_heads": heads,
        "hidden_act": act,
        "layer_norm_eps": (cfg.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def _placed(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of OpenCLIP under transformers' names; the fused projection of attention in three.  {}: no place."""
    if name in _WHOLE:
        return {_WHOLE[name]: value}
    if name in _TRANSPOSED:
        return {_TRANSPOSED[name]: value.T.contiguous()}
    match = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name)
    if match is None:
        return {}
    visual, number, part, kind = match.groups()
    layer = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
    if part == "attn.in_proj" and len(value) % 3 == 0:
        thirds = zip("qkv", value.chunk(3), strict=True)
        return {f"{layer}.self_attn.{one}_proj.{kind}": third.contiguous() for one, third in thirds}
    return {f"{layer}.{_BLOCK[part]}.{kind}": value} if part in _BLOCK else {}
