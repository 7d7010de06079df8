"""Model cards: what they say is what was given, and their Python runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import PreTrainedTokenizerFast

from opencloc.cli import main
from opencloc.model.card import MARK, CardConfig, model_card, write_card
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.processor import ClocProcessor
from opencloc.train.checkpoint import save_model


@pytest.fixture
def save(tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., Path]:
    def save(**region: Any) -> Path:
        torch.manual_seed(0)
        config = tower_config("clip")
        model = ClocModel(ClocConfig(clip_config=config, **region))
        save_model(tmp_path / "model", model, ClocProcessor.for_towers(config, tokenizer))
        return tmp_path / "model"

    return save


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


@pytest.mark.parametrize(
    "region",
    [{}, {"prompter": "roi"}, {"prompter": "pool"}, {"regions_trained": False}, {"grounding_trained": False}],
    ids=lambda region: str(region),
)
def test_the_python_of_a_card_runs_on_the_model_beside_it(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, region: dict[str, Any]
) -> None:
    folder = save(**region)
    Image.new("RGB", (300, 200), "teal").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(code[0].replace("FOLDER_OR_HUB_ID", str(folder)), names)
    answers = region.get("regions_trained", True)
    assert ("boxes_px" in names) == (not region)  # only a Prompter that takes texts grounds
    assert ("names" in names) == answers
    assert ("similarities" in names) != answers


def test_a_card_says_what_it_was_told_and_what_it_was_not(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save()
    assert "Not said here: started from, trained on, licence" in (folder / "README.md").read_text()
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "evaluation.md").write_text("| score in % | before | after | of |\n|---|---:|---:|---|\n")
    options = ["--repo", "me/cloc", "--base-model", "openai/clip-vit-base-patch16", "--license", "cc-by-nc-4.0"]
    options += ["--data", "zzliang/GRIT", "COCO train2017", "--evaluation", str(tmp_path / "scores")]
    assert main(["card", "--model", str(folder), *options]) == 0
    card = (folder / "README.md").read_text()
    assert metadata(card) == {
        "library_name": "opencloc",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["cloc", "region-aware", "clip"],
        "license": "cc-by-nc-4.0",
        "base_model": "openai/clip-vit-base-patch16",
        "datasets": ["zzliang/GRIT"],
    }
    for words in ('opencloc.load("me/cloc")', "COCO train2017", "| score in % | before | after | of |"):
        assert words in card
    assert "Not said here" not in card


def test_what_is_no_hub_id_stays_out_of_the_metadata(tower_config: Callable[[str], Any]) -> None:
    card = model_card(ClocConfig(clip_config=tower_config("siglip")), base_model="runs/a/model", data=["my own photos"])
    assert metadata(card).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "* Started from: runs/a/model\n* Trained on: my own photos\n" in card


def test_a_card_edited_by_hand_is_left_alone(save: Callable[..., Path]) -> None:
    folder = save()
    mine = (folder / "README.md").read_text().replace(MARK, "")
    (folder / "README.md").write_text(mine)
    with pytest.raises(ValueError, match="not written by opencloc, or edited"):
        write_card(CardConfig(model=str(folder), license="mit"))
    assert (folder / "README.md").read_text() == mine


def test_an_evaluation_without_a_table_is_refused(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save()
    before = (folder / "README.md").read_text()
    with pytest.raises(ValueError, match=r"evaluation\.md is not there"):
        write_card(CardConfig(model=str(folder), evaluation=str(tmp_path)))
    assert (folder / "README.md").read_text() == before
