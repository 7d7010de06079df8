"""Configuration of a training run: frozen dataclasses, checked whether made in Python, read from JSON or by the CLI.

The command line is made from these classes, and its help from their docstrings.  Presets (`opencloc.presets`) are
functions that return a complete `TrainConfig`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # typing's, with what pydantic needs of it

Config = TypeVar("Config")

Count = Annotated[int, Field(ge=1, lt=2**31)]
Whole = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

MAY_CHANGE = "may change on resuming"  # marks fields that say where and how a run goes, not what it computes
FROM_SCRATCH = "only from scratch"  # marks fields that a checkpoint to start from has its own values of


@dataclass(frozen=True, kw_only=True)
class Strict:
    """Base of configuration classes: unknown fields, other types, values out of range, NaN and infinity are errors.

    Ranges are pydantic's constraints in the annotations.  A subclass with checks of its own calls this one's first.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def __post_init__(self) -> None:
        try:
            _adapter(type(self)).validate_python(vars(self))
        except ValidationError as error:
            raise ValueError("; ".join(_problems(error, f"{type(self).__name__}."))) from None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Strict):
    """The model: towers from scratch (sizes below) or from a checkpoint (`init_from`), and the region parts."""

    init_from: str | None = None
    """Folder or hub id of a CLIP, SigLIP, SigLIP 2 or CLOC checkpoint to start from.  It brings its own sizes and
    tokenizer, of which only `image_size` can be given here, and a CLOC checkpoint its region parts too."""
    family: Annotated[Literal["clip", "siglip", "siglip2"], FROM_SCRATCH] = "clip"
    """Which towers to build from scratch."""
    image_size: Annotated[Count | None, FROM_SCRATCH] = None
    """Side of the square image in pixels.  None: 224 from scratch, else the checkpoint's own; for another size the
    checkpoint's position table is interpolated."""
    patch_size: Annotated[Count, FROM_SCRATCH] = 16
    """Side of a patch in pixels."""
    vision_width: Annotated[Count, FROM_SCRATCH] = 768
    vision_layers: Annotated[Count, FROM_SCRATCH] = 12
    vision_heads: Annotated[Count, FROM_SCRATCH] = 12
    text_width: Annotated[Count, FROM_SCRATCH] = 512
    text_layers: Annotated[Count, FROM_SCRATCH] = 12
    text_heads: Annotated[Count, FROM_SCRATCH] = 8
    text_length: Annotated[int, Field(ge=4, lt=2**31), FROM_SCRATCH] = 77
    """Most tokens of a text, start and end included."""
    embed_dim: Annotated[Count, FROM_SCRATCH] = 512
    """Width of the joint embedding (SigLIP towers: their vision width)."""
    tokenizer: Annotated[str | None, FROM_SCRATCH] = None
    """Folder or hub id of a tokenizer.  None: one is trained on the texts of the training data."""
    vocab_size: Annotated[int, Field(ge=300, lt=2**31), FROM_SCRATCH] = 49408
    """Most entries of a tokenizer trained on the data (256 bytes and more)."""
    prompter: Literal["cross", "encoder", "roi", "pool", "pool_cross"] = "cross"
    """Form of the Prompter; `encoder` is the published one, `roi` the RoIAlign baseline, `pool` the tower's own pooling
    restricted to the region (no text prompts, no weights), `pool_cross` the sum of `pool` and a `cross` that starts at
    zero."""
    prompter_heads: Count = 4
    """Attention heads of the cross Prompter."""
    prior_slope: Annotated[float, Field(ge=-10, le=10)] | None = 0.0
    """Initial log slope of the spatial prior of the cross Prompter; None: no prior."""
    shared_positions: bool = True
    """Patches carry the same position basis as the prompts."""
    box_head: Literal["dense", "mlp"] = "dense"
    """Box head; `mlp` is the published one, which the published Prompter always has."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel of the towers: torch's fused one, or plain softmax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from is not None and (
            given := changed_fields(ModelConfig(), replace(self, init_from=None, image_size=None), only=FROM_SCRATCH)
        ):
            names = ", ".join(f"model.{name}" for name in given)
            raise ValueError(f"model.init_from brings its own sizes and tokenizer; leave out {names}")
        if self.init_from is None and self.side_px % self.patch_size:
            raise ValueError(
                f"model.image_size must be a multiple of model.patch_size ({self.patch_size}), got {self.side_px}"
            )
        for side, width, heads in (
            ("vision", self.vision_width, self.vision_heads),
            ("text", self.text_width, self.text_heads),
        ):
            if width % heads:
                raise ValueError(f"model.{side}_heads must be a divisor of {width}, got {heads}")

    @property
    def side_px(self) -> int:
        """The image size of a model from scratch."""
        return 224 if self.image_size is None else self.image_size


@dataclass(frozen=True, kw_only=True)
class DataConfig(Strict):
    """What is trained on."""

    train: tuple[str, ...] = ("scenes:rich",)
    """Sources: `scenes:rich?num_things=120`, `shards:DIR/{00000..00099}.tar?sidecar=vesl`, `coco:DIR?split=train`,
    `folder:DIR`, `mosaic:DIR?grid=2-3`; or a bare path.  Where the vision tower is frozen also
    `features:DIR`, which `opencloc data features` writes."""
    weights: tuple[Positive, ...] = ()
    """Share of each source; none: equal shares."""
    num_regions: Count = 4
    """M, regions sampled per image (paper: 4)."""
    num_workers: Annotated[Whole, MAY_CHANGE] = 1
    """Loader processes of every rank; 0 loads in the training process."""
    lanes: Count = 16
    """Stretches of an epoch read at once: of tars, at least as many are in use, and as many ranks can read different
    ones.  On several machines a multiple of their number, and a divisor of batch_size."""
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of every image's patches, drawn anew each time, that training leaves out (FLIP, Li et al. 2023): cheaper
    steps that learn less each.  Regions of few patches may lose them all.  Not with the roi Prompter, nor on stored
    features."""
    max_skipped_share: Annotated[Share, MAY_CHANGE] = 0.05
    """Share of unusable samples (broken image, missing shard, no label, ...) past which the run stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train:
            raise ValueError("data.train must name at least one source")
        if self.weights and len(self.weights) != len(self.train):
            raise ValueError(
                f"data.weights must be empty or a number for each of the {len(self.train)} sources, got {self.weights}"
            )

    def kept_patches(self, num_patches: int) -> int:
        """How many of an image's patches are left by `patch_dropout`: at least one."""
        return max(1, round((1 - self.patch_dropout) * num_patches))


@dataclass(frozen=True, kw_only=True)
class LossConfig(Strict):
    """Weights and forms of the losses."""

    region_weight: NotNegative = 1.0
    """Factor of lambda; 0 trains a plain CLIP: no region is prompted at all."""
    grounding_weight: NotNegative = 1.0
    """Factor of the grounding loss beside the region-text loss; 0 leaves it out."""
    conflict_filter: Literal["similar", "identical", "none"] = "similar"
    """Which region texts are no negatives: similar ones too (published), identical ones only, or none at all."""
    conflict_threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Cosine above which two region texts count as similar (published value)."""
    gce_q: Share = 0.0
    """For noisy region texts: a pair counts by p^q in the region-text loss, p being its probability, as in generalized
    cross entropy.  0: all pairs count alike (published).  0.5 did best in the study's noisy worlds."""
    grounding: Literal["l1_giou", "squared"] = "l1_giou"
    """Box regression: (5 L1 + 2 (1 - GIoU)) / 7, or the published squared error."""


@dataclass(frozen=True, kw_only=True)
class LrFactors(Strict):
    """Factor of `optim.lr` for each part.  0 freezes a part: it stays as it is and costs no backward pass, no gradients
    and no optimizer state."""

    towers: NotNegative = 1.0
    """Both towers, with their projections and their temperature."""
    vision: NotNegative = 1.0
    """The vision tower, on top of `towers`."""
    text: NotNegative = 1.0
    """The text tower, on top of `towers`."""
    prompter: NotNegative = 1.0
    """The Prompter, its prompts and the temperature of regions."""
    heads: NotNegative = 1.0
    """The box head."""

    @property
    def vision_tower(self) -> float:
        """What the vision tower has in the end."""
        return self.towers * self.vision

    @property
    def text_tower(self) -> float:
        """What the text tower has in the end."""
        return self.towers * self.text


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Strict):
    """The optimizer, with warm-up and cosine decay (paper section 4.1)."""

    name: Literal["muon", "adamw"] = "muon"
    """`adamw` is the published one.  `muon`: AdamW for all but the matrices of the towers' layers, which take
    orthogonalized steps as long as AdamW's, at the same learning rate."""
    lr: Positive = 5e-4
    """Peak learning rate."""
    lr_factors: LrFactors = field(default_factory=LrFactors)
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    eps: Positive = 1e-6
    weight_decay: NotNegative = 0.2
    """Applied to matrices only, not to biases, norms, scales and embeddings of positions."""
    warmup_steps: Whole = 2000
    grad_clip: Positive = 1.0
    """Largest norm of the gradient; larger ones are scaled down."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Strict):
    """How a training run goes, whatever it trains."""

    out: Annotated[str, Field(min_length=1), MAY_CHANGE] = "runs/train"
    """Folder of the run: config.json, log.jsonl, checkpoints/, model/.  Running again resumes there."""
    steps: Count
    """Optimizer steps, in all."""
    batch_size: Count
    """Samples per step, over all ranks."""
    micro_batch_size: Annotated[Count | None, MAY_CHANGE] = None
    """Samples per forward and backward pass of a rank; None: its whole share of the batch at once.  The loss is the
    whole batch's either way; a run that was short of memory can go on with fewer."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast type of the forward pass; weights and losses are always fp32.  `auto`: bf16 where the hardware has it
    (GPUs; CPUs with AVX512-BF16 or AMX), fp32 elsewhere: emulated bf16 is a hundred times slower."""
    activation_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Keep no activations inside the layers and compute them again in the backward pass: a third more work, far less
    memory."""
    sharding: Annotated[Literal["ddp", "fsdp"], MAY_CHANGE] = "ddp"
    """Under torchrun: every rank holds the whole model (`ddp`), or its share of every matrix and of the optimizer's
    state (`fsdp`).  The result is the same."""
    device: Annotated[str, MAY_CHANGE] = "auto"
    """`auto` (cuda if there is one), `cpu`, `cuda`, `cuda:1`, ...  Under torchrun each rank takes its own GPU."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the weights that are new, the order of samples and all sampling."""
    log_every: Annotated[Count, MAY_CHANGE] = 10
    """Steps between lines of log.jsonl."""
    checkpoint_every: Annotated[Count, MAY_CHANGE] = 1000
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: Annotated[Count, MAY_CHANGE] = 2
    """How many of the newest checkpoints stay."""
    tensorboard: Annotated[bool, MAY_CHANGE] = False
    """Also write TensorBoard events (needs the extra `tensorboard`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % (self.micro_batch_size or 1):
            raise ValueError(
                f"micro_batch_size must be a divisor of batch_size ({self.batch_size}), got {self.micro_batch_size}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A whole training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: Count = 439_087
    """Optimizer steps, in all."""
    batch_size: Count = 32_768
    """Images per step: the contrastive batch, whole whatever `micro_batch_size` and the number of ranks."""
    compile: Annotated[bool, MAY_CHANGE] = False
    """Compile the towers' layers and the Prompter with torch.compile: faster steps after minutes of compilation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_frozen_parts()

    def _check_frozen_parts(self) -> None:
        """Raises ValueError where nothing would learn, or something frozen would be random."""
        factors = self.optim.lr_factors
        towers = {"vision": factors.vision_tower, "text": factors.text_tower}
        regions = {"prompter": factors.prompter, "heads": factors.heads} if self.loss.region_weight else {}
        if not any((towers | regions).values()):
            raise ValueError(f"nothing would be trained: optim.lr_factors is 0 for {', '.join(towers | regions)}")
        for tower in (name for name, factor in towers.items() if factor == 0):
            if self.model.init_from is None:
                raise ValueError(f"optim.lr_factors freezes the {tower} tower, which is random without model.init_from")


def changed_fields(old: Config, new: Config, *, only: str | None = None, but: str | None = None) -> dict[str, str]:
    """Dotted name -> "OLD there, NEW asked for" of every field that differs between two configurations of one class.

    `only`, `but`: no fields but those so marked, all but those so marked.
    """
    hints, changed = get_type_hints(type(old), include_extras=True), {}
    for name in (f.name for f in fields(old)):  # pyright: ignore[reportArgumentType]
        a, b, marks = getattr(old, name), getattr(new, name), getattr(hints[name], "__metadata__", ())
        if is_dataclass(a):
            inner = changed_fields(a, b, only=only, but=but)
            changed |= {f"{name}.{key}": value for key, value in inner.items()}
        elif a != b and (only is None or only in marks) and but not in marks:
            changed[name] = f"{a!r} there, {b!r} asked for"
    return changed


def from_scratch_left_out(config: TrainConfig) -> TrainConfig:
    """The configuration without what `model.init_from` brings: a preset's sizes are those of its model from scratch."""
    hints = get_type_hints(ModelConfig, include_extras=True)
    fixed = [f for f in fields(ModelConfig) if FROM_SCRATCH in getattr(hints[f.name], "__metadata__", ())]
    return replace(config, model=replace(config.model, **{f.name: f.default for f in fixed}))


def to_json(config: Any) -> str:
    """The configuration as indented JSON."""
    return json.dumps(asdict(config), indent=2) + "\n"


def from_json(kind: Callable[..., Config], text: str | bytes, where: str | Path) -> Config:
    """A configuration of class `kind` from JSON; `where` names the file in errors.

    Raises ValueError naming every unknown field and every value of the wrong type or out of range.
    """
    try:
        return TypeAdapter(kind).validate_json(text)  # pyright: ignore[reportArgumentType, reportReturnType]
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in _problems(error))
        raise ValueError(f"{where}: not a valid {getattr(kind, '__name__', kind)}:\n{lines}") from None


@functools.cache
def _adapter(kind: type) -> Any:  # a `TypeAdapter`, which the checker of the tests does not know
    """What checks the fields of a configuration class, given as a dictionary."""
    hints = get_type_hints(kind, include_extras=True)
    checked = TypedDict(kind.__name__, {f.name: hints[f.name] for f in fields(kind)})  # pyright: ignore
    checked.__pydantic_config__ = kind.__pydantic_config__  # pyright: ignore
    return TypeAdapter(checked)


def _problems(error: ValidationError, prefix: str = "") -> list[str]:
    """A line for every field that is wrong: its name, what is allowed, what it is."""
    lines = []
    for e in error.errors():
        name, got = prefix + ".".join(map(str, e["loc"])), repr(e["input"])
        message = e["msg"].removeprefix("Value error, ").replace("Input should", "must")
        if e["type"] in ("value_error", "json_invalid"):  # these say themselves what there is
            lines.append(message)
        else:
            lines.append(f"{name or 'the file'}: {message}, got {got if len(got) < 80 else f'{got[:77]}...'}")
    return lines
