"""Image files become the pixels that are stored, in RGB; what cannot be decoded is a bad sample."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opencloc.errors import BadSample
from opencloc.images import decode_image
from tests.helpers.tars import file_bytes, picture

PNG = file_bytes(picture())


PNG = file_bytes(picture())


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 320))
def test_scaled_decoding_never_goes_below_the_size_needed(width: int, height: int, max_px: int) -> None:
    data = file_bytes(Image.new("RGB", (width, height)), "JPEG")
    got = decode_image(data, "x", max_px).size
    assert max(got) >= min(max_px, max(width, height))
    eighths = {(-(-width // scale), -(-height // scale)) for scale in (1, 2, 4, 8)}
    assert got in eighths


def test_scaled_decoding_makes_large_photos_small() -> None:
    data = file_bytes(Image.new("RGB", (801, 400)), "JPEG")
    assert decode_image(data, "x", 100).size == (101, 50)
    assert decode_image(data, "x", 102).size == (201, 100)
    assert decode_image(data, "x").size == (801, 400)


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (4, 4), 100), "PNG", (100, 100, 100)),
        (Image.new("1", (4, 4), 1), "PNG", (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 0x8040, dtype=np.uint16)), "PNG", (0x80, 0x80, 0x80)),  # 16 bits: the upper 8
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG", (255, 255, 255)),  # transparent: white shows through
        (Image.new("LA", (4, 4), (0, 255)), "PNG", (0, 0, 0)),
        (Image.new("RGB", (4, 4), "red").convert("P"), "PNG", (255, 0, 0)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (Image.new("RGB", (4, 4), "blue"), "BMP", (0, 0, 255)),
    ],
)
def test_every_kind_of_image_becomes_rgb(image: Image.Image, kind: str, expected: tuple) -> None:
    got = decode_image(file_bytes(image, kind), "x")
    assert (got.mode, got.size, got.getpixel((2, 2))) == ("RGB", (4, 4), expected)


def test_of_an_animation_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = file_bytes(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert decode_image(data, "x").getpixel((0, 0)) == (255, 0, 0)


def test_orientation_in_exif_does_not_turn_the_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert decode_image(file_bytes(picture(0, 12, 7), "JPEG", exif=exif), "x").size == (12, 7)


@pytest.mark.parametrize("side", [9_600, 20_000])  # Pillow only warns of the first
def test_an_image_too_large_to_decode_is_a_bad_sample(side: int) -> None:
    header = b"IHDR" + struct.pack(">II", side, side) + bytes([8, 2, 0, 0, 0])
    bomb = PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]
    with pytest.raises(BadSample, match="huge: image too large"):
        decode_image(bomb, "huge")


@settings(max_examples=50)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]), st.data())
def test_damaged_image_bytes_raise_nothing_but_bad_sample(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(file_bytes(picture(0, 40, 30), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        reason = None if decode_image(bytes(damaged), "x").mode == "RGB" else "not RGB"
    except BadSample as bad:
        reason = bad.reason
    assert reason in (None, "broken image", "image too large")
