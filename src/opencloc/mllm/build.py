"""`build` makes a RegionLlava of a vision encoder and a language model; projector and sampler are yet to be trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AddedToken, AutoModel, AutoModelForCausalLM

from opencloc import files
from opencloc.config import Count, Strict
from opencloc.mllm.boxes_text import SCALE, STEPS, coordinate_numbers
from opencloc.mllm.chat_format import chat_format
from opencloc.mllm.model import RegionLlava, RegionLlavaConfig, Sampler, position_basis
from opencloc.mllm.processor import IMAGE, REGION, Refer, RegionLlavaProcessor, make_processor
from opencloc.model import loading, towers
from opencloc.model.cloc import ClocModel
from opencloc.model.processor import ClocProcessor
from opencloc.model.prompter import PROMPTERS

LANGUAGE_MODELS = ("llama", "qwen2", "qwen3", "mistral")  # whose head LLaVA's reproduces; SmolLM2 is a llama
PAD_ROWS = 64  # the table of embeddings is rounded up to a multiple of this
PROBE_TOLERANCE = 1e-3  # of the logits, against the bare language model's


@dataclass(frozen=True, kw_only=True)
class BuildConfig(Strict):
    """An encoder and a language model as one multimodal model, to be trained by `opencloc mllm train`."""

    encoder: str
    """Folder or hub id of the vision encoder: a CLOC, CLIP or SigLIP checkpoint."""
    llm: str
    """Folder or hub id of the language model: llama (SmolLM2 too), qwen2, qwen3 or mistral."""
    out: str
    """Folder to write; it must not be there."""
    sampler: Sampler = "prompter"
    """What makes a region's token: CLOC's Prompter, the mean of RoIAlign, or Ferret's sampler of points."""
    refer: Refer = "both"
    """What stands for a region in a question: its coordinates, a region token, or both."""
    layer: Annotated[int, Field(ge=-64, le=-1)] = -2
    """Layer of the tower whose tokens the language model reads; -1 is the last.  LLaVA reads -2: of a CLIP, the
    patches of the last layer were never trained.  CLOC trains them."""
    coordinate_steps: Annotated[int, Field(ge=2, le=STEPS)] = STEPS
    """How many different numbers from 0 to 999 boxes are written in; a small model learns fewer sooner."""
    shared_positions: bool = False
    """For language models from scratch: image tokens carry the position basis of prompts, and the numbers' embeddings
    start from it.  The model can then not be exported as a plain LLaVA."""
    max_length: Count = 2048
    """Most tokens of a conversation; longer ones are left out of training."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the new weights."""


def build(config: BuildConfig) -> Path:
    """The folder of the new model and its processor, which appears when it is complete.

    Raises ValueError for an encoder or a language model of another family, for a sampler that the encoder has not got,
    for a language model whose logits would change, and where `out` is there already.
    """
    out = Path(config.out)
    if out.exists():
        raise ValueError(f"{out} is there already: choose another --out")
    torch.manual_seed(config.seed)
    vision, prompter, image = _encoder(config)
    language, tokenizer, text_config = _language_model(config.llm)
    chat = chat_format(tokenizer, config.llm)
    embeddings = _add_tokens(language, tokenizer, config.llm)
    is_clip = vision.config.model_type == "clip_vision_model"
    side = vision.config.image_size // vision.config.patch_size
    described = RegionLlavaConfig(
        vision_config=vision.config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        region_token_index=tokenizer.convert_tokens_to_ids(REGION),
        image_seq_length=side**2,
        vision_feature_layer=config.layer,
        vision_feature_select_strategy="default" if is_clip else "full",
        tie_word_embeddings=text_config.tie_word_embeddings,
        sampler=config.sampler,
        prompter=None if prompter is None else prompter["settings"],
        shared_positions=config.shared_positions,
        position_std=float(embeddings.detach().std()),
    )
    if -config.layer > vision.config.num_hidden_layers:
        raise ValueError(f"layer must be at least -{vision.config.num_hidden_layers}, the tower's layers")
    model = RegionLlava(described).float().eval()
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    if prompter is not None:
        sampler: Any = model.model.sampler
        sampler.prompter.load_state_dict(prompter["prompter"])
        own = sampler.prompt_encoder.state_dict()  # without what texts are prompted by
        sampler.prompt_encoder.load_state_dict({name: prompter["prompt_encoder"][name] for name in own})
    _check_same_logits(model, language, config.llm)
    if config.shared_positions:
        start_numbers_from_basis(
            embeddings, tokenizer, config.coordinate_steps, model.model.grid, described.position_std
        )
        model.model.language_model.load_state_dict(language.model.state_dict())
        model.lm_head.load_state_dict(language.lm_head.state_dict())
    processor = make_processor(
        tokenizer,
        chat,
        described,
        refer=config.refer,
        coordinate_steps=config.coordinate_steps,
        max_length=config.max_length,
        **image,
    )
    model.generation_config.eos_token_id = processor.end_ids[-1]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    save(model, processor, out)
    return out


def save(model: RegionLlava, processor: RegionLlavaProcessor, out: Path) -> None:
    """Writes model and processor to a folder, atomically."""
    with files.new_folder(out) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)


def _encoder(config: BuildConfig) -> tuple[Any, dict[str, Any] | None, dict[str, Any]]:
    """(vision tower, the Prompter's weights and settings if it is asked for, mean and deviation of the pixels)."""
    path, kind = config.encoder, loading.load_config(config.encoder).model_type
    prompter = None
    if kind == "cloc":
        model: Any = ClocModel.from_pretrained(path)
        processor, clip = ClocProcessor.from_pretrained(path), model.clip
        if config.sampler == "prompter":
            form = PROMPTERS[model.config.prompter]
            if not model.config.regions_trained or form.reads_pool_input:
                raise ValueError(f"{path} has no trained Prompter of its own tokens: use sampler roi or points")
            options = {name: getattr(model.config, name) for name in form.options}
            prompter = {
                "settings": {"kind": model.config.prompter, "embed_dim": model.embed_dim, "options": options},
                "prompter": model.prompter.state_dict(),
                "prompt_encoder": model.prompt_encoder.state_dict(),
            }
    elif kind not in ("clip", "siglip"):
        raise ValueError(f"{path} holds a {kind!r} model: the encoder must be a cloc, clip or siglip checkpoint")
    elif config.sampler == "prompter":
        raise ValueError(f"{path} is a {kind} and has no Prompter: use sampler roi or points")
    else:
        clip = loading.load_model(AutoModel, path)
        processor = ClocProcessor.from_clip(path)
    if clip.config.model_type == "siglip2":
        raise ValueError(f"{path} has SigLIP 2 towers, which LLaVA's code cannot feed: use CLIP or SigLIP towers")
    tower = AutoModel.from_config(clip.config.vision_config).float()
    tower.load_state_dict(clip.vision_model.state_dict())
    assert towers.image_size(clip.config) == tower.config.image_size
    return tower, prompter, {"image_mean": processor.image_mean, "image_std": processor.image_std}


def _language_model(path: str) -> tuple[Any, Any, Any]:
    """(causal language model in float32, tokenizer, configuration)."""
    kind = loading.load_config(path).model_type
    if kind not in LANGUAGE_MODELS:
        able = ", ".join(LANGUAGE_MODELS)
        raise ValueError(f"{path} holds a {kind!r} model: the language model must be one of {able}")
    model = loading.load_model(AutoModelForCausalLM, path).float().eval()
    return model, loading.load_tokenizer(path), model.config


def _add_tokens(language: Any, tokenizer: Any, where: str) -> Tensor:
    """Adds the image and the region token, in place; the table of embeddings, which covers all tokens."""
    vocabulary = tokenizer.get_vocab()
    if taken := [token for token in (IMAGE, REGION) if token in vocabulary]:
        raise ValueError(f"{where}: the tokenizer has a token {taken[0]!r} of its own")
    new = [AddedToken(token, special=True, normalized=False) for token in (IMAGE, REGION)]
    tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    table = language.get_input_embeddings().weight
    size = max(tokenizer.get_vocab().values()) + 1
    if size > len(table):
        language.resize_token_embeddings(size, pad_to_multiple_of=PAD_ROWS, mean_resizing=False)
        with torch.no_grad():
            for module in {language.get_input_embeddings(), language.get_output_embeddings()}:
                known, new_rows = module.weight[: len(table)], module.weight[len(table) :]
                nn.init.normal_(new_rows, std=float(known.std()))
    return language.get_input_embeddings().weight


@torch.no_grad()
def _check_same_logits(model: RegionLlava, language: Any, where: str) -> None:
    """Raises ValueError if LLaVA's code computes something else than the language model does on its own."""
    ids = torch.arange(1, min(48, model.config.image_token_index - 1))[None]
    ours, theirs = model(input_ids=ids).logits, language(input_ids=ids).logits
    worst = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
    if not worst <= PROBE_TOLERANCE:
        raise ValueError(f"{where}: inside LLaVA the language model gives other logits (by {worst:.2%} at most)")


@torch.no_grad()
def start_numbers_from_basis(table: Tensor, tokenizer: Any, steps: int, grid: tuple[int, int], std: float) -> None:
    """Rows of the numbers that boxes are written in, where one is a token: the basis at (v, v), v = number / 999."""
    vocabulary = tokenizer.get_vocab()
    numbers = coordinate_numbers(steps)
    if missing := [n for n in numbers if str(n) not in vocabulary]:
        raise ValueError(f"shared_positions needs a tokenizer with whole numbers as tokens; {missing[0]} is none")
    rows = {vocabulary[str(n)]: n / SCALE for n in numbers}
    places = torch.tensor(list(rows.values()))[:, None].expand(-1, 2)
    table[list(rows)] = position_basis(places, table.shape[1], grid, std).to(table.dtype)
