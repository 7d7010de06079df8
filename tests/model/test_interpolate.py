"""Weights between the start and the end of a fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from opencloc.cli import main
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.export import export_clip
from opencloc.model.interpolate import interpolated_weights
from opencloc.model.processor import ClocProcessor
from opencloc.model.resize import at_image_size

SaveModel = Callable[..., Path]


@pytest.fixture
def save(tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> SaveModel:
    """(name, seed, image size or width) -> a folder with a model of these random weights."""

    def save(name: str, seed: int, *, image_size: int = 32, as_clip: bool = False, **changes: Any) -> Path:
        torch.manual_seed(seed)
        config = tower_config("clip")
        config.projection_dim = changes.pop("embed_dim", 24)
        pair = ClocModel(ClocConfig(clip_config=config, **changes)), ClocProcessor.for_towers(config, tokenizer)
        pair = at_image_size(*pair, image_size)
        if as_clip:
            return export_clip(*pair, tmp_path / name)
        for part in pair:
            part.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return ClocModel.from_pretrained(folder).state_dict()


def between(start: Path, end: Path, share: float, out: Path) -> dict[str, torch.Tensor]:
    assert (
        main(["interpolate", "--start", f"{start}", "--model", f"{end}", "--share", f"{share}", "--out", f"{out}"]) == 0
    )
    assert ClocProcessor.from_pretrained(out).image_size == ClocProcessor.from_pretrained(end).image_size
    return weights_of(out)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_weights_lie_on_the_line_from_the_start_to_the_end(save: SaveModel, tmp_path: Path, share: float) -> None:
    start, end = save("start", 0), save("end", 1)
    found, first, last = between(start, end, share, tmp_path / "out"), weights_of(start), weights_of(end)
    for name, value in found.items():
        torch.testing.assert_close(value, (1 - share) * first[name] + share * last[name])
        assert share or torch.equal(value, first[name])
        assert share < 1 or torch.equal(value, last[name])


@pytest.mark.parametrize("as_clip", [True, False])
def test_region_parts_that_the_start_lacks_or_never_trained_are_those_of_the_end(
    save: SaveModel, tmp_path: Path, as_clip: bool
) -> None:
    start, end = save("start", 0, as_clip=as_clip, regions_trained=False), save("end", 1)
    first = ClocModel.from_clip(start) if as_clip else ClocModel.from_pretrained(start)
    towers, last = first.state_dict(), weights_of(end)
    for name, value in between(start, end, 0.0, tmp_path / "out").items():
        assert torch.equal(value, towers[name] if name.startswith("clip.") else last[name]), name


def test_a_start_of_another_image_size_is_brought_to_that_of_the_end(save: SaveModel, tmp_path: Path) -> None:
    start, end = save("start", 0), save("end", 1, image_size=48)
    expected, _ = at_image_size(ClocModel.from_pretrained(start), ClocProcessor.from_pretrained(start), 48)
    found = between(start, end, 0.0, tmp_path / "out")
    assert all(torch.equal(value, found[name]) for name, value in expected.state_dict().items())


def test_models_that_do_not_fit_are_refused_by_the_name_of_a_weight(
    save: SaveModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*arguments: str) -> str:
        assert main(["interpolate", "--out", str(tmp_path / "out"), *arguments]) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    end = ["--model", str(save("end", 1))]
    wide = refusal(*end, "--start", str(save("wide", 0, embed_dim=16)))
    assert "clip.visual_projection.weight is (16, 32) at the start, (24, 32) at the end" in wide
    other = refusal(*end, "--start", str(save("other", 0, prompter="encoder")))
    assert "only the start has prompt_encoder.text_kind" in other
    with pytest.raises(SystemExit):
        refusal(*end, "--start", end[1], "--share", "1.5")
    assert "share must be in [0, 1], got 1.5" in " ".join(capsys.readouterr().err.split())


def test_nothing_is_replaced(save: SaveModel, capsys: pytest.CaptureFixture[str]) -> None:
    end = save("end", 1)
    before = {file.name: file.read_bytes() for file in end.iterdir()}
    assert main(["interpolate", "--start", str(end), "--model", str(end), "--out", str(end)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in end.iterdir()} == before


def test_the_ends_are_exact_in_low_precision_too() -> None:
    start, end = {"w": torch.randn(50).bfloat16()}, {"w": torch.randn(50).bfloat16(), "v": torch.ones(1)}
    assert torch.equal(interpolated_weights(start, end, 0.0)["w"], start["w"])
    assert torch.equal(interpolated_weights(start, end, 1.0)["w"], end["w"])
    assert torch.equal(interpolated_weights(start, end, 0.0)["v"], end["v"])
