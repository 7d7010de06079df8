"""Large annotation files are read once per machine: the kept content is the same, changes and damage are noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencloc import files
from opencloc.data.sources import coco_json, kept
from opencloc.data.sources.coco import Coco, CocoConfig
from opencloc.data.sources.coco_json import read_captions, read_coco, without_polygons
from opencloc.data.sources.table import Table, TableBuilder
from tests.data.sources.test_coco import instances, write, write_captions


@pytest.fixture(autouse=True)
def everything_is_worth_keeping(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("OPENCLOC_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(kept, "WORTH_KEEPING_BYTES", 0)
    monkeypatch.setattr(kept, "_memory", {})


def stored() -> list[Path]:
    return sorted(files.cache_folder("annotations").glob("*.npz"))


def same(one: Any, other: Any) -> bool:
    pairs = [(value, getattr(other, name)) for name, value in vars(one).items()]
    return all(
        a.dtype == b.dtype and np.array_equal(a, b) if isinstance(a, np.ndarray) else (type(a), a) == (type(b), b)
        for a, b in pairs
    )


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another process: nothing is in memory, and who reads a file is found out."""
    monkeypatch.setattr(kept, "_memory", {})

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the file was read again")

    monkeypatch.setattr(coco_json, "_parsed", never)


def test_what_is_kept_is_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path, instances())
    write_captions(tmp_path)
    path, captions = f"{root}/annotations/instances_train.json", f"{root}/annotations/captions_train.json"
    first, first_captions = read_coco(path), read_captions(captions)
    source = Coco(root, CocoConfig(split="train"))
    assert len(stored()) == 2
    forget(monkeypatch)
    assert same(first, read_coco(path))
    assert read_captions(captions) == first_captions
    again = Coco(root, CocoConfig(split="train"))
    assert again.skipped == source.skipped == Counter(again.skipped)
    assert [again[i].texts for i in range(3)] == [source[i].texts for i in range(3)]


def test_a_table_of_photos_is_kept_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    builder = TableBuilder()
    builder.image("a.jpg", (10, 20), ["one", "two"])
    builder.region([0, 0, 5, 50], "thing")
    builder.region([0, 0, 0, 5], "nothing")
    builder.image("b.jpg")
    made = builder.table("there")
    (tmp_path / "f").write_text("x")
    assert kept.kept(Table, [str(tmp_path / "f")], lambda: made) is made
    forget(monkeypatch)
    assert same(made, kept.kept(Table, [str(tmp_path / "f")], lambda: pytest.fail("read again")))


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    root = write(tmp_path, instances())
    path = f"{root}/annotations/instances_train.json"
    assert read_coco(path).classes == ("dog", "toothbrush")
    text = Path(path).read_text().replace('"dog"', '"cat"')  # of the same size
    Path(path).write_text(text)
    os.utime(path, ns=(1, 1))
    assert read_coco(path).classes == ("cat", "toothbrush")
    assert len(stored()) == 2


def test_a_folder_of_files_is_watched_too(tmp_path: Path) -> None:
    (tmp_path / "one.xml").write_text("1")

    def read() -> kept.Any:
        return coco_json._Captions(ids=tuple(range(len(list(tmp_path.iterdir())))), texts=(), skipped=Counter())

    assert kept.kept(coco_json._Captions, [str(tmp_path)], read).ids == (0,)
    (tmp_path / "two.xml").write_text("2")
    assert kept.kept(coco_json._Captions, [str(tmp_path)], read).ids == (0, 1)


def test_damage_is_said_and_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{write(tmp_path, instances())}/annotations/instances_train.json"
    first = read_coco(path)
    (index,) = stored()
    for damage in (index.read_bytes()[:100], b"", b"PK\x03\x04 but no more"):
        index.write_bytes(damage)
        monkeypatch.setattr(kept, "_memory", {})
        with pytest.warns(UserWarning, match="damaged, its files are read again"):
            assert same(first, read_coco(path))
        assert same(first, read_coco(path))
    forget(monkeypatch)
    assert same(first, read_coco(path))


def test_where_nothing_can_be_kept_reading_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    path = f"{write(tmp_path, instances())}/annotations/instances_train.json"
    monkeypatch.setattr(files, "new_file", full)
    with pytest.warns(UserWarning, match="every process reads for itself"):
        assert read_coco(path).classes == ("dog", "toothbrush")
    assert stored() == []


def test_of_many_processes_one_reads(tmp_path: Path) -> None:
    path = f"{write(tmp_path, instances())}/annotations/instances_train.json"
    program = (
        "import os, sys; from opencloc.data.sources import coco_json, kept; kept.WORTH_KEEPING_BYTES = 0;"
        "read = coco_json._parsed;"
        "coco_json._parsed = lambda *a: (os.close(os.open(f'{sys.argv[2]}/{os.getpid()}', os.O_CREAT)), read(*a))[1];"
        "print(coco_json.read_coco(sys.argv[1]).classes)"
    )
    readers = tmp_path / "readers"
    readers.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, path, str(readers)]
    ranks = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert {rank.communicate()[0] for rank in ranks} == {"('dog', 'toothbrush')\n"}
    assert len(list(readers.iterdir())) == 1


def test_small_files_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "WORTH_KEEPING_BYTES", 10**6)
    read_coco(f"{write(tmp_path, instances())}/annotations/instances_train.json")
    assert stored() == []


# -- polygons ----------------------------------------------------------------------------------------------------------

numbers = st.integers(-5, 500) | st.floats(0, 500)
polygons = st.lists(st.lists(numbers, max_size=4), max_size=3)
others = st.text('"[]\\{}:, segmntaio', max_size=30) | numbers | st.lists(numbers | st.text(max_size=3), max_size=3)
segmentations = (
    polygons | st.fixed_dictionaries({"counts": st.text(max_size=9) | st.lists(numbers), "size": others}) | others
)


@given(
    st.lists(st.fixed_dictionaries({"id": numbers, "segmentation": segmentations, "text": others})),
    st.sampled_from([None, 1]),
)
def test_leaving_out_polygons_changes_nothing_else(entries: list[dict[str, Any]], indent: int | None) -> None:
    content = {"annotations": entries, "segmentation": '"segmentation":[[1]]'}
    short = without_polygons(json.dumps(content, indent=indent).encode())
    found = json.loads(short)
    for one, other in zip(found["annotations"], entries, strict=True):
        assert (one["id"], one["text"]) == (other["id"], other["text"])
        assert one["segmentation"] in (0, other["segmentation"])
    assert found["segmentation"] == content["segmentation"]


def test_polygons_as_coco_writes_them_are_left_out() -> None:
    data = b'{"a": [{"segmentation": [[239.97,260.24],[1, 2]],"area": 2},{"segmentation":[[1]], "id": 3}]}'
    assert without_polygons(data) == b'{"a": [{"segmentation": 0,"area": 2},{"segmentation":0, "id": 3}]}'


def test_what_nests_deeper_than_polygons_is_read_in_full(tmp_path: Path) -> None:
    content = instances()
    content["annotations"][0]["segmentation"] = [[[1, 2]], [3]]
    path = f"{write(tmp_path, content)}/annotations/instances_train.json"
    assert read_coco(path).classes == ("dog", "toothbrush")
