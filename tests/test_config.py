"""Configurations: ranges in Python and from JSON, what may change on resuming, what a checkpoint brings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from opencloc.config import (
    MAY_CHANGE,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Strict,
    TrainConfig,
    changed_fields,
    from_json,
    from_scratch_left_out,
    to_json,
)
from opencloc.model.prompter import PROMPTERS
from opencloc.presets import PRESETS, tiny

ALL = (ModelConfig, DataConfig, LossConfig, OptimConfig, TrainConfig)


def numeric_fields() -> Iterator[tuple[type[Strict], str, list[Any]]]:
    """Class and name of every numeric field of a training's configuration, and values no such field may have."""
    for kind in ALL:
        for name, hint in get_type_hints(kind).items():
            kinds = {hint, *get_args(hint)} if get_origin(hint) is not tuple else set()
            if int in kinds:
                yield kind, name, [-(10**26), -1, 10**400]
            elif float in kinds:
                lowest = -1e26 if name == "prior_slope" else -1.0
                yield kind, name, [lowest, -1e26, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(("kind", "name", "values"), [pytest.param(*row, id=row[1]) for row in numeric_fields()])
def test_no_number_is_taken_out_of_its_range(kind: type[Strict], name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{kind.__name__}\.{name}: must be"):
            kind(**{name: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossConfig(region_weight=-1), "LossConfig.region_weight: must be greater than or equal to 0, got -1"),
        (lambda: LossConfig(conflict_threshold=1.5), "conflict_threshold: must be less than or equal to 1, got 1.5"),
        (
            lambda: DataConfig(weights=(1.0, math.inf), train=("a", "b")),
            "DataConfig.weights.1: must be a finite number",
        ),
        (lambda: DataConfig(weights=(1.0,), train=("a", "b")), "a number for each of the 2 sources"),
        (lambda: DataConfig(train=()), "data.train must name at least one source"),
        (lambda: ModelConfig(vision_width=30, vision_heads=4), "model.vision_heads must be a divisor of 30, got 4"),
        (lambda: TrainConfig(batch_size=8, micro_batch_size=3), "a divisor of batch_size (8), got 3"),
        (lambda: TrainConfig(out=""), "TrainConfig.out"),
    ],
)
def test_errors_say_the_field_what_is_allowed_and_what_there_was(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"stepz": 3}', "stepz"),
        ('{"steps": "3"}', "steps: must be a valid integer, got '3'"),
        ('{"steps": 0}', "steps: must be greater than or equal to 1, got 0"),
        ('{"model": {"vision_layers": -10000000000000000000000000}}', "model.vision_layers"),
        ('{"optim": {"beta1": 1e400}}', "optim.beta1: must be a finite number"),
        (f'{{"optim": {{"eps": 1{"0" * 400}}}}}', "optim.eps: must be a finite number"),
        ('{"model": {"image_size": 30, "patch_size": 8}}', "model.image_size must be a multiple of model.patch_size"),
        ('{"optim": {"lr_factors": {"vison": 0}}}', "optim.lr_factors.vison"),
        ('{"optim": {"lr_factors": {"vision": "0"}}}', "optim.lr_factors.vision: must be a valid number"),
        ("[]", "the file: must be an object"),
        ("{", "Invalid JSON"),
        (b'{"out": "\xff"}', "Invalid JSON"),
    ],
)
def test_bad_configurations_name_file_and_field(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=r"^run\.json") as error:
        from_json(TrainConfig, text, "run.json")
    assert message in str(error.value)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name: str) -> None:
    preset = PRESETS[name]()
    assert from_json(TrainConfig, to_json(preset), Path("x.json")) == preset


def test_what_may_change_on_resuming_is_marked_where_it_is_declared() -> None:
    """Where and how a run goes may change; what it computes may not."""
    free = set()
    for kind in ALL:
        for name, hint in get_type_hints(kind, include_extras=True).items():
            if get_origin(hint) is Annotated and MAY_CHANGE in hint.__metadata__:
                free.add(name)
    assert free == {
        *("out", "micro_batch_size", "num_workers", "max_skipped_share", "compile", "activation_checkpointing"),
        *("sharding", "device", "log_every", "checkpoint_every", "keep_checkpoints", "tensorboard"),
    }
    moved = replace(tiny(), out="elsewhere", log_every=3, data=replace(tiny().data, num_workers=5))
    assert not changed_fields(tiny(), moved, but=MAY_CHANGE)
    other = replace(moved, seed=1, optim=replace(moved.optim, lr=0.5))
    assert changed_fields(tiny(), other, but=MAY_CHANGE) == {
        "optim.lr": "0.0015 there, 0.5 asked for",
        "seed": "0 there, 1 asked for",
    }


@pytest.mark.parametrize(
    "given", [{"patch_size": 14}, {"family": "siglip"}, {"tokenizer": "x"}, {"text_length": 64}, {"vocab_size": 500}]
)
def test_sizes_beside_a_checkpoint_to_start_from_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"leave out model.{next(iter(given))}"):
        ModelConfig(init_from="clip", **given)


def test_a_preset_leaves_its_sizes_to_the_checkpoint_to_start_from() -> None:
    preset = from_scratch_left_out(tiny())
    assert replace(preset.model, init_from="clip").image_size == ModelConfig().image_size
    assert replace(preset, model=tiny().model) == tiny()


def test_choices_are_those_of_the_model() -> None:
    hints = get_type_hints(ModelConfig)
    assert set(get_args(hints["prompter"])) == set(PROMPTERS)
