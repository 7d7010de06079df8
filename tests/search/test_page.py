from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opencloc.model.predictor import load
from opencloc.search.page import Desk, Session, back, heat_over, listed, numbers
from opencloc.search.query import Library
from tests.search.conftest import photo


@pytest.fixture(scope="module")
def desk(library: Library) -> Desk:
    return Desk(library.predictor, library)


@pytest.fixture
def opened(desk: Desk, photos_folder: Path) -> Session:
    return desk.open_photo(Session(), str(photos_folder / "003.png"))


def test_two_clicks_make_a_box_and_one_makes_a_point(desk: Desk, opened: Session) -> None:
    session = desk.click(opened, 40, 30, "box")
    assert (session.corner, session.regions) == ((40, 30), ())
    session = desk.click(session, 10, 5, "box")
    assert (session.corner, session.regions) == (None, ((10, 5, 40, 30),))
    session = desk.click(session, 7, 8, "point")
    assert session.regions[1] == (7, 8)
    table = desk.names(session, "a red dog, pizza")
    assert [row[0] for row in table] == ["1", "2"]
    predictor = desk.predictor
    names, probabilities = predictor.classify(session.photo, [[10, 5, 40, 30]], ["a red dog", "pizza"])  # pyright: ignore
    assert table[0][1:3] == [names[0], f"{probabilities[0].max():.2f}"]
    marked = desk.marked(session, ["a", "b"])
    assert marked is not None
    assert np.any(np.asarray(marked) != np.asarray(photo(3)))


def test_the_image_is_encoded_once_however_many_regions_are_named(desk: Desk, opened: Session, monkeypatch) -> None:
    monkeypatch.setattr(desk.predictor.model, "encode_image", lambda *_: pytest.fail("encoded again"))
    session = desk.add(desk.add(opened, (1, 2, 30, 31)), (5, 6))
    assert len(desk.names(session, "dog, pizza")) == 2
    desk.find(session, "dog")


@pytest.mark.parametrize(
    ("clicks", "message"),
    [([(5, 5), (5, 5)], "same"), ([(5, 5), (5.5, 30)], "same"), ([(0, 0), (90, 90)], "outside")],
)
def test_clicks_that_make_no_box_are_named(desk: Desk, opened: Session, clicks, message: str) -> None:
    (x0, y0), (x1, y1) = clicks
    session = desk.click(opened, x0, y0, "box")
    with pytest.raises(ValueError, match=message):
        desk.click(session, x1, y1, "box")


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_a_broken_upload_is_named_without_the_servers_path(desk: Desk, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "cat.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=r"^cat\.jpg: broken image"):
        desk.open_photo(Session(), str(tmp_path / "cat.jpg"))


def test_an_image_of_too_many_pixels_is_named(desk: Desk, tmp_path: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="too large"):
        desk.open_photo(Session(), str(tmp_path / "huge.png"))


def test_large_photos_are_made_smaller_and_turned_upright(desk: Desk, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (2000, 1000)).save(tmp_path / "a.jpg", exif=exif)
    session = desk.open_photo(Session(), str(tmp_path / "a.jpg"))
    assert session.photo is not None
    assert session.photo.image.size == (800, 1600)


def test_a_phrase_gives_a_box_a_heat_map_and_words(desk: Desk, opened: Session) -> None:
    picture, heat, words = desk.find(opened, " a  red dog ")
    assert picture.size == heat.size == (60, 40)
    assert words.startswith("“a red dog” is ")
    with pytest.raises(ValueError, match="open a photo first"):
        desk.find(Session(), "dog")
    with pytest.raises(ValueError, match="type what to find"):
        desk.find(opened, " ")


def test_a_heat_map_is_bright_where_the_cosines_are_high() -> None:
    heat = np.zeros((10, 20), dtype=np.float32)
    heat[:, 15:] = 0.3
    shown = np.asarray(heat_over(Image.new("RGB", (200, 100), "gray"), heat)).astype(int).sum(-1)
    assert shown[:, 180:].min() > shown[:, :100].max()


def test_answers_lead_on_to_answers_and_back(desk: Desk, opened: Session) -> None:
    first = desk.ask(opened, "a red dog")
    second = desk.ask(first, like=1)
    assert first.found is not None
    assert second.found is not None
    assert second.found.rows[0].photo_id == first.found.rows[1].photo_id
    assert back(second).found is first.found
    assert back(back(back(second))).found is first.found
    third = desk.ask_region(desk.add(opened, (1, 2, 30, 31)))
    assert third.found is not None
    assert third.found.query == "the region"
    with pytest.raises(ValueError, match="search again"):
        desk.ask(Session(), like=0)
    with pytest.raises(ValueError, match="type what to look for"):
        desk.ask(opened, "")


def test_without_a_library_the_page_says_so(model: str) -> None:
    with pytest.raises(ValueError, match="no library"):
        Desk(load(model), None).ask(Session(), "dog")


def test_typed_names_and_regions() -> None:
    assert listed("dog,  a red   cat; dog\n\n bird,") == ["dog", "a red cat", "bird"]
    assert numbers("1, 2;3  4") == [1, 2, 3, 4]
    for wrong in ("", "1 2 3", "a b", "nan 1", "1 2 3 inf"):
        with pytest.raises(ValueError, match="four numbers"):
            numbers(wrong)
    with pytest.raises(ValueError, match="at most"):
        listed("x" * 400)
