"""The examples run: the notebook cell by cell, and the program that names and finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import opencloc
from examples.name_and_find import name_and_find, stacked
from tests.test_docs import save_untrained

ROOT = Path(__file__).parents[1]


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in json.loads((ROOT / "examples" / "regions.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # none of a machine's own
            exec("".join(cell["source"]), names)
    assert names["regions"].shape == (3, 128)
    assert len(names["found_px"]) == len(names["texts"])


def test_naming_and_finding_draws_the_photo_twice(tmp_path: Path) -> None:
    save_untrained(tmp_path)
    sample = opencloc.open_source("scenes:rich?seed=1", image_px=96)[0]
    drawn = name_and_find(opencloc.load(tmp_path), sample, ["pizza", *sample.texts])
    assert isinstance(drawn, Image.Image)
    assert drawn.size == (2 * 96 + 8, 96)
    left, right = np.asarray(drawn)[:, :96], np.asarray(drawn)[:, 104:]
    photo = np.asarray(sample.image)
    assert (left != photo).any()
    assert (right != photo).any()
    assert stacked([drawn, drawn]).size == (200, 200)
