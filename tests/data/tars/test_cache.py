"""Counts and indices of tars, and local copies of remote ones: found once, kept as long as they are true."""

from __future__ import annotations

import io
import os
import queue
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from opencloc import files
from opencloc.data.sidecar import SidecarRow, sidecar_path, write_sidecar
from opencloc.data.tars import cache
from opencloc.data.tars import index as counts
from opencloc.data.tars.cache import CacheConfig, Prefetcher, cache_report, local_tar
from opencloc.data.tars.index import count_samples, load_index
from opencloc.data.tars.shards import Shards, ShardsConfig, index_shard
from opencloc.errors import BadSample
from tests.helpers.tars import put_remote, tar_bytes, write_tars

GB = 1e9


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENCLOC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fetched(url: str, limit_gb: float) -> str:
    return local_tar(url, files.version(url), limit_gb)


def test_counts_come_from_headers_stats_and_remote_sidecars(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", [3, 4, 5])
    (folder / "1_stats.json").write_text('{"successes": 9, "count": 99}')
    (folder / "2_stats.json").write_text('{"count": 99}')  # of no use
    found = count_samples([str(folder / f"{i}.tar") for i in range(3)], cache_gb=1)
    assert (found.samples.tolist(), found.unknown) == ([3, 9, 5], frozenset())
    url = put_remote("counted", [6, 7])
    write_sidecar(sidecar_path(f"{url}/1.tar", "vesl"), [SidecarRow(key=str(i)) for i in range(70)], {})
    assert count_samples([f"{url}/0.tar", f"{url}/1.tar"], "vesl", cache_gb=1).samples.tolist() == [6, 70]


def test_counts_are_kept_until_the_tar_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_COUNTS_WORTH_KEEPING_S", 0.0)
    folder = write_tars(tmp_path / "tars", [3, 4])
    urls = [str(folder / f"{i}.tar") for i in range(2)]
    passes = []
    monkeypatch.setattr(counts, "index_shard", lambda path: passes.append(path) or index_shard(path))
    assert [count_samples(urls, cache_gb=1).samples.tolist() for _ in range(2)] == [[3, 4]] * 2
    assert sorted(passes) == urls
    (folder / "1.tar").write_bytes(tar_bytes(1, 9))
    assert count_samples(urls, cache_gb=1).samples.tolist() == [3, 9]
    assert passes[2:] == urls[1:]
    (kept,) = files.cache_folder("counts").glob("*.json")
    kept.write_text("{broken")
    assert count_samples(urls, cache_gb=1).samples.tolist() == [3, 9]


def test_kept_counts_are_answered_from_one_listing_whatever_else_is_new_or_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "_COUNTS_WORTH_KEEPING_S", 0.0)
    write_tars(tmp_path, [2, 3, 4, 5])
    urls = [str(tmp_path / f"{number}.tar") for number in (2, 0, 7, 1)]  # 7 is missing
    first = count_samples(urls, cache_gb=1)
    assert (first.samples.tolist(), first.unknown) == ([4, 2, 3, 3], {2})
    counted = []
    really = counts._count
    monkeypatch.setattr(counts, "_count", lambda url, *rest: counted.append(url) or really(url, *rest))
    assert count_samples(urls, cache_gb=1).samples.tolist() == [4, 2, 3, 3]
    assert counted == []
    assert count_samples([*urls, str(tmp_path / "3.tar")], cache_gb=1).samples.tolist() == [4, 2, 3, 3, 5]
    assert counted == [str(tmp_path / "3.tar")]


def test_a_missing_tar_has_the_usual_count_and_all_missing_is_an_error(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", [4, 4, 7])
    (folder / "1.tar").unlink()
    source = Shards(f"{folder}/{{0..2}}.tar")
    assert (source.counts.tolist(), source.problems) == ([4, 5, 7], Counter({"unreadable shard": 1}))
    with pytest.raises(BadSample, match=r"1\.tar: missing shard"):
        source[5]
    with pytest.raises(FileNotFoundError, match=r"7\.tar: no such shard \(none of 3 is there\)"):
        Shards(f"{folder}/{{7..9}}.tar")


@pytest.mark.parametrize(
    "content", ['{"successes": 1%s}' % ("0" * 30), '{"successes": 11}', "[" * 100_000, '{"successes": "many"}']
)
def test_a_count_that_the_tar_cannot_hold_is_named_and_not_believed(tmp_path: Path, content: str) -> None:
    folder = write_tars(tmp_path / "tars", [4])  # 10,240 bytes: room for ten of the smallest samples
    (folder / "0_stats.json").write_text(content)
    with pytest.warns(UserWarning, match=r"0_stats\.json: no count that its tar could hold"):
        assert Shards(str(folder)).size == 4


def test_a_remote_tar_is_downloaded_once_and_the_longest_unused_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put_remote("evicted", [2, 2, 2])
    size = len(tar_bytes(0, 2))
    downloads = []
    download = cache._download
    monkeypatch.setattr(cache, "_download", lambda url, *rest: downloads.append(url[-5]) or download(url, *rest))
    for shard in (0, 1, 0, 2, 0, 1):  # room for two: 2 drives 1 out, 1 drives 2 out
        path = fetched(f"{url}/{shard}.tar", 2.5 * size / GB)
        assert Path(path).read_bytes() == tar_bytes(shard, 2)
        for number, kept in enumerate(
            sorted(files.cache_folder("tars").iterdir(), key=lambda one: one.stat().st_mtime)
        ):
            os.utime(kept, (number, number))  # file times differ, however fast the machine
    assert downloads == ["0", "1", "2", "1"]
    assert len(list(files.cache_folder("tars").iterdir())) == 2


def test_a_copy_that_is_evicted_while_in_use_comes_back() -> None:
    source = Shards(put_remote("comes_back", [2, 2]), ShardsConfig(cache_gb=1e-9))  # room for the newest only
    assert [source[i].captions for i in (0, 2, 1, 3, 0)] == [("0/0",), ("1/0",), ("0/1",), ("1/1",), ("0/0",)]


@pytest.mark.parametrize(
    ("kind", "message"), [("error", "ConnectionError: reset"), ("short", "700 of 10240 bytes came")]
)
def test_downloads_are_repeated_and_then_given_up(monkeypatch: pytest.MonkeyPatch, kind: str, message: str) -> None:
    url = put_remote("flaky", [2]) + "/0.tar"
    whole, tries = MemoryFileSystem.open, Counter[str]()

    def flaky_open(fs: MemoryFileSystem, path: str, *rest: Any, **options: Any) -> object:
        tries[path] += 1
        if tries[path] > failures:
            return whole(fs, path, *rest, **options)
        if kind == "error":
            raise ConnectionError("reset by peer")
        return io.BytesIO(tar_bytes(0, 2)[:700])

    monkeypatch.setattr(cache, "_PAUSE_S", 0.0)
    monkeypatch.setattr(MemoryFileSystem, "open", flaky_open)
    failures = 3
    with pytest.raises(OSError, match=rf"flaky/0\.tar can't be fetched, tried 3 times: .*{message}"):
        fetched(url, 1)
    assert list(files.cache_folder("tars").iterdir()) == []
    tries.clear()
    failures = 2
    assert Path(fetched(url, 1)).read_bytes() == tar_bytes(0, 2)


def test_a_failing_server_is_not_asked_again_for_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    url = put_remote("failing", [5, 5])
    source = Shards(url)
    fsspec.filesystem("memory").rm("/failing/1.tar")
    for path in files.cache_folder("tars").iterdir():
        path.unlink()
    asked, version = [], files.version
    monkeypatch.setattr(files, "version", lambda url: asked.append(url) or version(url))
    for index in range(5, 10):
        with pytest.raises(BadSample, match=r"failing/1\.tar: missing shard"):
            source[index]
    assert len(asked) == 1


def test_the_next_tars_are_fetched_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    url = put_remote("prefetched", [2, 2])
    done = queue.SimpleQueue()
    download = cache._download
    monkeypatch.setattr(cache, "_download", lambda *rest: done.put(download(*rest)))
    Prefetcher(1.0).ask([f"{url}/0.tar", f"{url}/none.tar", f"{url}/1.tar"])
    for _ in range(2):
        done.get()
    assert len(list(files.cache_folder("tars").glob("*.tar"))) == 2


def test_an_index_that_took_long_is_kept_for_the_other_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_tars(tmp_path / "tars", [3]) / "0.tar")
    monkeypatch.setattr(counts, "_INDEX_WORTH_KEEPING_S", 0.0)
    made = load_index(path, 1)[0]
    with monkeypatch.context() as patch:
        patch.setattr(counts, "index_shard", lambda _: pytest.fail("made again"))
        kept = load_index(path, 1)[0]
    assert (kept.url, kept.keys, kept.problems) == (made.url, made.keys, made.problems)
    assert np.array_equal(kept.spans, made.spans)
    (file,) = files.cache_folder("indices").iterdir()
    for damaged in (file.read_bytes()[:100], b""):
        file.write_bytes(damaged)
        assert load_index(path, 1)[0].keys == made.keys
    Path(path).write_bytes(tar_bytes(0, 5))
    assert len(load_index(path, 1)[0].keys) == 5


@pytest.mark.parametrize("protocol", ["memory", "local"])
def test_a_remote_tar_that_was_replaced_is_read_anew(tmp_path: Path, protocol: str) -> None:
    place = f"{tmp_path}/replaced" if protocol == "local" else "/replaced"
    file_system, url = fsspec.filesystem(protocol), f"{protocol}://{place}/0.tar"
    file_system.makedirs(place, exist_ok=True)
    file_system.pipe_file(f"{place}/0.tar", tar_bytes(1, 3))
    source = Shards(url)
    assert [source[i].captions for i in range(source.size)] == [("1/0",), ("1/1",), ("1/2",)]
    file_system.pipe_file(f"{place}/0.tar", tar_bytes(2, 4))
    assert [sample.captions for sample in map(Shards(url).__getitem__, range(4))] == [(f"2/{row}",) for row in range(4)]
    assert source[0].captions == ("1/0",)  # what was opened before stays as it was, from its copy
    for copy in files.cache_folder("tars").iterdir():
        copy.unlink()
    with pytest.raises(BadSample, match=r"unreadable shard .*was replaced by another file"):
        source[0]


def test_a_local_tar_that_is_replaced_while_in_use_is_not_read_by_the_old_places(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", [3])
    source = Shards(str(folder))
    assert source[0].captions == ("0/0",)
    (folder / "0.tar").write_bytes(tar_bytes(5, 4))
    with pytest.raises(BadSample, match=r"unreadable shard .*was replaced by another file"):
        source[1]


def test_half_written_copies_of_killed_processes_go(tmp_path: Path) -> None:
    stale, fresh = (files.cache_folder("tars") / f".{name}.tar.elsewhere-1.partial" for name in ("stale", "fresh"))
    for path in (stale, fresh):
        path.touch()
    os.utime(stale, (0, 0))
    fetched(put_remote("room", [2]) + "/0.tar", 1)
    assert (stale.exists(), fresh.exists()) == (False, True)


def test_the_cache_says_how_large_it_is_and_can_be_cleared(cache_folder: Path) -> None:
    fetched(put_remote("shown", [2]) + "/0.tar", 1)
    assert cache_report(CacheConfig()).splitlines()[:2] == [
        str(cache_folder),
        "copies of remote tars: 1 files, 0.00 GB",
    ]
    assert "removed copies of remote tars: 1 files" in cache_report(CacheConfig(clear=True))
    assert "copies of remote tars: 0 files" in cache_report(CacheConfig())
