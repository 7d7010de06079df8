"""Folders of image files, each with an optional `.json` and `.txt` of the same name beside it.

What stands in those is the same as in shards.  Boxes refer to the pixels as stored, whatever EXIF orientation says.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from opencloc import files
from opencloc.data.sample import IMAGE_EXTENSIONS, Sample, parse_record
from opencloc.data.sidecar import SidecarRow, is_label_file, label_sizes, read_labels, with_labels
from opencloc.errors import BadSample
from opencloc.images import decode_image


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """How an image folder is read."""

    sidecar: str | None = None  # name of the labels in the folder, or FOLDER/name; they replace the json's regions
    # decode JPEGs no larger than needed for this long side; None: in full
    image_px: Annotated[int, Field(ge=1)] | None = None


class ImageFolder:
    """The images under a folder by number, at any depth, in the order of their sorted paths.

    A key is the path below the folder without its extension.  Files that are neither image nor annotation are counted
    in `skipped`, and so is an image with the key of an earlier one (`a.jpg`, `a.png`).  Raises `FileNotFoundError` if
    the folder doesn't exist, `ValueError` if it holds no image.
    """

    def __init__(self, location: str, config: FolderConfig | None = None) -> None:
        self.location = location
        self.config = config or FolderConfig()
        self.skipped: Counter[str] = Counter()  # files left out, by reason
        if not files.is_folder(location):
            raise FileNotFoundError(f"{location}: no such folder")
        names = files.find(location)
        self._names: list[str] = []
        keys, notes = set[str](), set[str]()
        for name in names:
            key, _, extension = name.rpartition(".")
            if "\ufffd" in name.encode(errors="surrogateescape").decode(errors="replace"):
                self.skipped["name is not utf-8"] += 1
            elif extension in ("json", "txt"):
                notes.add(name)
            elif extension == "parquet":
                pass  # labels that lie in the folder
            elif extension.lower() not in IMAGE_EXTENSIONS or not key or key.endswith("/"):
                self.skipped["not an image"] += 1
            elif key in keys:
                self.skipped["duplicate key"] += 1
            else:
                keys.add(key)
                self._names.append(name)
        if not self._names:
            raise ValueError(f"{location}: no image among {len(names)} files (*.{', *.'.join(IMAGE_EXTENSIONS)})")
        self._notes = {note for note in notes if note.rpartition(".")[0] in keys}
        if alone := sum(not is_label_file(note) for note in notes - self._notes):
            self.skipped["annotation without an image"] = alone
        self._labels: dict[str, SidecarRow] | None = None
        if self.config.sidecar is not None:
            self._labels = read_labels(location, self.config.sidecar)

    @property
    def size(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        skipped = f", skipped {dict(self.skipped)}" if self.skipped else ""
        return f"ImageFolder({self.location!r}: {self.size} images, {self.config}{skipped})"

    def identity(self, index: int) -> str:
        """Name of a sample that stays the same wherever the folder lies: its path in the folder."""
        return self._names[index]

    def image_bytes(self, index: int) -> bytes:
        """The image of a sample as it is stored."""
        return self._read(self._names[index])

    def label_sizes(self) -> dict[str, int | None]:
        """Sizes of the files that captions and regions come from."""
        sizes = files.sizes(self.location)
        return {note: sizes.get(note) for note in self._notes} | label_sizes(self.location, self.config.sidecar)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in 0 ... {self.size - 1} of {self!r}")
        name = self._names[index]
        key, where = name.rpartition(".")[0], self._where(name)
        json_bytes, text = (self._read(name) if name in self._notes else None for name in (f"{key}.json", f"{key}.txt"))
        record = parse_record(where, json_bytes, text)
        if self._labels is not None:
            record = with_labels(record, self._labels.get(key), where)
        image = decode_image(self.image_bytes(index), where, self.config.image_px)
        return Sample(key=key, image=image, where=where, **record)

    def _where(self, name: str) -> str:
        return f"{self.location.rstrip('/')}/{name}"

    def _read(self, name: str) -> bytes:
        try:
            return files.read_bytes(self._where(name))
        except OSError as error:
            raise BadSample("unreadable file", self._where(name), str(error)) from error
