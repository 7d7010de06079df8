"""The sample: one image with its captions and regions, in memory and as the JSON that lies beside an image.

The JSON is in UTF-8.  Every field is optional, others (img2dataset's `url`, `status`, ...) are ignored:

* `caption`: a string, or a list of strings where an image has several;
* `alt_text`: a string;
* `regions`: a list of `{"box": [x0, y0, x1, y1], "text": "...", "score": 0.9}`, boxes normalised to the image, scores
  in [0, 1] for all regions or for none.

Symbols: R regions of one image.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from opencloc.boxes import box_problem
from opencloc.errors import BadSample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
ImageFormat = Literal["jpg", "png", "webp"]
_NUMBERS = frozenset({int, float})  # as JSON gives them; bool is a type of its own
_FAR = 1e6  # JSON's numbers may have any number of digits; none beyond this is an edge of a box


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known about one image.

    Raises `BadSample` on construction if a box is not finite, lies outside the image or is empty, a score lies outside
    [0, 1], a region text is empty, a text cannot be written in UTF-8, or boxes, texts and scores differ in number.
    """

    key: str
    captions: tuple[str, ...] = ()  # any number of captions of the whole image
    alt_text: str | None = None  # what the web page said, if it differs from the captions
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), dtype=np.float32))  # (R, 4) XYXY, normalised
    texts: tuple[str, ...] = ()  # R region texts
    scores: np.ndarray | None = None  # (R,) float32 in [0, 1]; None where boxes are human
    where: InitVar[str | None] = None  # names the sample in errors; None: its key

    def __post_init__(self, where: str | None) -> None:
        object.__setattr__(self, "boxes", np.asarray(self.boxes, dtype=np.float32).reshape(-1, 4))
        problem = region_problem(self.boxes, self.texts, self.scores)
        problem = problem or text_problem(self.key, *self.captions, self.alt_text or "")
        if problem:
            raise BadSample(problem[0], where or self.key, problem[1])


@dataclass(frozen=True, kw_only=True)
class Sample(Record):
    """One image with what is known about it.  Raises `BadSample` on construction, as `Record` does."""

    image: Image.Image  # RGB, decoded

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of the image."""
        return self.image.size


def region_problem(boxes: np.ndarray, texts: Sequence[str], scores: np.ndarray | None) -> tuple[str, str] | None:
    """(reason, detail) of what is wrong with boxes (R, 4), texts and scores (R,) of an image; None if all is sound."""
    if len(boxes) != len(texts) or (scores is not None and len(scores) != len(boxes)):
        count = "no" if scores is None else len(scores)
        detail = f"{len(boxes)} boxes, {len(texts)} texts, {count} scores"
        return "boxes, texts and scores differ in number", detail
    for number, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        if 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1:
            continue
        if problem := box_problem(boxes[number]):  # else it is only within rounding of a sound box
            return "bad box", problem
    if scores is not None and not ((scores >= 0) & (scores <= 1)).all():
        return "bad score", f"scores {scores.tolist()} are not all in [0, 1]"
    for text, box in zip(texts, boxes, strict=True):
        if not text or text.isspace():
            return "empty region text", f"box {box.tolist()}"
    return text_problem(*texts)


def text_problem(*texts: str) -> tuple[str, str] | None:
    """(reason, detail) if one of the texts holds half a surrogate pair, which nothing can encode; else None."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return "text is not valid Unicode", f"{text!r}: {error.reason} at {error.start}"
    return None


@runtime_checkable
class Source(Protocol):
    """Samples by number.  `source[i]` is a pure function of i: same number, same sample, in any process.

    `source[i]` raises `BadSample` for a sample that cannot be used and nothing else that one sample could cause.
    Sources are cheap to pickle (workers get a copy) and hold no open files across a fork.
    """

    @property
    def size(self) -> int | None:
        """How many samples there are: valid numbers are 0 ... size - 1.  None: endless, every number >= 0 is valid."""
        ...

    def __getitem__(self, index: int) -> Sample: ...


def class_names(samples: Sequence[Sample]) -> tuple[str, ...]:
    """The distinct region texts of some samples, sorted."""
    return tuple(sorted({text for sample in samples for text in sample.texts}))


# -- on disk -----------------------------------------------------------------------------------------------------------


def encode_image(image: Image.Image, image_format: ImageFormat = "jpg", quality: int = 95) -> bytes:
    """The image as a file: jpg without chroma subsampling, webp lossless at quality 100."""
    options: dict[ImageFormat, dict[str, Any]] = {
        "jpg": {"format": "JPEG", "quality": quality, "subsampling": 0},
        "png": {"format": "PNG"},
        "webp": {"format": "WEBP", "quality": quality, "lossless": quality == 100},
    }
    buffer = io.BytesIO()
    image.save(buffer, **options[image_format])
    return buffer.getvalue()


def encode_record(sample: Record) -> bytes:
    """The JSON of a sample, of which `parse_record` makes the same captions, alt-text, boxes, texts and scores."""
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


def parse_record(where: str, json_bytes: bytes | None, text_bytes: bytes | None) -> dict[str, Any]:
    """The fields of a `Record` but for the key, from its `.json` and `.txt` (used where the JSON has no caption).

    Raises `BadSample` ("bad json", "bad utf-8", "bad box", "bad score") naming `where`.
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
    return {"captions": captions, "alt_text": alt_text or None, "boxes": boxes, "texts": texts, "scores": scores}


def _decode_text(where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("bad utf-8", where, str(error)) from error


def _parse_json(where: str, data: bytes) -> Mapping[str, Any]:
    text = _decode_text(where, data)
    try:
        record = json.loads(text)
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
        if any(abs(edge) > _FAR for edge in box):
            raise BadSample("bad box", where, f"region {number}: box {box} reaches outside the image [0, 1]")
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
