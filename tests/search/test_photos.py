import os
from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image

from opencloc.data.scenes.scenes import SceneConfig, write_scenes
from opencloc.errors import BadSample
from opencloc.search.photos import Entry, list_photos, read_photo
from tests.helpers.tars import write_tars
from tests.search.conftest import photo, save_photos


def test_a_folder_is_walked_once_whichever_links_lead_there(tmp_path: Path) -> None:
    save_photos(tmp_path / "a", 2)
    save_photos(tmp_path / "elsewhere", 1, first=7)
    (tmp_path / "a" / "round").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "a" / "out").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "a" / "twice").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "a" / "notes.txt").write_text("no photo")
    listing = list_photos(str(tmp_path / "a"))
    names = [os.path.relpath(entry.path, listing.source) for entry in listing.entries]
    assert names == ["000.png", "001.png", "out/007.png"]
    assert listing.skipped == {"not an image": 1}


def test_a_folder_without_a_photo_and_one_that_is_not_there_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no photo"):
        list_photos(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_photos(str(tmp_path / "nowhere"))


def test_a_photo_is_upright_and_dated_by_its_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif[0x0132] = "2019:08:07 06:05:04"
    photo(0, 60, 40).save(tmp_path / "a.jpg", exif=exif)
    (entry,) = list_photos(str(tmp_path)).entries
    read = read_photo(str(tmp_path), entry)
    assert read.image.size == (40, 60)
    assert read.date == datetime(2019, 8, 7, 6, 5, 4)


def test_equal_bytes_have_one_id_and_other_bytes_another(tmp_path: Path) -> None:
    first, second = save_photos(tmp_path, 2)
    (tmp_path / "copy.png").write_bytes(first.read_bytes())
    ids = {Path(e.path).name: read_photo(str(tmp_path), e).id for e in list_photos(str(tmp_path)).entries}
    assert ids["copy.png"] == ids[first.name] != ids[second.name]


@pytest.mark.parametrize("data", [b"", b"no image", photo(1).tobytes()[:500]])
def test_a_broken_photo_is_a_bad_sample(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(BadSample, match=r"a\.jpg"):
        read_photo(str(tmp_path), Entry(path=str(tmp_path / "a.jpg")))


def test_tars_and_endless_sources_are_read_by_number(tmp_path: Path) -> None:
    write_tars(tmp_path, [2, 3])
    listing = list_photos(str(tmp_path))
    assert [os.path.relpath(entry.path, tmp_path) for entry in listing.entries][:3] == [
        "0.tar/000", "0.tar/001", "1.tar/000",
    ]  # fmt: skip
    reds = [read_photo(listing.source, entry).image.getpixel((0, 0)) for entry in listing.entries]
    assert reds == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0)]
    with pytest.raises(ValueError, match="no end"):
        list_photos("scenes:easy")
    assert len(list_photos("scenes:easy", 3).entries) == 3


def test_scenes_written_to_a_folder_of_tars_are_listed_with_the_version_of_their_tar(tmp_path: Path) -> None:
    write_scenes(SceneConfig(mode="easy"), 2, str(tmp_path), 2)
    listing = list_photos(str(tmp_path))
    assert {entry.size for entry in listing.entries} == {next(tmp_path.glob("*.tar")).stat().st_size}


def test_a_number_of_images_is_for_sources_without_an_end(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", [2])
    (tmp_path / "photos").mkdir()
    for spec in (f"shards:{tmp_path / 'tars'}", str(tmp_path / "photos")):
        with pytest.raises(ValueError, match="--num-images is for sources without an end"):
            list_photos(spec, 1)
