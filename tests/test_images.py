"""Pixels: one rule for files, bytes, Pillow images, arrays and tensors, and for masks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opencloc import images
from opencloc.errors import BadSample
from opencloc.images import as_mask, as_rgb, decode_image, is_oriented, letterbox_array, open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
RGB = Image.fromarray(PIXELS[..., :3])


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(RGB, exif=exif)


MODES = {
    "RGB": RGB,
    "RGBA": Image.fromarray(PIXELS),
    "LA": Image.fromarray(PIXELS[..., 2:]),
    "palette with transparency": Image.fromarray(PIXELS).quantize(8),
    "palette": RGB.quantize(8),
    "gray": Image.fromarray(PIXELS[..., 0]),
    "16 bit": Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257),
    "one bit": Image.fromarray(PIXELS[..., 0] > 99),
}


@pytest.mark.parametrize("mode", MODES)
def test_file_bytes_and_pillow_image_give_the_pixels_of_the_data_reader(mode: str, tmp_path: Path) -> None:
    data = encoded(MODES[mode])
    (tmp_path / "x.png").write_bytes(data)
    expected = np.asarray(decode_image(data, "x"))
    assert expected.shape == (6, 9, 3)
    for source in (data, tmp_path / "x.png", str(tmp_path / "x.png"), Image.open(tmp_path / "x.png"), MODES[mode]):
        np.testing.assert_array_equal(np.asarray(open_image(source)), expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_square_shows_the_pixels_of_the_data_reader(mode: str) -> None:
    read = letterbox_array(decode_image(encoded(MODES[mode]), "x"), 9)
    np.testing.assert_array_equal(letterbox_array(MODES[mode], 9), read)


def test_cmyk_images_are_converted_and_floats_refused() -> None:
    cmyk = RGB.convert("CMYK")
    np.testing.assert_array_equal(np.asarray(as_rgb(cmyk)), np.asarray(RGB))
    with pytest.raises(BadSample, match="range is unknown"):
        as_rgb(RGB.convert("F"))


def test_transparency_is_laid_over_white_and_16_bits_are_scaled() -> None:
    assert as_rgb(Image.new("RGBA", (1, 1), (10, 20, 30, 0))).getpixel((0, 0)) == (255, 255, 255)
    sixteen = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    assert [as_rgb(sixteen).getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (1, 1, 1), (255, 255, 255)]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (PIXELS[..., :3], RGB),
        (PIXELS, MODES["RGBA"]),
        (PIXELS[..., 0], MODES["gray"]),
        (PIXELS[::-1, :, :3], RGB.transpose(Image.Transpose.FLIP_TOP_BOTTOM)),
        (torch.from_numpy(PIXELS[..., :3]).permute(2, 0, 1), RGB),
        (torch.from_numpy(PIXELS[..., 0]), MODES["gray"]),
    ],
)
def test_arrays_and_tensors_are_images(array: Any, expected: Image.Image) -> None:
    np.testing.assert_array_equal(np.asarray(open_image(array)), np.asarray(as_rgb(expected)))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (None, TypeError),
        (3 + 2j, TypeError),
        ([[1, 2]], TypeError),
        (np.zeros((4, 4, 3)), ValueError),
        (np.zeros((3, 4, 5), np.uint8), ValueError),
        (np.zeros((4, 4), complex), ValueError),
        (np.zeros((0, 4, 3), np.uint8), ValueError),
        (torch.zeros(5, 4, 3, dtype=torch.uint8), ValueError),
        (b"", BadSample),
        (b"hello", BadSample),
        (encoded(RGB)[:60], BadSample),
    ],
)
def test_what_is_no_image_is_refused(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"image|needs uint8"):
        open_image(wrong)


def test_files_are_named_and_opened_whatever_they_are_called(tmp_path: Path) -> None:
    (tmp_path / "x::y.png").write_bytes(encoded(RGB))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "x::y.png")), np.asarray(RGB))
    (tmp_path / "cut.png").write_bytes(encoded(RGB)[:60])
    with Image.open(tmp_path / "cut.png") as lazy:
        for source in (tmp_path / "cut.png", lazy):
            with pytest.raises(BadSample, match=r"cut\.png: broken image"):
                open_image(source)
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "missing.png")


def test_an_image_with_too_many_pixels_is_named_with_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(encoded(RGB))
    monkeypatch.setattr(images, "MAX_PIXELS", 53)
    with Image.open(tmp_path / "x.png") as lazy:
        for source in (tmp_path / "x.png", lazy):
            with pytest.raises(BadSample, match=r"x\.png: image too large \(9 x 6 pixels, at most 53"):
                open_image(source)


# -- orientation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", range(10))
def test_sources_keep_stored_pixels_and_users_see_what_viewers_show(value: int) -> None:
    from PIL import ImageOps

    data = with_orientation(value)
    stored, shown = decode_image(data, "x"), open_image(data)
    np.testing.assert_array_equal(np.asarray(stored), np.asarray(RGB))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
    assert is_oriented(data) == is_oriented(Image.open(io.BytesIO(data))) == is_oriented(stored) == (2 <= value <= 8)
    assert not is_oriented(shown)
    for decided in (stored, shown):  # a source's image is not turned behind its boxes, nor any image twice
        np.testing.assert_array_equal(np.asarray(open_image(decided)), np.asarray(decided))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_and_no_image_are_not_oriented() -> None:
    data = encoded(RGB, "JPEG", exif=b"Exif\0\0MM\0*garbage")
    assert not is_oriented(data)
    assert open_image(data).size == (9, 6)
    assert not is_oriented(b"hello")


# -- masks ---------------------------------------------------------------------------------------------------------

MASK = PIXELS[..., 0] > 99


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        MASK.tolist(),
        MASK.astype(int),
        np.where(MASK, 255, 0).astype(np.uint8),
        np.flipud(np.flipud(MASK)),
        np.where(MASK, 0.5, 0.49),
        torch.from_numpy(MASK),
        torch.from_numpy(MASK).float(),
        Image.fromarray(MASK),
        Image.fromarray(MASK).convert("L"),
    ],
)
def test_a_mask_is_the_same_in_every_form(mask: Any) -> None:
    np.testing.assert_array_equal(as_mask(mask, 6, 9), MASK)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (MASK.T, ValueError, "shape"),
        (MASK[None], ValueError, "shape"),
        (np.zeros((6, 9), bool), ValueError, "empty"),
        (np.where(MASK, 4.0, -4.0), ValueError, "logits"),
        (np.full((6, 9), np.nan), ValueError, "in \\[0, 1\\]"),
        (np.where(MASK, 3, 0), ValueError, "0 and 255"),
        (None, TypeError, "NoneType"),
        (MASK.astype(complex), TypeError, "complex"),
        ("mask", TypeError, "str"),
    ],
)
def test_other_masks_are_refused(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_mask(mask, 6, 9)
