"""The tasks by name: how each public set is read, and which question is asked of it.

A location of a public set is `PATH?key=value&key=value`; the keys are the reader's keyword arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opencloc.eval import tasks
from opencloc.eval.sets import (
    captions,
    coco,
    flickr_entities,
    grit,
    imagenet,
    open_images,
    panoptic,
    refcoco,
    statements,
)
from opencloc.eval.sets.item import EvalSet

SOURCE_TASKS: dict[str, tasks.Task] = {  # on any source of the project
    "region-recognition": tasks.recognise_regions,
    "region-retrieval": tasks.retrieve_regions,
    "image-retrieval": tasks.retrieve_images,
    "grounding": tasks.ground_texts,
}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A public set: how its files are read and what is asked of them."""

    read: Callable[..., EvalSet]
    task: tasks.Task

    @property
    def help(self) -> str:
        """What is read, in one line."""
        return (self.read.__doc__ or "").splitlines()[0]


BENCHMARKS: dict[str, Benchmark] = {
    "imagenet": Benchmark(read=imagenet.imagenet, task=tasks.classify_images),
    "imagenet-v2": Benchmark(read=imagenet.imagenet_v2, task=tasks.classify_images),
    "coco-retrieval": Benchmark(read=captions.coco_retrieval, task=tasks.retrieve_images),
    "flickr30k-retrieval": Benchmark(read=captions.flickr30k_retrieval, task=tasks.retrieve_images),
    "sugarcrepe": Benchmark(read=statements.sugarcrepe, task=tasks.choose_captions),
    "vsr": Benchmark(read=statements.vsr, task=tasks.judge_claims),
    "coco-recognition": Benchmark(read=coco.coco_recognition, task=tasks.recognise_regions),
    "coco-panoptic": Benchmark(read=panoptic.coco_panoptic, task=tasks.recognise_segments),
    "lvis-recognition": Benchmark(read=coco.lvis_recognition, task=tasks.recognise_regions),
    "open-images-recognition": Benchmark(read=open_images.open_images_recognition, task=tasks.recognise_regions),
    "grit-retrieval": Benchmark(read=grit.grit_retrieval, task=tasks.retrieve_regions),
    "fg-ovd": Benchmark(read=coco.fg_ovd, task=tasks.choose_texts),
    "refcoco": Benchmark(read=refcoco.refcoco, task=tasks.ground_texts),
    "refcoco+": Benchmark(read=refcoco.refcoco_plus, task=tasks.ground_texts),
    "refcocog": Benchmark(read=refcoco.refcocog, task=tasks.ground_texts),
    "flickr30k-entities": Benchmark(read=flickr_entities.flickr30k_entities, task=tasks.ground_texts),
}
TASKS: dict[str, tasks.Task] = SOURCE_TASKS | {name: one.task for name, one in BENCHMARKS.items()}


def task_name(text: str) -> str:
    """The task called `text`, in which underscores stand for hyphens.  Raises ValueError for an unknown one."""
    if (name := text.replace("_", "-")) not in TASKS:
        raise ValueError(f"unknown task {text!r}; there are {', '.join(TASKS)}")
    return name


def open_set(task: str, location: str) -> EvalSet:
    """The public set of a task at `PATH?key=value&...`.

    Raises ValueError for an unknown task, key or value, FileNotFoundError for files that are not there.
    """
    if task not in BENCHMARKS:
        raise ValueError(f"unknown task {task!r}; there are {', '.join(BENCHMARKS)}")
    return read_set(BENCHMARKS[task].read, task, location)


def read_set(read: Callable[..., EvalSet], task: str, location: str) -> EvalSet:
    """What `read` makes of `PATH?key=value&...`; the keys are its keyword arguments.  Raises as `open_set`."""
    path, _, query = location.partition("?")
    known = {name: p for name, p in inspect.signature(read).parameters.items() if p.kind is p.KEYWORD_ONLY}
    options: dict[str, Any] = {}
    for part in query.split("&") if query else ():
        key, equals, text = part.partition("=")
        if not equals or key not in known or key in options:
            raise ValueError(f"{task}={location}: {part!r} is not one of {', '.join(f'{k}=...' for k in known)}, once")
        options[key] = _value(f"{task}={location}", key, text, str(known[key].annotation))
    return read(path.rstrip("/") or "/", **options)


def _value(where: str, key: str, text: str, annotation: str) -> str | int:
    if "int" not in annotation:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{where}: {key} is {text!r}, must be a whole number >= 1")
    return int(text)
