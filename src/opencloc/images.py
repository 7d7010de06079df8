"""From bytes, files and arrays to the pixels a model sees: one rule for training, labelling, evaluation and Predictor.

Everything becomes 8-bit RGB: gray, palette, 16-bit and CMYK images are converted, transparency is laid over white, of
an animation the first frame counts.  Data sources keep the pixels as they are stored, since boxes refer to those
(COCO's do, and img2dataset stores them so); `Predictor` turns images upright by their EXIF orientation, as viewers do.
Where things lie in the letterboxed square is `boxes.Letterbox`'s.
"""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import AvifImagePlugin, Image, UnidentifiedImageError, WebPImagePlugin  # noqa: F401 (Pillow loads the other plugins by itself)

from opencloc.errors import BadSample

MEAN_RGB = (0.48145466, 0.4578275, 0.40821073)  # CLIP's pixel mean; the letterbox pads with it (0 once normalised)
STD_RGB = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 89_478_485  # Pillow's own bound: an RGB image of 256 MiB
# What bytes named .jpg may really be (img2dataset without re-encoding keeps them).  Pillow's other readers are left
# out: some run outside programs (EPS) and none is needed for photos.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
_DECIDED = "opencloc_orientation_decided"  # marks images of a data source, which `open_image` must not turn
_ORIENTATION = 0x0112  # EXIF's tag; its values 2 to 8 and what turns each upright:
_UPRIGHT = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)


def decode_image(
    data: bytes,
    where: str,
    max_px: int | None = None,
    *,
    expected_px: tuple[int, int] | None = None,
    oriented: bool = False,
) -> Image.Image:
    """The image as RGB.

    `max_px`: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where its long side then still has `max_px` pixels.
    `expected_px`: the (width, height) that annotations refer to; an image resized since then, of the same shape within
    a pixel, is taken too (normalised boxes fit it).
    `oriented`: turned upright by its EXIF orientation; by default the pixels stay as they are stored.

    Raises `BadSample` ("broken image", "image too large", "image size differs from its annotation") naming `where`.
    """
    image = _open(data, where)
    width, height = image.size
    if expected_px is not None and not _same_shape((width, height), expected_px):
        detail = f"{width} x {height} pixels, annotated as {expected_px[0]} x {expected_px[1]}"
        raise BadSample("image size differs from its annotation", where, detail)
    if max_px is not None and max_px < max(width, height):
        scale = max_px / max(width, height)
        image.draft(None, (max(1, int(np.ceil(width * scale))), max(1, int(np.ceil(height * scale)))))
    rgb = as_rgb(image, where, oriented=oriented)
    if not oriented:
        rgb.info[_DECIDED] = True
    return rgb


def as_rgb(image: Image.Image, where: str = "image", *, oriented: bool = False) -> Image.Image:
    """A Pillow image as `decode_image` gives it, with the same limit of size and the same errors."""
    _check_size(image, where)
    try:
        turn = _UPRIGHT.get(_orientation(image)) if oriented and not image.info.get(_DECIDED) else None
        rgb = _to_rgb(image)
        if turn is not None:
            rgb = rgb.transpose(turn)
            for name in ("exif", "xmp"):
                rgb.info.pop(name, None)
    except Exception as error:  # a lazy image is read only now, and Pillow raises a whole zoo
        raise BadSample("broken image", where, str(error)) from error
    return rgb


def open_image(source: Any) -> Image.Image:
    """What a user calls an image, as RGB and upright: a Pillow image, a path, bytes of a file, an array or a tensor.

    Arrays are uint8, (H, W, 3), (H, W, 4) with transparency or (H, W) gray; tensors uint8, (3, H, W) or (H, W).
    Raises TypeError or ValueError saying what is taken, FileNotFoundError, and `BadSample` naming a file that is no
    readable image or has too many pixels.
    """
    if isinstance(source, Image.Image):
        return as_rgb(source, str(getattr(source, "filename", "") or "image"), oriented=True)
    if isinstance(source, str | Path):
        path = os.fspath(source)  # a file of this machine, whatever its name looks like
        try:
            data = Path(path).read_bytes()
        except ValueError:  # NUL, or half a surrogate pair
            raise ValueError(f"{path!r} cannot be the name of an image file") from None
        return decode_image(data, path, oriented=True)
    if isinstance(source, bytes | bytearray | memoryview):
        return decode_image(bytes(source), "image", oriented=True)
    is_tensor = not isinstance(source, np.ndarray) and hasattr(source, "detach")
    if not is_tensor and not isinstance(source, np.ndarray):
        raise TypeError(
            f"an image is a PIL image, a path, bytes, a uint8 array (H, W, 3) or (H, W), or a uint8 tensor (3, H, W), "
            f"not {type(source).__name__}"
        )
    tensor: Any = source  # torch's, if it is one: this file does without torch
    array = tensor.detach().cpu().numpy() if is_tensor else source
    if is_tensor and array.ndim == 3:
        array = np.moveaxis(array, 0, -1)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        layout = "(3, H, W)" if is_tensor else "(H, W, 3)"
        raise ValueError(
            f"an image of type {source.dtype} and shape {tuple(source.shape)}: needs uint8 and {layout} or (H, W)"
        )
    if array.size == 0:
        raise ValueError(f"an image of shape {tuple(source.shape)} is empty")
    return as_rgb(Image.fromarray(np.ascontiguousarray(array)))


def is_oriented(image: bytes | Image.Image) -> bool:
    """Whether viewers turn the image by its EXIF orientation, so that stored pixels and shown ones differ."""
    if isinstance(image, bytes):
        try:
            image = _open(image, "image")
        except BadSample:
            return False
    return _orientation(image) in _UPRIGHT


def as_array(values: Any) -> np.ndarray:
    """Any array, tensor, image or nested list as an array; bfloat16, which NumPy has not, as float32."""
    if hasattr(values, "detach"):  # a tensor of torch's
        values = values.detach().cpu()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values
    return np.asarray(values)


def as_mask(mask: Any, height_px: int, width_px: int) -> np.ndarray:
    """The mask (H, W) as bool: any array, tensor, PIL image or nested list of the size of the image.

    Bool stays, integers are 0 and 1 or 0 and 255, floats lie in [0, 1] and count from 0.5.  Raises ValueError for
    other values (logits, numbers of segments), another shape or an empty mask, TypeError for what is no array.
    """
    array = as_array(mask)
    if array.dtype.kind not in "buif":
        raise TypeError(f"a mask is an array of bool, integers or floats, not {type(mask).__name__} of {array.dtype}")
    if array.shape != (height_px, width_px):
        raise ValueError(f"a mask of shape {array.shape} on an image of height {height_px}, width {width_px}")
    if array.dtype.kind == "f":
        if not ((array >= 0) & (array <= 1)).all():
            raise ValueError("a mask of floats has values in [0, 1]; compare logits with your threshold first")
        array = array >= 0.5
    elif array.dtype.kind in "ui":
        if not np.isin(array, (0, 1)).all() and not np.isin(array, (0, 255)).all():
            raise ValueError("a mask of integers holds 0 and 1, or 0 and 255; compare other values first (mask > 127)")
        array = array > 0
    if not array.any():
        raise ValueError("the mask is empty")
    return array


def _open(data: bytes, where: str) -> Image.Image:
    """The image, its header read and its size within bounds."""
    try:
        image = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("image too large", where, str(error)) from error
    except UnidentifiedImageError as error:  # its message is the address of an object
        raise BadSample("broken image", where, f"{len(data)} bytes of no known format") from error
    except Exception as error:  # Pillow raises a whole zoo for bytes that are no image
        raise BadSample("broken image", where, f"{len(data)} bytes: {error}") from error
    _check_size(image, where)
    return image


def _check_size(image: Image.Image, where: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadSample("image too large", where, f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded")
    if width * height == 0:
        raise BadSample("broken image", where, f"{width} x {height} pixels")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF: viewers ignore it too
        return 1


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
    if image.mode == "F":
        raise ValueError("pixels are floats, whose range is unknown: give 8-bit values")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def crop(image: Image.Image, box: np.ndarray) -> Image.Image:
    """The box (4,), normalised to the image, cut out at whole pixels: rounded to the nearest, at least one each way."""
    left, right = _whole_pixels(float(box[0]), float(box[2]), image.width)
    top, bottom = _whole_pixels(float(box[1]), float(box[3]), image.height)
    return image.crop((left, top, right, bottom))


def _whole_pixels(low: float, high: float, size_px: int) -> tuple[int, int]:
    first = min(max(round(low * size_px), 0), size_px - 1)
    return first, min(max(round(high * size_px), first + 1), size_px)


def mask_square(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) in the letterbox's square, in its own resolution: (S, S) with S the longer side."""
    (height, width), side = mask.shape, max(mask.shape)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.zeros((side, side), mask.dtype)
    square[top : top + height, left : left + width] = mask
    return square


def letterbox_array(image: Image.Image, size_px: int) -> np.ndarray:
    """The image resized (bicubic, antialiased) into a square (size_px, size_px, 3) of uint8, padded with CLIP's mean.

    The image is placed with sub-pixel accuracy at the very place `Letterbox.to_square` says: the resampled content
    covers the exact (unrounded) rectangle, bars cover the rest.
    """
    image = _to_rgb(image)
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
