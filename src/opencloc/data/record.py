"""One sample as it lies on disk: image bytes and `{caption, alt_text, regions: [{box, text, score}]}`.

This file owns both directions between those bytes and a `Sample`, whatever holds them (tar member or loose file).
It reads and writes no files.

The record, JSON in UTF-8, every field optional, others (img2dataset's `url`, `status`, ...) ignored:

* `caption`: a string, or a list of strings where an image has several;
* `alt_text`: a string;
* `regions`: a list of `{"box": [x0, y0, x1, y1], "text": "...", "score": 0.9}`, boxes normalised to the image, scores
  in [0, 1] for all regions or for none.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from opencloc.data.sample import Sample
from opencloc.errors import BadSample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_NUMBERS = frozenset({int, float})  # as JSON gives them; bool is a type of its own

ImageFormat = Literal["jpg", "png", "webp"]


def encode_image(image: Image.Image, image_format: ImageFormat = "jpg", quality: int = 95) -> bytes:
    """The image as a file; jpg without chroma subsampling, webp lossless at quality 100, else lossy."""
    buffer = io.BytesIO()
    if image_format == "jpg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    elif image_format == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "WEBP", quality=quality, lossless=quality == 100)
    return buffer.getvalue()


def image_extension(data: bytes) -> str | None:
    """`jpg`, `png` or `webp` by the first bytes of a file, None for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known about an image, without the image; the fields mean what `Sample`'s do."""

    captions: tuple[str, ...] = ()
    alt_text: str | None = None
    boxes: np.ndarray
    texts: tuple[str, ...] = ()
    scores: np.ndarray | None = None

    def sample(self, key: str, image: Image.Image, where: str) -> Sample:
        """The sample; raises `BadSample` naming `where` if boxes or texts are unsound."""
        try:
            return Sample(
                key=key,
                image=image,
                captions=self.captions,
                alt_text=self.alt_text,
                boxes=self.boxes,
                texts=self.texts,
                scores=self.scores,
            )
        except BadSample as bad:
            raise BadSample(bad.reason, where, bad.detail) from None


def parse_record(where: str, json_bytes: bytes | None, text_bytes: bytes | None) -> Record:
    """The record of a sample from its `.json` and/or `.txt` (which is used where the JSON has no caption).

    Raises `BadSample` ("bad json", "bad utf-8") naming `where`.
    """
    record = _parse_json(where, json_bytes) if json_bytes is not None else {}
    captions = _captions(where, record.get("caption"))
    if not captions and text_bytes is not None:
        text = _decode_text(where, text_bytes).strip()
        captions = (text,) if text else ()
    alt_text = record.get("alt_text")
    if alt_text is not None and not isinstance(alt_text, str):
        raise BadSample("bad json", where, f"alt_text must be a string, not {alt_text!r}")
    boxes, texts, scores = _regions(where, record.get("regions"))
    return Record(captions=captions, alt_text=alt_text or None, boxes=boxes, texts=texts, scores=scores)


def encode_record(sample: Sample) -> bytes:
    """The JSON of a sample, such that `parse_record` gives back the same captions, boxes, texts and scores."""
    record: dict[str, Any] = {}
    if sample.captions:
        record["caption"] = sample.captions[0] if len(sample.captions) == 1 else list(sample.captions)
    if sample.alt_text is not None:
        record["alt_text"] = sample.alt_text
    if len(sample.boxes):
        record["regions"] = [
            {"box": [_short(number) for number in box], "text": text}
            for box, text in zip(sample.boxes, sample.texts, strict=True)
        ]
        if sample.scores is not None:
            for region, score in zip(record["regions"], sample.scores, strict=True):
                region["score"] = _short(score)
    return json.dumps(record, ensure_ascii=False).encode()


def _short(number: np.float32) -> float:
    """The float with the fewest digits that is the same float32."""
    return float(str(np.float32(number)))


def _decode_text(where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("bad utf-8", where, str(error)) from error


def _parse_json(where: str, data: bytes) -> Mapping[str, Any]:
    text = _decode_text(where, data)
    try:
        record = json.loads(text)
        if "\\ud" in text.lower():  # half a surrogate pair, escaped, is no character: nothing could encode it again
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadSample("bad json", where, str(error)) from error
    if not isinstance(record, dict):
        raise BadSample("bad json", where, f"expected an object, found {type(record).__name__}")
    return record


def _captions(where: str, caption: Any) -> tuple[str, ...]:
    captions = caption if isinstance(caption, list) else [] if caption is None else [caption]
    if not all(isinstance(text, str) for text in captions):
        raise BadSample("bad json", where, f"caption must be a string or a list of strings, not {caption!r}")
    return tuple(text for text in captions if text.strip())


def _regions(where: str, regions: Any) -> tuple[np.ndarray, tuple[str, ...], np.ndarray | None]:
    """Boxes (R, 4), texts and scores (R,) of a record's `regions`."""
    boxes, texts, scores = [], [], []
    regions = [] if regions is None else regions
    if not isinstance(regions, list):
        raise BadSample("bad json", where, f"regions must be a list, not {type(regions).__name__}")
    for number, region in enumerate(regions):
        if not isinstance(region, dict) or not {"box", "text"} <= region.keys():
            raise BadSample("bad json", where, f"region {number} needs a box and a text: {region!r}")
        box, text, score = region["box"], region["text"], region.get("score")
        if not isinstance(box, list) or len(box) != 4 or not _NUMBERS.issuperset(map(type, box)):
            raise BadSample("bad box", where, f"region {number}: a box is 4 numbers, not {box!r}")
        if not isinstance(text, str):
            raise BadSample("bad json", where, f"region {number}: text must be a string, not {text!r}")
        if score is not None and not (type(score) in _NUMBERS and 0 <= score <= 1):
            raise BadSample("bad score", where, f"region {number}: a score lies in [0, 1], not {score!r}")
        boxes.append(box)
        texts.append(text)
        scores.append(score)
    if any(score is None for score in scores):
        if any(score is not None for score in scores):
            raise BadSample("bad score", where, "either all regions have a score or none")
        scores = []
    array = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    return array, tuple(texts), np.asarray(scores, dtype=np.float32) if scores else None
