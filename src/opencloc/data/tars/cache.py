"""Local copies of remote tars, and where the samples of a tar lie, shared by all processes of a machine.

Owns the cache's folder `tars`: whole tars (`HASH.tar`), downloaded once whoever asks, the longest unused removed when
room is needed; and the folder `indices`: the `ShardIndex` of tars (`HASH.npz`), so that of many workers one makes the
pass over the headers.  Everything here can be deleted at any time, by anybody: it is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import queue
import shutil
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fsspec.core import url_to_fs

from opencloc import files
from opencloc.data.tars.tar import ShardIndex, index_shard

GB = 10**9
_ATTEMPTS, _PAUSE_S = 3, 2.0  # downloads tried, and the wait before the second (then twice as long, ...)
_WORTH_KEEPING_S = 0.02  # an index made faster is made again rather than kept
_INDICES_GB = 10.0  # on disk; 10,000 samples take 0.6 MB


def local_tar(url: str, limit_gb: float) -> str:
    """Path of a tar on this machine: its own, or that of a copy, downloaded if it isn't there yet.

    At most `limit_gb` (10^9 bytes) of copies are kept.  Raises `FileNotFoundError` if there is no such tar, other
    `OSError` if it can't be fetched.
    """
    if (path := files.local_path(url)) is not None:
        return path
    copy = _copy_path(url)
    if not _touch(copy):
        with files.locked(copy):
            if not _touch(copy):
                _download(url, copy, limit_gb)
    return str(copy)


def _copy_path(url: str) -> Path:
    return files.cache_folder("tars") / f"{_hash(url)}.tar"


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=12).hexdigest()


def _touch(path: Path) -> bool:
    """Marks a file as just used, by its time; False if it isn't there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _download(url: str, copy: Path, limit_gb: float) -> None:
    """Makes the copy: all of it under its name, or nothing."""
    fs, remote = url_to_fs(url)
    part = copy.with_suffix(".part")  # the lock is held, so nobody else writes it; one left by a kill is overwritten
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S * 2 ** (attempt - 1))
        try:
            size = fs.size(remote)
            _make_room(copy.parent, "*.tar", limit_gb * GB - (size or 0))
            with fs.open(remote, "rb") as source, open(part, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            if size is not None and part.stat().st_size != size:
                raise OSError(f"{part.stat().st_size} of {size} bytes came")
            os.replace(part, copy)
            return
        except FileNotFoundError:
            raise
        except Exception as error:  # every file system has errors of its own kind
            last = error
    with contextlib.suppress(FileNotFoundError):
        part.unlink()
    raise OSError(f"{url} can't be fetched, tried {_ATTEMPTS} times: {type(last).__name__}: {last}") from last  # pyright: ignore


def _make_room(folder: Path, pattern: str, room: float) -> None:
    """Deletes the files unused for longest until the rest takes `room` bytes at most."""
    found = []
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    excess = sum(size for _, size, _ in found) - room
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # who has it open reads on
        excess -= size


class Prefetcher:
    """Downloads tars in the background of a process, one after the other."""

    def __init__(self, limit_gb: float) -> None:
        self._limit_gb = limit_gb
        self._process: int | None = None  # whose thread it is; a fork doesn't copy threads
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask(self, urls: Sequence[str]) -> None:
        """Will see to it that these are here soon; those already here cost next to nothing."""
        if self._process != os.getpid():
            self._process, self._queue = os.getpid(), queue.SimpleQueue()
            threading.Thread(target=self._run, daemon=True).start()
        for url in urls:
            self._queue.put(url)

    def _run(self) -> None:
        while True:
            url = self._queue.get()
            copy = _copy_path(url)
            with contextlib.suppress(OSError), files.locked(copy, wait=False) as got:
                if got and not _touch(copy):  # else another process is at it
                    _download(url, copy, self._limit_gb)


def load_index(url: str, path: str) -> ShardIndex:
    """The index of the tar `url`, which lies at `path` on this machine: the one kept, or made (and kept).

    Raises `FileNotFoundError` and other `OSError` of the tar.
    """
    status = os.stat(path)
    version = "" if path != url else f" {status.st_size} {status.st_mtime_ns}"  # a copy's time is that of its last use
    kept = files.cache_folder("indices") / f"{_hash(url + version)}.npz"
    if _touch(kept) and (index := _read_index(url, kept)) is not None:
        return index
    with files.locked(kept):
        if _touch(kept) and (index := _read_index(url, kept)) is not None:
            return index
        start = time.perf_counter()
        index = index_shard(path)
        index = ShardIndex(url=url, keys=index.keys, spans=index.spans, problems=index.problems)
        if time.perf_counter() - start >= _WORTH_KEEPING_S:
            data = _index_bytes(index)
            _make_room(kept.parent, "*.npz", _INDICES_GB * GB - len(data))
            files.write_bytes(str(kept), data)
    return index


def _index_bytes(index: ShardIndex) -> bytes:
    keys = "\0".join(index.keys).encode()  # no name in a tar holds a NUL
    problems = [f"{reason}\0{count}" for reason, count in index.problems.items()]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        spans=index.spans,
        keys=np.frombuffer(keys, dtype=np.uint8),
        problems=np.frombuffer("\n".join(problems).encode(), dtype=np.uint8),
    )
    return buffer.getvalue()


def _read_index(url: str, path: Path) -> ShardIndex | None:
    """The index kept in a file; None if the file is damaged or gone."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as kept:
            spans, keys, problems = (kept[name] for name in ("spans", "keys", "problems"))
        pairs = (line.split("\0") for line in problems.tobytes().decode().splitlines())
        index = ShardIndex(
            url=url,
            keys=tuple(keys.tobytes().decode().split("\0")) if len(spans) else (),
            spans=spans,
            problems=Counter({reason: int(count) for reason, count in pairs}),
        )
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return index if len(index.keys) == len(spans) else None
