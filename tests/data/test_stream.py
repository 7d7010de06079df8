"""Streams of many tars: counting without reading, remote copies and their room, damage counted and replaced, resume."""

from __future__ import annotations

import functools
import http.server
import io
import json
import multiprocessing
import os
import signal
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from torch.utils.data import DataLoader

from opencloc import files
from opencloc.data import stream as loader
from opencloc.data.sidecar import SidecarRow, sidecar_path, write_sidecar
from opencloc.data.stream import TrainingExamples, _Rows, check_skipped
from opencloc.data.tars import cache
from opencloc.data.tars import index as counts
from opencloc.data.tars.cache import Prefetcher, load_index, local_tar
from opencloc.data.tars.index import count_samples
from opencloc.data.tars.shards import Shards, ShardsConfig, index_shard
from opencloc.errors import BadSample

GB = 1e9


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENCLOC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tar_bytes(shard: int, count: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for row in range(count):
            image = io.BytesIO()
            Image.new("RGB", (8, 8), (shard, row, 0)).save(image, "PNG")
            for extension, data in (("png", image.getvalue()), ("txt", f"{shard}/{row}".encode())):
                info = tarfile.TarInfo(f"{row:03d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tars(folder: Path, sizes: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for shard, size in enumerate(sizes):
        (folder / f"{shard}.tar").write_bytes(tar_bytes(shard, size))
    return folder


def put_remote(name: str, sizes: list[int]) -> str:
    for shard, size in enumerate(sizes):
        fsspec.filesystem("memory").pipe_file(f"/{name}/{shard}.tar", tar_bytes(shard, size))
    return f"memory://{name}"


def stream(*sources: Shards, lanes: int = 2) -> TrainingExamples:
    return TrainingExamples(sources, (), num_regions=1, image_size=8, seed=0, lanes=lanes)


def captions_of(examples: TrainingExamples, positions: range) -> list[str]:
    return [examples[position].caption for position in positions]


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SHUFFLE", 8)


# -- counting ----------------------------------------------------------------------------------------------------------


def test_counts_come_from_headers_stats_and_remote_sidecars(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", [3, 4, 5])
    (folder / "1_stats.json").write_text('{"successes": 40, "count": 99}')
    (folder / "2_stats.json").write_text('{"successes": "many"}')  # of no use
    found = count_samples([str(folder / f"{i}.tar") for i in range(3)], cache_gb=1)
    assert (found.samples.tolist(), found.unknown) == ([3, 40, 5], frozenset())
    url = put_remote("counted", [6, 7])
    write_sidecar(sidecar_path(f"{url}/1.tar", "vesl"), [SidecarRow(key=str(i)) for i in range(70)], {})
    assert count_samples([f"{url}/0.tar", f"{url}/1.tar"], "vesl", cache_gb=1).samples.tolist() == [6, 70]


def test_counts_are_kept_until_the_tar_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_WORTH_KEEPING_S", 0.0)
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


def test_a_missing_tar_has_the_usual_count_and_all_missing_is_an_error(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", [4, 4, 7])
    (folder / "1.tar").unlink()
    source = Shards(f"{folder}/{{0..2}}.tar")
    assert (source.counts.tolist(), source.problems) == ([4, 5, 7], Counter({"unreadable shard": 1}))
    with pytest.raises(BadSample, match=r"1\.tar: missing shard"):
        source[5]
    with pytest.raises(FileNotFoundError, match=r"7\.tar: no such shard \(none of 3 is there\)"):
        Shards(f"{folder}/{{7..9}}.tar")


# -- copies of remote tars ---------------------------------------------------------------------------------------------


def test_a_remote_tar_is_downloaded_once_and_the_longest_unused_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put_remote("evicted", [2, 2, 2])
    size = len(tar_bytes(0, 2))
    downloads = []
    download = cache._download
    monkeypatch.setattr(cache, "_download", lambda url, *rest: downloads.append(url[-5]) or download(url, *rest))
    for shard in (0, 1, 0, 2, 0, 1):  # room for two: 2 drives 1 out, 1 drives 2 out
        path = local_tar(f"{url}/{shard}.tar", 2.5 * size / GB)
        assert Path(path).read_bytes() == tar_bytes(shard, 2)
        time.sleep(0.002)  # file times must differ
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
        local_tar(url, 1)
    assert list(files.cache_folder("tars").iterdir()) == []
    tries.clear()
    failures = 2
    assert Path(local_tar(url, 1)).read_bytes() == tar_bytes(0, 2)


def test_a_failing_server_is_not_asked_again_for_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    url = put_remote("failing", [5, 5])
    source = Shards(url)
    fsspec.filesystem("memory").rm("/failing/1.tar")
    for path in files.cache_folder("tars").iterdir():
        path.unlink()
    asked = []
    download = cache._download
    monkeypatch.setattr(cache, "_download", lambda url, *rest: asked.append(url) or download(url, *rest))
    for index in range(5, 10):
        with pytest.raises(BadSample, match=r"failing/1\.tar: missing shard"):
            source[index]
    assert len(asked) == 1


def test_the_next_tars_are_fetched_in_the_background() -> None:
    url = put_remote("prefetched", [2, 2])
    Prefetcher(1.0).ask([f"{url}/0.tar", f"{url}/none.tar", f"{url}/1.tar"])
    for _ in range(1000):
        if len(list(files.cache_folder("tars").glob("*.tar"))) == 2:
            break
        time.sleep(0.01)
    assert len(list(files.cache_folder("tars").glob("*.tar"))) == 2


def test_an_index_that_took_long_is_kept_for_the_other_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_tars(tmp_path / "tars", [3]) / "0.tar")
    monkeypatch.setattr(cache, "_WORTH_KEEPING_S", 0.0)
    made = load_index(path, path)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "index_shard", lambda _: pytest.fail("made again"))
        kept = load_index(path, path)
    assert (kept.url, kept.keys, kept.problems) == (made.url, made.keys, made.problems)
    assert np.array_equal(kept.spans, made.spans)
    (file,) = files.cache_folder("indices").iterdir()
    for damaged in (file.read_bytes()[:100], b""):
        file.write_bytes(damaged)
        assert load_index(path, path).keys == made.keys
    Path(path).write_bytes(tar_bytes(0, 5))
    assert len(load_index(path, path).keys) == 5


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


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server over `tmp_path`/tars that knows no ranges and lists nothing."""
    folder = write_tars(tmp_path / "tars", [6, 6, 6, 6])
    (folder / "index.html").write_text("nothing to see")
    for shard in range(4):
        (folder / f"{shard}_stats.json").write_text(json.dumps({"successes": 6}))
    handler = functools.partial(_Handler, directory=str(folder))
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_tars_behind_a_web_server_stream_into_workers(server: str, small_windows: None) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http by aiohttp, which is not installed")
    examples = stream(Shards(f"{server}/{{0..3}}.tar"))
    batches = DataLoader(examples, batch_sampler=_Rows(6, 2, 0, 4, 0, 1), num_workers=2, collate_fn=list)  # type: ignore
    found = [example.caption for batch in batches for example in batch]
    assert sorted(found) == sorted(f"{shard}/{row}" for shard in range(4) for row in range(6))


# -- the stream --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(("world_size", "lanes"), [(1, 1), (2, 4), (3, 3)])
def test_every_sample_comes_once_per_epoch_over_all_ranks(
    tmp_path: Path, small_windows: None, remote: bool, world_size: int, lanes: int
) -> None:
    sizes = [7, 1, 9, 4, 3]  # 24 samples, four batches of 6
    location = put_remote("ranks", sizes) if remote else str(write_tars(tmp_path / "tars", sizes))
    examples = stream(Shards(location), lanes=lanes)
    for epoch in range(2):
        batches = range(4 * epoch, 4 * epoch + 4)
        ranks = [_Rows(6, lanes, batches[0], batches[-1] + 1, rank, world_size) for rank in range(world_size)]
        found = [examples[p].caption for rows in ranks for part in rows for p in part]
        assert sorted(found) == sorted(f"{shard}/{row}" for shard, size in enumerate(sizes) for row in range(size))


def damage(folder: Path, kind: str) -> None:
    """Damages tar 1 of `folder` after it was counted, or one image of it."""
    path = folder / "1.tar"
    data = bytearray(path.read_bytes())
    if kind == "missing shard":
        path.unlink()
    elif kind == "truncated tar":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "not a tar":
        path.write_bytes(b"<html>404</html>" * 99)
    elif kind == "shard is shorter than its index says":
        path.write_bytes(tar_bytes(1, 5))
    elif kind == "broken image":
        offset, size = index_shard(str(path)).spans[3, 0]
        data[offset : offset + size] = bytes(int(size))
        path.write_bytes(data)
    elif kind == "not in the sidecar":
        write_labels(folder, {1: 6})
    elif kind == "missing sidecar":
        (folder / "1.vesl.parquet").unlink()
    else:
        assert kind == "unreadable sidecar"
        (folder / "1.vesl.parquet").write_bytes(b"not a table")


def write_labels(folder: Path, sizes: dict[int, int]) -> None:
    for shard, size in sizes.items():
        rows = [SidecarRow(key=f"{row:03d}") for row in range(size)]
        write_sidecar(sidecar_path(str(folder / f"{shard}.tar"), "vesl"), rows, {})


@pytest.mark.parametrize(
    ("kind", "lost"),  # how many of the 10 samples of tar 1
    [
        ("missing shard", 10),
        ("truncated tar", None),
        ("not a tar", 10),
        ("shard is shorter than its index says", 5),
        ("broken image", 1),
        ("not in the sidecar", 4),
        ("missing sidecar", 10),
        ("unreadable sidecar", 10),
    ],
)
def test_damage_is_counted_by_sample_and_disturbs_no_other_position(
    tmp_path: Path, small_windows: None, kind: str, lost: int | None
) -> None:
    sizes = {0: 10, 1: 10, 2: 10, 3: 10}
    folder = write_tars(tmp_path / "tars", list(sizes.values()))
    write_labels(folder, sizes)

    def examples() -> TrainingExamples:
        return stream(source)

    source = Shards(str(folder), ShardsConfig(sidecar="vesl"))
    before = captions_of(examples(), range(40))
    damage(folder, kind)
    source.__setstate__(source.__getstate__())  # as a worker gets it: nothing read yet
    made = [examples()[position] for position in range(40)]
    hit = [bool(one.skipped) for one in made]
    assert sum(hit) == lost or (lost is None and 0 < sum(hit) < 10)
    assert {reason for one in made for reason in one.skipped} == {kind}
    assert [one.caption for one, bad in zip(made, hit, strict=True) if not bad] == [
        caption for caption, bad in zip(before, hit, strict=True) if not bad
    ]
    assert all(before[position].startswith("1/") for position in range(40) if hit[position])
    assert [one.caption for one in made] == captions_of(examples(), range(40))  # replacements too are always the same


def test_the_limit_names_what_is_wrong_with_the_tars(
    tmp_path: Path, small_windows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "MIN_DRAWN", 40)
    folder = write_tars(tmp_path / "tars", [10] * 4)
    examples = stream(Shards(str(folder)))
    damage(folder, "missing shard")
    skipped = Counter(reason for position in range(40) for reason in examples[position].skipped)
    with pytest.raises(RuntimeError, match=r"allows 5\.0% \(missing shard: \d+\)"):
        check_skipped(skipped, 40, 0.05)


def test_a_stream_killed_in_mid_epoch_goes_on_exactly_with_other_workers(tmp_path: Path, small_windows: None) -> None:
    sizes = [7, 1, 9, 4, 3]
    source = Shards(str(write_tars(tmp_path / "tars", sizes)))

    def run(start: int, num_workers: int, kill_at: int | None) -> list[str]:
        """The captions of batches `start` ... 7, a line each, written by a process until it is killed."""
        path = tmp_path / f"from {start} with {num_workers}"

        def write_lines() -> None:
            rows = _Rows(6, 2, start, 8, 0, 1)
            batches = DataLoader(stream(source), batch_sampler=rows, num_workers=num_workers, collate_fn=list)  # type: ignore
            with path.open("w") as lines:
                for step, batch in enumerate(batches, start):
                    print(step, *(example.caption for example in batch), file=lines, flush=True)
                    if step == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

        process = multiprocessing.get_context("fork").Process(target=write_lines)
        process.start()
        process.join(60)
        assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL)
        return path.read_text().splitlines()

    whole = run(0, 0, None)
    assert run(0, 2, kill_at=2) + run(3, 1, None) == whole
    epoch = [word for line in whole[:4] for word in line.split()[1:]]
    assert sorted(epoch) == sorted(f"{shard}/{row}" for shard, size in enumerate(sizes) for row in range(size))
