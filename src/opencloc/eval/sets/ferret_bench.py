"""Ferret-Bench (You et al. 2023): open questions on regions of COCO's photos, each with a reference answer."""

from __future__ import annotations

from opencloc.data.sources.coco_json import field_of
from opencloc.eval.sets.item import EvalSet, Item, Stored, first_file, first_folder
from opencloc.eval.sets.pope import read_json_lines

CATEGORIES = ("refer_caption", "refer_reason", "ground_conv")


def ferret_bench(location: str, *, category: str = "refer_reason", images: str | None = None) -> EvalSet:
    """The questions of `CATEGORY/question.jsonl` (refer_caption, refer_reason, ground_conv), by image.

    `answer.jsonl` beside it has the reference answers, `context.jsonl` what a judge is told of each image.  Regions
    stand in the questions as `[x0, y0, x1, y1]`, 0 to 1 of the image.  `images` has COCO's `val2017`.
    """
    if category not in CATEGORIES:
        raise ValueError(f"ferret-bench: the category is {category!r}, must be one of {', '.join(CATEGORIES)}")
    folder_of = f"{location}/{category}"
    paths = {name: first_file([f"{folder_of}/{name}.jsonl"], "") for name in ("question", "answer", "context")}
    rows = {name: read_json_lines(path) for name, path in paths.items()}
    contexts = {
        _of(paths["context"], i, row, "image"): _of(paths["context"], i, row, "text")
        for i, row in enumerate(rows["context"])
    }
    references = {
        field_of(paths["answer"], f"line {i + 1}, answer", row, "question_id", int): _of(
            paths["answer"], i, row, "text"
        )
        for i, row in enumerate(rows["answer"])
    }
    asked: dict[str, list[tuple[int, str]]] = {}
    for i, row in enumerate(rows["question"]):
        number = field_of(paths["question"], f"line {i + 1}, question", row, "question_id", int)
        image = _of(paths["question"], i, row, "image")
        if number not in references or image not in contexts:
            what = "an answer" if number not in references else f"a context of {image}"
            raise ValueError(f"{paths['question']}, line {i + 1}: question {number} is without {what}")
        asked.setdefault(image, []).append((number, _of(paths["question"], i, row, "text")))
    folders = [images] if images else [f"{location}/val2017", f"{location}/images", location]
    folder = first_folder(folders, list(asked))
    items = [
        Item(
            image=Stored(path=f"{folder}/{image}"),
            questions=tuple(text for _, text in of_image),
            answers=tuple(references[number] for number, _ in of_image),
            question_ids=tuple(number for number, _ in of_image),
            context=contexts[image],
        )
        for image, of_image in asked.items()
    ]
    return EvalSet(name=category, items=items, num_items=len(items))


def _of(path: str, row_number: int, row: dict, name: str) -> str:
    return field_of(path, f"line {row_number + 1}, entry", row, name, str)
