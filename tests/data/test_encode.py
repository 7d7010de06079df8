"""`opencloc data features`: what the tower made, once, beside all that was known of the images; stopped and resumed."""

from __future__ import annotations

import itertools
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
from tests.helpers.records import assert_same_record
from tests.helpers.tars import file_bytes, picture


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_labelled(tmp_path / "in")


@pytest.fixture
def cloc(tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    return save_cloc(tmp_path / "cloc", tower_config("clip"), tokenizer)


def _at_calls(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], Any]]) -> None:
    """Lets something happen when the tower is run for the first, second, ... time."""
    forward, calls = towers.vision_forward, itertools.count(1)

    def watched(*arguments: Any) -> Any:
        actions.get(next(calls), lambda: None)()
        return forward(*arguments)

    monkeypatch.setattr(towers, "vision_forward", watched)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
        assert_same_record(sample, encoded)
        assert sample.size_px == encoded.size_px
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

    def stop() -> None:
        raise KeyboardInterrupt

    _at_calls(monkeypatch, {4: stop})  # in the second tar
    with pytest.raises(KeyboardInterrupt):
        features_of(data, cloc, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["00000.tar"]
    with pytest.raises(ValueError, match="was not finished"):
        open_source(f"features:{tmp_path}/out", features=True)
    (tmp_path / "out" / "00001.tar").write_bytes(b"killed before its figures were written")
    (tmp_path / "out" / ".00001.tar.elsewhere-1.partial").write_bytes(b"killed")
    assert features_of(data, cloc, tmp_path / "out") == whole
    assert "going on at image 4 of 10" in capsys.readouterr().err
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")

    _at_calls(monkeypatch, {1: stop})
    assert features_of(data, cloc, tmp_path / "out") == whole  # once more
    assert "is finished: nothing is left to do" in capsys.readouterr().err


def test_what_was_lost_of_a_finished_folder_is_made_again(cloc: str, data: str, tmp_path: Path) -> None:
    whole = features_of(data, cloc, out := tmp_path / "out")
    expected = _contents(out)
    (out / "00000.tar").unlink()
    (out / "00001_stats.json").write_text("{}")
    (out / "00002_stats.json").unlink()
    assert features_of(data, cloc, out) == whole
    assert _contents(out) == expected


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_tar_whose_source_goes_missing_is_left_to_another_run(
    num_workers: int,
    cloc: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = features_of(data, cloc, tmp_path / "whole")
    lost, out = Path(data) / "00001.tar", tmp_path / "out"
    shards = open_source(data)
    monkeypatch.setattr(encoding, "open_source", lambda *_, **__: shards)  # counted while it was there
    lost.rename(tmp_path / "away")
    report = features_of(data, cloc, out, num_workers=num_workers)
    assert (report.images, report.tars, report.exit_code, report.skipped) == (6, 2, 1, {})
    assert list(report.failed) == [f"{out}/00001.tar"]
    assert "1 tar given up:\n" in str(report)
    assert str(report).endswith("Run the same command again to go on; finished tars are kept.")
    assert f"{out}/00001.tar: attempt 3 of 3 failed: {lost}: missing shard" in capsys.readouterr().err
    assert open_source(str(out), features=True).size == 6

    (tmp_path / "away").rename(lost)
    assert features_of(data, cloc, out, num_workers=num_workers) == whole
    assert "going on at image 6 of 10" in capsys.readouterr().err
    assert _contents(out) == _contents(tmp_path / "whole")


def test_a_tar_whose_source_comes_back_is_made_after_the_others(
    cloc: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = features_of(data, cloc, tmp_path / "whole")
    source, away = Path(data) / "00001.tar", tmp_path / "away"
    # the tars have batches of 3 + 1, 3 + 1, 2 images: the second is lost when it is half read
    _at_calls(monkeypatch, {3: lambda: source.rename(away), 4: lambda: away.rename(source)})
    assert features_of(data, cloc, tmp_path / "out") == whole
    assert "00001.tar: attempt 1 of 3 failed: " in (said := capsys.readouterr().err)
    assert "attempt 2" not in said
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


def test_tars_that_are_missing_from_the_start_are_refused(cloc: str, data: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 of 5 tars cannot be read, first .*/in/00003\.tar"):
        features_of(f"{data}/{{00000..00004}}.tar", cloc, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_any_tar_nothing_is_left_behind(
    cloc: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_source(data)
    monkeypatch.setattr(encoding, "open_source", lambda *_, **__: shards)
    shutil.move(data, tmp_path / "away")
    with pytest.raises(ValueError, match=r"none of 10 images can be used\n3 tars given up:\n  .*: missing shard"):
        features_of(data, cloc, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock"}


def test_a_folder_of_something_else_is_left_alone(cloc: str, data: str, tmp_path: Path) -> None:
    half = Path(data) / ".00003.tar.elsewhere-1.partial"
    half.write_bytes(b"of another command")
    with pytest.raises(FileExistsError, match="holds tars already"):
        features_of(data, cloc, Path(data))
    assert half.exists()
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/_unfinished.json").write_text('{"job": {}, "tars": 1, "progress": {}}')
    with pytest.raises(FileExistsError, match=r"_unfinished\.json is not what this command writes"):
        features_of(data, cloc, tmp_path / "pack")
    features_of(data, cloc, tmp_path / "out")
    with pytest.raises(FileExistsError, match="num_images: 10 there, 5 asked for"):
        features_of(data, cloc, tmp_path / "out", num_images=5)


def test_other_writers_leave_unfinished_features_alone(
    cloc: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    _at_calls(monkeypatch, {3: stop})
    with pytest.raises(KeyboardInterrupt):
        features_of(data, cloc, tmp_path / "out")
    for job in (None, {}):
        with (
            pytest.raises(FileExistsError, match="holds an unfinished job"),
            ShardWriter(str(tmp_path / "out"), job=job),
        ):
            pass


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
