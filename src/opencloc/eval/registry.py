"""The evaluation sets by name: which reader and which protocol each task takes.

A location is `PATH?key=value&key=value`; the keys are the reader's keyword arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opencloc.eval import protocols
from opencloc.eval.sets import captions, coco, flickr_entities, grit, imagenet, refcoco
from opencloc.eval.sets.item import EvalSet


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One task: how its files are read and what is done with them."""

    read: Callable[..., EvalSet[Any]]
    protocol: protocols.Protocol

    @property
    def help(self) -> str:
        """What is read, in one line."""
        return (self.read.__doc__ or "").splitlines()[0]


BENCHMARKS: dict[str, Benchmark] = {
    "imagenet": Benchmark(read=imagenet.imagenet, protocol=protocols.classify),
    "imagenet-v2": Benchmark(read=imagenet.imagenet_v2, protocol=protocols.classify),
    "coco-retrieval": Benchmark(read=captions.coco_retrieval, protocol=protocols.retrieve_images),
    "flickr30k-retrieval": Benchmark(read=captions.flickr30k_retrieval, protocol=protocols.retrieve_images),
    "coco-recognition": Benchmark(read=coco.coco_recognition, protocol=protocols.recognise),
    "lvis-recognition": Benchmark(read=coco.lvis_recognition, protocol=protocols.recognise),
    "grit-retrieval": Benchmark(read=grit.grit_retrieval, protocol=protocols.retrieve_regions),
    "fg-ovd": Benchmark(read=coco.fg_ovd, protocol=protocols.choose),
    "refcoco": Benchmark(read=refcoco.refcoco, protocol=protocols.ground),
    "refcoco+": Benchmark(read=refcoco.refcoco_plus, protocol=protocols.ground),
    "refcocog": Benchmark(read=refcoco.refcocog, protocol=protocols.ground),
    "flickr30k-entities": Benchmark(read=flickr_entities.flickr30k_entities, protocol=protocols.ground),
}


def open_set(task: str, location: str) -> EvalSet[Any]:
    """The evaluation set of a task at `PATH?key=value&...`.

    Raises ValueError for an unknown task, key or value, FileNotFoundError for files that are not there.
    """
    if task not in BENCHMARKS:
        raise ValueError(f"unknown task {task!r}; there are {', '.join(BENCHMARKS)}")
    path, _, query = location.partition("?")
    read = BENCHMARKS[task].read
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
