"""A transcript of chats about photos: the first of a source with two names that occur once, mistakes included.

    python -m benchmarks.mllm_transcript --model MODEL --data "coco:../shared/data/coco740?split=test" --out OUT

Every photo is asked for a caption, for the name of its largest such thing (pointed at by its box), for the box of the
second largest, and whether that one and a thing that is not there are there; each question begins a new conversation.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import facts, save
from opencloc import files
from opencloc.data.sample import Sample, encode_image
from opencloc.data.sources.spec import open_source
from opencloc.mllm import templates
from opencloc.mllm.chat import Chat
from opencloc.model.predictor import Predictor

Asked = tuple[str, list[list[float]], str]  # question, boxes in pixels that it points at, what is true


def chosen(source: Any) -> Iterator[tuple[Sample, list[int]]]:
    """The photos that fit, with the numbers of the two largest things among those whose name occurs once."""
    for number in itertools.islice(itertools.count(), source.size):
        sample = source[number]
        sizes = np.prod(sample.boxes[:, 2:] - sample.boxes[:, :2], axis=1)
        once = sorted(templates.occurring_once(sample.texts), key=lambda k: -sizes[k])
        if len(once) >= 2:
            yield sample, once[:2]


def questions(sample: Sample, things: list[int], ask: templates.Questions) -> Iterator[Asked]:
    size = np.array([*sample.image.size] * 2)
    first, second = (sample.texts[k] for k in things)
    absent = ask.absent(sample, random.Random(sample.key), 1)
    yield templates.CAPTION, [], ""
    yield templates.refer(), [(sample.boxes[things[0]] * size).tolist()], first
    yield templates.ground(second), [], whole([sample.boxes[things[1]] * size])
    yield templates.exists(second), [], templates.YES
    for name in absent:
        yield templates.exists(name), [], templates.NO


def whole(boxes: Any) -> str:
    """Boxes in whole pixels."""
    return ", ".join(str(np.round(box).astype(int).tolist()) for box in boxes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a multimodal model")
    parser.add_argument("--data", required=True, help="a source of photos with named boxes")
    parser.add_argument("--num-photos", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for README.md, figures.json and photo-K.jpg")
    arguments = parser.parse_args()
    chat = Chat.from_pretrained(arguments.model, arguments.device)
    source: Any = open_source(arguments.data)
    ask = templates.Questions(templates.names_of(source))
    lines, said = ["# Chats about photos", ""], []
    for photo, (sample, things) in enumerate(itertools.islice(chosen(source), arguments.num_photos), 1):
        boxes, labels = [], []
        lines += [f"## {sample.key}", "", f"![The photo](photo-{photo}.jpg)", ""]
        for text, pointed, truth in questions(sample, things, ask):
            answer = chat.ask(sample.image, text, boxes_px=pointed, max_new_tokens=60)
            name = text.removeprefix("Where is ").rstrip("?")
            boxes += [*pointed, *answer.boxes_px.tolist()]
            labels += ["pointed at"] * len(pointed) + [name] * len(answer.boxes_px)
            shown = text.replace("{region:0}", f"the region {whole(pointed)}")
            at = f", in pixels {whole(answer.boxes_px)}" if len(answer.boxes_px) else ""
            lines.append(f"* {shown} **{answer.text}**{at}" + (f" ({truth})" if truth else ""))
            said.append(
                {"photo": sample.key, "question": text, "boxes_px": pointed, "answer": answer.text, "truth": truth}
            )
        drawn = Predictor.draw(sample.image, boxes, labels)
        files.write_bytes(arguments.out / f"photo-{photo}.jpg", encode_image(drawn, "jpg"))
        lines.append("")
    save(arguments.out, {"facts": facts(), "said": said}, "\n".join(lines))


if __name__ == "__main__":
    main()
