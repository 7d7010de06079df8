"""`opencloc mllm build` and `opencloc mllm train` as a user calls them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from opencloc.cli import main


def test_a_model_is_built_aligned_and_instructed(
    encoder: Callable[[str], Path],
    language: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--encoder", str(encoder("cloc")), "--llm", str(language("qwen2")), "--out", str(tmp_path / "start")]
    assert main(["mllm", "build", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "start")
    start = tmp_path / "start"
    for stage in ("align", "instruct"):
        options = ["--model", str(start), "--out", str(tmp_path / stage), "--data.train", "scenes:easy", "--steps", "2"]
        options += ["--batch-size", "4", "--data.num-workers", "0", "--device", "cpu", "--optim.warmup-steps", "1"]
        assert main(["mllm", "train", stage, *options]) == 0
        said = capsys.readouterr()
        assert said.out.splitlines()[0] == str(tmp_path / stage / "model")
        assert main(["mllm", "train", stage, *options]) == 0
        assert "is finished" in capsys.readouterr().err
        start = tmp_path / stage / "model"
    config = tmp_path / "instruct" / "config.json"
    again = ["--out", str(tmp_path / "again"), "--steps", "1"]
    assert main(["mllm", "train", str(config), *again]) == 0


def test_errors_are_one_line_that_says_what_to_do(
    encoder: Callable[[str], Path], built: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "rows.json").write_text(
        json.dumps([{"image": "a.jpg", "conversations": [{"from": "bot", "value": ""}]}])
    )
    rows = f"llava:{tmp_path}/rows.json?images={tmp_path}"
    train = ["mllm", "train", "align", "--out", str(tmp_path / "run"), "--data.num-workers", "0"]
    cases: list[tuple[list[str], str]] = [
        (train, "needs --model FOLDER"),
        (["mllm", "train", "pretrain"], "neither a stage (align, instruct) nor a .json"),
        ([*train, "--model", str(encoder("cloc"))], "not one of `opencloc mllm build`"),
        ([*train, "--model", str(tmp_path / "none")], "no such folder"),
        ([*train, "--model", str(built()), "--data.train", "llava:rows.json"], "FILE?images=DIR"),
        ([*train, "--model", str(built()), "--data.train", rows], "row 0: unknown role"),
        (["mllm", "build", "--encoder", "x/y/z", "--llm", "a", "--out", str(tmp_path / "b")], "x/y/z: no such folder"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 1
        said = capsys.readouterr()
        assert message in said.err
        assert "Traceback" not in said.err
        assert said.out == ""


def test_help_names_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mllm", "train"]) == 0
    assert "instruct" in capsys.readouterr().out
