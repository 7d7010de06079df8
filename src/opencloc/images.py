"""From bytes to the pixels a model sees: decoding, conversion to RGB, crops, the letterboxed square.

Training, labelling, evaluation and Predictor all come here, so that they see the same pixels of the same image.  Where
things lie in the square is `boxes.Letterbox`'s.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import AvifImagePlugin, ExifTags, Image, WebPImagePlugin  # noqa: F401 (Pillow loads the other plugins by itself)

from opencloc.errors import BadSample

MEAN_RGB = (0.48145466, 0.4578275, 0.40821073)  # CLIP's pixel mean; the letterbox pads with it (0 once normalised)
STD_RGB = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 89_478_485  # Pillow's own bound: an RGB image of 256 MiB
# What bytes named .jpg may really be (img2dataset without re-encoding keeps them).  Pillow's other readers are left
# out: some run outside programs (EPS) and none is needed for photos.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")


def decode_image(
    data: bytes, where: str, max_px: int | None = None, *, expected_px: tuple[int, int] | None = None
) -> Image.Image:
    """The image as RGB.

    Gray, palette, 16-bit and CMYK images are converted, transparency is laid over white, of an animation the first
    frame is taken.  EXIF orientation is NOT applied: boxes refer to the pixels as they are stored (as COCO's do, and
    as img2dataset stores them).

    `max_px`: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where its long side then still has `max_px` pixels.
    `expected_px`: the (width, height) that annotations refer to; an image resized since then, of the same shape within
    a pixel, is taken too (normalised boxes fit it).

    Raises `BadSample` ("broken image", "image too large", "image size differs from its annotation") naming `where`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("image too large", where, str(error)) from error
    except Exception as error:  # Pillow raises a whole zoo for bytes that are no image
        raise BadSample("broken image", where, f"{len(data)} bytes: {error}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadSample("image too large", where, f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded")
    if expected_px is not None and not _same_shape((width, height), expected_px):
        detail = f"{width} x {height} pixels, annotated as {expected_px[0]} x {expected_px[1]}"
        raise BadSample("image size differs from its annotation", where, detail)
    try:
        if max_px is not None and max_px < max(width, height):
            scale = max_px / max(width, height)
            image.draft(None, (max(1, int(np.ceil(width * scale))), max(1, int(np.ceil(height * scale)))))
        return _to_rgb(image)
    except Exception as error:
        raise BadSample("broken image", where, str(error)) from error


def _same_shape(size_px: tuple[int, int], expected_px: tuple[int, int]) -> bool:
    """Whether one size is the other one scaled, each side rounded to whole pixels."""
    (width, height), (expected_width, expected_height) = size_px, expected_px
    return abs(width * expected_height - height * expected_width) <= max(expected_px)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        image.load()  # and lets go of the file behind it
        return image
    if image.mode.startswith("I"):  # 16 bits per pixel; Pillow would clip them to 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def is_oriented(image: Image.Image | bytes) -> bool:
    """Whether EXIF says that a viewer shows the image turned or mirrored; False for bytes that are no image."""
    try:
        opened = Image.open(io.BytesIO(image), formats=_PILLOW_FORMATS) if isinstance(image, bytes) else image
        return opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # Pillow raises a whole zoo for bytes that are no image
        return False


def crop(image: Image.Image, box: np.ndarray) -> Image.Image:
    """The box (4,), normalised to the image, cut out at whole pixels: rounded to the nearest, at least one each way."""
    left, right = _whole_pixels(float(box[0]), float(box[2]), image.width)
    top, bottom = _whole_pixels(float(box[1]), float(box[3]), image.height)
    return image.crop((left, top, right, bottom))


def _whole_pixels(low: float, high: float, size_px: int) -> tuple[int, int]:
    first = min(max(round(low * size_px), 0), size_px - 1)
    return first, min(max(round(high * size_px), first + 1), size_px)


def letterbox_array(image: Image.Image, size_px: int) -> np.ndarray:
    """The image resized (bicubic, antialiased) into a square (size_px, size_px, 3) of uint8, padded with CLIP's mean.

    The image is placed with sub-pixel accuracy at the very place `Letterbox.to_square` says: the resampled content
    covers the exact (unrounded) rectangle, bars cover the rest.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")  # which copies even what is RGB
    width, height = image.size
    if width == height:
        return np.asarray(image.resize((size_px, size_px), Image.Resampling.BICUBIC))
    scale = size_px / max(width, height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (size_px - inner[0]) // 2, (size_px - inner[1]) // 2
    # The source rectangle whose image is the whole-pixel rectangle (left, top, inner): pixel p of the square shows
    # source coordinate (p - offset) / scale.  It may reach at most half a pixel over the source; it is clipped there.
    offset_x, offset_y = (size_px - width * scale) / 2, (size_px - height * scale) / 2
    source = (
        max(0.0, (left - offset_x) / scale),
        max(0.0, (top - offset_y) / scale),
        min(float(width), (left + inner[0] - offset_x) / scale),
        min(float(height), (top + inner[1] - offset_y) / scale),
    )
    square = _bars(size_px).copy()
    resized = image.resize(inner, Image.Resampling.BICUBIC, box=source)
    square[top : top + inner[1], left : left + inner[0]] = np.asarray(resized)
    return square


@functools.lru_cache(maxsize=4)
def _bars(size_px: int) -> np.ndarray:
    """A square of CLIP's mean colour, (size_px, size_px, 3)."""
    return np.full((size_px, size_px, 3), [round(255 * c) for c in MEAN_RGB], dtype=np.uint8)
