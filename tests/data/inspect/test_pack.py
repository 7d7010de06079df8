"""Self-contained shards: the images byte by byte, the labels of the sidecar, nothing lost without being counted."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opencloc.data.inspect.pack import PackConfig, pack
from opencloc.data.sample import Sample
from opencloc.data.sidecar import SidecarRow, sidecar_path, write_sidecar
from opencloc.data.tars.shards import Shards, ShardsConfig, ShardWriter
from tests.helpers.records import assert_same_record

BOXES = np.asarray([[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]], dtype=np.float32)
SCORES = np.asarray([0.3, 0.9], dtype=np.float32)


def file_bytes(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def read_tars(folder: Path) -> list[dict[str, bytes]]:
    """The members of every tar of a folder."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found.append({one.name: tar.extractfile(one).read() for one in tar})  # type: ignore[union-attr]
    return found


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A tar of three images of three formats with own captions, and labels beside it."""
    folder = tmp_path / "in"
    members = {
        "a.jpg": file_bytes(0, "JPEG"), "a.txt": b"a dog",
        "b.png": file_bytes(1, "PNG"), "b.json": json.dumps({"caption": "b", "alt_text": "B", "url": "x"}).encode(),
        "c.webp": file_bytes(2, "WEBP"), "c.json": b'{"regions": [{"box": [0, 0, 1, 1], "text": "own"}]}',
    }  # fmt: skip
    write_tar(folder / "00000.tar", members)
    rows = [
        SidecarRow(key="a", caption="a dog", boxes=BOXES, texts=("dog", "grass"), scores=SCORES),
        SidecarRow(key="b", caption="a long new caption", boxes=BOXES[:1], texts=("cat",), scores=SCORES[:1]),
        SidecarRow(key="c"),
    ]
    write_sidecar(sidecar_path(str(folder / "00000.tar"), "vesl"), rows, {})
    return folder


def test_packed_tars_give_the_same_samples_as_images_and_sidecar(labelled: Path, tmp_path: Path) -> None:
    report = pack(PackConfig(data=str(labelled), out=str(tmp_path / "out")))
    assert (report.samples, report.renamed, report.skipped) == (3, 0, {})
    assert report.paths == (str(tmp_path / "out" / "00000.tar"),)
    packed = Shards(str(tmp_path / "out"))
    beside = Shards(str(labelled), ShardsConfig(sidecar="vesl"))
    assert packed.size == beside.size
    for index in range(packed.size):
        one, other = packed[index], beside[index]
        assert_same_record(one, other)
        assert np.array_equal(np.asarray(one.image), np.asarray(other.image))
        assert one.texts == () or np.array_equal(np.asarray(one.scores), np.asarray(other.scores))


def test_images_are_not_encoded_again(labelled: Path, tmp_path: Path) -> None:
    pack(PackConfig(data=str(labelled), out=str(tmp_path / "out")))
    (before,), (after,) = read_tars(labelled), read_tars(tmp_path / "out")
    for name in ("a.jpg", "b.png", "c.webp"):
        assert after[name] == before[name]
    assert json.loads(after["a.json"]) == {
        "caption": "a dog",
        "regions": [
            {"box": [0.1, 0.2, 0.3, 0.4], "text": "dog", "score": 0.3},
            {"box": [0.0, 0.0, 1.0, 1.0], "text": "grass", "score": 0.9},
        ],
    }
    assert json.loads(after["b.json"])["caption"] == "a long new caption"
    assert "regions" not in json.loads(after["c.json"])  # the sidecar found none, and overrides the image's own


def test_what_cannot_be_packed_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    good, broken = file_bytes(0), file_bytes(1)[:60]
    write_tar(
        folder / "00000.tar", {"a.jpg": good, "b.jpg": broken, "c.jpg": good, "d.jpg": good, "e.txt": b"no image"}
    )
    rows = [SidecarRow(key="a"), SidecarRow(key="b"), SidecarRow(key="c", error="no caption")]
    write_sidecar(sidecar_path(str(folder / "00000.tar"), "vesl"), rows, {})
    report = pack(PackConfig(data=str(folder), out=str(tmp_path / "out")))
    assert report.samples == 1
    assert report.skipped == {"no image": 1, "broken image": 1, "not labelled": 1, "not in the sidecar": 1}
    assert str(report).startswith("1 samples in 1 tars")
    assert "broken image (1)" in str(report)
    assert read_tars(tmp_path / "out")[0].keys() == {"a.jpg", "a.json"}


def test_nothing_to_pack_is_an_error_that_says_why(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/00000.tar", {f"{i}.jpg": file_bytes(i)[:60] for i in range(3)})
    with pytest.raises(ValueError, match=r"none of 3 samples can be packed; skipped: broken image \(3\)"):
        pack(PackConfig(data=str(tmp_path / "in"), out=str(tmp_path / "out")))
    assert list((tmp_path / "out").iterdir()) == []


def test_samples_of_one_key_from_different_tars_are_all_kept(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    images = [file_bytes(i) for i in range(4)]
    write_tar(folder / "00000.tar", {"0.jpg": images[0], "1.jpg": images[1]})
    write_tar(folder / "00001.tar", {"0.jpg": images[2], "1.jpg": images[3]})
    report = pack(PackConfig(data=str(folder), out=str(tmp_path / "one")))
    assert (report.samples, report.renamed) == (4, 2)
    (members,) = read_tars(tmp_path / "one")
    assert [data for name, data in members.items() if name.endswith(".jpg")] == images
    report = pack(PackConfig(data=str(folder), out=str(tmp_path / "two"), samples_per_shard=2))
    assert (report.samples, report.renamed, len(report.paths)) == (4, 0, 2)


def test_a_folder_of_images_is_packed_under_its_paths(tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "day.1"
    folder.mkdir(parents=True)
    (folder / "x.jpg").write_bytes(file_bytes(0))
    (folder / "x.txt").write_text("a dog")
    (folder / "y.gif").write_bytes(b"GIF89a")
    report = pack(PackConfig(data=str(tmp_path / "photos"), out=str(tmp_path / "out")))
    assert report.skipped == {"not an image": 1}
    assert read_tars(tmp_path / "out")[0].keys() == {"day.1/x.jpg", "day.1/x.json"}
    assert Shards(str(tmp_path / "out"))[0].captions == ("a dog",)


def test_old_tars_are_never_mixed_with_new_ones(labelled: Path, tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "out")) as writer:
        writer.write(Sample(key="old", image=Image.new("RGB", (4, 4))))
    with pytest.raises(FileExistsError, match="out holds tars already"):
        pack(PackConfig(data=str(labelled), out=str(tmp_path / "out")))


def test_generated_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scenes:easy: only tars, folders and other image files"):
        pack(PackConfig(data="scenes:easy", out=str(tmp_path / "out")))


def test_a_shard_of_no_samples_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="samples_per_shard must be at least 1, got 0"):
        PackConfig(data="x", out="y", samples_per_shard=0)


def test_a_pack_that_was_killed_goes_on_and_never_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(7):
        (photos / f"{number}.jpg").write_bytes(b"broken" if number == 1 else file_bytes(number))
    whole = pack(PackConfig(data=str(photos), out=str(tmp_path / "whole"), samples_per_shard=2))
    write = ShardWriter.write

    def write_until_killed(writer: ShardWriter, sample: Sample, image_bytes: bytes | None = None) -> str:
        if sample.key == "5":
            raise KeyboardInterrupt
        return write(writer, sample, image_bytes)

    config = PackConfig(data=str(photos), out=str(tmp_path / "out"), samples_per_shard=2)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", write_until_killed)
        with pytest.raises(KeyboardInterrupt):
            pack(config)
    for location in (config.out, f"{config.out}/*.tar"):
        with pytest.raises(ValueError, match="out was not finished"):
            Shards(location)
    with pytest.raises(FileExistsError, match="unfinished job with other settings"):
        pack(PackConfig(data=str(photos), out=config.out, samples_per_shard=3))
    again = pack(config)
    assert "going on at image 3 of 7" in capsys.readouterr().err
    assert (again.samples, again.skipped) == (whole.samples, whole.skipped) == (6, {"broken image": 1})
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize("key", ["../../evil", "/abs/evil", "a/../../evil"])
def test_keys_that_lead_out_of_a_folder_are_renamed_and_counted(tmp_path: Path, key: str) -> None:
    write_tar(tmp_path / "in" / "0.tar", {f"{key}.jpg": file_bytes(0), "good.jpg": file_bytes(1)})
    report = pack(PackConfig(data=str(tmp_path / "in"), out=str(tmp_path / "out")))
    assert (report.samples, report.renamed) == (2, 1)
    assert read_tars(tmp_path / "out")[0].keys() == {"sample-0.jpg", "sample-0.json", "good.jpg", "good.json"}
