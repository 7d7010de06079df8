"""ClocModel: a CLIP-like pair of towers with a Prompter and a box head (paper section 3).

    features = model.encode_image(pixel_values)      # once per image
    regions = model.encode_regions(features, boxes)  # any number of prompts
    boxes = model.ground(features, text_embeddings)

Boxes are normalised to the letterboxed square that the model sees.

Symbols: B images, M regions or P prompts per image, U region texts, N patches, T tokens of a caption, W of a region
text, D width of the vision tower, E of the joint embedding, S side of the square in pixels, K patches kept in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from huggingface_hub import ModelCard, file_exists, repo_exists
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init

from opencloc import files
from opencloc.model import loading, towers
from opencloc.model.card import model_card
from opencloc.model.cloc_config import ClocConfig
from opencloc.model.outputs import ClocOutput, ImageFeatures
from opencloc.model.packing import PackedTexts, join
from opencloc.model.prompter import (
    INITIAL_LOG_SCALE,
    PROMPTERS,
    CrossPrompter,
    DenseBoxHead,
    Memory,
    MlpBoxHead,
    PoolCrossPrompter,
    Prompter,
)
from opencloc.model.prompts import (
    Heat,
    Prompt,
    PromptBatch,
    PromptEncoder,
    Text,
    as_prompt,
    check_boxes,
    check_text,
    has_text,
    patch_centres,
    replace_texts,
)

MAX_LOG_SCALE = math.log(100)  # CLIP's bound on the temperature
POSITION_STD = 0.02  # transformers' initial spread of CLIP's position embeddings
NO_GROUNDING = (
    "this model's box head was never trained (loss.grounding_weight was 0, or it comes fresh from a CLIP): it cannot "
    "ground; train with loss.grounding_weight > 0"
)
NO_REGIONS = (
    "this model's Prompter was never trained (loss.region_weight was 0), it has no regions to offer: "
    "run `opencloc export` and open that folder by opencloc.load, which pools regions with the tower itself, "
    "or train with loss.region_weight > 0"
)


class ClocModel(PreTrainedModel):
    """Towers, Prompter and box head.  `ClocModel(config)` is random; see `from_pretrained` and `from_clip`."""

    config: ClocConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = ClocConfig
    base_model_prefix = "cloc"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["CLIPEncoderLayer", "SiglipEncoderLayer", "Siglip2EncoderLayer"]  # noqa: RUF012

    def __init__(self, config: ClocConfig, towers_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        clip: Any = config.clip_config
        towers.check_family(clip)
        self.embed_dim, self.grid = towers.embed_dim(clip), towers.patch_grid(clip)
        width = clip.vision_config.hidden_size
        self._towers_given = towers_model is not None
        self.clip: Any = AutoModel.from_config(clip) if towers_model is None else towers_model
        if towers_model is not None:
            towers.keep_weights(towers_model)  # and, since the base class has just reset the shared configuration:
            towers_model.set_attn_implementation(config._attn_implementation or "sdpa")
        kind = PROMPTERS[config.prompter]
        is_dense = config.box_head == "dense" and kind.has_patch_embeddings
        as_tokens = kind.has_text_prompts and not is_dense
        self.prompt_encoder = PromptEncoder(width, self.embed_dim, self.grid, text_tokens=as_tokens)
        options = {name: self.clip if name == "clip" else getattr(config, name) for name in kind.options}
        self.prompter: Prompter = kind(width, self.embed_dim, self.grid, **options)
        self.box_head: nn.Module | None = None
        if self.has_text_prompts:
            self.box_head = DenseBoxHead(width, self.grid) if is_dense else MlpBoxHead(self.embed_dim, width)
        self.region_logit_scale: nn.Parameter | None = nn.Parameter(torch.zeros(())) if kind.is_trained else None
        if config.basis_cycles is not None:
            for module in self.modules():
                if isinstance(module, PromptEncoder | Memory):
                    module.max_cycles = config.basis_cycles
        self.post_init()

    @property
    def has_text_prompts(self) -> bool:
        return self.prompter.has_text_prompts

    def _init_weights(self, module: nn.Module) -> None:
        """Region parts as transformers initialises linear layers; ViT positions start from the prompts' basis."""
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, PromptEncoder):
            for _, kind in module.named_parameters(recurse=False):  # of corner, point, text
                init.normal_(kind, std=0.5)
            table, before = towers.position_table(self.clip)  # here, since transformers skips a `self` without weights
            is_new = not self._towers_given and not getattr(table.weight, "_is_hf_initialized", False)
            if self.config.shared_positions and is_new:
                self._start_positions_from_basis(table, before)
        elif isinstance(module, CrossPrompter):
            for linear in (module.value, module.out):
                init.eye_(linear.weight)
            if module.log_slope is not None:
                assert self.config.prior_slope is not None
                init.constant_(module.log_slope, self.config.prior_slope)
            if isinstance(self.prompter, PoolCrossPrompter):
                init.zeros_(module.projection.weight)
        elif isinstance(module, DenseBoxHead):
            init.constant_(module.log_scale, INITIAL_LOG_SCALE)
        elif module is self and self.region_logit_scale is not None:
            init.constant_(self.region_logit_scale, INITIAL_LOG_SCALE)

    @torch.no_grad()
    def _start_positions_from_basis(self, table: nn.Embedding, before: int) -> None:
        """Rows of the patches: the sinusoidal basis at the tower's own initial spread (a ViT may learn it away)."""
        basis = self.prompt_encoder.basis(patch_centres(self.grid, table.weight.device))
        table.weight[before:] = (basis * POSITION_STD * 2**0.5).to(table.weight.dtype)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The model of a CLOC checkpoint (a folder or hub id); arguments are transformers'.

        Raises ValueError for another kind of model, and for weights that are missing, unexpected, misshapen or not
        finite, or not in safetensors; FileNotFoundError where there is no such folder.
        """
        wanted = "not a CLOC checkpoint: use opencloc.load or ClocModel.from_clip"
        load: Any = super().from_pretrained
        return loading.load_of_kind(load, pretrained_model_name_or_path, "cloc", wanted, *args, **options)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        """Writes configuration and weights, and a model card (README.md) where there is none yet."""
        super().save_pretrained(save_directory, *args, **options)
        if not (card := Path(save_directory) / "README.md").exists():
            files.write_text(card, model_card(self.config))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The address of the commit on the hub.  A model card that is there stays."""
        token = options.get("token")
        is_new = not (repo_exists(repo_id, token=token) and file_exists(repo_id, "README.md", token=token))
        push: Any = super().push_to_hub
        address = push(repo_id, **options)
        if is_new:  # transformers has put its own empty card there
            ModelCard(model_card(self.config)).push_to_hub(repo_id, token=token)
        return address

    @classmethod
    def from_clip(cls, path: str | Path, **region_config: Any) -> ClocModel:
        """Fresh region parts on the weights of a CLIP, SigLIP or SigLIP 2 checkpoint (a folder or hub id).

        The towers of a CLOC checkpoint serve too if its region parts were never trained (the CLIP baseline).
        `region_config`: fields of `ClocConfig` but `clip_config`.  `pool` and `pool_cross` embed regions at once, the
        other Prompters and the box head have to be trained first.  Raises ValueError for any other kind of model, and
        as `from_pretrained` does.
        """
        config = loading.load_config(path)
        if config.model_type == "cloc":
            if config.regions_trained:
                raise ValueError(f"{path} is a CLOC checkpoint already: load it with ClocModel.from_pretrained")
            clip = loading.load_model(cls, path).clip
        else:
            with loading.naming(path):
                towers.check_family(config)
            clip = loading.load_model(AutoModel, path)
        pools = region_config.get("prompter") in ("pool", "pool_cross")
        region_config = {"regions_trained": pools, "grounding_trained": False} | region_config
        model = cls(ClocConfig(clip_config=clip.config, **region_config), towers_model=clip)
        if pools and model.region_logit_scale is not None:
            model.region_logit_scale.data.copy_(clip.logit_scale.reshape(()))
        return model

    # -- temperature ---------------------------------------------------------------------------------------------

    def scale(self, of: Literal["image", "region"]) -> Float[Tensor, ""]:
        """What cosines of images (or regions) with texts are multiplied by: at most 100.

        At the bound the gradient passes through, so that a scale that stands there can come down.  The `pool` Prompter
        shares the scale of images.
        """
        log_scale = self.clip.logit_scale.reshape(())
        if of == "region" and self.region_logit_scale is not None:
            log_scale = self.region_logit_scale
        return (log_scale - (log_scale - MAX_LOG_SCALE).clamp_min(0).detach()).exp()

    @torch.no_grad()
    def bound_scales(self) -> None:
        """Brings the scales' parameters, if they are trained, back to their bound, after a step, as open_clip does."""
        for log_scale in (self.clip.logit_scale, self.region_logit_scale):
            if log_scale is not None and log_scale.requires_grad:
                log_scale.clamp_(max=MAX_LOG_SCALE)

    # -- encoding ------------------------------------------------------------------------------------------------

    def encode_image(self, pixel_values: Float[Tensor, "B 3 S S"]) -> ImageFeatures:
        """Features of letterboxed, normalised images: the one pass that all prompts share."""
        pooled, tokens, pool_input = self._see(pixel_values, None)
        return ImageFeatures(embedding=_normalize(pooled), tokens=tokens, grid=self.grid, pool_input=pool_input)

    def _see(
        self, pixel_values: Float[Tensor, "B 3 S S"], kept: Int[Tensor, "B K"] | None
    ) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B N D"], Float[Tensor, "B L D"] | None]:
        """(pooled embedding, patch tokens, what the pooling read, where the Prompter needs it)."""
        if not self.prompter.reads_pool_input:
            return *towers.vision_forward(self.clip, pixel_values, kept), None
        with towers.recorded_pool_input(self.clip) as inputs:
            pooled, tokens = towers.vision_forward(self.clip, pixel_values, kept)
        return pooled, tokens, inputs[0]

    def encode_text(self, texts: Int[Tensor, "U T"] | PackedTexts) -> Float[Tensor, "U E"]:
        """L2-normalised embeddings f_T(y); captions, region texts and text prompts share the tower.

        `texts`: one to a row, or packed (`ClocProcessor.pack`), which gives the same embeddings for less work.
        """
        return _normalize(towers.text_forward(self.clip, texts))

    def dense_embedding(self, features: ImageFeatures) -> Float[Tensor, "B N E"]:
        """Patch tokens in the joint space by the tower's own pooling: what a CLIP without Prompter has to offer."""
        return towers.dense_embedding(self.clip, features.tokens)

    @overload
    def encode_regions(self, features: ImageFeatures, prompts: Tensor) -> Tensor: ...
    @overload
    def encode_regions(self, features: ImageFeatures, prompts: Sequence[Tensor | Sequence[Prompt]]) -> list[Tensor]: ...

    def encode_regions(
        self, features: ImageFeatures, prompts: Tensor | Sequence[Tensor | Sequence[Prompt]]
    ) -> Tensor | list[Tensor]:
        """L2-normalised region embeddings.

        `prompts` is a tensor of boxes (B, P, 4), and the result (B, P, E); or a list with, for each image, boxes
        (P_i, 4) or a list of `Box`, `Point`, `Mask`, `Text` (or tuples of them, which make one prompt of several
        parts), and the result a list of (P_i, E).  Raises ValueError for a box outside [0, 1] or empty, for a text
        prompt if the Prompter has none, for a Prompter that was never trained, and where images and lists differ in
        number; TypeError for what is no prompt.
        """
        if not isinstance(prompts, Tensor | Sequence):
            raise TypeError(f"prompts are a tensor (B, P, 4) or a list for each image, not {type(prompts).__name__}")
        ndim = 3 if isinstance(prompts, Tensor) else 2
        for boxes in [prompts] if isinstance(prompts, Tensor) else prompts:
            if isinstance(boxes, Tensor) and (boxes.ndim != ndim or boxes.shape[-1] != 4 or boxes.is_complex()):
                raise ValueError(f"boxes {tuple(boxes.shape)} of {boxes.dtype}: real (B, P, 4), or a list of (P, 4)")
        num_images = len(features.tokens)
        if len(prompts) != num_images:
            raise ValueError(f"{num_images} images but prompts for {len(prompts)}")
        if isinstance(prompts, Tensor):
            check_boxes(prompts)
            return self._prompt(features, self.prompt_encoder.boxes(prompts))
        if all(isinstance(image, Tensor) for image in prompts):
            counts = [len(image) for image in prompts]
            padded = features.tokens.new_tensor([0.0, 0.0, 1.0, 1.0]).repeat(num_images, max(counts, default=0), 1)
            for row, image in zip(padded, prompts, strict=True):
                row[: len(image)] = image  # pyright: ignore[reportArgumentType, reportCallIssue]
            check_boxes(padded)
            batch = self.prompt_encoder.boxes(padded)
        else:
            if not all(isinstance(image, Tensor | Sequence) for image in prompts):
                raise TypeError("prompts are a list of prompts for each image")
            listed = [[as_prompt(p) for p in image] for image in prompts]
            if any(has_text(p) for image in listed for p in image):
                if not self.has_text_prompts:
                    raise ValueError(self.no_text_prompts())
                listed = self._with_heat(features, listed)
            counts = [len(image) for image in listed]
            batch = self.prompt_encoder(listed)
        embeddings = self._prompt(features, batch)
        return [row[:count] for row, count in zip(embeddings, counts, strict=True)]

    def ground(self, features: ImageFeatures, texts: Float[Tensor, "B P E"]) -> Float[Tensor, "B P 4"]:
        """The box of each text in its image, from embeddings by `encode_text`.

        Raises ValueError if the Prompter has no text prompts, or the box head was never trained.
        """
        if self.box_head is None:
            raise ValueError(self.no_text_prompts())
        self._check_trained()
        if not self.config.grounding_trained:
            raise ValueError(NO_GROUNDING)
        boxes = self._boxes_of(features.tokens, texts, None, features.pool_input).clamp(0, 1)
        first, second = boxes.chunk(2, dim=-1)  # the published head does not order its corners
        return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)

    def heatmap(self, features: ImageFeatures, texts: Float[Tensor, "B P E"]) -> Float[Tensor, "B P N"]:
        """Cosine of each text with every patch of its image, row by row: where in the image it is.

        Raises ValueError if the Prompter cannot embed single patches.
        """
        if not self.prompter.has_patch_embeddings:
            raise ValueError(f"the {self.config.prompter} Prompter has no heat maps")
        self._check_trained()
        patches = self.prompter.patch_embeddings(features.tokens, features.pool_input)
        return texts.float() @ patches.transpose(1, 2)

    def _prompt(self, features: ImageFeatures, prompts: PromptBatch) -> Tensor:
        self._check_trained()
        return _normalize(self._ask(features.tokens, prompts, None, features.pool_input))

    def _ask(self, tokens: Tensor, prompts: PromptBatch, kept: Tensor | None, pool_input: Tensor | None) -> Tensor:
        """z of the prompts, from an image of which the patches `kept` were seen."""
        more = {"pool_input": pool_input} if self.prompter.reads_pool_input else {}
        return self.prompter(tokens, prompts if kept is None else prompts.over(kept), kept, **more)

    def _boxes_of(self, tokens: Tensor, texts: Tensor, kept: Tensor | None, pool_input: Tensor | None) -> Tensor:
        """The box that the head gives each text, as it comes: not yet clipped to the square."""
        if isinstance(self.box_head, DenseBoxHead):
            prompter: Any = self.prompter
            heat = self.box_head.heat(texts, prompter.patch_embeddings(tokens, pool_input))
            return self.box_head(heat, prompter.memory(tokens, kept)[1], kept)
        assert self.box_head is not None
        return self.box_head(self._ask(tokens, self.prompt_encoder.texts(texts), kept, pool_input))

    def _with_heat(self, features: ImageFeatures, prompts: list[list[Any]]) -> list[list[Any]]:
        """The prompts, where the box head is dense with the heat map over its image in place of every text."""
        if not isinstance(self.box_head, DenseBoxHead):
            return prompts
        head, patches = self.box_head, self.prompter.patch_embeddings(features.tokens, features.pool_input)

        def heat(text: Text, of_image: Tensor) -> Heat:
            embedding = check_text(text, self.embed_dim).to(of_image.device)
            return Heat(head.heat(embedding[None, None], of_image[None])[0, 0])

        return [
            [replace_texts(prompt, lambda text, of_image=of_image: heat(text, of_image)) for prompt in image]
            for image, of_image in zip(prompts, patches, strict=True)
        ]

    def no_text_prompts(self) -> str:
        """The message of the error where a text is prompted and the Prompter has no text prompts."""
        able = " or ".join(repr(name) for name, kind in PROMPTERS.items() if kind.has_text_prompts)
        return f"the {self.config.prompter} Prompter has no text prompts and cannot ground: use prompter={able}"

    def _check_trained(self) -> None:
        if not self.config.regions_trained and self.prompter.is_trained:
            raise ValueError(NO_REGIONS)

    # -- training ------------------------------------------------------------------------------------------------

    def forward(
        self,
        pixel_values: Float[Tensor, "B 3 S S"] | None,
        input_ids: Int[Tensor, "B T"] | PackedTexts | None,
        boxes: Float[Tensor, "B M 4"] | None = None,
        text_ids: Int[Tensor, "U W"] | PackedTexts | None = None,
        text_index: Int[Tensor, "B M"] | None = None,
        kept: Int[Tensor, "B K"] | None = None,
        features: ImageFeatures | None = None,
    ) -> ClocOutput:
        """Everything the losses need, from one pass of each tower.

        Distinct region texts are encoded once: `text_ids` holds them, `text_index` says which of them each region has.
        Without boxes only the image-text part is computed (the CLIP baseline), without captions only the region part.
        `kept`: of each image, the numbers of the patches that are looked at (FLIP, Li et al. 2023); None: all.
        `features`: what the vision tower made of the images before, in place of `pixel_values`; it then does not run.
        Raises ValueError if the Prompter needs all patches.
        """
        if kept is not None and not self.prompter.allows_patch_dropout:
            raise ValueError(f"the {self.config.prompter} Prompter needs all patches: data.patch_dropout must be 0")
        if features is not None:
            pooled, tokens, pool_input = features.embedding, features.tokens, features.pool_input
            pool_input = tokens if towers.pools_tokens(self.clip.config) else pool_input
        else:
            assert pixel_values is not None
            pooled, tokens, pool_input = self._see(pixel_values, kept)
        if isinstance(input_ids, PackedTexts) and isinstance(text_ids, PackedTexts) and boxes is not None:
            embeddings = self.encode_text(join(input_ids, text_ids))  # all in one pass of the tower
            caption, texts = embeddings.split([len(input_ids), len(text_ids)])
        else:
            caption = None if input_ids is None else self.encode_text(input_ids)
            texts = None if boxes is None or text_ids is None else self.encode_text(text_ids)
        output: dict[str, Tensor] = {}
        if caption is not None:
            output |= {"image": _normalize(pooled), "caption": caption, "logit_scale": self.scale("image")}
        if boxes is not None:
            assert texts is not None
            assert text_index is not None
            region_text = texts[text_index]
            output["region"] = _normalize(self._ask(tokens, self.prompt_encoder.boxes(boxes), kept, pool_input))
            output["region_text"] = region_text
            output["region_logit_scale"] = self.scale("region")
            if self.box_head is not None:
                output["ground_boxes"] = self._boxes_of(tokens, region_text, kept, pool_input)
        return ClocOutput(**output)


def _normalize(x: Tensor) -> Tensor:
    """L2-normalised in float32, so that cosines are exact under autocast too."""
    return F.normalize(x.float(), dim=-1)


AutoModel.register(ClocConfig, ClocModel)
