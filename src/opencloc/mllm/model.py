"""RegionLlava: transformers' LLaVA with a token per region, and `build`, which makes one of an encoder and a language
model.

Without regions it computes what `LlavaForConditionalGeneration` does, bit by bit (unless `shared_positions` adds places
to the image tokens).  One pass of the vision tower feeds the projector and the sampler.

Symbols: B rows, T tokens of a row, I images (rows that have one, in order), P regions per row, N patches, W width of
the language model, S side of the square.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, no_type_check

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, LlavaConfig, LlavaForConditionalGeneration
from transformers import initialization as init
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModel, LlavaPreTrainedModel

from opencloc.mllm.sampler import NONE, Regions, make_sampler
from opencloc.model import loading
from opencloc.model.prompts import patch_centres, sinusoidal

IGNORED = -100  # label of what is not learned: torch's
Sampler = Literal["prompter", "roi", "points"]


@no_type_check  # as `ClocConfig`
@strict
class RegionLlavaConfig(LlavaConfig):
    """LLaVA's configuration and the region parts.

    `sampler`: what makes a region's token, see `opencloc.mllm.sampler`.  `prompter`: kind, embed_dim and options of the
    Prompter, for the sampler of that name.  `region_token_index`: the token that a region's vector takes the place of.
    `shared_positions`: the image tokens carry the position basis of prompts, learnable; `position_std`: the spread of
    both, which is that of the embeddings of words at the start.
    """

    model_type = "region_llava"

    sampler: Literal["prompter", "roi", "points"] = "roi"
    prompter: dict | None = None
    region_token_index: int = 32001
    shared_positions: bool = False
    position_std: float = 0.02


class PatchPositions(nn.Module):
    """What says to the language model where a patch lies: learnable, from the position basis of prompts."""

    def __init__(self, grid: tuple[int, int], width: int, std: float) -> None:
        super().__init__()
        self.grid, self.std = grid, std
        self.weight = nn.Parameter(torch.zeros(grid[0] * grid[1], width))

    def forward(self, tokens: Float[Tensor, "N W"]) -> Float[Tensor, "N W"]:
        """The image tokens with their places, as loud at the start as what they show."""
        return F.rms_norm(tokens, tokens.shape[-1:]) * self.std + self.weight


class RegionLlavaModel(LlavaModel):
    """The model without its head: LLaVA's, into whose embeddings the regions' vectors are put."""

    config: RegionLlavaConfig

    def __init__(self, config: RegionLlavaConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config
        width = config.text_config.hidden_size  # pyright: ignore
        side = vision.image_size // vision.patch_size
        self.grid = (side, side)
        self.sampler = make_sampler(config.sampler, vision.hidden_size, width, self.grid, config.prompter)
        positions = PatchPositions(self.grid, width, config.position_std) if config.shared_positions else None
        self.patch_positions = positions
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PatchPositions):
            width = module.weight.shape[1]
            init.copy_(module.weight, position_basis(patch_centres(module.grid), width, module.grid, module.std))

    def get_image_features(self, pixel_values: Tensor, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As LLaVA's: `pooler_output` holds the projected tokens of each image."""
        features: Any = super().get_image_features(pixel_values, **options)
        if self.patch_positions is not None:
            features.pooler_output = [self.patch_positions(tokens) for tokens in features.pooler_output]
        return features

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,  # Int[Tensor, "B T"]
        pixel_values: Float[Tensor, "I 3 S S"] | None = None,
        inputs_embeds: Float[Tensor, "B T W"] | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        region_boxes: Float[Tensor, "B P 4"] | None = None,
        region_kinds: Int[Tensor, "B P"] | None = None,
        region_masks: Float[Tensor, "B P H V"] | None = None,
        **options: Any,
    ) -> Any:
        """As LLaVA's.  `region_*`: what the region tokens of each row mean, in their order (`sampler.Regions`).

        Raises ValueError where a row has another number of region tokens than of regions.
        """
        image = (mm_encoder_outputs or {}).get("image")
        if input_ids is None or (image is None and pixel_values is None and not self.training):
            # embeddings, text alone, or a later token of a generation: regions are in the cache already
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **options)
        if pixel_values is not None:
            image = self.get_image_features(pixel_values, return_dict=True)
        regions = None
        if region_boxes is not None and region_kinds is not None:
            regions = Regions(boxes=region_boxes, kinds=region_kinds, masks=region_masks)
        embeddings = self.get_input_embeddings()(input_ids)
        if self.training and (image is None or regions is None):
            embeddings = embeddings + 0.0 * self._idle(image, embeddings)
        if image is not None:
            tokens = torch.cat(list(image.pooler_output), 0).to(embeddings.dtype)
            places = self.get_placeholder_mask(input_ids, inputs_embeds=embeddings, image_features=tokens[None])
            embeddings = embeddings.masked_scatter(places, tokens)
        if regions is not None and image is not None:
            embeddings = self._with_regions(input_ids, embeddings, image, regions)
        return super().forward(inputs_embeds=embeddings, **options)

    def _with_regions(self, input_ids: Tensor, embeddings: Tensor, image: Any, regions: Regions) -> Tensor:
        """The embeddings with each region token's replaced by the vector of its region."""
        places, valid = input_ids == self.config.region_token_index, regions.kinds != NONE
        wrong = places.sum(1) != valid.sum(1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            counts = f"{int(places[row].sum())} region tokens for {int(valid[row].sum())} regions"
            raise ValueError(f"row {row} has {counts}")
        last, chosen = self._patches(image)
        has_image = (input_ids == self.config.image_token_index).any(1)
        if int(has_image.sum()) != len(last):  # beams share an image
            last, chosen = (x.repeat_interleave(int(has_image.sum()) // len(last), 0) for x in (last, chosen))
        if (valid.any(1) & ~has_image).any():
            raise ValueError("a row has regions but no image")
        of_row = has_image.cumsum(0) - 1
        vectors = self.sampler(last[of_row.clamp_min(0)], chosen[of_row.clamp_min(0)], regions)
        return embeddings.masked_scatter(places[..., None], vectors[valid].to(embeddings.dtype))

    def _patches(self, image: Any) -> tuple[Tensor, Tensor]:
        """Tokens of the patches: of the tower's last layer, and of the layer that the language model reads."""
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0
        chosen = image.hidden_states[self.config.vision_feature_layer]
        return image.last_hidden_state[:, first:], chosen[:, first:]

    def _idle(self, image: Any, like: Tensor) -> Tensor:
        """A sum over what a batch without image or regions leaves out, so that every rank computes every part."""
        if image is None:
            side = self.config.vision_config.image_size  # pyright: ignore
            image = self.get_image_features(like.new_zeros(1, 3, side, side), return_dict=True)
        last, chosen = (x[:1] for x in self._patches(image))
        whole = last.new_tensor([[[0.0, 0.0, 1.0, 1.0]]])
        kinds = torch.zeros(1, 1, dtype=torch.long, device=like.device)
        return image.pooler_output[0].sum() + self.sampler(last, chosen, Regions(boxes=whole, kinds=kinds)).sum()


class RegionLlava(LlavaForConditionalGeneration):
    """A LLaVA that regions can be pointed out to.  `opencloc.mllm.processor` makes its inputs.

    `forward` and `generate` take `region_boxes` (B, P, 4), `region_kinds` (B, P) and `region_masks` (B, P, H, V) beside
    LLaVA's own arguments.
    """

    config: RegionLlavaConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = RegionLlavaConfig

    def __init__(self, config: RegionLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        text: Any = config.text_config
        self.model = RegionLlavaModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # which transformers finds by the names of its own classes
        self.post_init()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        pixel_values: Float[Tensor, "I 3 S S"] | None = None,
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        region_boxes: Float[Tensor, "B P 4"] | None = None,
        region_kinds: Int[Tensor, "B P"] | None = None,
        region_masks: Float[Tensor, "B P H V"] | None = None,
        loss_only: bool = False,
        **options: Any,
    ) -> Any:
        """As LLaVA's; `generate` reads the names of the arguments off this function.

        `loss_only`: the output has no logits, which are then computed where `labels` has a token to learn and nowhere
        else.  Of a large vocabulary they take most of the memory of training.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "mm_encoder_outputs": mm_encoder_outputs,
            "region_boxes": region_boxes,
            "region_kinds": region_kinds,
            "region_masks": region_masks,
        }
        if not loss_only or labels is None:
            forward: Any = super().forward
            return forward(**inputs, labels=labels, **options)
        count = options.pop("num_items_in_batch", None)  # tokens that the loss is the mean of, if not this batch's
        logits, targets = self.learned_logits(labels, **inputs, **options)
        loss = self.loss_function(
            logits=logits,
            labels=None,
            shift_labels=targets,
            vocab_size=self.lm_head.out_features,
            num_items_in_batch=count,
        )
        return LlavaCausalLMOutputWithPast(loss=loss)

    def learned_logits(
        self, labels: Int[Tensor, "B T"], **inputs: Any
    ) -> tuple[Float[Tensor, "L V"], Int[Tensor, " L"]]:
        """(logits, targets) of the L tokens that `labels` has to learn, row by row; what says a token stands before it.

        `inputs`: those of `forward`.
        """
        hidden = self.model(**inputs).last_hidden_state
        targets = labels[:, 1:]
        learned = targets != IGNORED
        return self.lm_head(hidden[:, :-1][learned]), targets[learned]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The model of a folder that `build` or training wrote; arguments are transformers'.

        Raises ValueError for another kind of model, and for weights that are missing, unexpected, misshapen or not
        finite, or not in safetensors; FileNotFoundError where there is no such folder.
        """
        kind, wanted = RegionLlavaConfig.model_type, "not one of `opencloc mllm build`"
        load: Any = super().from_pretrained
        return loading.load_of_kind(load, pretrained_model_name_or_path, kind, wanted, *args, **options)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        """Writes configuration and weights, by the same names however the model came to be."""
        super().save_pretrained(save_directory, *args, **{"save_original_format": False} | options)


def position_basis(xy: Float[Tensor, "*S 2"], width: int, grid: tuple[int, int], std: float) -> Float[Tensor, "*S W"]:
    """The Prompter's position basis of points in [0, 1], for a (rows, columns) grid of patches; its spread is `std`."""
    return sinusoidal(xy, width, max_cycles=max(grid) / 2) * std * 2**0.5


AutoConfig.register(RegionLlavaConfig.model_type, RegionLlavaConfig)
AutoModel.register(RegionLlavaConfig, RegionLlava)
