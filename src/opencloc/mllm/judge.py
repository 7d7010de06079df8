"""Ferret-Bench: answers as its files have them, and a judge that compares them with the reference answers.

The judge is a language model behind an OpenAI-compatible server.  It is told what is in the image, the question and
both answers, and gives each answer points from 1 to 10.  Scores of different judges, and of different wordings of what
they are told, don't compare: the results name both.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from opencloc import files
from opencloc.boxes import Letterbox
from opencloc.chat_server import ChatServer, NoAnswer
from opencloc.config import Strict
from opencloc.errors import BadSample, redacted
from opencloc.mllm.boxes_text import find_boxes
from opencloc.model.prompts import Box

FERRET_SCALE = 1000  # its answers name places by whole numbers of this, of the image
_BRACKET = re.compile(r"\s*\[[^\[\]]*\]")
_POINTS = re.compile(r"\s*(\d+(?:\.\d+)?)(?:\s*,\s*|\s+)(\d+(?:\.\d+)?)\s*")
_ABOUT = {
    "refer_caption": "asks about a region of an image. Rate whether each answer speaks of the right place, ",
    "refer_reason": "asks about a region of an image. Rate whether each answer speaks of the right place, ",
    "ground_conv": "asks for the places of things in an image. Rate how well each answer's boxes fit the things they "
    "are said to hold (an edge may be off by up to 20 % of the box without loss, more is to cost the more), ",
}


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(Strict):
    """Who judges the answers of Ferret-Bench."""

    judge: str | None = None
    """`http://HOST:PORT/v1`: an OpenAI-compatible server.  Without one the answers are written and not judged."""
    judge_model: str | None = None
    """The model's name on that server; None: the only one it has."""
    judge_concurrency: int = 8
    """Questions to the judge at a time."""
    judge_timeout_s: float = 120.0
    """Seconds that the judge has for one answer."""
    judge_retries: int = 6
    """How often a question is repeated after a failure that may pass."""
    judge_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.judge_concurrency < 1 or self.judge_retries < 0 or not self.judge_timeout_s > 0:
            raise ValueError("judge_concurrency must be >= 1, judge_retries >= 0 and judge_timeout_s > 0")
        if self.judge is not None and not self.judge.startswith(("http://", "https://")):
            raise ValueError(f"judge is the address of a server, http://HOST:PORT/v1, not {self.judge!r}")
        if self.judge is not None and (redacted(self.judge) != self.judge or "?" in self.judge):
            raise ValueError(
                f"judge {redacted(self.judge)} must hold no password or key: put the key into the environment variable "
                f"{self.judge_key_env} (another name: --judge-key-env)"
            )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question with the answer to be judged, all in Ferret-Bench's own form."""

    question_id: int
    category: str
    image: str  # file name
    question: str
    context: str
    reference: str
    answer: str  # boxes as whole numbers of 1000


class Judge:
    """A judge that can be asked about many cases at a time.  Raises `ServerError` where the server can't be used."""

    def __init__(self, config: JudgeConfig) -> None:
        assert config.judge is not None, "without a server nobody judges"
        self._config = config
        self._server = ChatServer(
            "judge",
            config.judge,
            config.judge_model,
            model_option="--judge-model",
            api_key_env=config.judge_key_env,
            timeout_s=config.judge_timeout_s,
            retries=config.judge_retries,
        )
        self.name = self._server.model

    def points(self, cases: Sequence[Case], instructions: Sequence[str]) -> list[tuple[float, float] | BadSample]:
        """(points of the reference, points of the answer) of each case; a `BadSample` where the judge gave none.

        `instructions`: what the judge is told to do with each case.
        """
        pool = ThreadPoolExecutor(self._config.judge_concurrency)
        try:
            return list(pool.map(self._one, cases, instructions))
        finally:
            pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Closes the connections."""
        self._server.close()

    def _one(self, case: Case, instruction: str) -> tuple[float, float] | BadSample:
        system = "You check the quality of answers, helpfully and precisely."
        messages = [{"role": "system", "content": system}, {"role": "user", "content": judged_text(case, instruction)}]
        where = f"question {case.question_id}"
        try:
            said = self._server.ask(messages, 1024)
        except NoAnswer as error:
            return BadSample("judge refused the question" if error.refused else "judge failed", where, str(error))
        return read_points(said) or BadSample("judge gave no points", where, said[:200])


def judged_text(case: Case, instruction: str) -> str:
    """What the judge reads: context, question, reference and answer in the order of Ferret-Bench."""
    return (
        f"[Context]\n{case.context}\n\n[Question]\n{case.question}\n\n"
        f"[Assistant 1]\n{case.reference}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer_for_judge(case.answer, case.category)}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{instruction}\n\n"
    )


def default_instruction(category: str) -> str:
    """What the judge is told where the set's own `rule.json` is not at hand: the same demands in other words."""
    return (
        f"Two AI assistants answered the question above. It {_ABOUT[category]}"
        "and how helpful, relevant, accurate and detailed it is. The context lists what is in the image: objects, "
        "relationships and region descriptions, with boxes as (x1, y1, x2, y2), left, top, right and bottom, from 0 to "
        "1 of the image. Give each assistant an overall score from 1 to 10; higher is better.\n"
        "Write first a single line that holds only two numbers, the scores of Assistant 1 and Assistant 2, with a "
        "space between them. Then explain your rating on the next line, without bias: the order of the answers must "
        "not matter."
    )


def instructions(location: str) -> dict[str, str]:
    """What the judge is told, by category: of `rule.json` in the set's folder where it lies there, else our own words.

    Raises ValueError naming the file where it is not what Ferret publishes.
    """
    own = {category: default_instruction(category) for category in _ABOUT}
    path = f"{location}/rule.json"
    if not files.exists(path):
        return own
    try:
        rules = json.loads(files.read_text(path))
        # its rules call refer_caption refer_desc, as its question files do
        return {c: rules["refer_desc" if c == "refer_caption" else c]["prompt"] for c in own}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not Ferret-Bench's rules ({error!r})") from None


def read_points(said: str) -> tuple[float, float] | None:
    """The two numbers of a judge's first line, or None where it holds anything else or points outside [1, 10]."""
    match = _POINTS.fullmatch(said.strip().partition("\n")[0])
    points = (float(match[1]), float(match[2])) if match else None
    return points if points and all(1 <= value <= 10 for value in points) else None


# -- Ferret's forms ----------------------------------------------------------------------------------------------------


def pointed_question(question: str) -> tuple[str, tuple[Box, ...]]:
    """(the question with `{region:K}` for each box, the boxes in [0, 1] of the image) of a question of Ferret-Bench.

    Its boxes are four decimals from 0 to 1; what reaches over an edge, as annotations do, is cut.
    """
    boxes: list[Box] = []

    def place(match: re.Match[str]) -> str:
        numbers = match[0].strip(" []").split(",")
        try:
            x0, y0, x1, y1 = (min(max(float(number), 0.0), 1.0) for number in numbers)
        except ValueError:
            return match[0]
        if x0 >= x1 or y0 >= y1:
            return match[0]
        boxes.append(Box(x0, y0, x1, y1))
        return f"{match[0][: len(match[0]) - len(match[0].lstrip())]}{{region:{len(boxes) - 1}}}"

    return _BRACKET.sub(place, question), tuple(boxes)


def ferret_answer(answer: str, letterbox: Letterbox) -> str:
    """An answer of ours, with the boxes of the square as Ferret writes them: whole numbers of 1000 of the image."""

    def place(match: re.Match[str]) -> str:
        found = find_boxes(match[0]).boxes
        if not found:
            return match[0]
        box = letterbox.to_image(np.array(found[0]))
        return f" [{', '.join(str(int(FERRET_SCALE * float(edge))) for edge in box)}]"

    return _BRACKET.sub(place, answer).strip()


def answer_for_judge(answer: str, category: str) -> str:
    """The answer without boxes, or for ground_conv with boxes from 0 to 1, as Ferret's script shows it to the judge."""
    if category != "ground_conv":
        return _BRACKET.sub("", answer)

    def place(match: re.Match[str]) -> str:
        numbers = match[0].strip(" []").split(",")
        if len(numbers) != 4 or not all(number.strip().isdecimal() for number in numbers):
            return ""  # of no use as a place
        return f" [{', '.join(f'{int(number) / FERRET_SCALE:.3f}' for number in numbers)}]"

    return _BRACKET.sub(place, answer).strip()


def answers_file(cases: Sequence[Case]) -> str:
    """Answers as JSON lines of Ferret's own evaluation: `question_id`, `image_path`, `prompt`, `text`."""
    rows = (
        {"question_id": c.question_id, "image_path": os.path.basename(c.image), "prompt": c.question, "text": c.answer}
        for c in cases
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
