"""Whole command lines, each task on small random checkpoints, and what a wrong command says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, CLIPImageProcessor

from opencloc.cli import main
from opencloc.eval.registry import BENCHMARKS, TASKS
from opencloc.eval.run import parse_model
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.processor import ClocProcessor
from tests.eval import sets_on_disk as disk

WRITERS: dict[str, Callable[[Path], Any]] = {
    "imagenet": lambda root: disk.write_imagenet(root / "val", {"n01440764": "red", "n01443537": "green"}),
    "imagenet-v2": lambda root: disk.write_imagenet(root, {"0": "red", "1": "green"}),
    "coco-retrieval": lambda root: disk.write_karpathy(root, "coco"),
    "flickr30k-retrieval": lambda root: disk.write_karpathy(root, "flickr30k"),
    "sugarcrepe": disk.write_sugarcrepe,
    "vsr": disk.write_vsr,
    "coco-recognition": disk.write_coco,
    "coco-panoptic": disk.write_panoptic,
    "open-images-recognition": disk.write_open_images,
    "lvis-recognition": disk.write_lvis,
    "grit-retrieval": lambda root: disk.write_grit(root, parquet=True),
    "fg-ovd": disk.write_fg_ovd,
    "refcoco": disk.write_refer,
    "refcoco+": lambda root: disk.write_refer(root, "refcoco+"),
    "refcocog": lambda root: disk.write_refer(root, "refcocog", "umd"),
    "flickr30k-entities": disk.write_entities,
}
OPTIONS = {"imagenet": "?templates=none", "imagenet-v2": "?templates=none"}


@pytest.fixture(scope="module")
def models(
    tower_config: Callable[[str], Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Folders of a CLOC, a CLIP and a SigLIP checkpoint with random weights."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    clip = tower_config("clip")
    ClocModel(ClocConfig(clip_config=clip)).save_pretrained(root / "cloc")
    ClocProcessor.for_towers(clip, tokenizer).save_pretrained(root / "cloc")
    for family in ("clip", "siglip"):
        AutoModel.from_config(tower_config(family)).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
        CLIPImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / family)
    return {name: str(root / name) for name in ("cloc", "clip", "siglip")}


@pytest.mark.parametrize("task", BENCHMARKS)
def test_every_task_runs_from_the_command_line(
    task: str, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    WRITERS[task](data)
    place = f"{data}?images={data}/coco" if task == "fg-ovd" else f"{data}{OPTIONS.get(task, '')}"
    command = ["eval", task, "--data", place, "--out", str(out), "--resamples", "20", "--num-pictures", "1"]
    assert main([*command, "--model", *models.values()]) == 0
    path, printed = capsys.readouterr().out.split("\n", 1)
    assert path == str(out)
    assert printed.strip() == (out / "evaluation.md").read_text().strip()
    assert "| score in % | cloc, prompter | clip, crop | siglip, crop | of |" in printed
    assert f"| {task}: images used |" in printed
    results = json.loads((out / "evaluation.json").read_text())
    assert [(result["encoder"], result["task"]) for result in results] == [
        ("cloc, prompter", task),
        ("clip, crop", task),
        ("siglip, crop", task),
    ]
    grounds = [bool(result["scores"]) for result in results]
    assert grounds == ([True, False, False] if "refcoco" in task or "entities" in task else [True] * 3)
    for result in results:
        assert (
            result["of_images"] == result["images"] + sum(result["skipped"].get("images", {}).values())
            or not (result["scores"])
        )
        for score in result["scores"].values():
            assert set(score) == {"label", "value", "low", "high", "count", "of"}
            if score["count"]:
                assert 0 <= score["value"] <= 1
                assert score["low"] is None or 0 <= score["low"] <= score["value"] + 1e-9 <= score["high"] + 2e-9
    assert (out / "report.html").is_file()


def test_several_tasks_models_and_places_share_one_table(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.write_refer(tmp_path / "refer")
    disk.write_coco(tmp_path / "coco")
    places = [f"refcoco={tmp_path}/refer?split={split}" for split in ("val", "testA")]
    command = ["eval", "coco-recognition", "refcoco", "region-recognition", "--data", *places, f"{tmp_path}/coco"]
    source = [f"region_recognition=coco:{tmp_path}/coco?images={tmp_path}/coco/val2017"]
    out = ["--out", str(tmp_path / "out"), "--num-images", "1", "--regions", "roi", "--num-pictures", "1"]
    assert main([*command, *source, "--model", f"a={models['cloc']}@prompter", models["clip"], *out]) == 0
    printed = capsys.readouterr().out
    assert "| score in % | a | clip, roi | of |" in printed
    groups = dict.fromkeys(line.split(":")[0] for line in printed.splitlines() if line.startswith(("| r", "| c")))
    assert list(groups) == ["| coco-recognition", "| refcoco val", "| refcoco testA", "| region-recognition"]
    assert "| coco-recognition: images used | 1 of 3 | 1 of 3 |" in printed
    assert "* images: after the first 1 (1), in coco-recognition" in printed
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert {"region_top1", "coco-recognition instances_val2017 top1", "refcoco testA acc50"} <= metrics["a"].keys()
    # The public set and the source are two readings of the same boxes.
    assert metrics["a"]["region_top1"] == metrics["a"]["coco-recognition instances_val2017 top1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly", "--data", "x", "--model", "x"], "unknown task 'fly'; there are region-recognition, "),
        (["refcoco", "--data", "coco-recognition=x", "--model", "CLOC"], "the task coco-recognition is not asked for"),
        (["refcoco", "refcocog", "--data", "refcoco=x", "--model", "CLOC"], "no data for refcocog: --data refcocog="),
        (["refcoco", "--data", "refcoco=x", "y", "--model", "CLOC"], "--data y: every task has data of its own"),
        (["refcoco", "--data", "x", "--model", "CLOC"], "no such file: x/refcoco/refs(unc).p"),
        (["refcoco", "--data", "x", "--model", "CLOC", "CLOC"], "two models of one name"),
        (["refcoco", "--data", "x", "--model", "a/b/c@crop"], "a/b/c: no such folder"),
        (["imagenet-v2", "--data", "V2", "V2", "--model", "CLIP"], "the same set twice: imagenet-v2 "),
        (["imagenet-v2", "--data", "V2", "--model", "CLIP", "--regions", "prompter"], "which has no Prompter"),
        (["refcoco", "--data", "x", "--model", "x", "--max-missing", "2"], "max_missing must be in [0, 1], got 2"),
        (["--data", "scenes:easy", "--model", "CLIP", "--device", "cuda:99"], "device 'cuda:99' is not there"),
    ],
)
def test_wrong_commands_are_refused(
    arguments: list[str], message: str, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.write_imagenet(tmp_path, {"0": "red"})
    meant = {"CLOC": models["cloc"], "CLIP": models["clip"], "V2": str(tmp_path)}
    try:
        status = main(["eval", *(meant.get(argument, argument) for argument in arguments)])
    except SystemExit as stop:  # a field out of range, shown in tyro's frame
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    assert status != 0
    assert message in " ".join(captured.err.replace("│", " ").split())
    assert captured.out == ""


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("runs/a", (None, "runs/a", None)),
        ("clip_roi=runs/a@roi", ("clip_roi", "runs/a", "roi")),
        ("org/name@crop", (None, "org/name", "crop")),
    ],
)
def test_models_are_named_folders_with_a_way(spec: str, parts: tuple[Any, ...]) -> None:
    assert parse_model(spec) == parts


def test_a_way_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"embedded by prompter, crop, roi, maskclip, pool, not by 'magic'"):
        parse_model("runs/a@magic")


def test_every_task_says_what_is_asked_and_every_public_set_what_is_read() -> None:
    assert all((task.__doc__ or "").strip() for task in TASKS.values())
    assert all(benchmark.help for benchmark in BENCHMARKS.values())


def test_the_python_of_the_guide_runs(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (Path(__file__).parents[2] / "docs/guides/evaluate.md").read_text()
    (tmp_path / "runs/quickstart/cloc").mkdir(parents=True)
    (tmp_path / "runs/quickstart/cloc/model").symlink_to(models["cloc"])
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    exec(code, {})
    assert "| grounding: images used |" in capsys.readouterr().out


def test_more_runs_than_curves_can_be_told_apart_are_scored_all_the_same(
    models: dict[str, str], tmp_path: Path
) -> None:
    specs = []
    for seed in range(5):
        shutil.copytree(models["cloc"], tmp_path / f"run-{seed}" / "model")
        (tmp_path / f"run-{seed}" / "log.jsonl").write_text('{"step": 1, "image_text": 2}\n')
        specs.append(f"run-{seed}={tmp_path}/run-{seed}/model")
    data = ["--data", "scenes:easy", "--num-images", "3", "--num-pictures", "0", "--resamples", "0"]
    assert main(["eval", "image-retrieval", *data, "--out", str(tmp_path / "out"), "--model", *specs]) == 0
    assert "left out: 5 runs, of which 4 could be told apart" in (tmp_path / "out" / "report.html").read_text()
