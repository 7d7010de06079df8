"""Files, local or at any fsspec URL: reading, listing, writing that nobody ever sees half of, and locks.

A name without `://` is a local path, whatever else stands in it.  A local file is opened anew on every call, so no open
file is shared across a fork; everything else goes through fsspec, which keeps its own connections per process.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
from fsspec.core import url_to_fs as fsspec_url_to_fs
from fsspec.implementations.local import LocalFileSystem

from opencloc.errors import redacted


def local_path(url: str) -> str | None:
    """The path of a local file, or None if `url` belongs to another file system."""
    if url.startswith("file://"):
        return url.removeprefix("file://")
    return None if "://" in url else url


def _filesystem(url: str) -> tuple[Any, str]:
    """The file system of `url`, and the path in it (of a local file the absolute one)."""
    if (path := local_path(url)) is not None:
        return LocalFileSystem(), os.path.abspath(path)
    return url_to_fs(url)


def url_to_fs(url: str) -> tuple[Any, str]:  # fsspec has no types
    """The file system of a remote `url`, and the path in it.

    Raises ValueError naming the URL where the package for its kind is not installed (s3fs for `s3://`).
    """
    try:
        return fsspec_url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{redacted(url)}: {error}") from error


def read_bytes(url: str, start: int = 0, size: int | None = None) -> bytes:
    """`size` bytes (None: all) from byte `start` on; fewer where the file ends earlier."""
    if (path := local_path(url)) is not None:
        with open(path, "rb", buffering=0 if size is not None else -1) as stream:  # one read needs no buffer
            stream.seek(start)
            return stream.read() if size is None else stream.read(size)
    fs, path = url_to_fs(url)
    return fs.cat_file(path, start=start, end=None if size is None else start + size)


def read_text(url: str) -> str:
    """A whole file in UTF-8, without its byte order mark.  Raises ValueError naming the file for other bytes."""
    try:
        return read_bytes(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{url}: not a text in UTF-8 ({error})") from error


def write_bytes(url: str | Path, data: bytes) -> None:
    """Writes a whole file: nobody ever sees half of it.  The folder of a local file is made.

    Local files are written under a temporary name, synced and renamed.  Elsewhere the object is put in one piece, which
    object stores make visible only when it is complete.  Raises `OSError` where something other than a regular file has
    the name.
    """
    if (path := local_path(str(url))) is None:
        fs, path = url_to_fs(str(url))
        fs.pipe_file(path, data)
        return
    with new_file(Path(path)) as partial:
        partial.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of a text, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """`write_bytes` of a value as indented JSON.  Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to.  It is renamed to `path` when the block ends well, removed when it fails.

    Raises `OSError` naming `path` where it is something other than a regular file, or cannot be written (a full disk).
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    partial = _make_room_for(path)
    try:
        with _named(path):
            yield partial
            _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill, which takes the place of `path` when the block ends well.

    The old folder stays until the new one is complete and synced.  When the block fails, the old one is untouched.
    Raises `OSError` naming `path` where it is something other than a folder, or cannot be written (a full disk).
    """
    if path.exists() and not path.is_dir():
        raise OSError(f"{path} is not a folder")
    partial = _make_room_for(path)
    partial.mkdir()
    try:
        with _named(path):
            yield partial
            for written in [*partial.rglob("*"), partial]:
                _sync(written)
        if path.exists():
            old = partial.with_suffix(".old")
            os.replace(path, old)
            os.replace(partial, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(partial, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Makes a full disk an `OSError` that names `path`, whichever library met it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(path)
        elif os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def remove_folder(path: Path) -> None:
    """Removes a folder so that nobody ever sees half of it: it is renamed out of sight first."""
    hidden = partial_path(path)
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what killed processes left half written in a folder.  The caller must be its only writer."""
    for leftover in [*folder.glob(".*.partial"), *folder.glob(".*.old")]:
        _remove(leftover)


def partial_path(path: Path) -> Path:
    """The hidden name beside `path` under which this process writes it."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def _make_room_for(path: Path) -> Path:
    """The partial path of `path`, free, in a folder from which the leftovers of dead processes are gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if (os.getpid(), path.parent) not in _swept:  # once per folder, which may be large
        _swept.add((os.getpid(), path.parent))
        mine = re.compile(rf"\..*\.{re.escape(socket.gethostname())}-(\d+)\.(partial|old)")
        for name in os.listdir(path.parent):
            if (match := mine.fullmatch(name)) and not _is_alive(int(match[1])):
                _remove(path.parent / name)
    partial = partial_path(path)
    _remove(partial)
    return partial


_swept: set[tuple[int, Path]] = set()  # (process, folder)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exists(url: str) -> bool:
    """Whether there is a file or folder."""
    fs, path = _filesystem(url)
    return fs.exists(path)


def is_folder(url: str) -> bool:
    """Whether `url` is a folder that exists."""
    fs, path = _filesystem(url)
    return fs.isdir(path)


def glob(pattern: str) -> list[str]:
    """Files that match a glob pattern, sorted, as URLs of the same kind as the pattern."""
    fs, path = _filesystem(pattern)
    found: list[str] = sorted(fs.glob(path))  # pyright: ignore[reportAssignmentType]
    if (local := local_path(pattern)) is None:
        return [str(fs.unstrip_protocol(path)) for path in found]
    return found if os.path.isabs(local) else [os.path.relpath(path) for path in found]


def children(folder: str) -> list[str]:
    """What lies directly in a folder, sorted, as URLs of the same kind as `folder`."""
    if (path := local_path(folder)) is not None:
        return sorted(os.path.join(path, name) for name in os.listdir(path or "."))
    fs, path = url_to_fs(folder)
    return sorted(f"{folder.rstrip('/')}/{found.rstrip('/').rsplit('/', 1)[-1]}" for found in fs.ls(path, detail=False))


@dataclass(frozen=True, kw_only=True)
class Version:
    """What tells one version of a file from another without reading it."""

    size: int | None  # in bytes; None where the server doesn't say
    tag: str = ""  # its ETag or time

    def __str__(self) -> str:
        return f"{self.size}-{self.tag}"


def version(url: str) -> Version:
    """The version of a file: one look, of a remote file one request.  Raises `FileNotFoundError`, other `OSError`."""
    if (path := local_path(url)) is not None:
        status = os.stat(path)
        return Version(size=status.st_size, tag=str(status.st_mtime_ns))
    fs, path = url_to_fs(url)
    fs.invalidate_cache(path)
    return _version(fs.info(path))


def versions(folder: str) -> dict[str, Version] | None:
    """Name -> version of all files directly in a folder.

    One listing, however many files.  None where the folder isn't there or can't be listed (as on web servers).
    """
    if (path := local_path(folder)) is not None:
        try:
            with os.scandir(path or ".") as entries:
                status = {entry.name: entry.stat() for entry in entries if entry.is_file()}
        except OSError:
            return None
        return {name: Version(size=one.st_size, tag=str(one.st_mtime_ns)) for name, one in status.items()}
    if folder.startswith(("http://", "https://")):  # fsspec takes the links of whatever page comes for a listing
        return None
    fs, path = url_to_fs(folder)
    fs.invalidate_cache(path)
    try:
        entries = fs.ls(path, detail=True)
    except Exception:  # every file system has its own; what is not there will be missed when it is read
        return None
    files = (entry for entry in entries if entry.get("type") != "directory")
    return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: _version(entry) for entry in files}


def _version(entry: dict[str, Any]) -> Version:
    """The version in one of fsspec's descriptions of a file."""
    names = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "created")
    size = entry.get("size")
    tag = next(filter(None, map(entry.get, names)), "")
    return Version(size=None if size is None else int(size), tag=str(tag))


def find(folder: str) -> list[str]:
    """All files under a folder, at any depth, sorted, as paths below it with `/` between the parts."""
    return sorted(sizes(folder))


def sizes(folder: str) -> dict[str, int | None]:
    """Path below a folder -> size in bytes, of all files under it at any depth."""
    fs, path = _filesystem(folder)
    root = path.rstrip("/") + "/"
    found: Any = fs.find(path, detail=True)
    return {name.removeprefix(root): entry.get("size") for name, entry in found.items()}


def cache_folder(name: str) -> Path:
    """A folder for what can be made again, which is made if need be: OPENCLOC_CACHE/name, by default in `~/.cache`.

    Where nothing can be written there, it is in the machine's folder for temporary files.
    """
    base = os.environ.get("OPENCLOC_CACHE")
    base = base or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "opencloc")
    folder = Path(base, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir(), f"opencloc-{os.getuid()}", name)
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Locks a file of the cache among the processes of this machine; the lock falls with its process, however killed.

    Gives whether the lock was got, which without `wait` may be False.  Some files share one lock (those of different
    folders never do), and then merely wait for each other: a lock per file would leave a file behind for each.
    """
    number = int(hashlib.blake2b(path.name.encode(), digest_size=1).hexdigest(), 16)
    with _lock(cache_folder("locks") / f"{path.parent.name}-{number:03d}", wait) as got:
        yield got


@contextlib.contextmanager
def held(folder: Path, who: str) -> Iterator[None]:
    """Holds a folder for its one writer, making it if need be; the lock falls with its process, however killed.

    Raises ValueError, saying `who` does, where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / ".lock", wait=False) as got:
        if not got:
            raise ValueError(f"{folder}: {who}")
        yield


@contextlib.contextmanager
def _lock(path: Path, wait: bool) -> Iterator[bool]:
    """Locks the file; gives whether the lock was got."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextlib.contextmanager
def open_seekable(url: str) -> Iterator[io.BufferedIOBase]:
    """A readable stream that can seek; a remote file whose server can't is first copied to a temporary file."""
    if (path := local_path(url)) is not None:
        with open(path, "rb") as stream:
            yield stream
        return
    fs, path = url_to_fs(url)
    with fs.open(path, "rb") as remote:
        try:
            remote.seek(1)
            remote.seek(0)
        except (ValueError, OSError):
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(remote, copy)
                copy.seek(0)
                yield copy
        else:
            yield io.BufferedReader(remote)
