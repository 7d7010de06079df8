"""Folders of tars: the same bytes for the same samples, nothing half written under its name, jobs that go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from opencloc.data.sample import Sample
from opencloc.data.tars.shards import Shards, ShardWriter, index_shard
from opencloc.data.tars.urls import UNFINISHED
from tests.helpers.tars import file_bytes, picture


def test_the_same_samples_write_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        with ShardWriter(str(tmp_path / folder)) as writer:
            for i in range(3):
                writer.write(Sample(key=f"{i}", image=picture(i), captions=("a", "b")))
    assert (tmp_path / "one/00000.tar").read_bytes() == (tmp_path / "two/00000.tar").read_bytes()


def test_image_files_are_stored_untouched_unless_readers_could_not_expect_them(tmp_path: Path) -> None:
    jpeg, gif = file_bytes(picture(), "JPEG", quality=30), file_bytes(picture(), "GIF")
    with ShardWriter(str(tmp_path)) as writer:
        writer.write(Sample(key="jpeg", image=picture()), jpeg)
        writer.write(Sample(key="gif", image=picture()), gif)
    source = Shards(str(tmp_path))
    assert source.image_bytes(0) == jpeg
    assert source.image_bytes(1)[:3] == b"\xff\xd8\xff"


def test_the_writer_makes_keys_that_a_tar_can_hold(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path)) as writer:
        assert writer.write(Sample(key="v1.2/photo.small", image=picture())) == "v1.2/photo_small"
        with pytest.raises(ValueError, match=r"'v1\.2/photo_small' comes twice"):
            writer.write(Sample(key="v1.2/photo_small", image=picture()))
        for key in ("", "folder/", "nul\0", "/abs/evil", "../evil", "a/../evil", "C:\\evil"):
            with pytest.raises(ValueError, match="cannot be the key"):
                writer.write(Sample(key=key, image=picture()))
    assert index_shard(writer.paths[0]).keys == ("v1.2/photo_small",)


@pytest.mark.parametrize("written", [1, 3])  # before and after the first tar of two samples is whole
def test_a_failed_writer_leaves_only_whole_tars_and_says_so(tmp_path: Path, written: int) -> None:
    def write(*, fail: bool, **options: object) -> list[str]:
        with ShardWriter(str(tmp_path), samples_per_shard=2, **options) as writer:  # type: ignore[arg-type]
            for key in range(len(writer.paths) * 2, written):
                writer.write(Sample(key=str(key), image=picture()))
            if fail:
                raise RuntimeError("disk on fire")
        return writer.paths

    with pytest.raises(RuntimeError, match="disk on fire"):
        write(fail=True, job={"job": 1})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == ({"00000.tar", UNFINISHED} if written == 3 else set())
    if written == 3:
        for options in ({}, {"job": {"job": 2}}):
            with pytest.raises(FileExistsError, match="unfinished job with other settings"):
                write(fail=False, **options)
    assert len(write(fail=False, job={"job": 1})) == -(-written // 2)
    assert Shards(str(tmp_path)).size == written
    with pytest.raises(FileExistsError, match=r"holds tars already \(00000\.tar"):
        write(fail=False, job={"job": 1})


def test_leftovers_of_a_kill_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".00000.tar.elsewhere-1.partial").write_bytes(b"half")
    (tmp_path / UNFINISHED).write_text('{"job": null, "tars": 0, "progress": {}}')
    (tmp_path / "00000.tar").write_bytes(b"whole, but killed before that was noted")
    with ShardWriter(str(tmp_path)) as writer:
        writer.write(Sample(key="a", image=picture()))
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]
    assert Shards(str(tmp_path)).size == 1
