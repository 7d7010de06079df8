"""Folders in OpenCLIP's format, written here from a CLIPModel by the published names, give its embeddings again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, DINOv3ViTConfig, PreTrainedTokenizerFast, Siglip2Model

import opencloc
from opencloc.eval.encoders import load_encoder
from opencloc.images import MEAN_RGB
from opencloc.model import open_clip
from opencloc.model.cloc import ClocModel
from opencloc.model.loading import load_config, load_model
from opencloc.model.processor import ClocProcessor

WORDS = ["a", "red", "dog", "cat", "person", *"bcdefghijklmnopqrstuvwxyz", "<unk>", "<start>", "<end>"]  # highest: end
TOWER = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(one, WORDS.index(one)) for one in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<end>", bos_token="<start>", eos_token="<end>", unk_token="<unk>"
    )


def open_clip_names(clip: Any) -> dict[str, torch.Tensor]:
    """The model's tensors as `open_clip.CLIP` names them (its model.py and transformer.py)."""
    state = {}
    for tower, prefix in ((clip.vision_model, "visual."), (clip.text_model, "")):
        for i, layer in enumerate(tower.encoder.layers):
            block, attention = f"{prefix}transformer.resblocks.{i}.", layer.self_attn
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            parts = {
                "attn.in_proj_weight": torch.cat([one.weight for one in projections]),
                "attn.in_proj_bias": torch.cat([one.bias for one in projections]),
            }
            for name, module in (
                ("ln_1", layer.layer_norm1),
                ("attn.out_proj", attention.out_proj),
                ("ln_2", layer.layer_norm2),
                ("mlp.c_fc", layer.mlp.fc1),
                ("mlp.c_proj", layer.mlp.fc2),
            ):
                parts |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
            state |= {block + name: value for name, value in parts.items()}
    vision, text = clip.vision_model, clip.text_model
    for name, module in (
        ("visual.ln_pre", vision.pre_layrnorm),
        ("visual.ln_post", vision.post_layernorm),
        ("ln_final", text.final_layer_norm),
    ):
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    state |= {
        "visual.class_embedding": vision.embeddings.class_embedding,
        "visual.positional_embedding": vision.embeddings.position_embedding.weight,
        "visual.conv1.weight": vision.embeddings.patch_embedding.weight,
        "visual.proj": clip.visual_projection.weight.T,
        "token_embedding.weight": text.embeddings.token_embedding.weight,
        "positional_embedding": text.embeddings.position_embedding.weight,
        "text_projection": clip.text_projection.weight.T,
        "logit_scale": clip.logit_scale,
    }
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Writes a random CLIP as an OpenCLIP folder: (the folder, the model); keywords change model_cfg."""

    def write(prefix: str = "", **changes: Any) -> tuple[Path, Any]:
        torch.manual_seed(0)
        act = "quick_gelu" if changes.get("quick_gelu") else "gelu"
        vision = TOWER | {"num_attention_heads": 4, "patch_size": 8, "image_size": 32, "hidden_act": act}
        text = TOWER | {"num_attention_heads": 2, "vocab_size": len(WORDS), "max_position_embeddings": 12}
        config = CLIPConfig(
            vision_config=vision, text_config=text | {"hidden_act": act, "eos_token_id": 2}, projection_dim=24
        )
        clip: Any = CLIPModel(config).eval()
        for parameter in clip.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # biases and norms matter
        state = {(name if name.startswith(("visual", "logit")) else prefix + name): value
                 for name, value in open_clip_names(clip).items()}  # fmt: skip
        save_file(state, tmp_path / "open_clip_model.safetensors")
        model_cfg: dict[str, Any] = {
            "embed_dim": 24,
            "vision_cfg": {
                "image_size": 32,
                "layers": 2,
                "width": 32,
                "head_width": 8,
                "patch_size": 8,
                "mlp_ratio": 3,
            },
            "text_cfg": {"context_length": 12, "vocab_size": len(WORDS), "width": 32, "heads": 2, "layers": 2}
            | {"mlp_ratio": 3.0},
        }
        for key, value in changes.items():
            model_cfg[key] = model_cfg[key] | value if key in ("vision_cfg", "text_cfg") else value
        preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
        content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
        word_tokenizer().save_pretrained(tmp_path)
        return tmp_path, clip

    return write


@pytest.mark.parametrize(
    ("prefix", "changes"),
    [("", {}), ("", {"quick_gelu": True}), ("text.", {"custom_text": True, "text_cfg": {"pool_type": "argmax"}})],
)
def test_an_open_clip_folder_gives_the_embeddings_of_the_same_clip(
    write: Callable[..., tuple[Path, Any]], prefix: str, changes: dict[str, Any]
) -> None:
    folder, clip = write(prefix, **changes)
    model, processor = ClocModel.from_clip(folder, prompter="pool").eval(), ClocProcessor.from_clip(folder)
    assert (processor.image_mean, processor.image_std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    pixels, ids = torch.randn(2, 3, 32, 32), processor.tokenize(["a red dog", "cat"])
    with torch.no_grad():
        seen = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        read = F.normalize(clip.get_text_features(input_ids=ids).pooler_output, dim=-1)
        torch.testing.assert_close(model.encode_image(pixels).embedding, seen)
        torch.testing.assert_close(model.encode_text(ids), read)
        torch.testing.assert_close(load_encoder(folder, "crop").encode_texts(["a red dog", "cat"]), read)
        torch.testing.assert_close(opencloc.load(folder).embed_texts(["a red dog", "cat"]), read)
    model.save_pretrained(folder / "cloc")  # and is a CLOC checkpoint like any other from here on
    assert load_config(folder / "cloc").clip_config.vision_config.hidden_size == 32


def test_what_is_not_said_is_open_clips_default(write: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = write()
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = None
    config["model_cfg"] |= {"vision_cfg": {"patch_size": 32}, "text_cfg": {}, "embed_dim": 512}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    found = load_config(folder)
    assert (found.vision_config.hidden_size, found.vision_config.num_attention_heads) == (768, 12)
    assert (found.text_config.vocab_size, found.text_config.max_position_embeddings) == (49408, 77)
    assert open_clip.image_settings(folder)["image_mean"] == MEAN_RGB


def test_the_tokenizer_may_lie_elsewhere(write: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = write(text_cfg={"hf_tokenizer_name": str(tmp_path / "words")})
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"words: no such folder"):
        ClocProcessor.from_clip(folder)
    word_tokenizer().save_pretrained(tmp_path / "words")
    assert ClocProcessor.from_clip(folder).tokenize("a red dog").tolist() == [[WORDS.index("<start>"), 0, 1, 2, 32]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224"}},
            r"timm's 'vit_base.*Google's own checkpoint",
        ),
        ({"vision_cfg": {"timm_model_name": "fastvit_mci2"}}, r"timm's 'fastvit_mci2', which .* CLIP cannot hold$"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, r"the text tower is 'roberta-base', not CLIP's"),
        ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, r"needs a ViT that sees a square"),
        ({"vision_cfg": {"image_size": [32, 64]}}, r"needs a ViT that sees a square"),
        ({"text_cfg": {"pool_type": "last"}}, r"text_cfg\.pool_type is 'last', which .* no place for"),
        ({"vision_cfg": {"ls_init_value": 1e-5}}, r"vision_cfg\.ls_init_value is 1e-05"),
        ({"init_logit_bias": -10}, r"init_logit_bias is -10"),
        ({"embed_dim": None}, r"open_clip_config\.json is not OpenCLIP's"),
        ({"embed_dim": 23}, r"2 misshapen weights: text_projection\.weight, visual_projection\.weight"),
    ],
)
def test_what_clip_cannot_hold_is_refused_by_name(
    write: Callable[..., tuple[Path, Any]], changes: dict[str, Any], message: str
) -> None:
    folder, _ = write(**changes)
    with pytest.raises(ValueError, match=message) as refused:
        ClocModel.from_clip(folder)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize(
    ("add", "drop", "message"),
    [
        ({"visual.attn_pool.query": torch.zeros(2)}, "", r"1 tensors with no place in CLIP: visual\.attn_pool\.query"),
        ({"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(32)}, "", r"resblocks\.0\.ls_1\.gamma"),
        ({}, "visual.ln_pre.bias", r"1 missing weights: vision_model\.pre_layrnorm\.bias"),
        ({"visual.transformer.resblocks.2.ln_1.bias": torch.zeros(32)}, "", r"1 unexpected weights: .*layers\.2\."),
        ({"logit_scale": torch.tensor(float("nan"))}, "", r"not finite: logit_scale"),
    ],
)
def test_every_tensor_has_its_place(
    write: Callable[..., tuple[Path, Any]], add: dict[str, torch.Tensor], drop: str, message: str
) -> None:
    folder, _ = write()
    state = load_file(folder / "open_clip_model.safetensors") | add
    state.pop(drop, None)
    save_file(state, folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=message):
        ClocModel.from_clip(folder)


def test_pickled_weights_are_not_opened(write: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = write()
    (folder / "open_clip_model.safetensors").rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"open_clip_pytorch_model\.bin is a pickle, .* is not opened"):
        load_encoder(folder, "crop")


def test_transformers_weights_beside_open_clips_are_taken(write: Callable[..., tuple[Path, Any]]) -> None:
    folder, clip = write()
    clip.save_pretrained(folder)
    (folder / "open_clip_model.safetensors").unlink()
    assert load_config(folder).vision_config.intermediate_size == 96


# -- checkpoints with code of their own --------------------------------------------------------------------------------


def test_a_checkpoint_with_its_own_code_is_refused_unless_transformers_knows_its_kind(
    tower_config: Callable[[str], Any], tmp_path: Path
) -> None:
    Siglip2Model(tower_config("siglip2")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    hostile = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "evil.py").write_text("raise SystemExit('foreign code ran')")
    (tmp_path / "config.json").write_text(json.dumps(config | hostile))
    assert load_model(Siglip2Model, tmp_path).config.model_type == "siglip2"  # transformers' own class, no code run
    assert type(ClocModel.from_clip(tmp_path, prompter="pool").clip) is Siglip2Model
    (tmp_path / "config.json").write_text(json.dumps(config | hostile | {"model_type": "fgclip2"}))
    with pytest.raises(ValueError, match=r"no model type 'fgclip2'; it brings its own code .* is not run"):
        ClocModel.from_clip(tmp_path)


def test_a_vision_tower_without_a_text_tower_is_refused(tmp_path: Path) -> None:
    DINOv3ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"towers must be one of clip, siglip, siglip2; got a 'dinov3_vit' config"):
        ClocModel.from_clip(tmp_path)


def test_transformers_classes_can_be_imported_after_opencloc() -> None:
    """Importing them registers ours on the way, which must not ask for what is just being imported."""
    code = "import opencloc\nfrom transformers import CLIPConfig, CLIPModel"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
