"""Configuration of the training of a multimodal model, and LLaVA's two stages as presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from opencloc.config import MAY_CHANGE, Count, NotNegative, Positive, RunConfig, Share, Strict, Whole
from opencloc.mllm.templates import KINDS, Kind


@dataclass(frozen=True, kw_only=True)
class Rates(Strict):
    """Peak learning rate of each part; 0 leaves it as it is."""

    projector: NotNegative = 0.0
    """What makes the tower's tokens the language model's, with the positions of patches."""
    sampler: NotNegative = 0.0
    """What makes a region's vector the language model's."""
    language_model: NotNegative = 0.0
    """The language model, or its LoRA matrices where `lora_rank` is given."""
    prompter: NotNegative = 0.0
    """CLOC's Prompter, for the sampler of that name."""
    tower: NotNegative = 0.0
    """The vision tower."""


@dataclass(frozen=True, kw_only=True)
class MllmOptimConfig(Strict):
    """The optimizer, with warm-up and cosine decay."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: AdamW for all but the matrices of the layers and the projector, which take orthogonalized steps.  For
    models from scratch."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    eps: Positive = 1e-6
    weight_decay: NotNegative = 0.0
    warmup_steps: Whole = 100
    grad_clip: Positive = 1.0
    """Largest norm of the gradient; larger ones are scaled down."""


@dataclass(frozen=True, kw_only=True)
class MllmDataConfig(Strict):
    """What is trained on."""

    train: tuple[str, ...] = ("scenes:rich?num_things=120",)
    """Sources: `llava:FILE?images=DIR`, `ferret:FILE?images=DIR`, `shards:DIR` (its conversations, or questions about
    its regions), or questions about the regions of any other source (`scenes:`, `coco:`, ...)."""
    weights: tuple[Positive, ...] = ()
    """Share of each source; none: equal shares."""
    questions: tuple[Kind, ...] = KINDS
    """Kinds of questions made of regions; one that comes twice is asked twice as often."""
    max_turns: Count = 5
    """Most questions of a conversation made of regions."""
    num_workers: Annotated[Whole, MAY_CHANGE] = 1
    """Loader processes of every rank; 0 loads in the training process."""
    lanes: Count = 16
    """Stretches of an epoch read at once, as in pre-training."""
    max_skipped_share: Annotated[Share, MAY_CHANGE] = 0.05
    """Share of unusable conversations (broken image, too many tokens, no prompt, ...) past which the run stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train or not self.questions:
            raise ValueError("data.train and data.questions must name at least one each")
        if self.weights and len(self.weights) != len(self.train):
            raise ValueError(
                f"data.weights must be empty or a number for each of the {len(self.train)} sources, got {self.weights}"
            )


@dataclass(frozen=True, kw_only=True)
class MllmTrainConfig(RunConfig):
    """A training run of a multimodal model."""

    model: Annotated[str, Field(min_length=1)]
    """Folder to start from: of `opencloc mllm build`, or the `model` of an earlier stage."""
    out: Annotated[str, Field(min_length=1), MAY_CHANGE] = "runs/mllm"
    """Folder of the run: config.json, log.jsonl, checkpoints/, model/.  Running again resumes there."""
    data: MllmDataConfig = field(default_factory=MllmDataConfig)
    rates: Rates = field(default_factory=Rates)
    optim: MllmOptimConfig = field(default_factory=MllmOptimConfig)
    lora_rank: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Trains low-rank additions to the language model's linear layers in its place (needs the extra `mllm`); in the
    final model they are merged into it."""
    batch_size: Count
    """Conversations per step, over all ranks."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """How attention is computed, as in pre-training.  Eager is the faster one for small models on some CPUs and takes
    memory with the square of a conversation's length."""
    checkpoint_every: Annotated[Count, MAY_CHANGE] = 500
    """Steps between checkpoints; the last step always makes one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(vars(self.rates).values()):
            raise ValueError("nothing would be trained: all rates are 0")
        if self.lora_rank is not None and not self.rates.language_model:
            raise ValueError("lora_rank needs rates.language_model above 0")


def align(model: str) -> MllmTrainConfig:
    """LLaVA's first stage: the projector and the sampler learn to speak to the language model, which stays as it is."""
    return MllmTrainConfig(
        model=model,
        out="runs/mllm_align",
        data=MllmDataConfig(questions=("caption", "refer")),
        rates=Rates(projector=1e-3, sampler=1e-3),
        optim=MllmOptimConfig(warmup_steps=65),
        steps=2180,
        batch_size=256,
    )


def instruct(model: str) -> MllmTrainConfig:
    """LLaVA's second stage: the language model learns too, on questions and answers."""
    return MllmTrainConfig(
        model=model,
        out="runs/mllm_instruct",
        rates=Rates(projector=2e-5, sampler=2e-5, language_model=2e-5),
        optim=MllmOptimConfig(warmup_steps=156),
        steps=5197,
        batch_size=128,
    )


STAGES = {stage.__name__: stage for stage in (align, instruct)}
