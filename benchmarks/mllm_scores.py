"""What a multimodal model of the study, or its language model, is asked about scenes, and how answers are scored."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from opencloc.boxes import Letterbox, iou
from opencloc.mllm import templates
from opencloc.mllm.boxes_text import find_boxes
from opencloc.mllm.conversation import Conversation, Turn
from opencloc.model.prompts import Box

LENGTHS = {"refer": 8, "ground": 16, "exists": 3, "caption": 60}  # most tokens of an answer
AT_ONCE = 64  # conversations answered together
GOOD_IOU = 0.5

Answer = Callable[[Sequence[Any], Sequence[Any], int], list[str]]  # samples, conversations, most tokens -> answers


def score(answer: Answer, source: Any, num_images: int) -> dict[str, float]:
    """Shares of right answers about the first scenes of a source; every question is a conversation of its own.

    `of some thing`: of the boxes, those with IoU >= 0.5 with any thing of the scene.
    """
    ask = templates.Questions(templates.names_of(source))
    right: dict[str, list[float]] = {}
    asked = [one for number in range(num_images) for one in _questions(source[number], random.Random(number), ask)]
    for kind, length in LENGTHS.items():
        own = [one for one in asked if one[0] == kind]
        for first in range(0, len(own), AT_ONCE):
            part = own[first : first + AT_ONCE]
            answers = answer(
                [sample for _, sample, _, _ in part], [conversation for _, _, conversation, _ in part], length
            )
            for (_, sample, _, truth), text in zip(part, answers, strict=True):
                for name, value in _values(kind, text, sample, truth, ask.names).items():
                    right.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in right.items()}


def _questions(sample: Any, rng: random.Random, ask: Any) -> list[tuple[str, Any, Any, Any]]:
    """(kind, sample, conversation, what is right) for every question about a scene."""

    def asking(kind: str, text: str, truth: Any, *prompts: Any) -> tuple[str, Any, Any, Any]:
        return kind, sample, Conversation(image=sample.image, turns=(Turn("user", text),), prompts=prompts), truth

    asked = [asking("caption", templates.CAPTION, None)]
    if only := templates.occurring_once(sample.texts):
        k = only[rng.randrange(len(only))]
        text = sample.texts[k]
        asked.append(asking("refer", templates.refer(), text, Box(*map(float, sample.boxes[k]))))
        asked.append(asking("ground", templates.ground(text), k))
        asked.append(asking("exists", templates.exists(text), templates.YES))
        asked += [asking("exists", templates.exists(name), templates.NO) for name in ask.absent(sample, rng, 1)]
    return asked


def _values(kind: str, answer: str, sample: Any, truth: Any, names: Sequence[str]) -> dict[str, float]:
    """What an answer adds to the shares."""
    if kind == "refer":
        return {"refer": squeezed(answer) == squeezed(truth)}
    if kind == "exists":
        return {"exists": answer == truth, "said yes": answer == templates.YES}
    if kind == "ground":
        letterbox = Letterbox(width_px=sample.image.width, height_px=sample.image.height)
        boxes = torch.from_numpy(letterbox.to_square(sample.boxes))
        found = find_boxes(answer).boxes
        overlaps = iou(boxes.new_tensor(found[0]).expand_as(boxes), boxes) if found else boxes.new_zeros(len(boxes))
        return {
            "boxes read": bool(found),
            "ground": float(overlaps[truth]) >= GOOD_IOU,
            "of some thing": float(overlaps.max()) >= GOOD_IOU,
            "mean IoU": float(overlaps[truth]),
        }
    said = {name for name in names if f" {squeezed(name)} " in f" {squeezed(answer)} "}
    there = set(sample.texts)
    both = len(said & there)
    return {"caption recall": both / len(there), "caption precision": both / max(1, len(said))}


def squeezed(text: str) -> str:
    """Words alone, one space between them."""
    return " ".join(text.replace(",", " ").replace(".", " ").split())
