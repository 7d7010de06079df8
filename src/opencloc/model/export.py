"""A model's towers as a plain checkpoint of transformers, for LLaVA, Ferret and whatever else loads a CLIP."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Regex, Tokenizer, normalizers

from opencloc import files
from opencloc.images import MEAN_RGB
from opencloc.model import towers
from opencloc.model.cloc import ClocModel
from opencloc.model.processor import ClocProcessor, save_tokenizer

PAD_RGB = tuple(round(255 * mean) for mean in MEAN_RGB)  # the letterbox's bars
MARK = "opencloc-export"  # among the README's tags: how an export is told from a folder that must not be replaced


def export_clip(model: ClocModel, processor: ClocProcessor, folder: str | Path) -> Path:
    """The folder, which appears when it is complete: towers, tokenizer, image processor and a README.

    The towers are of transformers' own class (`CLIPModel`, `SiglipModel`, `Siglip2Model`) and give what `encode_image`
    and `encode_text` give.  An older export of that name is replaced.  Raises ValueError where the name holds anything
    else.
    """
    folder = Path(folder)
    if folder.exists() and not may_be_replaced(folder):
        raise ValueError(f"{folder} is there already and is no earlier export: it is not replaced")
    with files.new_folder(folder) as partial:
        model.clip.save_pretrained(partial)
        _complete_config(partial / "config.json")
        save_exported_tokenizer(processor, partial)
        for name, content in _image_processor(model.config.clip_config, processor).items():
            files.write_json(partial / name, content)
        files.write_text(partial / "README.md", _readme(model.config.clip_config, processor))
    return folder


def check_apart(model: str | Path, out: str | Path) -> None:
    """Raises ValueError where one of the folders is or holds the other: an export must not touch its checkpoint."""
    source, target = Path(model).resolve(), Path(out).resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(f"--out {out} must lie outside the checkpoint {model}, and must not hold it")


def may_be_replaced(folder: Path) -> bool:
    """Whether a path is an empty folder or an export of ours."""
    if not folder.is_dir():
        return False
    readme = folder / "README.md"
    return not any(folder.iterdir()) or (readme.is_file() and MARK in readme.read_text(errors="replace"))


def _complete_config(file: Path) -> None:
    """Writes CLIP's joint width into the towers' own configurations, where the `WithProjection` classes look."""
    config = json.loads(file.read_text())
    if config["model_type"] == "clip":
        for tower in ("text_config", "vision_config"):
            config[tower]["projection_dim"] = config["projection_dim"]
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    files.write_json(file, config)


def save_exported_tokenizer(processor: ClocProcessor, folder: Path) -> None:
    """The tokenizer with the canonical form of texts built in, so that it makes of a text what training made of it."""
    save_tokenizer(processor.tokenizer, folder, processor.max_text_length)
    file = str(folder / "tokenizer.json")
    backend = Tokenizer.from_file(file)
    spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    own = [backend.normalizer] if backend.normalizer is not None else []
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), *spaces, *own])
    backend.save(file)
    content = json.loads(Path(file).read_text())
    merges = content["model"].get("merges")
    if merges and all(isinstance(m, list) and not any(" " in part for part in m) for m in merges):
        content["model"]["merges"] = [
            " ".join(m) for m in merges
        ]  # as tokenizers < 0.20 (transformers 4.37) wants them
        files.write_json(file, content)


def pixel_settings(mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """What all of transformers' image processors are told of resizing and colours."""
    factor = colour_factor(mean)
    return {
        "do_resize": True,
        "resample": int(Image.Resampling.BICUBIC),
        "do_rescale": True,
        "rescale_factor": factor / 255,
        "do_normalize": True,
        "image_mean": [factor * value for value in mean],
        "image_std": [factor * value for value in std],
        "do_convert_rgb": True,
    }


def _image_processor(config: Any, processor: ClocProcessor) -> dict[str, dict[str, Any]]:
    """File name -> content.

    transformers 5 reads processor_config.json and letterboxes as training does; version 4 (and LLaVA and Ferret, which
    use it) reads the other file, whose CLIPImageProcessor cannot pad.
    """
    side = processor.image_size
    common = pixel_settings(processor.image_mean, processor.image_std)
    if config.model_type == "siglip2":
        rows, columns = towers.patch_grid(config)
        patches = {"patch_size": config.vision_config.patch_size, "max_num_patches": rows * columns}
        return {"preprocessor_config.json": {"image_processor_type": "Siglip2ImageProcessor", **common, **patches}}
    square = {"height": side, "width": side}
    if config.model_type == "siglip":
        older: dict[str, Any] = {"image_processor_type": "SiglipImageProcessor", "size": square}
        kind = "SiglipProcessor"
    else:
        older = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "do_center_crop": True,
            "crop_size": square,
        }
        kind = "CLIPProcessor"
    newer = {
        "image_processor_type": "JanusImageProcessor",  # the one that resizes the long side, then pads with the mean
        "do_pad": True,
        "min_size": 1,
        "size": square,
        "do_center_crop": False,
        "crop_size": square,
    }
    return {
        "preprocessor_config.json": older | common,
        "processor_config.json": {"processor_class": kind, "image_processor": newer | common},
    }


def colour_factor(mean: Sequence[float]) -> float:
    """What rescaling, mean and deviation are all multiplied by, which changes no pixel: it makes the bars right.

    Others pad with `int(255 * mean)`, training with `PAD_RGB`, CLIP's mean rounded.  A difference of 1 in 255 is much:
    a patch of a bar is constant and nearly 0 once normalised, and the towers' layer norms blow that up.  1 where no
    factor fits (a mean that is not near CLIP's).
    """
    low = max(colour / (255 * m) if m else math.inf for colour, m in zip(PAD_RGB, mean, strict=True))
    high = min((colour + 1) / (255 * m) if m else 0.0 for colour, m in zip(PAD_RGB, mean, strict=True))
    return (low + high) / 2 if low < high else 1.0


def _readme(config: Any, processor: ClocProcessor) -> str:
    side = processor.image_size
    if config.model_type == "siglip2":
        pixels = (
            "transformers' image processor keeps the aspect ratio and does not pad: pad photos to a square first, with "
            f"the colour {PAD_RGB}, to give the model what it was trained on."
        )
    else:
        pixels = (
            "In transformers 5 the image processor of this folder does that. In version 4 `CLIPImageProcessor` cannot "
            f"pad: pad photos to a square first, with the colour {PAD_RGB}."
        )
    if config.model_type == "siglip2":
        pixels += (
            "\n\nTexts: `PreTrainedTokenizerFast.from_pretrained(folder)`. `AutoTokenizer` opens every SigLIP 2 folder "
            "with Gemma's tokenizer, which this one's may not be."
        )
    return f"""---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags:
- {MARK}
- {config.model_type}
---

# Towers of a CLOC model

A plain `{(config.architectures or [type(config).__name__])[0]}` checkpoint, written by `opencloc export`. Boxes and
other prompts need the CLOC checkpoint itself.

The model sees square images of {side} x {side} pixels: the long side resized, the rest padded. {pixels}

| used in | setting |
|---|---|
| LLaVA | `--vision_tower` this folder, `--image_aspect_ratio pad`; `crop_size` and `size.shortest_edge` are {side} |
| LLaVA, any resolution | `--image_aspect_ratio anyres`, with grid points that are multiples of {side} |
| Ferret | `--vision_tower` this folder; it squashes photos to a square: pad them beforehand, boxes and masks too |
"""
