"""The cache: local copies of remote tars and what is known of tars, shared by all processes of a machine.

A copy is downloaded once, however many processes ask for it; the longest unused ones are removed when room is needed.
Everything in the cache can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from opencloc import files

T = TypeVar("T")
GB = 10**9
_ATTEMPTS, _PAUSE_S = 3, 2.0  # downloads tried, and the wait before the second (then twice as long, ...)
_STALE_S = 3600.0  # a half-written file that has not grown for so long is nobody's
_KINDS = {
    "tars": "copies of remote tars",
    "indices": "where the samples of tars lie",
    "counts": "how many samples tars hold",
    "annotations": "what annotation files say",
}


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Shows the cache of remote tars, their indices and what was read from annotation files.

    The environment variable OPENCLOC_CACHE sets its place, by default ~/.cache/opencloc.  Copies of remote tars take
    up to 50 GB; a source sets another size by its option, as in `shards:s3://bucket/{000..999}.tar?cache_gb=200`.
    Everything in the cache can be deleted at any time: it is made again.
    """

    clear: bool = False
    """Delete what is in it."""


def cache_report(config: CacheConfig) -> str:
    """Where the cache lies and how large its parts are; clears it first if the config says so."""
    lines = [str(files.cache_folder("tars").parent)]
    for kind, meaning in _KINDS.items():
        found = [path for path in files.cache_folder(kind).iterdir() if path.is_file()]
        size = 0
        for path in found:
            with contextlib.suppress(FileNotFoundError):
                size += path.stat().st_size
                if config.clear:
                    path.unlink()  # who has it open reads on
        lines.append(f"{'removed ' if config.clear else ''}{meaning}: {len(found):,} files, {size / GB:.2f} GB")
    return "\n".join(lines)


def local_tar(url: str, version: files.Version, limit_gb: float) -> str:
    """Path of a tar on this machine: its own, or that of a copy, downloaded if it isn't there yet.

    `version`: as `files.version` gave it when the tar was opened.  At most `limit_gb` (10^9 bytes) of copies are kept.
    Raises `FileNotFoundError` if there is no such tar, other `OSError` if it can't be fetched or has been replaced.
    """
    if (path := files.local_path(url)) is not None:
        _check_version(url, version)
        return path
    copy = _copy_path(url, version)
    if not touch(copy):
        with files.locked(copy):
            if not touch(copy):
                _download(url, version, copy, limit_gb)
    return str(copy)


def version_of(url: str) -> files.Version:
    """`files.version`, asked again where a server fails."""
    return files.version(url) if files.local_path(url) is not None else _patiently(url, lambda: files.version(url))


def _check_version(url: str, version: files.Version) -> None:
    if version_of(url) != version:
        raise OSError(f"{url} was replaced by another file while it was in use")


def _copy_path(url: str, version: files.Version) -> Path:
    return files.cache_folder("tars") / f"{digest(url, version)}.tar"


def digest(*parts: object) -> str:
    """A short name for some values."""
    text = "\n".join(map(str, parts))
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=12).hexdigest()


def touch(path: Path) -> bool:
    """Marks a file as just used, by its time; False if it isn't there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _download(url: str, version: files.Version, copy: Path, limit_gb: float) -> None:
    """Makes the copy: all of it under its name, or nothing."""

    def fetch() -> None:
        fs, remote = files.url_to_fs(url)
        make_room(copy.parent, "*.tar", limit_gb * GB - (version.size or 0))
        with files.new_file(copy) as part:
            with fs.open(remote, "rb") as source, open(part, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            if version.size is not None and part.stat().st_size != version.size:
                raise OSError(f"{part.stat().st_size} of {version.size} bytes came")
            _check_version(url, version)

    _check_version(url, version)
    _patiently(url, fetch)


def _patiently(url: str, ask: Callable[[], T]) -> T:
    """What a server answers, asked some times if need be.  Raises `FileNotFoundError`, or `OSError` for all else."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S * 2 ** (attempt - 1))
        try:
            return ask()
        except FileNotFoundError:
            raise
        except Exception as error:  # every file system has errors of its own kind
            last = error
    raise OSError(f"{url} can't be fetched, tried {_ATTEMPTS} times: {type(last).__name__}: {last}") from last  # pyright: ignore


def make_room(folder: Path, pattern: str, room: float) -> None:
    """Deletes the files unused for longest until the rest takes `room` bytes at most, and stale half-written ones."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if path.suffix == ".partial" and time.time() - status.st_mtime > _STALE_S:
                path.unlink()
            elif path.match(pattern) and not path.name.startswith("."):
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
            with contextlib.suppress(OSError):
                version = version_of(url)
                copy = _copy_path(url, version)
                with files.locked(copy, wait=False) as got:
                    if got and not touch(copy):  # else another process is at it
                        _download(url, version, copy, self._limit_gb)
