"""Tars of features: damaged ones are counted, and whatever needs pixels says that there are none."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from transformers import PreTrainedTokenizerFast

from opencloc.cli import main
from opencloc.data.sources.features import Features
from opencloc.data.sources.spec import open_source
from opencloc.data.tars.shards import Shards, iter_shard
from opencloc.errors import BadSample
from tests.helpers.encoded import features_of, save_cloc, write_labelled


@pytest.fixture(scope="module")
def made(
    tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Features of three images by an untrained CLIP."""
    folder = tmp_path_factory.mktemp("features")
    data = write_labelled(folder / "in", count=3)
    features_of(data, save_cloc(folder / "cloc", tower_config("clip"), tokenizer), folder / "out")
    return folder / "out"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def rewrite(tar_path: Path, change: Callable[[bytes], bytes]) -> None:
    """Changes the features of the first sample of a tar."""
    with tarfile.open(tar_path) as tar:
        members = [(one.name, tar.extractfile(one).read()) for one in tar]  # pyright: ignore[reportOptionalMemberAccess]
    members[0] = (members[0][0], change(members[0][1]))
    with tarfile.open(tar_path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    "spec", ["features:{}", "{}", "shards:{}", "crops:{}", "mosaic:{}", "crops:features:{}", "features:{}?sidecar=a"]
)
def test_what_needs_images_is_refused_on_opening(made: Path, spec: str) -> None:
    with pytest.raises(ValueError, match="features stand in place of images, only training on a frozen vision tower"):
        open_source(spec.format(made))


def test_tars_of_features_read_as_images_say_what_they_are(made: Path) -> None:
    reason = "features in place of the image"
    with pytest.raises(BadSample, match=f"{reason} .*as features:LOCATION"):
        Shards(str(made))[0]
    assert {bad.reason for bad in iter_shard(str(made / "00000.tar")) if isinstance(bad, BadSample)} == {reason}


@pytest.mark.parametrize("verb", [["stats"], ["view"], ["check"], ["pack"]])
def test_verbs_that_look_at_images_refuse_features(
    made: Path, verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", *verb, "--data", str(made), "--out", str(tmp_path / "out")]) == 1
    assert "features stand in place of images" in capsys.readouterr().err


@pytest.mark.parametrize("spec", ["{}", "{}/", "shards:{}", "{}/00000.tar", "shards:{}/*.tar", "features:{}"])
def test_tars_of_features_are_recognised(made: Path, spec: str) -> None:
    source = open_source(spec.format(made), features=True)
    assert isinstance(source, Features)
    assert source.size == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-10],
        lambda data: b"",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data.replace(b'"F16"', b'"I16"'),
        lambda data: data.replace(b'"tokens"', b'"tokenz"'),
        lambda data: save(load(data) | {"size_px": torch.zeros(2, dtype=torch.int32)}),
        lambda data: save(load(data) | {"embedding": torch.full_like(load(data)["embedding"], -torch.inf)}),
        lambda data: save(load(data) | {"tokens": load(data)["tokens"].index_fill(0, torch.tensor(3), torch.nan)}),
    ],
    ids=["cut off", "empty", "header longer than the file", "other type", "other name", "no width", "inf", "nan"],
)
def test_damaged_features_are_bad_samples(copy: Path, change: Callable[[bytes], bytes]) -> None:
    rewrite(copy / "00000.tar", change)
    source = Features(str(copy))
    with pytest.raises(BadSample, match="broken features") as caught:
        source[0]
    assert caught.value.reason == "broken features"
    assert source[1].key == "k1"


def test_tars_without_their_description_are_refused(copy: Path) -> None:
    (copy / "features.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"features\.json: not there; a folder of features is one that"):
        Features(str(copy))
    (copy / "features.json").write_text('{"model": "x"}')
    with pytest.raises(ValueError, match=r"features\.json: not a valid FeaturesInfo"):
        Features(str(copy))


def test_features_made_in_two_ways_are_refused(made: Path, copy: Path) -> None:
    """Of several folders in one pattern, of which one has images of another size."""
    assert Features([str(made), str(copy)]).size == 6
    info = (copy / "features.json").read_text()
    (copy / "features.json").write_text(info.replace('"image_size": 32', '"image_size": 48'))
    with pytest.raises(ValueError, match="not made in one way"):
        Features([str(made), str(copy)])
    with pytest.raises(ValueError, match="features of images of 48 pixels, 32 are needed"):
        open_source(str(copy), image_px=32, features=True)
