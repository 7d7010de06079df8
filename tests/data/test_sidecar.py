"""Parquet sidecars: reading undoes writing, files of the wrong form are refused, wrong rows are kept as errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opencloc.data.sidecar import (
    SCHEMA,
    Sidecar,
    SidecarRow,
    read_labels,
    read_sidecar,
    sidecar_path,
    stats_path,
    with_labels,
    write_sidecar,
)
from opencloc.errors import BadSample

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)


@st.composite
def sidecar_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """The fields of some rows with different keys."""
    made = []
    for key in draw(st.lists(texts, max_size=6, unique=True)):
        if draw(st.integers(0, 3)) == 0:
            made.append({"key": key, "caption": draw(st.none() | texts), "error": draw(texts)})
            continue
        labels = draw(st.lists(texts, max_size=4))
        corners = [draw(st.tuples(st.floats(0, 0.5, width=32), st.floats(0, 0.5, width=32))) for _ in labels]
        low = np.array(corners, dtype=np.float32).reshape(-1, 2)
        scores = np.array([draw(st.floats(0, 1, width=32)) for _ in labels], dtype=np.float32)
        boxes = np.concatenate([low, low + np.float32(0.25)], axis=1)
        caption = draw(st.none() | texts)
        made.append({"key": key, "caption": caption, "boxes": boxes, "texts": tuple(labels), "scores": scores})
    return made


def plain(row: SidecarRow) -> tuple:
    return (row.key, row.caption, row.boxes.tolist(), row.texts, row.scores.tolist(), row.error)


def row(key: str = "a", text: str = "dog", **changes: object) -> SidecarRow:
    values = {"boxes": np.array([[0, 0, 0.5, 1]]), "texts": (text,), "scores": np.array([0.5])} | changes
    return SidecarRow(key=key, **values)  # type: ignore[arg-type]


@settings(max_examples=50)
@given(sidecar_rows())
def test_reading_gives_back_what_was_written(tmp_path_factory, fields: list[dict[str, Any]]) -> None:
    rows = [SidecarRow(**one) for one in fields]
    path = str(tmp_path_factory.mktemp("sidecar") / "00000.vesl.parquet")
    write_sidecar(path, rows, {"images": len(rows)})
    found = read_sidecar(path)
    assert list(found) == [one.key for one in rows]
    assert [plain(one) for one in found.values()] == [plain(one) for one in rows]
    assert all(one.boxes.flags.writeable and one.boxes.dtype == np.float32 for one in found.values())


def test_a_sidecar_stands_beside_its_tar_with_its_figures_written_last(tmp_path: Path) -> None:
    path = sidecar_path(str(tmp_path / "00000.tar"), "vesl")
    write_sidecar(path, [row()], {"regions": 1, "images": 1})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00000.vesl.parquet", "00000.vesl_stats.json"]
    assert json.loads(Path(stats_path(path)).read_text()) == {"images": 1, "regions": 1}
    with pytest.raises(TypeError):
        write_sidecar(sidecar_path(str(tmp_path / "00001.tar"), "vesl"), [row()], {"bad": object()})
    assert not (tmp_path / "00001.vesl_stats.json").exists()


def test_any_parquet_reader_sees_natural_columns(tmp_path: Path) -> None:
    path = tmp_path / "0.vesl.parquet"
    write_sidecar(str(path), [row()], {})
    assert pq.read_table(path).to_pylist() == [
        {"key": "a", "caption": None, "boxes": [[0, 0, 0.5, 1]], "texts": ["dog"], "scores": [0.5], "error": None}
    ]


@pytest.mark.parametrize(
    ("location", "name", "part", "expected"),
    [
        ("/d/00000.tar", "vesl", None, "/d/00000.vesl.parquet"),
        ("s3://bucket/d/00000.tar", "vesl", None, "s3://bucket/d/00000.vesl.parquet"),
        ("/d/annotations/instances_train.json", "v2", None, "/d/annotations/instances_train.v2.parquet"),
        ("/d/photos/", "vesl", None, "/d/photos/photos.vesl.parquet"),
        ("/d/photos", "vesl", 12, "/d/photos/photos-00012.vesl.parquet"),
        ("/d/00000.tar", "/labels/vesl", None, "/labels/00000.vesl.parquet"),
        ("s3://bucket/00000.tar", "out/vesl", None, "out/00000.vesl.parquet"),
    ],
)
def test_where_a_sidecar_lies(location: str, name: str, part: int | None, expected: str) -> None:
    assert sidecar_path(location, name, part) == expected


def test_a_sidecar_needs_a_name() -> None:
    with pytest.raises(ValueError, match="'/labels/'"):
        sidecar_path("/d/00000.tar", "/labels/")


def test_remote_sidecars_read_like_local_ones() -> None:
    for part in (0, 1):
        write_sidecar(sidecar_path("memory://test_sidecar/photos", "vesl", part), [row(f"{part}")], {})
    assert list(read_labels("memory://test_sidecar/photos", "vesl")) == ["0", "1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": np.array([[0, 0, 1.5, 1]])}, "'a': bad box .* reaches outside"),
        ({"boxes": np.array([[0, 0, np.nan, 1]])}, "not finite"),
        ({"boxes": np.array([[0.5, 0, 0.5, 1]])}, "is empty"),
        ({"boxes": np.zeros((0, 4))}, "0 boxes, 1 texts, 1 scores"),
        ({"texts": (" ",)}, "empty region text"),
        ({"texts": ("half a pair \ud83d",)}, "not valid Unicode"),
        ({"caption": "half a pair \ud83d"}, "not valid Unicode"),
        ({"scores": np.array([1.5])}, r"scores \[1.5\] are not all in \[0, 1\]"),
        ({"scores": np.array([np.nan])}, "not all in"),
        ({"error": "no caption"}, "error beside regions"),
    ],
)
def test_unsound_rows_cannot_be_made(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row(**changes)


def test_a_box_that_rounding_pushed_outside_is_sound() -> None:
    assert len(row(boxes=np.array([[-1e-6, 0, 1 + 1e-6, 1]])).boxes) == 1


def table(**changes: object) -> pa.Table:
    """A sidecar of two rows as another program would write it: 64-bit floats, lists of no fixed length."""
    columns = {
        "key": ["a", "b"],
        "caption": ["x", None],
        "boxes": [[[0.0, 0.0, 0.5, 1.0]], []],
        "texts": [["dog"], []],
        "scores": [[0.5], []],
        "error": pa.array([None, "slow"], pa.string()),
    }
    return pa.table({name: value for name, value in (columns | changes).items() if value is not None})


def test_a_sidecar_of_another_program_is_read(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "0.vesl.parquet")
    found = read_sidecar(str(tmp_path / "0.vesl.parquet"))
    assert plain(found["a"]) == ("a", "x", [[0, 0, 0.5, 1]], ("dog",), [0.5], None)
    assert found["b"].error == "slow"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"texts": None, "labels": [[], []]},
            r"columns differ from a sidecar's: missing \['texts'\], unknown \['labels'\]",
        ),
        ({"boxes": [[[0.0, 0.0, 1.0]], []]}, "columns don't have a sidecar's types"),  # three numbers
        ({"scores": ["high", "low"]}, "columns don't have a sidecar's types"),
        ({"key": ["a", None]}, "columns don't have a sidecar's types .*null"),
        ({"texts": [["dog"], None]}, "columns don't have a sidecar's types .*null"),
        ({"texts": [[None], []]}, "column texts holds lists with null entries"),
        ({"boxes": [[[0.0, 0.0, 1.0, None]], []]}, "column boxes holds lists with null entries"),
        ({"key": ["a", "a"]}, "key 'a' comes twice"),
    ],
)
def test_files_of_the_wrong_form_are_refused_by_name(tmp_path: Path, changes: dict, message: str) -> None:
    pq.write_table(table(**changes), tmp_path / "0.vesl.parquet")
    with pytest.raises(ValueError, match=r"0\.vesl\.parquet: " + message):
        read_sidecar(str(tmp_path / "0.vesl.parquet"))


def test_what_is_no_parquet_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "0.vesl.parquet"
    with pytest.raises(FileNotFoundError, match=r"0\.vesl\.parquet"):
        read_sidecar(str(path))
    write_sidecar(str(path), [row(str(i)) for i in range(50)], {})
    for damaged in (b"", b"not parquet", path.read_bytes()[:-9]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"0\.vesl\.parquet: not a Parquet file"):
            read_sidecar(str(path))


def test_a_wrong_row_becomes_an_error_and_the_others_stay(tmp_path: Path) -> None:
    boxes = [[[0.0, 0.0, 7.0, 1.0]], [[0.0, 0.0, 1.0, 1.0]]]
    wrong = table(boxes=boxes, texts=[["dog"], ["cat"]], scores=[[0.5], [0.5]], error=pa.nulls(2, pa.string()))
    pq.write_table(wrong, tmp_path / "0.vesl.parquet")
    found = read_sidecar(str(tmp_path / "0.vesl.parquet"))
    assert found["a"].texts == ()
    assert found["a"].error is not None
    assert "reaches outside the image" in found["a"].error
    assert (found["b"].texts, found["b"].error) == (("cat",), None)


@pytest.mark.parametrize("column", ["key", "caption", "texts", "error"])
def test_bytes_that_are_not_utf8_cost_their_row_alone(tmp_path: Path, column: str) -> None:
    bad = pa.array([b"caf\xe9"]).view(pa.string())
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 1], type=pa.int32()), bad)
    good = {"key": "b", "caption": None, "error": None}
    columns = table(boxes=[[], []], texts=[[], []], scores=[[], []]) if column == "error" else table()
    changed = lists if column == "texts" else pa.concat_arrays([bad, pa.array([good[column]], type=pa.string())])
    columns = columns.set_column(columns.column_names.index(column), column, changed)
    pq.write_table(columns, tmp_path / "0.vesl.parquet")
    found = Sidecar(str(tmp_path / "0.vesl.parquet"))
    if column == "key":
        assert list(found) == ["caf\\xe9", "b"]  # which no sample has, so that the sample is "not in the sidecar"
    else:
        assert "can't decode byte 0xe9" in (found["a"].error or "")
    assert found["b"].texts == ()


def test_a_key_comes_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="key 'a' comes twice"):
        write_sidecar(str(tmp_path / "0.vesl.parquet"), [row(), row()], {})
    assert list(tmp_path.iterdir()) == []


def test_labels_of_a_folder_are_one_file_or_all_its_parts(tmp_path: Path) -> None:
    photos = str(tmp_path / "photos")
    with pytest.raises(FileNotFoundError, match=r"photos\.vesl\.parquet: no such sidecar, nor parts"):
        read_labels(photos, "vesl")
    for part in (0, 1):
        write_sidecar(sidecar_path(photos, "vesl", part), [row(f"part {part}")], {})
    write_sidecar(sidecar_path(photos, "other", 2), [row("other")], {})
    assert list(read_labels(photos, "vesl")) == ["part 0", "part 1"]
    write_sidecar(sidecar_path(photos, "vesl", 2), [row("part 0")], {})
    with pytest.raises(ValueError, match=r"photos-00002\.vesl\.parquet: key 'part 0' lies in an earlier part"):
        read_labels(photos, "vesl")
    write_sidecar(sidecar_path(photos, "vesl"), [row("whole")], {})
    assert list(read_labels(photos, "vesl")) == ["whole"]


def test_labels_replace_regions_and_keep_every_own_caption_they_came_from() -> None:
    own = {"captions": ("one", "two"), "boxes": np.array([[0, 0, 1, 1]]), "texts": ("old",)}
    same, new, silent = (with_labels(own, row(caption=caption), "x") for caption in ("two", "three", None))
    assert same["captions"] == silent["captions"] == ("one", "two")
    assert (new["captions"], new["alt_text"]) == (("three",), "one")
    assert same["texts"] == new["texts"] == silent["texts"] == ("dog",)
    for labels, reason in ((None, "not in the sidecar"), (SidecarRow(key="a", error="slow"), "not labelled")):
        with pytest.raises(BadSample) as caught:
            with_labels(own, labels, "x")
        assert caught.value.reason == reason


@pytest.mark.parametrize("made_from", ["one", "two", "one\ntwo", "from the page"])  # caption, all-captions, alt-text
def test_labels_made_from_a_samples_own_texts_leave_these_as_they_are(made_from: str) -> None:
    own = {"captions": ("one", "two"), "alt_text": "from the page"}
    found = with_labels(own, row(caption=made_from), "x")
    assert (found["captions"], found["alt_text"], found["texts"]) == (("one", "two"), "from the page", ("dog",))


def test_a_row_is_made_when_it_is_asked_for_and_like_all_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "0.vesl.parquet")
    write_sidecar(path, [row(str(i), text=f"thing {i}") for i in range(5)], {})
    lazily, at_once = Sidecar(path), read_sidecar(path)
    assert (len(lazily), list(lazily)) == (5, list(at_once))
    assert plain(lazily["3"]) == plain(at_once["3"])
    assert lazily.get("5") is None


def test_the_written_schema_is_the_documented_one(tmp_path: Path) -> None:
    write_sidecar(str(tmp_path / "0.vesl.parquet"), [], {})
    assert pq.read_schema(tmp_path / "0.vesl.parquet").equals(SCHEMA)
    assert read_sidecar(str(tmp_path / "0.vesl.parquet")) == {}
