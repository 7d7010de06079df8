"""Weights between a checkpoint and what fine-tuning made of it (WiSE-FT, Wortsman et al. 2022).

    weight = (1 - share) * start + share * end

Fine-tuning gains on what it trains for and loses elsewhere; in between much of the gain is often had for little of the
loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opencloc import files
from opencloc.model import loading
from opencloc.model.cloc import ClocModel
from opencloc.model.processor import ClocProcessor
from opencloc.model.resize import at_image_size


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig:
    """A checkpoint between two: the start of a fine-tuning and its end."""

    start: str
    """Folder or hub id of the CLIP, SigLIP, SigLIP 2 or CLOC checkpoint that training started from."""
    model: str
    """Folder of the fine-tuned CLOC checkpoint."""
    out: str
    """Folder to write, which must not be there."""
    share: float = 0.5
    """How far from the start (0) to the end (1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share}")


def write_interpolated(config: InterpolateConfig) -> Path:
    """The folder with the CLOC checkpoint in between, which appears when it is complete.

    A start of another image size is brought to that of the end.  Region parts that the start lacks, or never trained,
    are the end's.  Raises ValueError naming the weights where the two do not fit.
    """
    out = Path(config.out)
    if out.exists():
        raise ValueError(f"{out} is there already: it is not replaced")
    end, processor = ClocModel.from_pretrained(config.model), ClocProcessor.from_pretrained(config.model)
    weights = interpolated_weights(_start(config.start, processor.image_size), end.state_dict(), config.share)
    end.load_state_dict(weights)
    with files.new_folder(out) as partial:
        end.save_pretrained(partial)
        processor.save_pretrained(partial)
    return out


def interpolated_weights(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The weights at `share` of the way from `start` to `end`; those that `start` lacks are the end's.

    Raises ValueError naming a weight that `end` lacks or has in another shape.
    """
    for name, value in start.items():
        if name not in end:
            raise ValueError(f"the models differ in kind: only the start has {name}")
        if value.shape != end[name].shape:
            shapes = f"{tuple(value.shape)} at the start, {tuple(end[name].shape)} at the end"
            raise ValueError(f"the models differ in size: {name} is {shapes}")
    return {
        name: torch.lerp(start[name].float(), value.float(), share).to(value.dtype) if name in start else value
        for name, value in end.items()
    }


def _start(path: str, image_size: int) -> dict[str, Tensor]:
    """The weights of a start under the names of a CLOC model."""
    if loading.load_config(path).model_type == "cloc":
        model, processor = ClocModel.from_pretrained(path), ClocProcessor.from_pretrained(path)
    else:
        model, processor = ClocModel.from_clip(path), ClocProcessor.from_clip(path)
    if image_size % model.config.clip_config.vision_config.patch_size == 0:  # pyright: ignore
        model, _ = at_image_size(model, processor, image_size)
    fresh = () if model.config.regions_trained else ("prompt_encoder.", "prompter.", "box_head.", "region_logit_scale")
    fresh += () if model.config.grounding_trained else ("box_head.",)
    return {name: value for name, value in model.state_dict().items() if not name.startswith(fresh)}
