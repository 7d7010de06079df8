"""ClocConfig: what a `ClocModel` is made of, as transformers saves it."""

from __future__ import annotations

from typing import Any, Literal, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


@no_type_check  # tests check the types of all calls: that would hide the **kwargs transformers adds to configurations
@strict
class ClocConfig(PreTrainedConfig):
    """Configuration of a `ClocModel`: the towers' own configuration and the region parts.

    `clip_config`: any CLIP, SigLIP or SigLIP 2 configuration of transformers.
    `prompter`: `cross` (default), `encoder` (as published), `roi` (the baseline), `pool` (the tower's own pooling
    restricted to the region, nothing to train), `pool_cross` (`pool` plus a `cross` that starts at zero).  `roi` and
    `pool` have no text prompts.
    `prompter_heads`: attention heads of `cross`.
    `prior_slope`: initial log slope of the spatial prior; at 0 `cross` starts near the area-weighted mean over the box.
    None: no prior.  `pool` keeps it fixed.
    `shared_positions`: patches carry the position basis of the prompts.
    `basis_cycles`: highest frequency of the position basis, in cycles per image; None: half the patches of a side, the
    finest that they tell apart.  A trained model keeps its own at another image size.
    `box_head`: `dense` (default): the text weights boxes that the patches give; `mlp`: the published head, which
    `encoder` always has.
    `roi_size`: bins per side of RoIAlign, for `roi`.
    `regions_trained`, `grounding_trained`: False where the region parts (the box head) were left untrained, as in the
    CLIP baseline; they then refuse to answer.
    """

    model_type = "cloc"
    sub_configs = {"clip_config": AutoConfig}  # noqa: RUF012

    clip_config: dict | PreTrainedConfig | None = None
    prompter: Literal["cross", "encoder", "roi", "pool", "pool_cross"] = "cross"
    prompter_heads: int = 4
    prior_slope: float | None = 0.0
    shared_positions: bool = True
    basis_cycles: float | None = None
    box_head: Literal["dense", "mlp"] = "dense"
    roi_size: int = 4
    regions_trained: bool = True
    grounding_trained: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        # by hand: how a configuration makes those inside it has changed in the course of transformers 5
        if not isinstance(self.clip_config, PreTrainedConfig):
            self.clip_config = AutoConfig.for_model(**{"model_type": "clip"} | (self.clip_config or {}))
        super().__post_init__(**kwargs)


AutoConfig.register("cloc", ClocConfig)
