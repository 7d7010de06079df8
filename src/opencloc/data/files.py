"""Bytes of files, local or at any fsspec URL.  Owns reading, listing and atomic writing; knows nothing of samples.

A local path is opened plainly on every call (no file stays open, so nothing is shared across a fork); everything else
goes through fsspec, which keeps its own connections per process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fsspec.core import url_to_fs


def local_path(url: str) -> str | None:
    """The path of a local file, or None if `url` belongs to another file system."""
    if url.startswith("file://"):
        return url.removeprefix("file://")
    return None if "://" in url or "::" in url else url


def read_bytes(url: str, start: int = 0, size: int | None = None) -> bytes:
    """`size` bytes (None: all) from byte `start` on; fewer where the file ends earlier."""
    if (path := local_path(url)) is not None:
        with open(path, "rb", buffering=0 if size is not None else -1) as stream:  # one read needs no buffer
            stream.seek(start)
            return stream.read() if size is None else stream.read(size)
    fs, path = url_to_fs(url)
    return fs.cat_file(path, start=start, end=None if size is None else start + size)


def write_bytes(url: str, data: bytes) -> None:
    """Writes a whole file: nobody ever sees half of it.

    Local files are written under a temporary name and renamed.  Elsewhere the object is put in one piece, which
    object stores make visible only when it is complete.
    """
    if (path := local_path(url)) is None:
        fs, path = url_to_fs(url)
        fs.pipe_file(path, data)
        return
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def exists(url: str) -> bool:
    """Whether there is a file or folder."""
    if (path := local_path(url)) is not None:
        return os.path.exists(path)
    fs, path = url_to_fs(url)
    return fs.exists(path)


def is_folder(url: str) -> bool:
    """Whether `url` is a folder that exists."""
    if (path := local_path(url)) is not None:
        return os.path.isdir(path)
    fs, path = url_to_fs(url)
    return fs.isdir(path)


def glob(pattern: str) -> list[str]:
    """Files that match a glob pattern, sorted, as URLs of the same kind as the pattern."""
    fs, path = url_to_fs(pattern)
    found = sorted(fs.glob(path))
    if (local := local_path(pattern)) is None:
        return [fs.unstrip_protocol(path) for path in found]
    return found if os.path.isabs(local) else [os.path.relpath(path) for path in found]


def children(folder: str) -> list[str]:
    """What lies directly in a folder, sorted, as URLs of the same kind as `folder`."""
    if (path := local_path(folder)) is not None:
        return sorted(os.path.join(path, name) for name in os.listdir(path or "."))
    fs, path = url_to_fs(folder)
    return sorted(f"{folder.rstrip('/')}/{found.rstrip('/').rsplit('/', 1)[-1]}" for found in fs.ls(path, detail=False))


def versions(folder: str) -> dict[str, str] | None:
    """Name -> what tells one version of a file from another (size and time), of all files directly in a folder.

    One listing, however many files.  None where the folder isn't there or can't be listed (as on web servers).
    """
    if (path := local_path(folder)) is not None:
        try:
            with os.scandir(path or ".") as entries:
                return {e.name: f"{(s := e.stat()).st_size}-{s.st_mtime_ns}" for e in entries if e.is_file()}
        except OSError:
            return None
    if folder.startswith(("http://", "https://")):  # fsspec takes the links of whatever page comes for a listing
        return None
    fs, path = url_to_fs(folder)
    try:
        entries = fs.ls(path, detail=True)
    except Exception:  # every file system has its own; what is not there will be missed when it is read
        return None
    times = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created")
    return {
        entry["name"]
        .rstrip("/")
        .rsplit("/", 1)[-1]: f"{entry.get('size')}-{next(filter(None, map(entry.get, times)), '')}"
        for entry in entries
        if entry.get("type") != "directory"
    }


def find(folder: str) -> list[str]:
    """All files under a folder, at any depth, sorted, as paths below it with `/` between the parts."""
    fs, path = url_to_fs(folder)
    root = path.rstrip("/") + "/"
    return sorted(found.removeprefix(root) for found in fs.find(path))


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
    with open(cache_folder("locks") / f"{path.parent.name}-{number:03d}", "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


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
