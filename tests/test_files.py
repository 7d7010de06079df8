"""Files: nobody sees half of one, only regular ones are replaced, every local name is read as it is, locks fall."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest

from opencloc import files


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with files.new_file(tmp_path / "a") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == set()
    files.write_text(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (names(tmp_path), (tmp_path / "a").read_text()) == ({"a"}, "old")
    files.write_json(tmp_path / "a", {"ü": 1})
    assert json.loads((tmp_path / "a").read_text()) == {"ü": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a", float("nan"))


def test_a_folder_takes_the_place_of_another_when_it_is_whole(tmp_path: Path) -> None:
    def write(name: str, *, fail: bool = False) -> None:
        with files.new_folder(tmp_path / "out") as partial:
            (partial / name).touch()
            if fail:
                raise KeyboardInterrupt

    write("one")
    with pytest.raises(KeyboardInterrupt):
        write("two", fail=True)
    assert (names(tmp_path), names(tmp_path / "out")) == ({"out"}, {"one"})
    write("three")
    assert (names(tmp_path), names(tmp_path / "out")) == ({"out"}, {"three"})
    files.remove_folder(tmp_path / "out")
    assert names(tmp_path) == set()


def test_only_regular_files_and_folders_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match=f"{name} is not a regular file"):
            files.write_bytes(tmp_path / name, b"")
    with pytest.raises(OSError, match="pipe is not a folder"), files.new_folder(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left on device (28)")]
)
@pytest.mark.parametrize("new", [files.new_file, files.new_folder])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, new, error: Exception) -> None:
    with pytest.raises(OSError, match=r"No space left on device: .*model\.bin"), new(tmp_path / "model.bin"):
        raise error
    assert names(tmp_path) == set()


def test_what_a_killed_process_left_half_written_goes_when_its_folder_is_written_again(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=lambda: None)
    process.start()
    process.join()
    dead, alive = (
        files.partial_path(tmp_path / name).name.replace(f"-{os.getpid()}.", f"-{pid}.")
        for name, pid in (("a", process.pid), ("b", os.getppid()))
    )
    others = ".c.other.host-1.partial"
    for name in (dead, alive, others):
        (tmp_path / name).touch()
    (tmp_path / dead.replace(".partial", ".old")).mkdir()
    files.write_bytes(tmp_path / "new", b"")
    assert names(tmp_path) == {alive, others, "new"}
    files.sweep(tmp_path)
    assert names(tmp_path) == {"new"}


@pytest.mark.parametrize("name", ["x::y.jpg", "a[1].jpg", "a{b,c}.jpg", "what?x=1.jpg", "~tilde.jpg", "simplecache::z"])
def test_a_local_file_is_read_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / name).write_bytes(b"data")
    monkeypatch.chdir(folder)
    for url in (name, str(folder / name)):
        assert files.read_bytes(url) == b"data"
        assert files.exists(url)
        assert not files.is_folder(url)
        assert files.version(url).size == 4
        with files.open_seekable(url) as stream:
            assert stream.read() == b"data"
    assert files.is_folder(str(folder))
    assert files.find(str(folder)) == files.find(".") == [name]
    assert files.children(str(folder)) == [str(folder / name)]
    assert files.versions(str(folder)) == {name: files.version(name)}
    files.write_bytes(name, b"new")
    assert files.read_bytes(name, 1, 2) == b"ew"


def test_where_the_cache_cannot_be_written_a_temporary_folder_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPENCLOC_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert files.cache_folder("tars").is_relative_to(tmp_path)
    assert files.cache_folder("tars").is_dir()


def test_a_lock_is_held_by_one_at_a_time_and_falls_with_its_process() -> None:
    place = files.cache_folder("tars") / "a.tar"

    def hold() -> None:
        with files.locked(place):
            os.write(writes, b"x")
            time.sleep(60)

    reads, writes = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    assert os.read(reads, 1) == b"x"
    with files.locked(place, wait=False) as got:
        assert not got
    process.kill()
    with files.locked(place) as got:
        assert got
    process.join()
    os.close(reads)
    os.close(writes)


def test_a_file_system_whose_package_is_missing_is_an_error_that_names_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for ask in (files.is_folder, files.read_bytes):
        with pytest.raises(ValueError, match=r"s3://bucket/a\.tar: .*s3fs"):
            ask("s3://bucket/a.tar")
