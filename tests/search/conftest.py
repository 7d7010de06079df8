"""Shared by the tests of photo libraries: a small random model, a folder of photos, an index of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.processor import ClocProcessor
from opencloc.search.index import IndexConfig, run_index
from opencloc.search.query import Library

pytest.importorskip("lancedb", reason="needs the extra `search`")


@pytest.fixture(scope="session")
def make_model(tokenizer, tower_config):
    """Saves a small random model into a folder, and returns the folder."""

    def make(folder: Path, seed: int = 0) -> str:
        torch.manual_seed(seed)
        towers = tower_config("clip")
        model = ClocModel(ClocConfig(clip_config=towers)).eval()
        with torch.no_grad():  # so that regions of one photo differ, as a trained model's do
            for weight in model.clip.vision_model.parameters():
                weight.mul_(3)
        model.save_pretrained(folder)
        ClocProcessor.for_towers(towers, tokenizer).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def model(make_model, tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


def photo(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """A photo of rectangles of many colours."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = (int(rng.integers(0, side - 12)) for side in (width, height))
        right, bottom = (int(start + rng.integers(6, 24)) for start in (x, y))
        pen.rectangle((x, y, right, bottom), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def save_photos(folder: Path, count: int, first: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03d}.png" for number in range(first, first + count)]
    for number, path in enumerate(paths, start=first):
        photo(number).save(path)
    return paths


@pytest.fixture(scope="session")
def photos_folder(tmp_path_factory) -> Path:
    """Eight photos, three of them in a folder below."""
    folder = tmp_path_factory.mktemp("photos")
    save_photos(folder, 5)
    save_photos(folder / "holiday", 3, first=5)
    return folder


@pytest.fixture(scope="session")
def index(photos_folder, model, tmp_path_factory) -> str:
    """An index of those photos, only read."""
    out = str(tmp_path_factory.mktemp("index") / "library")
    report = run_index(IndexConfig(photos=(str(photos_folder),), out=out, model=model, device="cpu"))
    assert report.photos == 8
    return out


@pytest.fixture(scope="session")
def library(index) -> Library:
    return Library.open(index, device="cpu")
