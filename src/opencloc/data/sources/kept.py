"""What was read from large annotation files, kept so that of all ranks, commands and days one reads each file.

The content lies as arrays in the cache's folder `annotations`, under a name made of the place, size and time of every
file that it was read from, so a changed file is read anew.  Who comes while another one reads waits for it.  Small
files are read again rather than kept.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from opencloc import files
from opencloc.data.tars.cache import GB, digest, make_room, touch

T = TypeVar("T")
WORTH_KEEPING_BYTES = 16 * 2**20  # of the files read
_FORMAT = 1  # to be raised whenever a reader makes something else of the same files
_KEPT_GB = 10.0  # on disk; COCO's train2017 takes 0.03


def kept(kind: type[T], inputs: Sequence[str], read: Callable[[], T], options: str = "") -> T:
    """What `read` makes of the files (or folders of files) `inputs`, read by one process of the machine.

    `kind`: a dataclass of arrays, texts, tuples and counters, not to be changed by anyone, since all share it.
    `options`: whatever else it depends on.  Raises as `read`, and `FileNotFoundError` for an input that is not there.
    """
    states = [_state(path) for path in inputs]
    name = digest(kind.__name__, _FORMAT, options, *(state for state, _ in states))
    if (found := _memory.get(name)) is not None:
        return found
    if sum(size for _, size in states) < WORTH_KEEPING_BYTES:
        return _remember(name, read())
    path = files.cache_folder("annotations") / f"{name}.npz"
    if (found := _load(kind, path)) is None:
        with files.locked(path):
            if (found := _load(kind, path)) is None:
                found = read()
                _save(found, path)
    return _remember(name, found)


_memory: dict[str, Any] = {}  # of this process: the last few


def _remember(name: str, found: T) -> T:
    while len(_memory) >= 4:
        _memory.pop(next(iter(_memory)), None)
    _memory[name] = found
    return found


def _state(path: str) -> tuple[str, int]:
    """(what tells this version of a file or folder from others, its size in bytes)."""
    place = path if (local := files.local_path(path)) is None else os.path.abspath(local)
    if files.is_folder(path):
        inside = files.versions(path) or {}
        return f"{place} {digest(*sorted(map(str, inside.items())))}", sum(one.size or 0 for one in inside.values())
    version = files.version(path)
    return f"{place} {version}", version.size or 0


def _load(kind: type[T], path: Path) -> T | None:
    """What is kept there; None where nothing is, or it is damaged."""
    if not touch(path):
        return None
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            rest = json.loads(stored["rest"].tobytes())
            values = {name: stored[name] for name in stored.files if name != "rest"}
            return kind(**values, **{name: _frozen(value) for name, value in rest.items()})
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        path.unlink(missing_ok=True)
        warnings.warn(f"{path}: what was kept there is damaged, its files are read again ({error})", stacklevel=3)
        return None


def _frozen(value: Any) -> Any:
    """A value of JSON with tuples for lists and counters for objects."""
    if isinstance(value, list):
        return tuple(map(_frozen, value)) if value and isinstance(value[0], list) else tuple(value)
    return Counter(value) if isinstance(value, dict) else value


def _save(found: Any, path: Path) -> None:
    """Keeps it; where that is not possible the run goes on with what it has."""
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    rest = json.dumps({name: value for name, value in values.items() if name not in arrays})
    try:
        with files.new_file(path) as partial, open(partial, "wb") as stream:
            np.savez(stream, allow_pickle=False, rest=np.frombuffer(rest.encode(), dtype=np.uint8), **arrays)
        make_room(path.parent, "*.npz", _KEPT_GB * GB)
    except OSError as error:
        warnings.warn(f"{path}: could not be written, every process reads for itself ({error})", stacklevel=3)
