"""Training: resume, ranks and micro-batches compute what one process does; LoRA; transformers' Trainer."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from opencloc.mllm.config import MllmDataConfig, MllmOptimConfig, MllmTrainConfig, Rates, align, instruct
from opencloc.mllm.model import RegionLlava
from opencloc.mllm.parts import make_optimizer, part_of, set_trained_parts
from opencloc.mllm.processor import RegionLlavaProcessor
from opencloc.mllm.readers import Asked, open_conversations
from opencloc.mllm.stream import ConversationExamples
from opencloc.mllm.train import backward, train
from opencloc.train.checkpoint import list_checkpoints
from opencloc.train.distributed import ALONE, Ranks
from tests.train.test_distributed import on_two_ranks

Stage = Callable[..., MllmTrainConfig]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(stage(out))
    return out


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 2e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_resumed_run_is_the_uninterrupted_one(stage: Stage, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step_0000004")
    train(stage(out))
    first, second = weights(whole), weights(out)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [(r["step"], r["loss"]) for r in log(out)][-2:] == [(r["step"], r["loss"]) for r in log(whole)][-2:]


def test_another_configuration_does_not_go_on_there(stage: Stage, whole: Path) -> None:
    with pytest.raises(ValueError, match="another configuration"):
        train(replace(stage(whole), seed=1))


def test_micro_batches_compute_the_same(stage: Stage, whole: Path, tmp_path: Path) -> None:
    """Rows have different numbers of learned tokens, so a mean of the means would not.  A run may go on with others."""
    out = tmp_path / "run"
    train(replace(stage(out), micro_batch_size=1))
    assert_close(weights(out), weights(whole))
    assert [r["tokens"] for r in log(out)] == [r["tokens"] for r in log(whole)]
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step_0000004")
    train(replace(stage(out), micro_batch_size=2))
    assert_close(weights(out), weights(whole))


def test_plain_attention_computes_the_same(stage: Stage, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(replace(stage(out), attention="eager"))
    assert_close(weights(out), weights(whole))


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_compute_what_one_process_does(sharding: str, stage: Stage, whole: Path, tmp_path: Path) -> None:
    config = replace(stage(tmp_path / "run"), sharding=sharding, micro_batch_size=1)

    def body(ranks: Ranks) -> None:
        train(config)

    on_two_ranks(body, tmp_path / "ranks")
    assert_close(weights(tmp_path / "run"), weights(whole))
    for a, b in zip(log(tmp_path / "run"), log(whole), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["tokens"] == b["tokens"]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_rank_may_have_no_image(sharding: str, stage: Stage, tmp_path: Path) -> None:
    """Half of the rows are text alone, so that micro-batches of one row come with and without an image."""
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.jpg")
    said = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes"}]
    seen = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a red image"}]
    rows = [{"conversations": said}, {"conversations": seen, "image": "a.jpg"}] * 4
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = MllmDataConfig(train=(f"llava:{tmp_path}/rows.json?images={tmp_path}",), num_workers=0)
    config = stage(tmp_path / "one", data=data, steps=3)
    train(config)

    def body(ranks: Ranks) -> None:
        train(replace(config, out=str(tmp_path / "two"), sharding=sharding, micro_batch_size=1))

    on_two_ranks(body, tmp_path / "ranks")
    assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"))


def test_parts_without_a_rate_stay_as_they_are(stage: Stage, built: Callable[..., Path], tmp_path: Path) -> None:
    before = load_file(built() / "model.safetensors")
    for rates, trained in (
        (Rates(projector=1e-2), {"projector"}),
        (Rates(prompter=1e-2, sampler=1e-2), {"prompter", "sampler"}),
        (Rates(tower=1e-2), {"tower"}),
    ):
        out = tmp_path / "-".join(sorted(trained))
        train(stage(out, rates=rates, steps=1))
        after = weights(out)
        assert {part_of(name) for name in before if not torch.equal(before[name], after[name])} == trained


def test_rates_and_muon_go_to_their_parts(built: Callable[..., Path]) -> None:
    model = RegionLlava.from_pretrained(built())
    rates = Rates(projector=0.5, language_model=0.25, tower=0.125)
    set_trained_parts(model, rates)
    optimizer = make_optimizer(model, rates, MllmOptimConfig(name="muon", weight_decay=0.1))
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        rate = getattr(rates, part_of(name))
        assert (parameter in groups) == (rate > 0), name
        if rate:
            group = groups[parameter]
            assert group["rate"] == rate
            hidden = ".layers." in name or "multi_modal_projector" in name
            assert group["muon"] == (parameter.ndim == 2 and hidden)
            assert (group["weight_decay"] > 0) == (parameter.ndim >= 2 and "position" not in name)


def test_lora_trains_little_and_is_merged(stage: Stage, built: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = stage(tmp_path / "run", lora_rank=2, rates=Rates(language_model=1e-2), steps=2, checkpoint_every=1)
    train(config)
    before, after = load_file(built() / "model.safetensors"), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("_proj.weight" in name and part_of(name) == "language_model" for name in changed)
    for name in changed:  # a product of two thin matrices
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) <= 2
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert any("lora_A" in name for name in load_file(newest / "model.safetensors"))
    again = replace(config, out=str(tmp_path / "again"))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "model")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_0000002")
    train(again)
    assert all(torch.equal(after[name], value) for name, value in weights(tmp_path / "again").items())


def test_loss_is_the_mean_over_all_learned_tokens(stage: Stage, built: Callable[..., Path], tmp_path: Path) -> None:
    """Against log-likelihoods that are looked up token by token."""
    model, processor = RegionLlava.from_pretrained(built()), RegionLlavaProcessor.from_pretrained(built())
    source = open_conversations("scenes:easy", image_px=processor.image_size)
    examples = ConversationExamples([source], (), processor, questions=("refer", "caption"), max_turns=3, seed=0)
    rows = [examples[position].row for position in range(3)]
    loss, count = backward(model, rows, 2, processor, bf16=False, ranks=ALONE)
    total, tokens = 0.0, 0
    for row in rows:
        batch = processor.pad([row], for_training=True)
        labels = batch.pop("labels")[0]
        with torch.no_grad():
            likely = model(**batch).logits[0].log_softmax(-1)
        for place in range(1, len(labels)):
            if labels[place] != -100:
                total -= float(likely[place - 1, labels[place]])
                tokens += 1
    assert int(count) == tokens
    assert float(loss) == pytest.approx(total / tokens, rel=1e-5)


def test_unusable_rows_are_counted_and_stop_the_run_when_they_are_many(stage: Stage, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.jpg")
    good = {
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "<image> Hello?"}, {"from": "gpt", "value": "a"}],
    }
    long = {
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "<image>" + "0" * 9000}, {"from": "gpt", "value": "a"}],
    }
    lost = good | {"image": "none.jpg"}
    (tmp_path / "rows.json").write_text(json.dumps([good, good, long, lost]))
    spec = f"llava:{tmp_path}/rows.json?images={tmp_path}"
    data = MllmDataConfig(train=(spec,), num_workers=0, max_skipped_share=1.0)
    train(stage(tmp_path / "run", data=data))
    skipped = log(tmp_path / "run")[-1]["skipped"]
    assert skipped.keys() == {"too many tokens", "missing image"}
    (tmp_path / "rows.json").write_text(json.dumps([long, lost]))
    with pytest.raises(RuntimeError, match="unusable conversations in a row"):
        train(stage(tmp_path / "other", data=data))


def test_position_of_the_stream_is_a_pure_function(built: Callable[..., Path]) -> None:
    processor = RegionLlavaProcessor.from_pretrained(built())

    def rows(order: list[int]) -> dict[int, list[int]]:
        source = open_conversations("scenes:easy", image_px=32)
        made = ConversationExamples([source], (), processor, questions=("refer",), max_turns=2, seed=3)
        return {position: made[position].row.input_ids for position in order}

    assert rows([5, 0, 3]) == rows([0, 3, 5])


def test_trainer_can_run_a_step_on_it(built: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, processor = RegionLlava.from_pretrained(built()), RegionLlavaProcessor.from_pretrained(built())
    asked = Asked(open_conversations("scenes:easy", image_px=32))
    data = [asked.conversation(i, random.Random(i)) for i in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=2, remove_unused_columns=False, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    before = model.lm_head.weight.detach().clone()
    collate: Any = functools.partial(processor, for_training=True)
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate)  # pyright: ignore[reportArgumentType]
    trainer.train()
    assert not torch.equal(before, model.lm_head.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": Rates()}, "nothing would be trained"),
        ({"lora_rank": 2, "rates": Rates(projector=1e-3)}, "lora_rank needs rates.language_model"),
        ({"micro_batch_size": 3}, "micro_batch_size must be a divisor"),
    ],
)
def test_senseless_configurations_are_refused(
    changes: dict[str, Any], message: str, stage: Stage, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        stage(tmp_path, **changes)


def test_stages_train_what_llava_does() -> None:
    """Published: projector alone at 1e-3, batch 256; then with the language model at 2e-5, batch 128; 3 % warm-up."""
    first, second = align("m"), instruct("m")
    assert (first.rates.projector, first.rates.language_model, first.rates.tower) == (1e-3, 0, 0)
    assert (second.rates.projector, second.rates.language_model, second.rates.tower) == (2e-5, 2e-5, 0)
    assert (first.batch_size, second.batch_size) == (256, 128)
    for stage in (first, second):
        assert stage.optim.warmup_steps == pytest.approx(0.03 * stage.steps, rel=0.02)
