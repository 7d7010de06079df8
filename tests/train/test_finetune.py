"""Training that starts from others' checkpoints: at another image size, with long texts, by the preset for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from opencloc.cli import main
from opencloc.config import ModelConfig
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.export import export_clip
from opencloc.model.processor import ClocProcessor, save_tokenizer
from opencloc.presets import finetune
from opencloc.train.build import build_model, image_size
from opencloc.train.checkpoint import save_model
from opencloc.train.loop import train
from tests.train.runs import MakeConfig, cut_off, log


@pytest.fixture
def starts(tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> dict[str, Path]:
    """A CLIP and a CLOC checkpoint for 32 px."""
    torch.manual_seed(0)
    towers = tower_config("clip")
    model, processor = ClocModel(ClocConfig(clip_config=towers)), ClocProcessor.for_towers(towers, tokenizer)
    save_model(tmp_path / "cloc", model, processor)
    return {"clip": export_clip(model, processor, tmp_path / "clip"), "cloc": tmp_path / "cloc"}


@pytest.mark.parametrize("kind", ["clip", "cloc"])
def test_a_run_at_another_size_is_saved_and_resumed_at_that_size(
    config: MakeConfig, starts: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    run = config(tmp_path / "run", model=ModelConfig(init_from=str(starts[kind]), image_size=48), steps=4)
    assert image_size(run, None) == 48
    folder = train(run)
    assert (ClocModel.from_pretrained(folder).grid, ClocProcessor.from_pretrained(folder).image_size) == ((6, 6), 48)
    finished = (folder / "model.safetensors").read_bytes()
    cut_off(tmp_path / "run", after=2)
    train(run)
    assert (folder / "model.safetensors").read_bytes() == finished
    assert len(log(tmp_path / "run")) == 4


@pytest.mark.parametrize("kind", ["clip", "cloc"])
def test_the_checkpoints_own_size_and_none_are_the_same(
    config: MakeConfig, starts: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    own, none = (
        build_model(config(tmp_path, model=ModelConfig(init_from=str(starts[kind]), image_size=side)))[0].state_dict()
        for side in (32, None)
    )
    assert own.keys() == none.keys()
    assert all(torch.equal(own[name], value) for name, value in none.items())


def test_a_size_that_the_checkpoint_cannot_have_leaves_the_folder_free(
    config: MakeConfig, starts: dict[str, Path], tmp_path: Path
) -> None:
    run = config(tmp_path / "run", model=ModelConfig(init_from=str(starts["clip"]), image_size=36))
    with pytest.raises(ValueError, match="multiple of its patches, 8 pixels; got 36"):
        train(run)
    train(replace(run, steps=1, model=replace(run.model, image_size=40)))


def test_long_texts_are_read_to_their_end_from_training_to_export(
    config: MakeConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A text tower of 120 tokens whose tokenizer still says 77, as LongCLIP's and FG-CLIP's do."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = sizes | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 120}
    towers = CLIPConfig(text_config=text, vision_config=sizes | {"patch_size": 8, "image_size": 32}, projection_dim=16)
    CLIPModel(towers).save_pretrained(tmp_path / "long")
    save_tokenizer(tokenizer, tmp_path / "long", max_length=77)

    folder = train(config(tmp_path / "run", model=ModelConfig(init_from=str(tmp_path / "long")), steps=1))
    model, processor = ClocModel.from_pretrained(folder).eval(), ClocProcessor.from_pretrained(folder)
    dogs, other_end = "a dog " * 45 + "red", "a dog " * 45 + "cat"
    rows = processor.tokenize([dogs, other_end])
    assert 77 < rows.shape[1] <= 120
    with torch.no_grad():
        plain, packed = model.encode_text(rows), model.encode_text(processor.pack([dogs, other_end]))
    torch.testing.assert_close(plain, packed)
    assert not torch.allclose(plain[0], plain[1])

    export = export_clip(model, processor, tmp_path / "export")
    own: Any = PreTrainedTokenizerFast.from_pretrained(export)
    assert own.model_max_length == 120
    assert own([dogs], truncation=True)["input_ids"][0] == rows[0].tolist()
    again: Any = CLIPModel.from_pretrained(export).eval()
    with torch.no_grad():
        theirs = torch.nn.functional.normalize(again.get_text_features(input_ids=rows).pooler_output, dim=-1)
    torch.testing.assert_close(theirs, plain)


def test_the_preset_trains_from_a_checkpoint_and_asks_for_one(
    starts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--steps", "1", "--batch-size", "4", "--data.train", "scenes:easy", "--data.num-workers", "0"]
    assert main(["train", "finetune", *short, "--out", str(tmp_path / "run")]) == 1
    assert "finetune starts from a checkpoint: --model.init-from FOLDER_OR_HUB_ID" in capsys.readouterr().err
    start = ["--model.init-from", str(starts["clip"])]
    assert main(["train", "finetune", *start, *short, "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/run/model\n")
    assert finetune("CLIP").model == ModelConfig(init_from="CLIP")
    assert 0 < finetune("CLIP").optim.lr_factors.vision_tower < finetune("CLIP").optim.lr_factors.prompter
