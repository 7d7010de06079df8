"""Chat about a photo: questions that point at regions, answers with boxes in pixels.

    chat = Chat.from_pretrained("runs/mllm/model")
    answer = chat.ask("dogs.jpg", "What is {region:0}?", boxes_px=[[10, 20, 200, 180]])
    print(answer.text, answer.boxes_px)
    print(chat.follow_up("Where is the ball?").boxes_px)

The photo is encoded once, for all turns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image

from opencloc import files
from opencloc.boxes import Letterbox, clipped_px
from opencloc.data.sample import encode_image
from opencloc.images import as_array, as_mask, open_image
from opencloc.mllm.answers import Answerer, Features
from opencloc.mllm.boxes_text import find_boxes
from opencloc.mllm.conversation import PLACEHOLDER, Conversation, RegionPrompt, Turn
from opencloc.model.predictor import Predictor
from opencloc.model.prompts import Box, Mask, Point

MAX_NEW_TOKENS = 256
_BRACKET = re.compile(r"\[[^\[\]]*\]")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said.

    `text`: to the letter, boxes in it as it writes them; `boxes_px`: those boxes (P, 4), XYXY in pixels of the photo;
    `labels`: the words before each; `unread`: what looks like a box and is none, by reason.
    """

    text: str
    boxes_px: Float32[np.ndarray, "P 4"]
    labels: tuple[str, ...]
    unread: dict[str, int]
    image: Image.Image

    def draw(self) -> Image.Image:
        """A copy of the photo with the boxes and their labels."""
        return Predictor.draw(self.image, self.boxes_px, self.labels)

    def save(self, path: str | Path) -> Path:
        """Writes the picture of `draw`, which appears when it is complete; .jpg, .png or .webp."""
        path = Path(path)
        kind = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}.get(path.suffix.lower())
        if kind is None:
            raise ValueError(f"{path}: a picture is written as .jpg, .png or .webp")
        files.write_bytes(path, encode_image(self.draw(), kind))  # pyright: ignore[reportArgumentType]
        return path


class Chat:
    """A conversation with a model about one photo at a time.

    `ask` begins a new one, `follow_up` goes on; when either fails, the conversation stays as it was.  Regions are
    numbered through the conversation, boxes before points before masks of one turn; `{region:K}` in a question points
    at region K.  Where a turn brings regions and its text names none, they are put behind it.
    """

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self.turns: tuple[Turn, ...] = ()
        self.prompts: tuple[RegionPrompt, ...] = ()
        self.image: Image.Image | None = None
        self._features: Features | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> Chat:
        """The chat with the model of a folder that `opencloc mllm build` or training wrote."""
        return cls(Answerer.from_pretrained(folder, device))

    def ask(
        self,
        image: Any,
        text: str,
        *,
        boxes_px: Any = (),
        points_px: Any = (),
        masks: Iterable[Any] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> Answer:
        """The answer to a first question about an image: anything that `opencloc.images.open_image` takes.

        Raises ValueError for a region outside the image and a placeholder without one.
        """
        before = self.turns, self.prompts, self.image, self._features
        self.open(image)
        try:
            return self.follow_up(
                text, boxes_px=boxes_px, points_px=points_px, masks=masks, max_new_tokens=max_new_tokens
            )
        except BaseException:
            self.turns, self.prompts, self.image, self._features = before
            raise

    def open(self, image: Any) -> None:
        """Encodes an image and begins a new conversation about it, in which nothing is said yet."""
        photo = open_image(image)
        self._features = self.answerer.encode([Conversation(image=photo, turns=(Turn("user", "?"),))])
        self.image = photo
        self.restart()

    def restart(self) -> None:
        """Begins a new conversation about the same image."""
        self.turns, self.prompts = (), ()

    def follow_up(
        self,
        text: str,
        *,
        boxes_px: Any = (),
        points_px: Any = (),
        masks: Iterable[Any] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> Answer:
        """The answer to a further question about the same image.  Raises as `ask`, and ValueError before any image."""
        if self.image is None:
            raise ValueError("there is no image yet: begin with ask(image, text)")
        if not text.strip():
            raise ValueError("the question is empty")
        new = _prompts(self.image, boxes_px, points_px, masks)
        if new and not PLACEHOLDER.search(text):
            text = " ".join([text.strip(), *(f"{{region:{len(self.prompts) + i}}}" for i in range(len(new)))])
        prompts = (*self.prompts, *new)
        asked = Conversation(
            image=self.image, turns=(*self.turns, Turn("user", text)), prompts=prompts, where="question"
        )
        (said,) = self.answerer.answer([asked], max_new_tokens, self._features)
        said_then = Turn("assistant", said or "...")  # a conversation has no empty answers
        self.turns, self.prompts = (*asked.turns, said_then), prompts
        return read_answer(said, self.image)


def read_answer(text: str, image: Image.Image) -> Answer:
    """A model's text about an image with its boxes in pixels."""
    found = find_boxes(text)
    letterbox = Letterbox(width_px=image.width, height_px=image.height)
    square = np.array(found.boxes, dtype=np.float32).reshape(-1, 4)
    size = np.array([image.width, image.height] * 2, dtype=np.float32)
    labels, last = [], 0
    for match in _BRACKET.finditer(text):
        if find_boxes(match[0]).boxes:
            words = re.split(r"[.,;:!?\n]", text[last : match.start()])[-1].split()
            labels.append(" ".join(words[-4:]))
            last = match.end()
    return Answer(
        text=text,
        boxes_px=letterbox.to_image(square) * size,
        labels=tuple(labels),
        unread=dict(found.problems),
        image=image,
    )


def _prompts(image: Image.Image, boxes_px: Any, points_px: Any, masks: Iterable[Any]) -> tuple[RegionPrompt, ...]:
    """Boxes, points and masks in pixels as prompts in [0, 1] of the image."""
    width, height = image.size
    size = np.array([width, height], dtype=np.float64)
    prompts: list[RegionPrompt] = []
    for box in clipped_px(_rows(boxes_px, 4, "boxes_px"), width, height):
        prompts.append(Box(*(box / np.tile(size, 2)).tolist()))
    for point in _rows(points_px, 2, "points_px"):
        if not ((point >= 0) & (point <= size)).all():
            raise ValueError(f"point {point.tolist()} does not lie in the image of {width} x {height} pixels")
        prompts.append(Point(*(point / size).tolist()))
    prompts += [Mask(as_mask(mask, height, width)) for mask in masks]  # pyright: ignore[reportArgumentType]
    return tuple(prompts)


def _rows(values: Any, count: int, what: str) -> np.ndarray:
    """Rows of `count` numbers each, from any array, tensor or list."""
    array = as_array(values if isinstance(values, Sequence | np.ndarray) or hasattr(values, "detach") else list(values))
    if array.size == 0:
        return np.zeros((0, count))
    if array.dtype.kind not in "iuf" or array.ndim != 2 or array.shape[1] != count:
        raise ValueError(f"{what} are rows of {count} numbers, not {values!r}"[:300])
    return array.astype(np.float64)
