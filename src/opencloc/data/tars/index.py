"""How many samples each of many tars holds, and where in a tar they lie, with as little reading as can be.

Counts come from what was found earlier (kept in the cache's folder `counts`, a file per folder of tars), img2dataset's
`XXXXX_stats.json` (`successes`), the rows of a remote tar's sidecar, and last a pass over the tar's headers.  The
positions of a training stream depend on these counts, so a kept count stays as long as the tar does.

The `ShardIndex` of a tar is kept in the cache's folder `indices`, so that of many workers one makes the pass over the
headers.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opencloc import files
from opencloc.data.sidecar import sidecar_path
from opencloc.data.tars.cache import GB, digest, local_tar, make_room, touch, version_of
from opencloc.data.tars.tar import ShardIndex, index_shard
from opencloc.progress import track

_AT_ONCE = 16  # tars asked at the same time
_COUNTS_WORTH_KEEPING_S = 1.0  # what was found faster is found again rather than kept
_INDEX_WORTH_KEEPING_S = 0.02
_INDICES_GB = 10.0  # on disk; 10,000 samples take 0.6 MB
_BYTES_PER_SAMPLE = 1024  # of a tar, at least: the header and one block of its image
_LARGEST_TAR = 10**11  # bytes, where a server does not tell


@dataclass(frozen=True, kw_only=True)
class ShardCounts:
    """Samples per tar, in the order asked.  Tars that can't be read are given the median of the others."""

    samples: np.ndarray  # (tars,) int64
    unknown: frozenset[int]  # the tars that can't be read and of which nothing else tells the count
    problems: Counter[str]  # what passes over headers met that is no sample, by reason


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What is known of one tar; `version` tells whether it still is the same file."""

    samples: int
    version: str
    problems: dict[str, int] = field(default_factory=dict)


def count_samples(urls: Sequence[str], sidecar: str | None = None, *, cache_gb: float) -> ShardCounts:
    """The samples of every tar.

    `sidecar`: name of labels beside the tars.  `cache_gb`: room for remote tars that must be downloaded to be counted.

    Raises `FileNotFoundError` if none of the tars is there, other `OSError` of a tar that can't be read.
    """
    folders: dict[str, list[int]] = defaultdict(list)
    for number, url in enumerate(urls):
        folders[os.path.dirname(url)].append(number)
    found: dict[int, _Found | None] = {}
    for folder, numbers in folders.items():
        found |= _count_folder(folder, {number: urls[number] for number in numbers}, sidecar, cache_gb)
    there = [one.samples for one in found.values() if one is not None]
    if not there:
        with contextlib.suppress(FileNotFoundError):
            _count(urls[0], version_of(urls[0]), None, sidecar, cache_gb)  # raises what keeps it from being read
        raise FileNotFoundError(f"{urls[0]}: no such shard (none of {len(urls)} is there)")
    usual = int(np.median(there))
    samples = [one.samples if (one := found[number]) is not None else usual for number in range(len(urls))]
    return ShardCounts(
        samples=np.asarray(samples, dtype=np.int64),
        unknown=frozenset(number for number, one in found.items() if one is None),
        problems=sum((Counter(one.problems) for one in found.values() if one is not None and one.problems), Counter()),
    )


def _count_folder(folder: str, urls: dict[int, str], sidecar: str | None, cache_gb: float) -> dict[int, _Found | None]:
    """What is known of the tars of one folder, by number; None for those that can't be read."""
    there = files.versions(folder)
    kept_at = files.cache_folder("counts") / f"{digest(_place(folder), sidecar)}.json"
    names = {number: url.rsplit("/", 1)[-1] for number, url in urls.items()}

    def ask(number: int) -> _Found | None:
        url, name = urls[number], names[number]
        try:
            version = version_of(url) if there is None else there[name]
            if name in kept and kept[name].version == str(version):
                return kept[name]
            samples, problems = _count(url, version, there, sidecar, cache_gb)
        except OSError:  # whoever reads it will meet the same, and count it
            return None
        return _Found(samples=samples, version=str(version), problems=problems)

    with files.locked(kept_at):  # of a machine's ranks one counts
        kept = _read_kept(kept_at)
        known: dict[int, _Found | None] = dict.fromkeys(urls)
        to_ask = list(urls)
        if there is not None:  # what listing and kept counts say needs no thread per tar
            to_ask = [number for number, name in names.items() if name in there]
            known |= {
                n: kept[name] for n in to_ask if (name := names[n]) in kept and kept[name].version == str(there[name])
            }
            to_ask = [number for number in to_ask if known[number] is None]
        if not to_ask:
            return known
        start = time.perf_counter()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            answers = track(pool.map(ask, to_ask), "counting samples", total=len(to_ask), unit="tars")
            known |= zip(to_ask, answers, strict=True)
        if time.perf_counter() - start >= _COUNTS_WORTH_KEEPING_S:
            kept |= {names[number]: one for number, one in known.items() if one is not None}
            entries = {name: [one.samples, one.version, one.problems] for name, one in kept.items()}
            files.write_bytes(kept_at, json.dumps(entries).encode())
    return known


def _place(url: str) -> str:
    """A name of a file or folder that does not depend on the working directory."""
    return url if (path := files.local_path(url)) is None else os.path.abspath(path)


def _read_kept(path: Path) -> dict[str, _Found]:
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, AttributeError):
        entries = json.loads(path.read_bytes())
        return {name: _Found(samples=n, version=v, problems=p) for name, (n, v, p) in entries.items()}
    return {}


def _count(
    url: str,
    version: files.Version,
    there: dict[str, files.Version] | None,
    sidecar: str | None,
    cache_gb: float,
) -> tuple[int, dict[str, int]]:
    """(samples, problems) of one tar; raises `FileNotFoundError` if only the tar itself could tell and isn't there."""
    stats = f"{url.removesuffix('.tar')}_stats.json"
    if there is None or os.path.basename(stats) in there:
        with contextlib.suppress(OSError):
            successes = _successes(files.read_bytes(stats))
            if successes is not None and 0 <= successes <= (version.size or _LARGEST_TAR) // _BYTES_PER_SAMPLE:
                return successes, {}
            if successes is not None:
                warnings.warn(f"{stats}: no count that its tar could hold; the tar itself is counted", stacklevel=2)
    if sidecar is not None and files.local_path(url) is None:
        with (
            contextlib.suppress(OSError, ValueError, pa.ArrowException),
            files.open_seekable(sidecar_path(url, sidecar)) as stream,
        ):
            return pq.ParquetFile(stream).metadata.num_rows, {}
    index = index_shard(local_tar(url, version_of(url), cache_gb))  # a listing may write a version in another way
    return len(index.keys), dict(index.problems)


def _successes(data: bytes) -> int | None:
    """img2dataset's count of samples in a `_stats.json`; None if it says none, -1 if it makes no sense."""
    try:
        successes = json.loads(data).get("successes")
    except (ValueError, AttributeError, RecursionError):
        return -1
    return successes if type(successes) is int or successes is None else -1


def load_index(url: str, cache_gb: float) -> tuple[ShardIndex, files.Version]:
    """The index of a tar, the one kept or made (and kept), and the version of the tar that it is of.

    Raises `FileNotFoundError` and other `OSError` of the tar.
    """
    version = version_of(url)
    kept = files.cache_folder("indices") / f"{digest(_place(url), version)}.npz"
    if touch(kept) and (index := _read_index(url, kept)) is not None:
        return index, version
    path = local_tar(url, version, cache_gb)
    with files.locked(kept):
        if touch(kept) and (index := _read_index(url, kept)) is not None:
            return index, version
        start = time.perf_counter()
        index = replace(index_shard(path), url=url)
        if time.perf_counter() - start >= _INDEX_WORTH_KEEPING_S:
            data = _index_bytes(index)
            make_room(kept.parent, "*.npz", _INDICES_GB * GB - len(data))
            files.write_bytes(kept, data)
    return index, version


def _index_bytes(index: ShardIndex) -> bytes:
    texts = json.dumps([index.keys, index.problems]).encode()
    buffer = io.BytesIO()
    np.savez(buffer, spans=index.spans, texts=np.frombuffer(texts, dtype=np.uint8))
    return buffer.getvalue()


def _read_index(url: str, path: Path) -> ShardIndex | None:
    """The index kept in a file; None if the file is damaged or gone."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as kept:
            spans, (keys, problems) = kept["spans"], json.loads(kept["texts"].tobytes())
        index = ShardIndex(url=url, keys=tuple(keys), spans=spans, problems=Counter(problems))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    return index if len(index.keys) == len(spans) else None
