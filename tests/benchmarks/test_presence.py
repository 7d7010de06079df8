"""The benchmark of presence at its smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import presence
from opencloc.presets import tiny
from opencloc.train.build import build_model
from opencloc.train.checkpoint import save_model


def test_presence_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = build_model(tiny())
    save_model(tmp_path / "model", model, processor)
    presence.main(["--model", str(tmp_path / "model"), "--num-images", "3", "--out", str(tmp_path / "out")])
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["present"] == figures["absent"] > 0
    assert set(figures["auc"]) == {"score", "own box", "whole image"}
    assert "| score | 0." in capsys.readouterr().out


def test_auc_is_the_share_of_pairs_in_order() -> None:
    assert presence.auc(np.array([0.1, 0.9, 0.5, 0.5]), np.array([False, True, True, False])) == 0.875
