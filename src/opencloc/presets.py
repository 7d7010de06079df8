"""Presets: named, complete training configurations.  Each is a function; the command line overrides its fields."""

from __future__ import annotations

from opencloc.config import DataConfig, LrFactors, ModelConfig, OptimConfig, TrainConfig


def tiny() -> TrainConfig:
    """The quickstart: scenes of 120 named things at 64 px, minutes on two cores."""
    return TrainConfig(
        out="runs/tiny",
        model=ModelConfig(
            image_size=64,
            patch_size=8,
            vision_width=128,
            vision_layers=4,
            vision_heads=4,
            text_width=128,
            text_layers=2,
            text_heads=4,
            text_length=32,
            embed_dim=128,
            vocab_size=2048,
        ),
        data=DataConfig(train=("scenes:rich?num_things=120",), num_regions=5),  # every object of a scene
        optim=OptimConfig(name="muon", lr=1.5e-3, warmup_steps=50, weight_decay=0.1),
        steps=850,
        batch_size=32,
        checkpoint_every=200,
    )


def small() -> TrainConfig:
    """Real photos at 96 px: an hour on one AVX2 core (recipes/photos.sh)."""
    return TrainConfig(
        out="runs/small",
        model=ModelConfig(
            image_size=96,
            patch_size=8,
            vision_width=192,
            vision_layers=5,
            vision_heads=6,
            text_width=192,
            text_layers=3,
            text_heads=6,
            text_length=48,
            embed_dim=192,
            vocab_size=4096,
        ),
        # all tiles of a 3 x 3 mosaic: prompts cost little beside the towers
        data=DataConfig(num_regions=9, patch_dropout=0.5),
        optim=OptimConfig(name="muon", lr=1e-3, warmup_steps=100, weight_decay=0.1),
        steps=2500,
        batch_size=32,
        checkpoint_every=200,
    )


def vit_b16() -> TrainConfig:
    """ViT-B/16 at 224 px with the published constants (paper section 4.1)."""
    return TrainConfig(out="runs/vit_b16", optim=OptimConfig(name="adamw"))


def vit_l14_336() -> TrainConfig:
    """ViT-L/14 at 336 px with the published constants."""
    return TrainConfig(
        out="runs/vit_l14_336",
        model=ModelConfig(
            image_size=336,
            patch_size=14,
            vision_width=1024,
            vision_layers=24,
            vision_heads=16,
            text_width=768,
            text_heads=12,
            embed_dim=768,
        ),
        optim=OptimConfig(name="adamw"),
    )


def vit_h14_336() -> TrainConfig:
    """ViT-H/14 at 336 px with the published constants."""
    return TrainConfig(
        out="runs/vit_h14_336",
        model=ModelConfig(
            image_size=336,
            patch_size=14,
            vision_width=1280,
            vision_layers=32,
            vision_heads=16,
            text_width=1024,
            text_layers=24,
            text_heads=16,
            embed_dim=1024,
        ),
        optim=OptimConfig(name="adamw"),
    )


def finetune(init_from: str = "CHECKPOINT") -> TrainConfig:
    """From a pretrained checkpoint (--model.init-from): its towers hardly move, the regions are learned."""
    return TrainConfig(
        out="runs/finetune",
        model=ModelConfig(init_from=init_from),
        # the optimizer that pretrained towers were made with; they move at 1e-5, the fresh parts at 5e-4
        optim=OptimConfig(name="adamw", lr=5e-4, lr_factors=LrFactors(towers=0.02), warmup_steps=200, weight_decay=0.1),
        steps=5000,
        batch_size=256,
        checkpoint_every=500,
    )


PRESETS = {preset.__name__: preset for preset in (tiny, small, vit_b16, vit_l14_336, vit_h14_336, finetune)}
