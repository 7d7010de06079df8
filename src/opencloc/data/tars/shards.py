"""The samples of many tars by number, wherever the tars lie and however many they are.

The names that users of tars need can all be imported from here.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cachetools import LRUCache, TTLCache

from opencloc import files
from opencloc.data.sample import Sample, parse_record
from opencloc.data.sidecar import Sidecar, SidecarRow, sidecar_path, with_labels
from opencloc.data.tars.cache import Prefetcher, local_tar
from opencloc.data.tars.index import count_samples, load_index
from opencloc.data.tars.tar import NOT_ADJACENT, ShardIndex, decode_stored, index_shard, iter_shard
from opencloc.data.tars.urls import expand_urls
from opencloc.data.tars.writer import ShardWriter
from opencloc.errors import BadSample, and_skipped

__all__ = [
    "ShardIndex",
    "ShardWriter",
    "Shards",
    "ShardsConfig",
    "expand_urls",
    "index_shard",
    "iter_shard",
]

# Reasons of a `BadSample` that concern all samples of a file, which may be readable another time.
OF_A_FILE = ("missing shard", "unreadable shard", "missing sidecar", "unreadable sidecar")
_INDEX_SAMPLES = 1_000_000  # samples whose places a process remembers; some 120 bytes each
_SIDECARS_KEPT = 64  # per process; the labels of 10,000 samples take a few MB
_SIDECARS_LOOKED_FOR = 16  # at opening; of many tars not every one is asked
_FAILURES_KEPT = 1024  # tars and sidecars known to be unreadable, so that not every sample waits for the same error
_TRY_AGAIN_S = 300.0  # then they are tried once more


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """How tars are read."""

    sidecar: str | None = None  # name of the labels beside the tars, or FOLDER/name; they replace the tars' own regions
    image_px: int | None = None  # decode JPEGs no larger than needed for this long side; None: in full
    # Disk for copies of remote tars, shared by all processes of the machine; training wants some four per lane.
    cache_gb: float = 50.0

    def __post_init__(self) -> None:
        if not self.cache_gb > 0:
            raise ValueError(f"cache_gb is {self.cache_gb}; more than 0")


class Shards:
    """The samples of many tars by number, in the order of the tars.

    Opening asks how many samples each tar holds (`count_samples`) and reads none.  Where in a tar its samples lie is
    found when the first of them is read; a remote tar is then copied to this machine.  Samples without an image have
    no number; they and whatever else is broken are counted in `problems` where tars were passed over to be counted.

    `source[i]` raises `BadSample` also for what concerns a whole tar: "missing shard", "unreadable shard", "truncated
    tar", "not a tar", "shard is shorter than its index says", "missing sidecar", "unreadable sidecar".

    Raises `FileNotFoundError` if there is no tar at all or none of the sidecars looked for, `ValueError` if no tar
    holds any sample.
    """

    def __init__(self, location: str | Sequence[str], config: ShardsConfig | None = None) -> None:
        self.location = location
        self.config = config or ShardsConfig()
        self.urls = expand_urls(location, must_exist=False)
        if self.config.sidecar is not None:
            step = max(1, len(self.urls) // _SIDECARS_LOOKED_FOR)
            paths = [sidecar_path(url, self.config.sidecar) for url in self.urls[::step]]
            if not any(map(files.exists, paths)):
                raise FileNotFoundError(f"{paths[0]}: no such sidecar ({len(paths)} of {len(self.urls)} looked for)")
        counts = count_samples(self.urls, self.config.sidecar, cache_gb=self.config.cache_gb)
        self.counts: np.ndarray = counts.samples  # samples of every tar
        self.problems: Counter[str] = counts.problems  # what the tars hold that is no sample, by reason
        self.unknown = [self.urls[number] for number in sorted(counts.unknown)]  # tars that could not be counted
        if counts.unknown:
            self.problems["unreadable shard"] += len(counts.unknown)
        self._ends = np.cumsum(self.counts)
        if not self.size:
            raise ValueError(
                f"{location}: no sample with an image in {len(self.urls)} tars{and_skipped(self.problems)}"
            )
        self._forget()

    def _forget(self) -> None:
        """Starts with nothing read: what a process has read is its own."""
        self._indices = LRUCache[int, tuple[ShardIndex, files.Version]](  # by tar
            _INDEX_SAMPLES, getsizeof=lambda found: min(len(found[0].keys), _INDEX_SAMPLES)
        )
        self._sidecars = LRUCache[int, Mapping[str, SidecarRow]](_SIDECARS_KEPT)  # by tar
        self._failures = TTLCache[str, tuple[str, str]](_FAILURES_KEPT, _TRY_AGAIN_S)  # by file: reason, detail
        self._prefetcher: Prefetcher | None = None

    def __getstate__(self) -> dict:
        read = ("_indices", "_sidecars", "_failures", "_prefetcher")
        return {name: value for name, value in self.__dict__.items() if name not in read}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def size(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        problems = f", problems {dict(self.problems)}" if self.problems else ""
        return f"Shards({self.location!r}: {self.size} samples in {len(self.urls)} tars, {self.config}{problems})"

    def identity(self, index: int) -> str:
        """Name of a sample that stays the same wherever the tars lie: tar name and key."""
        shard, row = self._locate(index)
        return f"{os.path.basename(self.urls[shard])}/{self._index(shard, row)[0].keys[row]}"

    def image_bytes(self, index: int) -> bytes:
        """The image of a sample as it is stored."""
        shard, row = self._locate(index)
        return self._read(*self._index(shard, row), row)[0]

    def __getitem__(self, index: int) -> Sample:
        key, where, image, record = self._stored(index)
        return Sample(key=key, image=decode_stored(image, where, self.config.image_px), where=where, **record)

    def _stored(self, index: int) -> tuple[str, str, bytes, dict[str, Any]]:
        """(key, name in errors, the image as it is stored, the other fields) of a sample; raises `BadSample`."""
        shard, row = self._locate(index)
        found, version = self._index(shard, row)
        key = found.keys[row]
        where = f"{found.url}/{key}"
        labels = self._labels(shard) if self.config.sidecar is not None else None
        image, json_bytes, text = self._read(found, version, row)
        if json_bytes is None and text is None and labels is None and found.problems[NOT_ADJACENT]:
            raise BadSample(NOT_ADJACENT, where, "no .json or .txt follows the image, others stand alone in this tar")
        record = self.parse(where, json_bytes, text)
        if labels is not None:
            record = with_labels(record, labels.get(key), where)
        return key, where, image, record

    def parse(self, where: str, json_bytes: bytes | None, text: bytes | None) -> dict[str, Any]:
        """The fields of a sample but for key and image; raises `BadSample`."""
        return parse_record(where, json_bytes, text)

    def label_sizes(self) -> dict[str, int | None]:
        """Size of every tar, and of its sidecar if that is read: another one says that the labels are others."""
        wanted = [*self.urls, *(sidecar_path(url, name) for url in self.urls if (name := self.config.sidecar))]
        listed = {folder: files.versions(folder) or {} for folder in {os.path.dirname(url) for url in wanted}}
        found = {url: listed[os.path.dirname(url)].get(os.path.basename(url)) for url in wanted}
        return {os.path.basename(url): version and version.size for url, version in found.items()}

    def prefetch(self, shards: Sequence[int]) -> None:
        """Will have local copies of these tars soon, if they are remote; returns at once."""
        urls = [url for shard in shards if files.local_path(url := self.urls[shard]) is None]
        if urls and self._prefetcher is None:
            self._prefetcher = Prefetcher(self.config.cache_gb)
        if self._prefetcher is not None:
            self._prefetcher.ask(urls)

    def _locate(self, index: int) -> tuple[int, int]:
        """(number of the shard, row in it) of a sample."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in 0 ... {self.size - 1} of {self!r}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def _index(self, shard: int, row: int) -> tuple[ShardIndex, files.Version]:
        """The index of a shard, which has that row, and the version of the tar that it is of."""
        if (found := self._indices.get(shard)) is None:
            url = self.urls[shard]
            with self._remembering(url, "missing shard", "unreadable shard"):
                found = self._indices[shard] = load_index(url, self.config.cache_gb)
            if (there := len(found[0].keys)) > self.counts[shard]:
                warnings.warn(f"{url}: {there} samples, of which {self.counts[shard]} are known and read", stacklevel=2)
        index = found[0]
        if row >= len(index.keys):
            broken = [reason for reason in ("truncated tar", "not a tar") if index.problems[reason]]
            detail = f"{len(index.keys)} samples instead of {self.counts[shard]}"
            raise BadSample((*broken, "shard is shorter than its index says")[0], index.url, detail)
        return found

    def _read(self, index: ShardIndex, version: files.Version, row: int) -> tuple[bytes, bytes | None, bytes | None]:
        """Bytes of image, json and txt, by one read over the members of the sample."""
        spans = index.spans[row].tolist()
        start = min(offset for offset, size in spans if size >= 0)
        end = max(offset + size for offset, size in spans if size >= 0)
        where = f"{index.url}/{index.keys[row]}"
        try:
            data = files.read_bytes(local_tar(index.url, version, self.config.cache_gb), start, end - start)
        except OSError as error:
            reason = "missing shard" if isinstance(error, FileNotFoundError) else "unreadable shard"
            raise BadSample(reason, where, str(error)) from error
        if len(data) < end - start:
            raise BadSample("unreadable shard", where, "the tar became shorter since it was indexed")
        image, json_bytes, text = (
            data[offset - start : offset - start + size] if size >= 0 else None for offset, size in spans
        )
        assert image is not None
        return image, json_bytes, text

    def _labels(self, shard: int) -> Mapping[str, SidecarRow]:
        assert self.config.sidecar is not None
        if (labels := self._sidecars.get(shard)) is None:
            path = sidecar_path(self.urls[shard], self.config.sidecar)
            with self._remembering(path, "missing sidecar", "unreadable sidecar"):
                labels = self._sidecars[shard] = Sidecar(path)
        return labels

    @contextlib.contextmanager
    def _remembering(self, url: str, missing: str, unreadable: str) -> Iterator[None]:
        """Turns errors of a whole file into `BadSample`, and for some minutes raises the same without another try."""
        if url in self._failures:
            reason, detail = self._failures[url]
            raise BadSample(reason, url, detail)
        try:
            yield
        except (OSError, ValueError) as error:
            reason = missing if isinstance(error, FileNotFoundError) else unreadable
            self._failures[url] = (reason, str(error))
            raise BadSample(reason, url, str(error)) from error
