"""`opencloc mllm chat`: the conversation of `chat.py` in a terminal, or of lines from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from opencloc.config import Count, Strict
from opencloc.devices import choose_device
from opencloc.mllm.chat import MAX_NEW_TOKENS, Answer, Chat

HELP = """\
A line is a question. What begins with / is an order:
  /image FILE        another photo, a new conversation
  /box X0 Y0 X1 Y1   points at a box, in pixels of the photo; /point X Y at a point
                     {region:K} in the next question says where it stands, else it comes last
  /new               a new conversation about the same photo
  /quit              ends (so does the end of the input)"""


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Strict):
    """A conversation about a photo."""

    model: str
    """Folder of the model."""
    image: str
    """The photo to begin with."""
    out: str | None = None
    """Folder for a picture of every answer that has boxes: answer-1.png, answer-2.png, ..."""
    max_new_tokens: Count = MAX_NEW_TOKENS
    """Longest answer, in tokens."""
    device: str = "auto"
    """`auto` (cuda if there is one), `cpu`, `cuda`, ..."""


def run_chat(config: ChatConfig, lines: Any = None) -> None:
    """Reads questions line by line and prints each answer, with its boxes in pixels and the picture written.

    `lines`: a text stream, by default the standard input.  Raises ValueError or OSError for a model or a first photo
    that cannot be opened; what is wrong with a later line is said, and the conversation goes on.
    """
    disable_progress_bar()  # transformers' own
    chat = Chat.from_pretrained(config.model, str(choose_device(config.device)))
    lines = lines or sys.stdin
    talk = _Talk(chat, config)
    talk.open(config.image)
    if lines.isatty():
        print(HELP, file=sys.stderr)
    for line in _read(lines):
        if line == "/quit":
            break
        try:
            talk.take(line)
        except (ValueError, TypeError, OSError) as error:
            print(f"opencloc mllm chat: {error}", file=sys.stderr)


class _Talk:
    """What has been pointed at for the next question, and how many pictures there are."""

    def __init__(self, chat: Chat, config: ChatConfig) -> None:
        self._chat, self._config = chat, config
        self._boxes: list[list[float]] = []
        self._points: list[list[float]] = []
        self._pictures = 0

    def open(self, path: str) -> None:
        """A new conversation about a photo."""
        self._chat.open(path)
        self._boxes, self._points = [], []

    def take(self, line: str) -> None:
        """One line: a question or an order."""
        order, _, rest = line.partition(" ")
        orders: dict[str, Callable[[], None]] = {
            "/image": lambda: self.open(rest.strip()),
            "/box": lambda: self._boxes.append(_numbers(rest, 4)),
            "/point": lambda: self._points.append(_numbers(rest, 2)),
            "/new": self._new,
            "/help": lambda: print(HELP, file=sys.stderr),
        }
        if order in orders:
            orders[order]()
        elif order.startswith("/"):
            raise ValueError(f"there is no order {order}; /help lists them")
        else:
            boxes, points = self._boxes, self._points
            self._boxes, self._points = [], []
            limit = self._config.max_new_tokens
            self._show(self._chat.follow_up(line, boxes_px=boxes, points_px=points, max_new_tokens=limit))

    def _new(self) -> None:
        self._chat.restart()
        self._boxes, self._points = [], []

    def _show(self, answer: Answer) -> None:
        print(answer.text, flush=True)
        for label, box in zip(answer.labels, answer.boxes_px, strict=True):
            print(f"  {label or 'box'}: {', '.join(f'{edge:.0f}' for edge in box)}", flush=True)
        for problem, count in answer.unread.items():
            print(f"opencloc mllm chat: a box of the answer can't be read: {problem} ({count})", file=sys.stderr)
        if len(answer.boxes_px) and self._config.out is not None:
            self._pictures += 1
            print(answer.save(Path(self._config.out) / f"answer-{self._pictures}.png"), flush=True)


def _read(lines: Any) -> Iterator[str]:
    """Lines that are not empty, with a prompt where somebody types them."""
    while True:
        if lines.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = lines.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _numbers(text: str, count: int) -> list[float]:
    parts = text.replace(",", " ").split()
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise ValueError(f"{text.strip()!r}: {count} numbers are needed, in pixels")
    return numbers
