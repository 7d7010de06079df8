"""Configuration of a training run: frozen dataclasses, validated on construction, strict JSON round trip.

Owns what a run is made of and nothing of how it is done.  The command line is made from these classes, and its help
from their docstrings; presets (`opencloc.presets`) are functions that return a complete `TrainConfig`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

Config = TypeVar("Config")


def _check(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Strict:
    """Base of all configuration classes: JSON with an unknown or mistyped field is an error."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Strict):
    """The model: towers from scratch (sizes below) or from a checkpoint (`init_from`), and the region parts."""

    init_from: str | None = None
    """Folder or hub id of a CLIP, SigLIP, SigLIP 2 or CLOC checkpoint to start from.  Sizes are then its own,
    and of a CLOC checkpoint the region parts too."""
    family: Literal["clip", "siglip", "siglip2"] = "clip"
    """Which towers to build from scratch."""
    image_size: int = 224
    """Side of the square image in pixels."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    text_length: int = 77
    """Most tokens of a text, start and end included."""
    embed_dim: int = 512
    """Width of the joint embedding (SigLIP towers: their vision width)."""
    tokenizer: str | None = None
    """Folder or hub id of a tokenizer.  None: one is trained on the texts of the training data."""
    vocab_size: int = 49408
    """Most entries of a tokenizer trained on the data."""
    prompter: Literal["cross", "encoder", "roi", "pool"] = "cross"
    """Form of the Prompter; `encoder` is the published one, `roi` the RoIAlign baseline, `pool` the tower's own pooling
    restricted to the region (no text prompts, no weights)."""
    prompter_heads: int = 4
    """Attention heads of the cross Prompter."""
    prior_slope: float | None = 1.5
    """Initial log slope of the soft spatial prior of the cross Prompter; None: no prior."""
    shared_positions: bool = True
    """Patches carry the same position basis as the prompts."""
    box_head: Literal["anchored", "mlp"] = "anchored"
    """Box head; `mlp` is the published one."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel of the towers: torch's fused one, or plain softmax."""

    def __post_init__(self) -> None:
        _check(
            self.patch_size > 0 and self.image_size % self.patch_size == 0,
            "model.image_size",
            self.image_size,
            f"a multiple of model.patch_size ({self.patch_size})",
        )
        for side, width, heads in (
            ("vision", self.vision_width, self.vision_heads),
            ("text", self.text_width, self.text_heads),
        ):
            _check(heads > 0 and width % heads == 0, f"model.{side}_heads", heads, f"a divisor of {width}")
        _check(self.text_length >= 4, "model.text_length", self.text_length, "at least 4")
        _check(self.vocab_size >= 300, "model.vocab_size", self.vocab_size, "at least 300 (256 bytes and more)")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Strict):
    """What is trained on."""

    train: tuple[str, ...] = ("scenes:rich",)
    """Sources: `scenes:rich?num_things=120`, `shards:DIR/{00000..00099}.tar?sidecar=vesl`, `coco:DIR?split=train`,
    `folder:DIR`, `mosaic:DIR?grid=2-3`; or a bare path."""
    weights: tuple[float, ...] = ()
    """Share of each source; none: equal shares."""
    num_regions: int = 4
    """M, regions sampled per image (paper: 4)."""
    num_workers: int = 1
    """Loader processes of every rank; 0 loads in the training process."""
    lanes: int = 16
    """Stretches of an epoch read at once: of tars, at least as many are in use, and as many ranks can read different
    ones.  On several machines a multiple of their number, and a divisor of batch_size."""
    patch_dropout: float = 0.0
    """Share of every image's patches, drawn anew each time, that training leaves out (FLIP, Li et al. 2023): cheaper
    steps that learn less each.  Regions of few patches may lose them all.  Not with the roi Prompter."""
    max_skipped_share: float = 0.05
    """Share of unusable samples (broken image, missing shard, no label, ...) past which the run stops."""

    def __post_init__(self) -> None:
        _check(len(self.train) > 0, "data.train", self.train, "at least one source")
        _check(
            not self.weights or (len(self.weights) == len(self.train) and min(self.weights) > 0),
            "data.weights",
            self.weights,
            f"empty, or a positive number for each of the {len(self.train)} sources",
        )
        _check(self.num_regions >= 1, "data.num_regions", self.num_regions, ">= 1")
        _check(self.num_workers >= 0, "data.num_workers", self.num_workers, ">= 0")
        _check(self.lanes >= 1, "data.lanes", self.lanes, ">= 1")
        _check(0 <= self.patch_dropout < 1, "data.patch_dropout", self.patch_dropout, "in [0, 1)")
        _check(0 <= self.max_skipped_share <= 1, "data.max_skipped_share", self.max_skipped_share, "in [0, 1]")

    def kept_patches(self, num_patches: int) -> int:
        """How many of an image's patches are left by `patch_dropout`: at least one."""
        return max(1, round((1 - self.patch_dropout) * num_patches))


@dataclass(frozen=True, kw_only=True)
class LossConfig(Strict):
    """Weights and forms of the losses."""

    region_weight: float = 1.0
    """Factor of lambda; 0 trains a plain CLIP: no region is prompted at all."""
    grounding_weight: float = 1.0
    """Factor of the grounding loss beside the region-text loss; 0 leaves it out."""
    conflict_filter: Literal["similar", "identical", "none"] = "similar"
    """Which region texts are no negatives: similar ones too (published), identical ones only, or none at all."""
    conflict_threshold: float = 0.9
    """Cosine above which two region texts count as similar (published value)."""
    grounding: Literal["l1_giou", "squared"] = "l1_giou"
    """Box regression: (5 L1 + 2 (1 - GIoU)) / 7, or the published squared error."""

    def __post_init__(self) -> None:
        _check(self.region_weight >= 0, "loss.region_weight", self.region_weight, ">= 0")
        _check(self.grounding_weight >= 0, "loss.grounding_weight", self.grounding_weight, ">= 0")
        _check(0 < self.conflict_threshold <= 1, "loss.conflict_threshold", self.conflict_threshold, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Strict):
    """AdamW with warm-up and cosine decay (paper section 4.1)."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: AdamW for all but the matrices of the transformer layers, which take orthogonalized steps."""
    lr: float = 5e-4
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2
    """Applied to matrices only, not to biases, norms, scales and embeddings of positions."""
    warmup_steps: int = 2000
    grad_clip: float = 1.0
    """Largest norm of the gradient; larger ones are scaled down."""

    def __post_init__(self) -> None:
        _check(self.lr > 0, "optim.lr", self.lr, "> 0")
        _check(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, ">= 0")
        _check(self.grad_clip > 0, "optim.grad_clip", self.grad_clip, "> 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Strict):
    """A whole training run."""

    out: str = "runs/train"
    """Folder of the run: config.json, log.jsonl, checkpoints/, model/.  Running again resumes there."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 439_087
    batch_size: int = 32_768
    """Images per step: the contrastive batch, whole whatever `micro_batch_size` and the number of ranks."""
    micro_batch_size: int | None = None
    """Images per forward and backward pass of a rank; None: its whole share of the batch at once."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast type of the forward pass; weights and losses are always fp32.  `auto`: bf16 where the hardware has it
    (GPUs; CPUs with AVX512-BF16 or AMX), fp32 elsewhere: emulated bf16 is a hundred times slower."""
    compile: bool = False
    """Compile the towers' layers and the Prompter with torch.compile: faster steps after minutes of compilation."""
    activation_checkpointing: bool = False
    """Keep no activations inside the towers' layers and compute them again in the backward pass: a third more work,
    far less memory."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: every rank holds the whole model (`ddp`), or its share of every matrix and of the optimizer's
    state (`fsdp`).  The result is the same."""
    device: str = "auto"
    """`auto` (cuda if there is one), `cpu`, `cuda`, `cuda:1`, ...  Under torchrun each rank takes its own GPU."""
    seed: int = 0
    """Of the weights, the order of samples and all sampling."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `tensorboard`)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        _check(
            self.optim.name != "muon" or self.sharding == "ddp",
            "optim.name",
            self.optim.name,
            "adamw where sharding is fsdp: muon needs whole matrices",
        )
        if self.micro_batch_size is not None:
            _check(
                self.micro_batch_size >= 1 and self.batch_size % self.micro_batch_size == 0,
                "micro_batch_size",
                self.micro_batch_size,
                f"a divisor of batch_size ({self.batch_size})",
            )


def to_json(config: Any) -> str:
    """The configuration as indented JSON."""
    return json.dumps(asdict(config), indent=2) + "\n"


def from_json(kind: Callable[..., Config], text: str, where: str | Path) -> Config:
    """A configuration of class `kind` from JSON; `where` names the file in errors.

    Raises ValueError naming every unknown field and every value of the wrong type or out of range.
    """
    try:
        return TypeAdapter(kind).validate_json(text)  # pyright: ignore[reportArgumentType, reportReturnType]
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc'])) or '(file)'}: {e['msg']} (got {e['input']!r})" for e in error.errors()
        ]
        raise ValueError(f"{where}: not a valid {getattr(kind, '__name__', kind)}:\n" + "\n".join(lines)) from None
