"""`opencloc data features`: what the tower made, once, beside all that was known of the images; stopped and resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from opencloc.cli import main
from opencloc.data import encode as encoding
from opencloc.data.sample import Sample
from opencloc.data.sidecar import SidecarRow, sidecar_path, write_sidecar
from opencloc.data.sources.features import Features
from opencloc.data.sources.spec import open_source
from opencloc.data.tars.shards import Shards, ShardWriter
from opencloc.model import towers
from opencloc.model.cloc import ClocModel
from opencloc.model.loading import load_model
from opencloc.model.predictor import load
from tests.helpers.encoded import features_of, save_cloc, write_labelled
from tests.helpers.tars import file_bytes, picture


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_labelled(tmp_path / "in")


@pytest.fixture
def cloc(tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    return save_cloc(tmp_path / "cloc", tower_config("clip"), tokenizer)


@pytest.mark.parametrize("prompter", ["cross", "pool_cross"])
@pytest.mark.parametrize("family", towers.FAMILIES)
def test_features_are_what_the_model_encodes_and_all_else_is_as_it_was(
    family: str, prompter: str, tower_config: Callable[[str], Any], tokenizer: Any, data: str, tmp_path: Path
) -> None:
    model = save_cloc(tmp_path / "cloc", tower_config(family), tokenizer, prompter)
    report = features_of(data, model, tmp_path / "out")
    assert (report.images, report.tars, report.skipped) == (10, 3, {})
    predictor, images, stored = load(model), Shards(data), Features(str(tmp_path / "out"))
    assert ("pool_input" in stored.info.shapes) == (family == "clip" and prompter == "pool_cross")
    assert stored.size == images.size
    for number in range(images.size):
        sample, encoded = images[number], stored[number]
        assert (sample.key, sample.captions, sample.texts, sample.size_px) == (
            encoded.key,
            encoded.captions,
            encoded.texts,
            encoded.size_px,
        )
        assert np.array_equal(sample.boxes, encoded.boxes)
        features = predictor.encode(sample.image).features
        for name in stored.info.shapes:
            now, then = getattr(features, name), getattr(encoded.features, name)
            assert then.dtype == torch.float16
            torch.testing.assert_close(then.float(), now, atol=1e-3, rtol=1e-3)
        assert encoded.features.grid == features.grid


def test_a_plain_clip_is_encoded_for_the_prompter_that_will_be_trained(cloc: str, data: str, tmp_path: Path) -> None:
    assert main(["export", "--model", cloc, "--out", str(tmp_path / "clip")]) == 0
    features_of(data, str(tmp_path / "clip"), tmp_path / "cross")
    features_of(data, str(tmp_path / "clip"), tmp_path / "pool", prompter="pool_cross")
    cross, pool = (Features(str(tmp_path / name)) for name in ("cross", "pool"))
    assert cross[0].features.pool_input is None
    pool_input = pool[0].features.pool_input
    assert pool_input is not None
    assert pool_input.shape == (1, 17, 32)
    assert cross.info.vision_tower == pool.info.vision_tower


def test_labels_beside_the_tars_of_images_fit_the_tars_of_features(cloc: str, data: str, tmp_path: Path) -> None:
    for url in Shards(data).urls:
        keys = [sample.key for sample in map(Shards(url).__getitem__, range(Shards(url).size))]
        rows = [
            SidecarRow(key=key, boxes=np.array([[0, 0, 0.5, 1]]), texts=(f"new {key}",), scores=np.ones(1))
            for key in keys
        ]
        write_sidecar(sidecar_path(url, "new"), rows, {})
    features_of(data, cloc, tmp_path / "out")
    relabelled = open_source(f"features:{tmp_path}/out?sidecar={data}/new", features=True)
    assert [relabelled[i].texts for i in (0, 9)] == [("new k0",), ("new k9",)]


def test_a_stopped_command_goes_on_and_ends_with_the_same_files(
    cloc: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(data) / "00001.tar"
    broken.write_bytes(broken.read_bytes().replace(b"\x89PNG", b"\x00PNG", 1))  # one image of the second tar
    whole = features_of(data, cloc, tmp_path / "whole")
    assert whole.skipped == {"broken image": 1}

    forward, calls = towers.vision_forward, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # in the second tar
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(towers, "vision_forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        features_of(data, cloc, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["00000.tar"]
    with pytest.raises(ValueError, match="was not finished"):
        open_source(f"features:{tmp_path}/out", features=True)
    (tmp_path / "out" / "00001.tar").write_bytes(b"killed before its figures were written")
    (tmp_path / "out" / ".00001.tar.elsewhere-1.partial").write_bytes(b"killed")
    assert features_of(data, cloc, tmp_path / "out") == whole
    assert "going on at image 4 of 10" in capsys.readouterr().err
    made, expected = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "whole")
    )
    assert made == expected

    calls.clear()
    assert features_of(data, cloc, tmp_path / "out") == whole  # once more
    assert "is finished: nothing is left to do" in capsys.readouterr().err
    assert calls == []


def test_a_folder_of_something_else_is_left_alone(cloc: str, data: str, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="holds tars already"):
        features_of(data, cloc, Path(data))
    features_of(data, cloc, tmp_path / "out")
    with pytest.raises(FileExistsError, match="num_images: 10 there, 5 asked for"):
        features_of(data, cloc, tmp_path / "out", num_images=5)


def test_two_processes_do_not_write_in_one_folder(cloc: str, data: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out" / ".lock"), pytest.raises(ValueError, match="another process is writing"):
        features_of(data, cloc, tmp_path / "out")
    assert features_of(data, cloc, tmp_path / "out").images == 10


def test_images_that_cannot_be_used_are_counted(cloc: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in {"good.png": file_bytes(picture()), "bad.png": b"no image", "note.md": b""}.items():
        (folder / name).write_bytes(data)
    report = features_of(str(folder), cloc, tmp_path / "out")
    assert report.images == 1
    assert report.skipped == {"broken image": 1, "not an image": 1}
    assert str(report).startswith("features of 1 images in 1 tars, ")
    assert json.loads((tmp_path / "out/00000_stats.json").read_text()) == {
        "successes": 1,
        "skipped": {"broken image": 1},
    }
    (folder / "good.png").unlink()
    with pytest.raises(ValueError, match=r"none of 1 images can be used; skipped: .*broken image \(1\)"):
        features_of(str(folder), cloc, tmp_path / "none")
    assert {path.name for path in (tmp_path / "none").iterdir()} <= {".lock"}


def test_features_that_float16_cannot_hold_are_counted(cloc: str, data: str, tmp_path: Path) -> None:
    model = load_model(ClocModel, cloc)
    with torch.no_grad():
        model.clip.vision_model.encoder.layers[-1].mlp.fc2.bias.fill_(1e5)
    model.save_pretrained(cloc)
    with pytest.raises(ValueError, match=r"features are not finite in float16 \(10\)"):
        features_of(data, cloc, tmp_path / "out")


def test_images_without_end_need_a_number(cloc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="say how many images by --num-images"):
        features_of("scenes:easy", cloc, tmp_path / "out")
    monkeypatch.setattr(encoding, "SAMPLES_PER_TAR", 3)
    report = features_of("scenes:easy", cloc, tmp_path / "out", num_images=7, num_workers=1)
    assert (report.images, report.tars) == (7, 3)
    scenes, stored = open_source("scenes:easy", image_px=32), Features(str(tmp_path / "out"))
    assert [stored[i].texts for i in range(7)] == [scenes[i].texts for i in range(7)]


def test_keys_that_a_tar_cannot_hold_twice_are_changed(cloc: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.b.png", "a_b.png"):
        (folder / name).write_bytes(file_bytes(picture()))
    assert features_of(str(folder), cloc, tmp_path / "out").images == 2
    assert {Features(str(tmp_path / "out"))[i].key for i in (0, 1)} == {"a_b", "sample-1"}


def test_tars_of_one_name_in_several_folders_are_numbered(cloc: str, data: str, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "more")
    pattern = f"shards:{tmp_path}/{{in,more}}/{{00000..00002}}.tar"
    assert features_of(pattern, cloc, tmp_path / "out", num_images=11).images == 11
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [f"0000{i}.tar" for i in range(4)]


def test_the_command_says_where_and_how_much(
    cloc: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["data", "features", "--model", cloc, "--data", data, "--out", out, "--num-workers", "0"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == out
    assert second.startswith("features of 10 images in 3 tars, 0.00 GB, ")


def test_an_image_smaller_than_its_jpeg_keeps_its_place_in_the_square(cloc: str, tmp_path: Path) -> None:
    """JPEGs are decoded no larger than needed: the size that is stored is that of the pixels that were encoded."""
    image = Image.fromarray(np.zeros((330, 500, 3), dtype=np.uint8))
    with ShardWriter(str(tmp_path / "in"), image_format="jpg") as writer:
        writer.write(Sample(key="a", image=image))
    features_of(str(tmp_path / "in"), cloc, tmp_path / "out")
    assert Features(str(tmp_path / "out"))[0].size_px == open_source(str(tmp_path / "in"), image_px=32)[0].size_px
