"""A conversation about an image: the one form that every data set is read into, and its form on disk.

On disk it lies beside the image, in KEY.json (other fields, `regions` among them, may stand there too):

    {"conversations": [{"role": "user", "text": "What is {region:0}?"},
                       {"role": "assistant", "text": "A dog, at {box:1}."}],
     "prompts": [{"box": [0.1, 0.2, 0.5, 0.9]}, {"point": [0.3, 0.4]}, {"mask": {"size": [H, W], "counts": ...}}]}

`{region:K}` in a question points at prompt K, by its coordinates, by a region token or by both, as the model was built;
`{box:K}` writes the coordinates of prompt K.  Coordinates are in [0, 1] of the image; masks are COCO's run lengths, of
any resolution.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np
from PIL import Image

from opencloc.boxes import box_problem
from opencloc.data.sample import text_problem
from opencloc.errors import BadSample
from opencloc.images import as_mask
from opencloc.model.prompts import Box, Mask, Point

RegionPrompt = Box | Point | Mask

PLACEHOLDER = re.compile(r"\{(region|box):(\d{1,6})\}")
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Turn:
    """What one side says: `role` is `user` or `assistant`."""

    role: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns about one image, user and assistant in turn, the user first.

    `prompts`: what the placeholders in the texts mean, in [0, 1] of the image; a mask's array has any resolution.
    `image` None: about no image, and then nothing can be pointed at.  Raises `BadSample` naming `where` and the reason.
    """

    image: Image.Image | None
    turns: tuple[Turn, ...]
    prompts: tuple[RegionPrompt, ...] = ()
    where: InitVar[str | None] = None  # names the conversation in errors

    def __post_init__(self, where: str | None) -> None:
        problem = self._problem()
        if problem is not None:
            raise BadSample(problem[0], where or "conversation", problem[1])

    def _problem(self) -> tuple[str, str] | None:
        if not self.turns:
            return "conversation without turns", ""
        for number, turn in enumerate(self.turns):
            if turn.role not in ROLES:
                return "unknown role", f"turn {number}: {turn.role!r} is none of {', '.join(ROLES)}"
            if turn.role != ROLES[number % 2]:
                return "roles do not take turns", f"turn {number} is the {turn.role}'s"
            if turn.role == "assistant" and not turn.text.strip():
                return "empty answer", f"turn {number}"
            for kind, index in PLACEHOLDER.findall(turn.text):
                if int(index) >= len(self.prompts):
                    detail = f"turn {number}: {{{kind}:{index}}}, there are {len(self.prompts)} prompts"
                    return "placeholder without a prompt", detail
                if kind == "region" and turn.role == "assistant":
                    return "region placeholder in an answer", f"turn {number}: answers name boxes by {{box:{index}}}"
        if self.prompts and self.image is None:
            return "prompts without an image", f"{len(self.prompts)} prompts"
        for number, prompt in enumerate(self.prompts):
            if detail := prompt_problem(prompt):
                return "bad prompt", f"prompt {number}: {detail}"
        return text_problem(*(turn.text for turn in self.turns))


def prompt_problem(prompt: RegionPrompt) -> str | None:
    """What is wrong with a prompt in [0, 1] of its image, or None if it is sound."""
    if isinstance(prompt, Box):
        return box_problem(np.array([prompt.x0, prompt.y0, prompt.x1, prompt.y1], dtype=np.float64))
    if isinstance(prompt, Point):
        sound = math.isfinite(prompt.x) and math.isfinite(prompt.y) and 0 <= prompt.x <= 1 and 0 <= prompt.y <= 1
        return None if sound else f"point [{prompt.x}, {prompt.y}] reaches outside the image [0, 1]"
    try:
        array = np.asarray(prompt.mask)
        as_mask(array, *(array.shape if array.ndim == 2 else (0, 0)))
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def parse_conversation(record: Mapping[str, Any], image: Image.Image | None, where: str) -> Conversation:
    """The conversation of a record's `conversations` and `prompts`.  Raises `BadSample` naming `where`."""
    turns, prompts = record.get("conversations"), record.get("prompts") or []
    if not isinstance(turns, list) or not isinstance(prompts, list):
        raise BadSample("bad json", where, "conversations and prompts are lists")
    said = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(name), str) for name in ("role", "text")):
            raise BadSample("bad json", where, f"turn {number} needs a role and a text: {str(turn)[:100]}")
        said.append(Turn(turn["role"], turn["text"]))
    pointed = tuple(_prompt(prompt, f"{where}: prompt {number}") for number, prompt in enumerate(prompts))
    return Conversation(image=image, turns=tuple(said), prompts=pointed, where=where)


def conversation_record(conversation: Conversation) -> dict[str, Any]:
    """The fields of which `parse_conversation` makes the same conversation."""
    prompts: list[dict[str, Any]] = []
    for prompt in conversation.prompts:
        if isinstance(prompt, Box):
            prompts.append({"box": [prompt.x0, prompt.y0, prompt.x1, prompt.y1]})
        elif isinstance(prompt, Point):
            prompts.append({"point": [prompt.x, prompt.y]})
        else:
            prompts.append({"mask": encode_rle(np.asarray(prompt.mask))})
    return {"conversations": [{"role": t.role, "text": t.text} for t in conversation.turns], "prompts": prompts}


def _prompt(prompt: Any, where: str) -> RegionPrompt:
    kind: str = ""
    value: Any = None
    if isinstance(prompt, dict) and len(prompt) == 1:
        kind, value = next(iter(prompt.items()))
    if kind == "mask":
        return Mask(decode_rle(value, where))
    lengths = {"box": 4, "point": 2}
    numbers = isinstance(value, list) and all(type(v) in (int, float) and abs(v) < 1e6 for v in value)
    if kind not in lengths or not numbers or len(value) != lengths[kind]:
        raise BadSample("bad prompt", where, f"needs a box, a point or a mask: {str(prompt)[:100]}")
    return Box(*map(float, value)) if kind == "box" else Point(*map(float, value))


# -- COCO's run lengths ------------------------------------------------------------------------------------------------


def decode_rle(rle: Any, where: str) -> np.ndarray:
    """The mask (H, W) of COCO's run lengths, as a list or in its compressed text.  Raises `BadSample`."""
    size, counts = (rle.get("size"), rle.get("counts")) if isinstance(rle, dict) else (None, None)
    if not isinstance(size, list) or len(size) != 2 or not all(type(s) is int and 0 < s <= 16384 for s in size):
        raise BadSample("bad mask", where, f"needs a size [height, width]: {str(size)[:60]}")
    counts: Any = _uncompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(counts, list) or not all(type(c) is int and c >= 0 for c in counts):
        raise BadSample("bad mask", where, "counts are whole numbers, or COCO's text of them")
    height, width = size
    if sum(counts) != height * width:
        raise BadSample("bad mask", where, f"run lengths of {sum(counts)} pixels for {height} x {width}")
    runs = np.zeros(len(counts), dtype=bool)
    runs[1::2] = True
    return np.repeat(runs, counts).reshape(width, height).T.copy()  # column by column


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths of a mask (H, W), not compressed."""
    flat = np.asarray(mask, dtype=bool).T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
    return {"size": list(mask.shape), "counts": ([0, *counts] if flat[0] else counts)}


def _uncompressed(text: str) -> Sequence[int] | None:
    """Run lengths of COCO's text: five bits a character, low ones first, from the third on as differences."""
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts if shift == 0 else None
