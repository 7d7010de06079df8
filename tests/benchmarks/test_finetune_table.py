"""The table of scores before and after fine-tuning."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import finetune_table
from opencloc.cli import main
from tests.test_docs import save_untrained


def result(encoder: str, top1: float | None, task: str = "region-recognition") -> dict[str, Any]:
    return {"encoder": encoder, "task": task, "scores": {"top1": {"label": "top-1", "value": top1}}}


def write(folder: Path, *results: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(results))
    return folder


def test_seeds_are_averaged_and_compared_with_the_first_column(tmp_path: Path) -> None:
    photos = write(tmp_path / "photos", result("before", 0.10), result("after-0", 0.20), result("after-1", 0.30))
    more = write(tmp_path / "more", result("before", None), result("after-0", 0.5), result("after-1", 0.5))
    lines = finetune_table.before_and_after(finetune_table.read([photos, more])).splitlines()
    assert lines[0] == "| % | before | after | after − before |"
    assert lines[2] == "| photos, region recognition: top-1 | 10.0 | 25.0 ± 7.1 | +15.0 |"
    assert lines[3] == "| more, region recognition: top-1 | – | 50.0 ± 0.0 | – |"


def test_seeds_of_which_one_lacks_a_score_are_refused(tmp_path: Path) -> None:
    photos = write(tmp_path / "photos", result("after-0", 0.20), result("after-1", None))
    with pytest.raises(ValueError, match="region-recognition top-1 of after: 1 of 2 seeds"):
        finetune_table.read([photos])


def test_it_reads_what_the_evaluation_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_untrained(tmp_path / "model")
    models = [f"before={tmp_path}/model@pool", f"after-0={tmp_path}/model", f"after-1={tmp_path}/model"]
    data = ["--data", "scenes:rich?num_things=12&seed=1", "--num-images", "4", "--num-pictures", "0"]
    assert main(["eval", *data, "--out", str(tmp_path / "scenes"), "--model", *models]) == 0
    monkeypatch.setattr(sys, "argv", ["finetune_table", str(tmp_path / "scenes"), "--out", str(tmp_path / "table")])
    finetune_table.main()
    text = (tmp_path / "table" / "README.md").read_text()
    for task in ("region recognition: top-1", "region retrieval: region to text R@1", "grounding", "image retrieval"):
        assert f"| scenes, {task}" in text
    figures = json.loads((tmp_path / "table" / "figures.json").read_text())
    assert all(len(one["values"]["after"]) == 2 for one in figures)
