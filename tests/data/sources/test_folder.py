"""Image folders: what lies beside an image belongs to it, what cannot be used is counted."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opencloc.data.sidecar import SidecarRow, sidecar_path, write_sidecar
from opencloc.data.sources.folder import FolderConfig, ImageFolder
from opencloc.data.tars.shards import Shards, ShardWriter
from opencloc.errors import BadSample


def write_photos(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (5, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name, format="JPEG")


def test_images_come_in_order_of_their_paths_with_what_lies_beside_them(tmp_path: Path) -> None:
    write_photos(tmp_path, "b.jpg", "dogs/1.small.JPG", "dogs/2.png", "a.webp")
    (tmp_path / "a.txt").write_text("a cat\n")
    record = {"caption": "a dog", "regions": [{"box": [0, 0, 1, 0.5], "text": "dog"}]}
    (tmp_path / "dogs/1.small.json").write_text(json.dumps(record))
    source = pickle.loads(pickle.dumps(ImageFolder(str(tmp_path))))
    found = [source[i] for i in range(source.size)]
    assert [sample.key for sample in found] == ["a", "b", "dogs/1.small", "dogs/2"]
    assert [source.identity(i) for i in (2, 3)] == ["dogs/1.small.JPG", "dogs/2.png"]
    assert [sample.captions for sample in found] == [("a cat",), (), ("a dog",), ()]
    assert (found[2].texts, found[2].boxes.tolist(), found[2].scores) == (("dog",), [[0, 0, 1, 0.5]], None)
    assert found[2].image.size == (9, 5)
    with pytest.raises(IndexError):
        source[4]


def test_a_relative_folder_is_read_like_an_absolute_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path, "photos/b.jpg", "photos/dogs/a.jpg")
    monkeypatch.chdir(tmp_path)
    for location in ("photos", "photos/", "./photos", str(tmp_path / "photos"), f"file://{tmp_path}/photos"):
        assert [ImageFolder(location)[i].key for i in range(2)] == ["b", "dogs/a"]


def test_every_file_that_is_left_out_is_counted(tmp_path: Path) -> None:
    write_photos(tmp_path, "a.jpg", "a.png", "movie.mp4", ".jpg")
    (tmp_path / "lonely.txt").write_text("no image of this name")
    source = ImageFolder(str(tmp_path))
    assert source.size == 1
    assert source.skipped == Counter({"not an image": 2, "duplicate key": 1, "annotation without an image": 1})


def test_broken_files_are_bad_samples_that_name_the_file(tmp_path: Path) -> None:
    write_photos(tmp_path, "broken.jpg", "gone.jpg", "json.jpg", "outside.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    (tmp_path / "json.json").write_text("{")
    (tmp_path / "outside.json").write_text('{"regions": [{"box": [0, 0, 1, 2], "text": "dog"}]}')
    source = ImageFolder(str(tmp_path))
    (tmp_path / "gone.jpg").unlink()
    for index, (name, reason) in enumerate(
        [("broken", "broken image"), ("gone", "unreadable file"), ("json", "bad json"), ("outside", "bad box")]
    ):
        with pytest.raises(BadSample, match=rf"{tmp_path}/{name}\.jpg: {reason}"):
            source[index]


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        ImageFolder(str(tmp_path / "nowhere"))
    (tmp_path / "note.txt").touch()
    with pytest.raises(ValueError, match="no image among 1 files"):
        ImageFolder(str(tmp_path))


def test_sidecar_labels_join_by_path(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, "dogs/1.jpg", "2.jpg")
    labels = SidecarRow(key="dogs/1", boxes=np.array([[0, 0, 1, 1]]), texts=("dog",), scores=np.array([1.0]))
    write_sidecar(sidecar_path(f"{photos}/", "vesl", 0), [labels], {})
    source = ImageFolder(str(photos), FolderConfig(sidecar="vesl"))
    assert source[1].texts == ("dog",)
    with pytest.raises(BadSample, match="not in the sidecar"):
        source[0]


def test_a_folder_packs_into_shards_without_encoding_again(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", "b.jpg", "dogs/1.jpg")
    source = ImageFolder(str(tmp_path / "photos"))
    with ShardWriter(str(tmp_path / "shards")) as writer:
        for i in range(source.size):
            writer.write(source[i], source.image_bytes(i))
    packed = Shards(str(tmp_path / "shards"))
    assert [packed[i].key for i in range(2)] == ["b", "dogs/1"]
    assert [packed.image_bytes(i) for i in range(2)] == [source.image_bytes(i) for i in range(2)]


def test_remote_folders_read_like_local_ones(tmp_path: Path) -> None:
    import fsspec

    write_photos(tmp_path, "b.jpg", "dogs/1.jpg")
    fsspec.filesystem("memory").put(str(tmp_path), "/test_folder", recursive=True)
    local, remote = ImageFolder(str(tmp_path)), ImageFolder("memory://test_folder")
    assert [remote[i].key for i in range(2)] == ["b", "dogs/1"]
    assert [remote.image_bytes(i) for i in range(2)] == [local.image_bytes(i) for i in range(2)]
