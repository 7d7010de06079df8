"""How many samples each of many tars holds, without reading the tars where that can be helped.

Owns the order in which it is asked: what was found earlier (kept in the cache's folder `counts`, one file per folder of
tars), img2dataset's `XXXXX_stats.json` (`successes`), of a remote tar the rows of its sidecar, and last a pass over the
tar's headers.
The positions of a training stream depend on these counts, so a count once kept is not corrected by what is read later.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from opencloc import files
from opencloc.data.sidecar import sidecar_path
from opencloc.data.tars.cache import local_tar
from opencloc.data.tars.tar import index_shard

_AT_ONCE = 16  # tars asked at the same time
_WORTH_KEEPING_S = 1.0  # counts found faster are found again rather than kept


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
    version: str | None = None
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
            _count(urls[0], None, sidecar, cache_gb)  # raises what keeps it from being read
        raise FileNotFoundError(f"{urls[0]}: no such shard (none of {len(urls)} is there)")
    usual = int(np.median(there))
    samples = [one.samples if (one := found[number]) is not None else usual for number in range(len(urls))]
    return ShardCounts(
        samples=np.asarray(samples, dtype=np.int64),
        unknown=frozenset(number for number, one in found.items() if one is None),
        problems=sum((Counter(one.problems) for one in found.values() if one is not None), Counter()),
    )


def _count_folder(folder: str, urls: dict[int, str], sidecar: str | None, cache_gb: float) -> dict[int, _Found | None]:
    """What is known of the tars of one folder, by number; None for those that aren't there."""
    there = files.versions(folder)
    kept_at = _kept_path(folder, sidecar)
    with files.locked(kept_at):  # the ranks of a machine: one counts, the others read
        kept = _read_kept(kept_at)
        known: dict[int, _Found | None] = {}
        for number, url in urls.items():
            name = os.path.basename(url)
            if there is not None and name not in there:
                known[number] = None
            elif name in kept and (there is None or kept[name].version in (None, there[name])):
                known[number] = kept[name]
        unknown = {number: url for number, url in urls.items() if number not in known}
        start = time.perf_counter()
        known |= _ask(unknown, there, sidecar, cache_gb)
        if unknown and time.perf_counter() - start >= _WORTH_KEEPING_S:
            fresh = {os.path.basename(urls[number]): one for number, one in known.items() if one is not None}
            entries = {name: [one.samples, one.version, one.problems] for name, one in (kept | fresh).items()}
            files.write_bytes(str(kept_at), json.dumps(entries).encode())
    return known


def _kept_path(folder: str, sidecar: str | None) -> Path:
    place = folder if files.local_path(folder) is None else os.path.abspath(files.local_path(folder) or "")
    digest = hashlib.blake2b(f"{place}\n{sidecar}".encode(errors="surrogateescape"), digest_size=12).hexdigest()
    return files.cache_folder("counts") / f"{digest}.json"


def _read_kept(path: Path) -> dict[str, _Found]:
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        entries = json.loads(path.read_bytes())
        return {name: _Found(samples=n, version=v, problems=p) for name, (n, v, p) in entries.items()}
    return {}


def _ask(
    urls: dict[int, str], there: dict[str, str] | None, sidecar: str | None, cache_gb: float
) -> dict[int, _Found | None]:
    """What is found out about tars now, many at a time."""

    def ask(url: str) -> _Found | None:
        version = None if there is None else there[os.path.basename(url)]
        try:
            samples, problems = _count(url, there, sidecar, cache_gb)
        except OSError:  # whoever reads it will meet the same, and count it
            return None
        return _Found(samples=samples, version=version, problems=problems)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = pool.map(ask, urls.values())
        console = Console(stderr=True)
        shown = track(
            answers, "counting samples", len(urls), console=console, disable=len(urls) < 32 or not console.is_terminal
        )
        return dict(zip(urls, shown, strict=True))


def _count(url: str, there: dict[str, str] | None, sidecar: str | None, cache_gb: float) -> tuple[int, dict[str, int]]:
    """(samples, problems) of one tar; raises `FileNotFoundError` if only the tar itself could tell and isn't there."""
    stats = f"{url.removesuffix('.tar')}_stats.json"
    if there is None or os.path.basename(stats) in there:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            successes = json.loads(files.read_bytes(stats))["successes"]
            if isinstance(successes, int) and successes >= 0:
                return successes, {}
    if sidecar is not None and files.local_path(url) is None:
        with contextlib.suppress(OSError, pa.ArrowException), files.open_seekable(sidecar_path(url, sidecar)) as stream:
            return pq.ParquetFile(stream).metadata.num_rows, {}
    index = index_shard(local_tar(url, cache_gb))
    return len(index.keys), dict(index.problems)
