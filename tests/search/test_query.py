import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencloc.search import store as store_module
from opencloc.search.index import IndexConfig, run_index
from opencloc.search.query import Library, presence
from opencloc.search.regions import grid_boxes
from tests.search.conftest import photo, save_photos

TEXTS = st.sampled_from(["a red dog", "two trains", "pizza", "snow"])


def table(library: Library) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]], np.ndarray]:
    """(regions, photo by its id, vectors) of a library."""
    regions = library.store.regions.search().limit(None).to_arrow().to_pylist()
    photos = {row["id"]: row for row in library.store.photos.search().limit(None).to_arrow().to_pylist()}
    return regions, photos, np.array([row["vector"] for row in regions], dtype=np.float32)


@given(
    text=TEXTS,
    minus=st.none() | TEXTS,
    per_photo=st.sampled_from(["best", "all"]),
    areas=st.sampled_from([(0.0, 1.0), (0.1, 1.0), (0.0, 0.3)]),
    holiday=st.booleans(),
    top=st.sampled_from([1, 4, 1000]),
)
def test_an_answer_equals_comparing_every_region(
    library: Library, photos_folder: Path, text, minus, per_photo, areas, holiday: bool, top: int
) -> None:
    minus = None if minus == text else minus
    found = library.search(
        text,
        minus=minus or (),
        per_photo=per_photo,
        min_area=areas[0],
        max_area=areas[1],
        folder=str(photos_folder / "holiday") if holiday else None,
        top=top,
    )
    query = library.predictor.embed_texts([text])[0].numpy()
    if minus:
        query = query - library.predictor.embed_texts([minus])[0].numpy()
    regions, photos, vectors = table(library)
    scores = vectors @ query / np.linalg.norm(query) / np.linalg.norm(vectors, axis=1)
    expected: list[tuple[int, int, float]] = []
    seen = set[int]()
    for row in np.argsort(-scores, kind="stable").tolist():
        region = regions[row]
        if not areas[0] <= region["area"] <= areas[1]:
            continue
        if holiday and "/holiday/" not in photos[region["photo"]]["path"]:
            continue
        if per_photo == "best" and region["photo"] in seen:
            continue
        seen.add(region["photo"])
        expected.append((region["photo"], region["number"], scores[row]))
    assert found.searched == (3 if holiday else 8)
    assert len(found.rows) == min(top, len(expected))
    np.testing.assert_allclose([row.score for row in found.rows], [score for *_, score in expected[:top]], atol=1e-3)
    by_score = {(number, which): score for number, which, score in expected}
    for row in found.rows:  # equal scores may change places
        assert by_score[row.photo_id, row.number] == pytest.approx(row.score, abs=1e-3)


def test_a_stored_region_finds_itself_by_its_photo_and_box_and_by_its_row(library: Library) -> None:
    regions, photos, _ = table(library)
    region = regions[len(regions) // 2]
    stored = photos[region["photo"]]
    box_px = np.array(region["box"]) * [stored["width"], stored["height"], stored["width"], stored["height"]]
    found = library.search(image=stored["path"], box_px=box_px.tolist(), per_photo="all", top=5)
    assert found.rows[0].score > 0.995
    assert found.presence is None
    assert not found.nothing
    again = library.search(like=found.rows[0], per_photo="all", top=1)
    assert again.rows[0].score > 0.999


def test_a_whole_image_finds_itself_and_words_can_be_added_to_it(library: Library, photos_folder: Path) -> None:
    found = library.search(image=photo(3), top=1)
    assert Path(found.rows[0].photo) == photos_folder / "003.png"
    both = library.search("a red dog", image=photo(3), minus="snow")
    assert both.query == "“a red dog” + the image − “snow”"
    assert both.presence is None


def test_rows_say_where_the_region_lies_in_pixels(library: Library) -> None:
    for row in library.search("a red dog", per_photo="all", top=50).rows:
        assert row.width_px, row.height_px == (60, 40)
        np.testing.assert_allclose(row.box_px, np.array(row.box) * [60, 40, 60, 40], atol=0.5)
        assert row.is_there


def test_photos_are_filtered_by_the_day_they_were_taken(library: Library, photos_folder: Path) -> None:
    taken = datetime.fromtimestamp((photos_folder / "000.png").stat().st_mtime)
    assert library.search("snow", after=taken - timedelta(days=1)).searched == 8
    nobody = library.search("snow", before=taken - timedelta(days=1))
    assert (nobody.searched, nobody.rows, nobody.nothing, nobody.presence) == (0, (), True, 0.0)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "query is empty"),
        ({"text": "  "}, "text is empty"),
        ({"text": ["dog", ""]}, "text is empty"),
        ({"text": "dog", "minus": ""}, "text is empty"),
        ({"text": "dog", "minus": "dog"}, "cancel"),
        ({"text": "dog", "top": 0}, "top"),
        ({"text": "dog", "min_area": 0.5, "max_area": 0.4}, "areas"),
        ({"text": "dog", "box_px": [0, 0, 1, 1]}, "needs an image"),
        ({"image": photo(0), "box_px": [0, 0, 61.1, 90]}, "outside"),
        ({"image": photo(0), "box_px": [1, 2, 3]}, "4 numbers"),
        ({"text": "dog", "folder": " "}, "folder is empty"),
    ],
)
def test_wrong_questions_are_named(library: Library, query: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        library.search(**query)


def test_a_library_refuses_another_model_naming_both(index: str, make_model, model: str, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="their embeddings do not compare") as caught:
        Library.open(index, model=other)
    assert model in str(caught.value)
    assert other in str(caught.value)


def test_a_library_whose_model_went_away_says_so_and_opens_with_a_copy(make_model, tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", 2)
    made = make_model(tmp_path / "model", seed=7)
    out = str(tmp_path / "index")
    run_index(IndexConfig(photos=(str(tmp_path / "photos"),), out=out, model=made, device="cpu"))
    shutil.move(made, tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="--model"):
        Library.open(out)
    assert len(Library.open(out, model=str(tmp_path / "moved"), device="cpu")) == 2


def test_a_photo_deleted_since_is_still_found_and_marked(model: str, tmp_path: Path) -> None:
    first, _ = save_photos(tmp_path / "photos", 2)
    out = str(tmp_path / "index")
    run_index(IndexConfig(photos=(str(tmp_path / "photos"),), out=out, model=model, device="cpu"))
    first.unlink()
    rows = Library.open(out, device="cpu").search("snow").rows
    assert {row.photo: row.is_there for row in rows} == {
        str(first): False,
        str(first.with_name("001.png")): True,
    }


def test_an_open_library_sees_what_another_process_adds(model: str, tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", 2)
    config = IndexConfig(photos=(str(tmp_path / "photos"),), out=str(tmp_path / "index"), model=model, device="cpu")
    run_index(config)
    library = Library.open(config.out, device="cpu")
    save_photos(tmp_path / "photos", 1, first=9)
    run_index(config)
    assert len(library) == 3
    assert library.search(image=photo(9), top=1).rows[0].photo.endswith("009.png")


def test_a_library_of_whole_photos_is_asked_with_whole_embeddings(model: str, photos_folder: Path, tmp_path) -> None:
    out = str(tmp_path / "index")
    run_index(IndexConfig(photos=(str(photos_folder),), out=out, model=model, regions="whole", device="cpu"))
    library = Library.open(out, device="cpu")
    assert library.store.regions.count_rows() == 8
    text = library.predictor.embed_texts(["snow"])[0].numpy()
    image = library.predictor.encode(photo(3)).features.embedding[0].numpy()
    by_photo = {Path(row.photo).name: row.score for row in library.search("snow").rows}
    assert by_photo["003.png"] == pytest.approx(float(text @ image), abs=2e-3)
    assert library.search(image=photo(3), top=1).rows[0].score > 0.999
    assert library.search(image=photo(3), box_px=[5, 5, 30, 30]).rows


def test_a_large_library_gets_an_approximate_index_that_takes_new_photos(model: str, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(store_module, "APPROXIMATE_FROM", 300)
    save_photos(tmp_path / "photos", 20)
    config = IndexConfig(photos=(str(tmp_path / "photos"),), out=str(tmp_path / "index"), model=model, device="cpu")
    run_index(config)
    library = Library.open(config.out, device="cpu")
    assert library.store.approximate
    save_photos(tmp_path / "photos", 2, first=30)
    run_index(config)
    assert library.search(image=photo(31), top=1).rows[0].photo.endswith("031.png")
    box = (grid_boxes()[5] * [60, 40, 60, 40]).tolist()
    near = library.search(image=photo(4), box_px=box, top=10)
    exact = library.search(image=photo(4), box_px=box, top=10, exact=True)
    assert len({row.photo for row in near.rows} & {row.photo for row in exact.rows}) >= 9


def test_presence_is_that_of_one_photo_and_falls_with_the_number_of_photos_that_fit_worse() -> None:
    assert presence([0.0], 1) == pytest.approx(0.5)
    assert presence([3.0], 1) > presence([3.0], 10) > presence([3.0], 1000)
    assert presence([3.0, 3.0], 10) > presence([3.0], 10)


def test_the_level_of_everyday_names_is_what_one_in_twenty_reaches(library: Library) -> None:
    from opencloc.model.predictor import EVERYDAY

    regions, photos, vectors = table(library)
    names = library.predictor.embed_texts(EVERYDAY.split(", ")).numpy()
    owners = np.array([row["photo"] for row in regions])
    best = [(vectors[owners == number] @ names.T).max(axis=0) for number in photos]
    found = library.search("snow", top=8)
    scale = library.predictor.model.scale("region").item()
    row = found.rows[0]
    logit = scale * (row.score - float(np.quantile(best, 0.95)))
    assert row.presence == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-3)
