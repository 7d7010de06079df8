"""Patterns: what exists under a name goes before what it could mean as a pattern."""

from __future__ import annotations

from pathlib import Path

import pytest

from opencloc import files
from opencloc.data.tars.urls import UNFINISHED, expand_urls


def test_patterns_expand_in_order(tmp_path: Path) -> None:
    for name in ("00008.tar", "00009.tar", "00010.tar", "a-1.tar", "b-1.tar", "x[1].tar", "note.txt"):
        (tmp_path / name).touch()

    def names(pattern: str) -> list[str]:
        return [Path(url).name for url in expand_urls(str(tmp_path / pattern))]

    assert names("{00008..00010}.tar") == ["00008.tar", "00009.tar", "00010.tar"]
    assert names("{b,a}-{1..1}.tar") == ["b-1.tar", "a-1.tar"]
    assert names("0000?.tar") == ["00008.tar", "00009.tar"]
    assert names("x[1].tar") == ["x[1].tar"]  # a file of that very name is no pattern
    assert len(names("")) == 6
    assert expand_urls([str(tmp_path / "a-1.tar"), str(tmp_path / "b-*.tar")])[1].endswith("b-1.tar")


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("{0..1}.tar", FileNotFoundError, r"1\.tar: no such shard \(from .*\{0\.\.1\}\.tar\)"),  # a gap
        ("9*.tar", FileNotFoundError, r"9\*\.tar: no file matches"),
        ("empty", FileNotFoundError, r"empty: no \*\.tar in this folder"),
        ("{3..1}.tar", ValueError, r"\{3\.\.1\} runs backwards"),
    ],
)
def test_patterns_that_match_nothing_say_so(tmp_path: Path, pattern: str, error: type, message: str) -> None:
    (tmp_path / "0.tar").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        expand_urls(str(tmp_path / pattern))


@pytest.mark.parametrize("name", ["a{b,c}", "a[1]", "a?x=1", "a*", "a::b", "a{0..3}"])
def test_a_folder_or_file_of_that_very_name_is_no_pattern(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for tar in ("0.tar", f"{name}.tar"):
        (folder / tar).touch()
        assert expand_urls(str(folder / tar)) == [str(folder / tar)]
    assert expand_urls(str(folder)) == sorted([str(folder / "0.tar"), str(folder / f"{name}.tar")])


def test_many_named_tars_are_looked_up_by_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        (tmp_path / f"{number:02d}.tar").touch()
    looks, listings = [], []
    for name, calls in (("exists", looks), ("is_folder", looks), ("versions", listings)):
        original = getattr(files, name)
        monkeypatch.setattr(files, name, lambda url, of=original, calls=calls: calls.append(url) or of(url))
    assert len(expand_urls(f"{tmp_path}/{{00..49}}.tar")) == 50
    assert listings == [str(tmp_path)]
    assert len(looks) <= 1
    with pytest.raises(FileNotFoundError, match=r"50\.tar: no such shard"):
        expand_urls(f"{tmp_path}/{{00..50}}.tar")


@pytest.mark.parametrize("pattern", ["", "*.tar", "{0..0}*.tar"])
def test_a_folder_that_is_being_written_is_refused(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "0.tar").touch()
    (tmp_path / UNFINISHED).touch()
    with pytest.raises(ValueError, match="was not finished"):
        expand_urls(str(tmp_path / pattern))
