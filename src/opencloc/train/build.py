"""Model and processor of a run: from scratch, from a checkpoint to start from, or from the run's own checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, Siglip2Config, SiglipConfig

from opencloc.config import ModelConfig, TrainConfig
from opencloc.data.sample import Source
from opencloc.data.sources.spec import open_source
from opencloc.errors import BadSample
from opencloc.model import towers
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.loading import load_config, load_tokenizer, naming
from opencloc.model.processor import ClocProcessor, train_tokenizer
from opencloc.model.resize import at_image_size

TOKENIZER_SAMPLES = 2000  # samples per source whose texts train a tokenizer


def build_model(
    config: TrainConfig, sources: Sequence[Source] | None = None, resume_from: Path | None = None
) -> tuple[ClocModel, ClocProcessor]:
    """Model and processor, with weights drawn from `config.seed` where they are new.

    `sources`: the training data, which a tokenizer may have to be trained on; None: opened if it has.  A resumed run
    takes its processor and architecture from its checkpoint; weights are loaded by the caller.
    """
    model, processor = _build(config, sources, resume_from)
    factors = config.optim.lr_factors
    model.config.regions_trained |= config.loss.region_weight * factors.prompter > 0
    model.config.grounding_trained |= config.loss.region_weight * config.loss.grounding_weight * factors.heads > 0
    model.float()  # weights are fp32 whatever the checkpoint was saved in; `precision` says what is computed in
    model.set_attn_implementation(config.model.attention)
    apply_options(model, config)
    return model, processor


def apply_options(model: ClocModel, config: TrainConfig) -> None:
    """Activation checkpointing and compilation, in place: no parameter is renamed, no result changes but by rounding.

    Layers of the towers are compiled one by one, on their first call: equal ones share their code, and what shards or
    checkpoints a layer still finds it.
    """
    if config.activation_checkpointing:
        # transformers renamed the method in the course of version 5
        older: Any = getattr(model, "gradient_checkpointing_enable", None)
        getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
    if config.compile:
        layers = [*model.clip.vision_model.encoder.layers, *model.clip.text_model.encoder.layers]
        for module in [*layers, model.prompter]:
            module.compile()


def image_size(config: TrainConfig, resume_from: Path | None) -> int:
    """Side in pixels of the images that the model of a run takes, known before there is a model."""
    if resume_from is None and (config.model.init_from is None or config.model.image_size is not None):
        return config.model.side_px
    path = str(resume_from or config.model.init_from)
    found = load_config(path)
    return towers.image_size(getattr(found, "clip_config", found))


def _build(
    config: TrainConfig, sources: Sequence[Source] | None, resume_from: Path | None
) -> tuple[ClocModel, ClocProcessor]:
    model_config = config.model
    torch.manual_seed(config.seed)
    if resume_from is not None:
        processor = ClocProcessor.from_pretrained(resume_from)
        return ClocModel(ClocConfig.from_pretrained(resume_from)), processor
    region: dict[str, Any] = {
        name: getattr(model_config, name)
        for name in ("prompter", "prompter_heads", "prior_slope", "shared_positions", "box_head")
    }
    region |= {"regions_trained": False, "grounding_trained": False}  # `build_model` knows what the loss trains
    if model_config.init_from is not None:
        theirs = load_config(model_config.init_from)
        is_cloc = theirs.model_type == "cloc"
        opened = ClocProcessor.from_pretrained if is_cloc else ClocProcessor.from_clip
        processor = opened(model_config.init_from)
        if is_cloc and theirs.regions_trained:
            _check_region_parts(model_config, region)
            model = ClocModel.from_pretrained(model_config.init_from)
        else:
            model = ClocModel.from_clip(model_config.init_from, **region)
        if model_config.image_size is None:
            return model, processor
        with naming(model_config.init_from):
            return at_image_size(model, processor, model_config.image_size)
    tokenizer: Any
    if model_config.tokenizer is not None:
        tokenizer = load_tokenizer(model_config.tokenizer)
    else:
        sources = [open_source(spec) for spec in config.data.train] if sources is None else sources
        tokenizer = train_tokenizer(texts_of(sources), model_config.vocab_size, model_config.text_length)
    clip = tower_config(model_config, tokenizer)
    return ClocModel(ClocConfig(clip_config=clip, **region)), ClocProcessor.for_towers(clip, tokenizer)


def _check_region_parts(config: ModelConfig, region: dict[str, Any]) -> None:
    """Raises ValueError for settings of the region parts that the CLOC checkpoint to start from does not have."""
    theirs, default = load_config(str(config.init_from)), ModelConfig()
    given = [n for n in vars(default).keys() & region if region[n] not in (getattr(default, n), getattr(theirs, n))]
    if given:
        names = ", ".join(f"model.{name}" for name in sorted(given))
        raise ValueError(f"{config.init_from} is a CLOC checkpoint with its own region parts; leave out {names}")


def tower_config(config: ModelConfig, tokenizer: Any) -> Any:
    """Transformers' configuration of towers of the given sizes, for the given tokenizer."""
    vision = {
        "hidden_size": config.vision_width,
        "intermediate_size": 4 * config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "patch_size": config.patch_size,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.text_width,
        "intermediate_size": 4 * config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.text_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if config.family == "clip":
        return CLIPConfig(
            vision_config=vision | {"image_size": config.side_px, "hidden_act": "gelu"},
            text_config=text | {"hidden_act": "gelu"},
            projection_dim=config.embed_dim,
        )
    text["projection_size"] = config.vision_width
    if config.family == "siglip":
        return SiglipConfig(vision_config=vision | {"image_size": config.side_px}, text_config=text)
    num_patches = (config.side_px // config.patch_size) ** 2
    return Siglip2Config(vision_config=vision | {"num_patches": num_patches}, text_config=text)


def texts_of(sources: Sequence[Source]) -> list[str]:
    """Captions and region texts of the first samples of every source; unusable samples are passed over."""
    texts: list[str] = []
    for source in sources:
        for index in islice(range(TOKENIZER_SAMPLES), source.size):
            try:
                sample = source[index]
            except BadSample:
                continue  # counted when training meets it
            texts += [*sample.captions, *sample.texts, *([sample.alt_text] if sample.alt_text else [])]
    return texts
