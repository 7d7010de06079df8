"""Streams of many tars: every sample once, damage counted and replaced, resumed exactly after a kill."""

from __future__ import annotations

import functools
import http.server
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opencloc.data import stream as loader
from opencloc.data.loader import make_loader
from opencloc.data.sidecar import SidecarRow, sidecar_path, write_sidecar
from opencloc.data.sources.folder import ImageFolder
from opencloc.data.stream import TrainingExamples, _Rows, check_skipped
from opencloc.data.tars.shards import Shards, ShardsConfig, index_shard
from tests.helpers.tars import put_remote, tar_bytes, write_tars

GB = 1e9


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENCLOC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stream(*sources: Shards, lanes: int = 2) -> TrainingExamples:
    return TrainingExamples(sources, (), num_regions=1, image_size=8, seed=0, lanes=lanes)


def captions_of(examples: TrainingExamples, positions: range) -> list[str]:
    return [examples[position].caption for position in positions]


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SHUFFLE", 8)


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
    batches = make_loader(examples, _Rows(6, 2, 0, 4, 0, 1), num_workers=2)
    found = [example.caption for batch in batches for example in batch]
    assert sorted(found) == sorted(f"{shard}/{row}" for shard in range(4) for row in range(6))


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
            batches = make_loader(stream(source), rows, num_workers=num_workers)
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


# -- fingerprints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_fingerprints_tell_another_order_from_other_labels(tmp_path: Path, kind: str) -> None:
    def fingerprints(place: Path = tmp_path / kind) -> tuple[str, str]:
        source = ImageFolder(str(place)) if kind == "folder" else Shards(str(place), ShardsConfig(sidecar="vesl"))
        examples = TrainingExamples([source], (), num_regions=1, image_size=8, seed=0)
        return examples.fingerprint, examples.labels_fingerprint

    def label(text: str) -> None:
        (tmp_path / "folder/0.txt").write_text(text)
        row = SidecarRow(key="000", caption=text, texts=(text,), boxes=np.array([[0, 0, 1, 1]]), scores=np.ones(1))
        write_sidecar(str(tmp_path / "tars/0.vesl.parquet"), [row], {})

    (tmp_path / "folder").mkdir()
    for name in ("0", "1"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"folder/{name}.png")
    write_tars(tmp_path / "tars", [2, 2])
    label("dog")
    order, labels = fingerprints()
    assert fingerprints(Path(shutil.copytree(tmp_path / kind, tmp_path / "copy" / kind))) == (order, labels)
    label("a brown dog")
    assert fingerprints()[0] == order
    assert fingerprints()[1] != labels
    last = tmp_path / kind / ("1.png" if kind == "folder" else "1.tar")
    last.rename(last.with_stem("2"))
    assert fingerprints()[0] != order
