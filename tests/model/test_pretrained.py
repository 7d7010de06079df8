"""The model that comes with the package loads by its name, offline, in every verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import opencloc
from opencloc.cli import main
from opencloc.model.cloc import ClocModel
from opencloc.model.loading import PACKAGED, PRETRAINED, model_path
from tests.test_docs import save_untrained


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_model_is_stored_in_float16_and_computes_in_float32(name: str) -> None:
    stored = load_file(PRETRAINED / name / "model.safetensors")
    assert {weights.dtype for weights in stored.values()} == {torch.float16}
    assert ClocModel.from_pretrained(name).dtype == torch.float32
    assert opencloc.load(name).model.dtype == torch.float32


def test_tiny_names_and_finds_what_is_in_a_generated_scene() -> None:
    predictor = opencloc.load("tiny")
    scene = opencloc.open_source("scenes:rich?seed=1", image_px=256)[0]
    image = predictor.encode(scene.image)
    names, _ = predictor.classify(image, boxes_px=scene.boxes * 256, names=["pizza", *scene.texts])
    assert names == list(scene.texts)
    _, scores = predictor.ground(image, [*scene.texts, "an elephant"])
    assert scores[:-1].min() > scores[-1]


def test_what_lies_in_the_working_directory_comes_before_a_packaged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_path("tiny") == str(PRETRAINED / "tiny")
    assert model_path(Path("tiny")) == str(PRETRAINED / "tiny")
    save_untrained(tmp_path / "tiny")
    assert model_path("tiny") == "tiny"
    assert len(opencloc.load("tiny").processor.tokenizer) < 500  # the folder's
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tiny").write_text("a file")
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="tiny: no such folder"):
        opencloc.load("tiny")


def test_verbs_take_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "region-recognition", "--data", "scenes:rich", "--num-images", "2", "--model", "tiny"]) == 0
    assert main(["export", "--model", "tiny", "--out", "clip"]) == 0
    assert (tmp_path / "clip" / "model.safetensors").is_file()


def test_provenance_says_what_made_the_weights_and_what_float16_costs() -> None:
    made = json.loads((PRETRAINED / "tiny" / "provenance.json").read_text())
    assert {"command", "commit", "hardware", "config"} <= set(made["training"])
    for name, score in made["scores"]["tiny"].items():
        assert score >= made["scores"]["trained"][name] - 0.001
