"""The two LanceDB tables of a library, and how they are written so that a kill at any moment loses and doubles nothing.

`regions` belong to a content, `photos` say which files hold which content; so a photo that moved, or lies there twice,
is encoded once.  The regions of some photos are added in one commit, then the rows of the photos in another.  A photo
is in the library when both are there.  Everything else follows from what is there: `Store.check` finds regions without
a photo (a killed run had just encoded them; they are taken), photos without regions and doubled regions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from opencloc import files
from opencloc.errors import redacted
from opencloc.search.photos import Photo
from opencloc.search.regions import RegionKind, Regions

FORMAT = 1
APPROXIMATE_FROM = 200_000  # regions; below it every query looks at all of them, which is exact and takes milliseconds
OLD_VERSIONS = timedelta(hours=1)  # how long a query that has begun may still read what was replaced
_IDS_AT_ONCE = 1000  # in one condition
_METADATA = "opencloc"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the vectors of a library depend on; written into both tables."""

    model: str  # where it was loaded from
    model_id: str  # hash of weights and configuration
    width: int  # of the embeddings
    regions: RegionKind
    detector: str | None = None
    names: tuple[str, ...] = ()  # that the detector looks for
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a library holds, as far as an index run needs it."""

    versions: dict[str, tuple[int, int]]  # path -> (size, mtime) of the photos that are whole
    sources: dict[str, str]  # path -> source, of the same
    contents: frozenset[int]  # that have regions
    broken: frozenset[str]  # paths of photos without regions
    doubled: frozenset[int]  # contents whose regions are there more than once
    unused: frozenset[int]  # contents no photo has


class Store:
    """An open library.  Reads see every commit at once; there is one writer at a time (`writing`), with its workers."""

    def __init__(self, path: str, settings: Settings, photos: Any, regions: Any) -> None:
        self.path, self.settings, self.photos, self.regions = path, settings, photos, regions

    def check(self) -> Known:
        """What is there, whole or not.  Reads names and numbers of all photos, no vector."""
        first = self.regions.search().where("number = 0").select(["photo"]).limit(None).to_arrow()
        ids, counts = np.unique(first["photo"].to_numpy(), return_counts=True)
        contents = set(ids.tolist())
        columns = ["path", "source", "size", "mtime", "id"]
        rows = self.photos.search().select(columns).limit(None).to_arrow().to_pydict()
        versions, sources, broken, used = {}, {}, set[str](), set[int]()
        for path, source, size, mtime, number in zip(*(rows[name] for name in columns), strict=True):
            if number in contents:
                versions[path], sources[path] = (size, mtime), source
                used.add(number)
            else:
                broken.add(path)
        return Known(
            versions=versions,
            sources=sources,
            contents=frozenset(contents),
            broken=frozenset(broken),
            doubled=frozenset(ids[counts > 1].tolist()),
            unused=frozenset(contents - used),
        )

    def commit(self, source: str, photos: Sequence[Photo], regions: dict[int, Regions]) -> None:
        """Adds photos, replacing rows of the same path, and before them the regions of new contents."""
        with _naming(self.path):
            if regions:
                self._add(_region_rows(regions, self.regions.schema))
            if photos:
                self._upsert(_photo_rows(source, photos, self.photos.schema))

    def remove_photos(self, paths: Iterable[str]) -> None:
        """Takes photos out of the library; their regions stay until `remove_regions`."""
        with _naming(self.path):
            for part in _parts(sorted(paths)):
                self._delete(self.photos, f"path IN ({', '.join(map(quoted, part))})")

    def remove_regions(self, contents: Iterable[int]) -> None:
        """Removes all regions of some contents."""
        with _naming(self.path):
            for part in _parts(sorted(contents)):
                self._delete(self.regions, f"photo IN ({', '.join(map(str, part))})")

    def tidy(self) -> None:
        """Joins small files, brings the vector index up to date or builds it where the library has become large."""
        with _naming(self.path):
            if self.regions.count_rows() >= APPROXIMATE_FROM and not self.approximate:
                from lancedb.index import IvfSq  # seconds to build where a graph (HNSW) or PQ takes many minutes

                self.regions.create_index("vector", config=IvfSq(distance_type="cosine"))
            for table in (self.photos, self.regions):
                self._optimize(table)

    # Every write is one of these, and each is one commit: all of it is there, or nothing.

    def _add(self, rows: pa.Table) -> None:
        self.regions.add(rows)

    def _upsert(self, rows: pa.Table) -> None:
        self.photos.merge_insert("path").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def _delete(self, table: Any, condition: str) -> None:
        table.delete(condition)

    def _optimize(self, table: Any) -> None:
        table.optimize(cleanup_older_than=OLD_VERSIONS)

    @property
    def approximate(self) -> bool:
        """Whether there is a vector index."""
        return any(index.columns == ["vector"] for index in self.regions.list_indices())


def quoted(text: str) -> str:
    """A text in a condition."""
    return "'" + text.replace("'", "''") + "'"


def _parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[start : start + _IDS_AT_ONCE] for start in range(0, len(items), _IDS_AT_ONCE))


def open_store(path: str) -> Store:
    """The library at a path or URL.

    Raises FileNotFoundError where there is none, ValueError where something else is there, or a library of another
    version.
    """
    local = files.local_path(path)
    if local is not None and not os.path.isdir(local):
        raise FileNotFoundError(f"{path}: no such index; `opencloc index PHOTOS --out {path}` makes one")
    tables = _connected(path)
    if set(tables) != {"photos", "regions"}:
        raise ValueError(f"{redacted(path)} is no index: `opencloc index PHOTOS --out {redacted(path)}` makes one")
    return Store(path, _settings(path, tables), tables["photos"], tables["regions"])


def make_store(path: str, settings: Settings) -> Store:
    """The library at a path or URL, made if it is not there.

    Raises ValueError, naming both, if it was made by another model or with other regions, and if something else is in
    the folder.
    """
    local = files.local_path(path)
    tables = _connected(path) if local is None or os.path.isdir(local) else {}
    if tables:
        _check_same(path, _settings(path, tables), settings)
    elif local is not None and os.path.isdir(local) and set(os.listdir(local)) - {".lock"}:
        raise ValueError(f"{path} holds something else: choose another --out")
    vector = pa.list_(pa.float16(), settings.width)
    schemas = {
        "photos": {"path": pa.utf8(), "source": pa.utf8(), "size": pa.int64(), "mtime": pa.int64(), "id": pa.int64()}
        | {"digest": pa.utf8(), "date": pa.timestamp("s"), "width": pa.int32(), "height": pa.int32()}
        | {"thumbnail": pa.binary()},
        "regions": {"photo": pa.int64(), "number": pa.int16(), "box": pa.list_(pa.float32(), 4), "area": pa.float32()}
        | {"vector": vector},
    }
    with _naming(path):
        database = connect(path)
        for name, columns in schemas.items():
            if name not in tables:
                schema = pa.schema(columns, metadata={_METADATA: json.dumps(dataclasses.asdict(settings))})
                database.create_table(name, schema=schema, exist_ok=True)
    return open_store(path)


def _check_same(path: str, there: Settings, new: Settings) -> None:
    if there.model_id != new.model_id:
        raise ValueError(
            f"{path} was made by the model {there.model} ({there.model_id}), not by {new.model} ({new.model_id}): "
            "choose another --out"
        )
    for name in ("regions", "detector", "names"):
        if (old := getattr(there, name)) != getattr(new, name):
            raise ValueError(f"{path} was made with {name} {old!r}, not {getattr(new, name)!r}: choose another --out")


def connect(path: str) -> Any:
    """LanceDB's connection; it sends nothing anywhere but to the storage itself.

    Raises ValueError where LanceDB is not installed.
    """
    os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")  # or it says on stderr that it will be so
    try:
        import lancedb
    except ImportError as error:
        raise ValueError("a photo library needs the extra `search`: pip install 'opencloc[search]'") from error
    return lancedb.connect(path, read_consistency_interval=timedelta(0))


def _connected(path: str) -> dict[str, Any]:
    """The tables of ours that are there, open."""
    database = connect(path)
    found = {}
    for name in ("photos", "regions"):
        try:
            found[name] = database.open_table(name)
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            if "not found" not in str(error).lower():
                raise ValueError(f"{redacted(path)}: table {name} cannot be read: {str(error)[:300]}") from error
    return found


def _settings(path: str, tables: dict[str, Any]) -> Settings:
    for name, table in tables.items():
        text: Any = (table.schema.metadata or {}).get(_METADATA.encode())
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise ValueError(
                    f"{path} is an index of format {values['format']}, this version reads {FORMAT}: make it anew"
                )
            return Settings(**values | {"names": tuple(values["names"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{redacted(path)}: its table {name} is not of an index of opencloc") from error
    raise AssertionError("no table")


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Holds a library for writing; the lock falls with its process.

    On object stores, which have no locks, nobody is kept out: two runs at once would do some work twice, and the next
    run would put that right.  Raises ValueError where another run holds it.
    """
    local = files.local_path(path)
    if local is None:
        yield
        return
    with files.held(Path(local), "another `opencloc index` is writing this index"):
        yield


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Makes what LanceDB raises for a full disk or a lost place an `OSError` that names the library."""
    try:
        yield
    except (RuntimeError, OSError, ValueError) as error:
        text = str(error)
        if os.strerror(errno.ENOSPC) in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path) from error
        raise OSError(
            f"{redacted(path)}: {redacted(text.splitlines()[0] if text else type(error).__name__)}"
        ) from error


def _photo_rows(source: str, photos: Sequence[Photo], schema: pa.Schema) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "path": [photo.entry.path for photo in photos],
        "source": [source] * len(photos),
        "size": [photo.entry.size for photo in photos],
        "mtime": [photo.entry.mtime for photo in photos],
        "id": [photo.id for photo in photos],
        "digest": [photo.digest for photo in photos],
        "date": [photo.date and photo.date.replace(microsecond=0) for photo in photos],
        "width": [photo.image.width for photo in photos],
        "height": [photo.image.height for photo in photos],
        "thumbnail": [photo.thumbnail for photo in photos],
    }
    return pa.table(columns, schema=schema.remove_metadata())


def _region_rows(regions: dict[int, Regions], schema: pa.Schema) -> pa.Table:
    boxes = np.concatenate([one.boxes for one in regions.values()]).astype(np.float32)
    vectors = np.concatenate([one.vectors for one in regions.values()])
    counts = [len(one.boxes) for one in regions.values()]
    arrays = [
        pa.array(np.repeat(list(regions), counts)),
        pa.array(np.concatenate([np.arange(count, dtype=np.int16) for count in counts])),
        pa.FixedSizeListArray.from_arrays(pa.array(boxes.ravel()), 4),
        pa.array((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])),
        pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
    ]
    return pa.table(arrays, schema=schema.remove_metadata())
