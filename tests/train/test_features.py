"""Training on stored features: what training on the images does, but for float16, without ever running the tower."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from opencloc.cli import main
from opencloc.config import DataConfig, LossConfig, LrFactors, ModelConfig, OptimConfig, TrainConfig
from opencloc.data import stream
from opencloc.model import towers
from opencloc.model.cloc import ClocModel
from opencloc.model.loading import load_model
from opencloc.train.loop import train
from tests.helpers.encoded import features_of, save_cloc, write_labelled
from tests.train.runs import MakeConfig, cut_off, log, on_two_ranks, tree

FROZEN = {"towers": LrFactors(towers=0), "vision": LrFactors(vision=0)}
CAUSES = {"images_per_s", "data_wait"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labelled(tmp_path_factory.mktemp("images") / "in", count=21, samples_per_shard=8)


@pytest.fixture(scope="module")
def start(
    tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> str:
    return save_cloc(tmp_path_factory.mktemp("start") / "cloc", tower_config("clip"), tokenizer)


@pytest.fixture(scope="module")
def stored(data: str, start: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("features") / "out"
    features_of(data, start, out)
    return str(out)


@pytest.fixture
def make(config: MakeConfig, start: str) -> Callable[..., TrainConfig]:
    """(folder, source, changed fields) -> 6 steps of 8 from the checkpoint, its vision tower frozen."""

    def made(out: Path, source: str, **changes: Any) -> TrainConfig:
        fields: dict[str, Any] = {
            "model": ModelConfig(init_from=start),
            "data": DataConfig(train=(source,), num_workers=0),
            "optim": OptimConfig(lr=1e-3, warmup_steps=2, eps=1e-3, lr_factors=FROZEN["vision"]),
        }
        return config(out, **fields | changes)

    return made


def assert_alike(one: Path, other: Path, *, atol: float) -> None:
    """Equal logs but for `atol` times a value's size, from the first step to the last."""
    for line, expected in zip(log(one), log(other), strict=True):
        assert line.keys() == expected.keys()
        for name in line.keys() - CAUSES:
            assert line[name] == pytest.approx(expected[name], rel=atol, abs=atol), (line["step"], name)


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize(
    ("family", "prompter"), [("clip", "cross"), ("clip", "pool_cross"), ("siglip2", "roi"), ("siglip", "pool_cross")]
)
def test_features_train_what_images_train(
    family: str,
    prompter: str,
    frozen: str,
    make: Callable[..., TrainConfig],
    data: str,
    tower_config: Callable[[str], Any],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """The same samples in the same order, the same boxes: losses and gradients differ by the rounding to float16."""
    model = save_cloc(tmp_path / "start", tower_config(family), tokenizer, prompter)
    features_of(data, model, tmp_path / "features")
    optim = OptimConfig(lr=1e-3, warmup_steps=2, eps=1e-3, lr_factors=FROZEN[frozen])
    changes: dict[str, Any] = {"model": ModelConfig(init_from=model), "optim": optim}
    for name, source in (("images", data), ("features", f"features:{tmp_path}/features")):
        train(make(tmp_path / name, source, **changes))
    assert_alike(tmp_path / "features", tmp_path / "images", atol=5e-3)
    weights, expected = (load_file(tmp_path / name / "model/model.safetensors") for name in ("features", "images"))
    torch.testing.assert_close(weights, expected, atol=2e-4, rtol=1e-2)


def test_neither_the_tower_nor_a_decoder_runs(
    make: Callable[..., TrainConfig], stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("not needed")

    monkeypatch.setattr(towers, "vision_forward", refuse)
    monkeypatch.setattr(stream, "letterbox_array", refuse)
    train(make(tmp_path / "run", stored))
    train(make(tmp_path / "clip", stored, loss=LossConfig(region_weight=0)))  # the text tower alone


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 4}], ids=["whole", "micro-batches"])
def test_a_resumed_run_ends_with_the_same_bytes(
    make: Callable[..., TrainConfig], stored: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run = make(tmp_path / "run", stored, data=DataConfig(train=(stored,), num_workers=1), **changes)
    finished = tree(train(run))
    cut_off(tmp_path / "run", after=4)
    assert tree(train(run)) == finished


@pytest.mark.parametrize(("sharding", "micro_batch_size"), [("ddp", None), ("fsdp", None), ("ddp", 2)])
def test_two_ranks_train_what_one_process_trains(
    make: Callable[..., TrainConfig], stored: str, tmp_path: Path, sharding: Any, micro_batch_size: int | None
) -> None:
    train(make(tmp_path / "one", stored))
    two = make(tmp_path / "two", stored, sharding=sharding, micro_batch_size=micro_batch_size)
    on_two_ranks(lambda _: train(two) and None, tmp_path)
    assert_alike(tmp_path / "two", tmp_path / "one", atol=2e-4)
    weights, expected = (load_file(tmp_path / name / "model/model.safetensors") for name in ("two", "one"))
    torch.testing.assert_close(weights, expected, atol=2e-6, rtol=1e-4)


def test_features_serve_for_whatever_has_their_vision_tower(
    make: Callable[..., TrainConfig], stored: str, tmp_path: Path
) -> None:
    """The model of a first run has other texts and another Prompter than the start, and the same vision tower."""
    first = train(make(tmp_path / "first", stored))
    train(make(tmp_path / "second", stored, model=ModelConfig(init_from=str(first)), steps=1))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "the tower is trained": (
        {"optim": OptimConfig(lr_factors=LrFactors(vision=0.1))},
        "this run trains its own.*set optim.lr_factors.vision 0",
    ),
    "patches are left out": ({"data": {"patch_dropout": 0.5}}, "data.patch_dropout leaves patches out"),
    "images beside them": ({"data": {"train": ("STORED", "scenes:easy")}}, "holds features, scenes:easy images"),
    "another image size": (
        {"model": {"image_size": 48}},
        "features of images of 32 pixels, 48 are needed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_a_reason(
    case: str, make: Callable[..., TrainConfig], stored: str, tmp_path: Path
) -> None:
    changes, message = REFUSED[case]
    run = make(tmp_path / "run", stored)
    for name, change in changes.items():
        if isinstance(change, dict):
            given = {
                k: tuple(stored if v == "STORED" else v for v in x) if k == "train" else x for k, x in change.items()
            }
            change = replace(getattr(run, name), **given)
        run = replace(run, **{name: change})
    with pytest.raises(ValueError, match=message):
        train(run)
    train(make(tmp_path / "run", stored, steps=1))  # the folder is free


def test_another_vision_tower_is_refused_by_both_names(
    make: Callable[..., TrainConfig], stored: str, start: str, tmp_path: Path
) -> None:
    model = load_model(ClocModel, start)
    with torch.no_grad():
        model.clip.vision_model.encoder.layers[0].mlp.fc1.weight[0, 0] += 0.5
    other = tmp_path / "other"
    model.save_pretrained(other)
    for path in Path(start).iterdir():
        if not (other / path.name).exists():
            (other / path.name).write_bytes(path.read_bytes())
    with pytest.raises(
        ValueError, match=rf"of the vision tower of {start} \(\w{{16}}\), and this run starts from {other}"
    ):
        train(make(tmp_path / "run", stored, model=ModelConfig(init_from=str(other))))


def test_the_pool_prompters_need_what_the_tower_pools(
    make: Callable[..., TrainConfig], stored: str, start: str, tmp_path: Path
) -> None:
    assert main(["export", "--model", start, "--out", str(tmp_path / "clip")]) == 0
    run = make(tmp_path / "run", stored, model=ModelConfig(init_from=str(tmp_path / "clip"), prompter="pool_cross"))
    with pytest.raises(ValueError, match=r"lacks what the pool_cross Prompter reads: .* --prompter pool_cross"):
        train(run)


def test_another_normalisation_is_refused(
    make: Callable[..., TrainConfig], stored: str, start: str, tmp_path: Path
) -> None:
    """The same weights that look at other numbers."""
    other = tmp_path / "other"
    other.mkdir()
    for path in Path(start).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    settings = json.loads((other / "processor_config.json").read_text())
    (other / "processor_config.json").write_text(json.dumps(settings | {"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(ValueError, match=r"made of images with image_mean \(0.48.*, this model's is \(0.5, 0.5, 0.5\)"):
        train(make(tmp_path / "run", stored, model=ModelConfig(init_from=str(other))))


def test_features_of_another_tower_are_noticed_on_resuming(
    make: Callable[..., TrainConfig], stored: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in Path(stored).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    run = make(tmp_path / "run", str(copy))
    train(run)
    cut_off(tmp_path / "run", after=4)
    info = json.loads((copy / "features.json").read_text())
    (copy / "features.json").write_text(json.dumps(info | {"vision_tower": "0123456789abcdef"}))
    with pytest.raises(ValueError, match="the training data has changed"):
        train(run)
