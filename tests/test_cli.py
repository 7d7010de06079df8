"""The command line: help, errors, and one small run through every step a user takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import CLIPModel

from opencloc.cli import VERBS, main
from opencloc.cli.arguments import together
from opencloc.config import to_json
from opencloc.presets import tiny
from tests.test_docs import save_untrained

TINY = ["--model.image-size", "32", "--model.vision-width", "32", "--model.vision-layers", "1", "--batch-size", "8"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h", "train"], ["data"], ["data", "--help"]])
def test_help_lists_every_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main([*verb.split(), "--help"])
    except SystemExit as stop:
        status = stop.code
    assert status == 0
    assert len(capsys.readouterr().out) > 100


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["fly"], 2, "no verb 'fly'"),
        (["data", "fly"], 2, "no verb 'data fly'"),
        (["train", "huge"], 1, "'huge' is neither a preset (tiny, small"),
        (["train", "nothere.json"], 1, "No such file or directory: 'nothere.json'"),
        (["train", "tiny", "--data.train", "scenes:rich?num_thing=3"], 1, "num_thing"),
        (["train", "tiny", "--model.init-from", "nothere"], 1, "nothere: no such folder"),
        (["train", "tiny", "--model.tokenizer", "nothere"], 1, "nothere: no such folder"),
        (["train", "tiny", "--device", "cuda:77"], 1, "device 'cuda:77' is not there"),
        (["eval", "--data", "scenes:easy", "--model", "nowhere"], 1, "nowhere: no such folder"),
        (["export", "--model", "nowhere", "--out", "x"], 1, "nowhere: no such folder"),
    ],
)
def test_errors_say_what_was_wrong_and_where(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    extra = ["--out", str(tmp_path / "run"), "--data.num-workers", "0"] if arguments[:2] == ["train", "tiny"] else []
    assert main([*arguments, *extra]) == status
    assert message in capsys.readouterr().err


def test_an_option_that_comes_twice_keeps_all_its_values() -> None:
    both = ["--data", "scenes:easy", "--batch-size", "4", "--data=grounding=scenes:rich"]
    assert together(both, "--data") == ["--batch-size", "4", "--data", "scenes:easy", "grounding=scenes:rich"]


def test_value_out_of_range_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "tiny", "--loss.region_weight", "-1"])
    assert "region_weight: must be greater than or equal to 0, got -1.0" in " ".join(capsys.readouterr().err.split())


def test_a_preset_starts_from_a_checkpoint_whose_sizes_nobody_gives_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_untrained(tmp_path / "clip")
    start = ["train", "tiny", "--model.init-from", str(tmp_path / "clip"), "--data.num-workers", "0", "--steps", "1"]
    assert main([*start, "--batch-size", "2", "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/run/model\n1 steps of 2 images")
    with pytest.raises(SystemExit):
        main([*start, "--model.patch-size", "32", "--out", str(tmp_path / "other")])
    assert "leave out model.patch_size" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_train_eval_and_export_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, clip = tmp_path / "run", tmp_path / "clip"
    arguments = ["train", "tiny", *TINY, "--steps", "2", "--data.num-workers", "0", "--precision", "fp32"]
    assert main([*arguments, "--out", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(run / "model")
    assert main([*arguments, "--out", str(clip), "--loss.region_weight", "0"]) == 0
    models = [f"cloc={run}/model", f"clip_crop={clip}/model@crop", f"clip_roi={clip}/model@roi"]
    scores = tmp_path / "scores"
    data = ["--data", "scenes:rich?num_things=12&seed=1", "--num-images", "6", "--num-pictures", "2"]
    assert main(["eval", *data, "--out", str(scores), "--model", *models]) == 0
    metrics = json.loads((scores / "metrics.json").read_text())
    assert list(metrics) == ["cloc", "clip_crop", "clip_roi"]
    for name, keys in metrics.items():
        expected = {"region_top1", "region_macc", "i2t_r1", "t2i_r1"}
        assert set(keys) == expected | ({"ground_acc50", "ground_miou"} if name == "cloc" else set())
        assert all(0 <= value <= 1 for value in keys.values())
    assert "<svg" in (scores / "report.html").read_text()
    assert main(["export", "--model", str(run / "model"), "--out", str(tmp_path / "export")]) == 0
    assert isinstance(CLIPModel.from_pretrained(tmp_path / "export"), CLIPModel)


def test_a_saved_configuration_is_a_preset_too(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(to_json(tiny()))
    arguments = ["train", str(tmp_path / "run.json"), *TINY, "--steps", "1", "--data.num-workers", "0"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 1
