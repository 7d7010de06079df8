"""Runs the evaluation tasks: samples through an encoder, embeddings into metrics.

This file owns the protocols: what is a query, what is a candidate, what is left out and counted.  The arithmetic is in
`metrics.py`, encoders in `encoders.py`, tables in `report.py`.  One pass over the samples; each image is encoded once,
whatever the number of its boxes and tasks, and each distinct text once per run.

Symbols: B images in a batch, P boxes or texts of one image, E width of the joint embedding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from opencloc.boxes import area, iou
from opencloc.data.sample import Sample
from opencloc.eval import metrics
from opencloc.eval.encoders import Encoder
from opencloc.eval.text_bank import NO_CLASSES, Dtype, TextBank, check_names, inference
from opencloc.texts import canonical

Task = Literal["region_recognition", "region_retrieval", "image_retrieval", "grounding"]
TASKS: tuple[Task, ...] = get_args(Task)

NO_REGIONS = "image without regions"
NO_CAPTIONS = "image without captions"
UNKNOWN_CLASS = "region text is not among the class names"
AMBIGUOUS = "text names several regions of its image"
CANNOT_GROUND = "this encoder cannot ground"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of one encoder.  A task that was not asked for, or had nothing to score, is None.

    `skipped` counts what each task left out, by reason: images, regions or queries as the reason says.
    """

    encoder: str
    images: int
    dtype: Dtype
    region_recognition: metrics.RegionRecognition | None = None
    region_retrieval: metrics.Retrieval | None = None
    image_retrieval: metrics.Retrieval | None = None
    grounding: metrics.Grounding | None = None
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Grounded:
    """One text of an image with the box found for it."""

    text: str
    box: np.ndarray  # (4,) normalised to the image
    truth: np.ndarray  # (4,) the text's own region
    iou: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What an encoder says of one sample: a class name for every region, a box for every unambiguous text."""

    sample: Sample
    names: tuple[str, ...]  # one per region
    correct: tuple[bool, ...]
    grounded: tuple[Grounded, ...]  # empty if the encoder cannot ground


def evaluate(
    encoder: Encoder,
    samples: Iterable[Sample],
    *,
    tasks: Sequence[Task] = TASKS,
    class_names: Sequence[str] | None = None,
    batch_size: int = 32,
    dtype: Dtype = "float32",
    progress: bool = True,
) -> Evaluation:
    """Scores of `encoder` on `samples` for each of `tasks`.

    * `region_recognition`: name each given box among `class_names` (default: the distinct region texts of the samples).
    * `region_retrieval`: every region against all region texts, and back; identical texts are all hits.
    * `image_retrieval`: every image against all captions, and back; all captions of an image are hits.
    * `grounding`: the box of each region text that names one region of its image only.

    `batch_size` counts images.  `dtype` is the autocast type of the encoder; scores are always float32.  `progress`
    draws on stderr, if that is a terminal.  Raises ValueError for an unknown task, a duplicated class name, or if there
    are no samples.
    """
    _check_arguments(tasks, batch_size, dtype)
    names = None if class_names is None else check_names(class_names)
    bank, collected = TextBank(encoder), _Collected()
    if progress:
        total = len(samples) if isinstance(samples, Sized) else None
        console = Console(stderr=True)
        hidden = not console.is_terminal
        samples = track(samples, f"evaluating {encoder.name}", total=total, console=console, disable=hidden)
    with inference(encoder, dtype):
        classes = None if names is None else bank.ids(names)
        for batch in _batches(samples, batch_size):
            _collect(encoder, batch, tasks, bank, collected)
    if not collected.images:
        raise ValueError("no samples to evaluate on")
    return Evaluation(
        encoder=encoder.name, images=collected.images, dtype=dtype, **_score(tasks, classes, bank, collected)
    )


def predict(
    encoder: Encoder, samples: Sequence[Sample], class_names: Sequence[str], *, dtype: Dtype = "float32"
) -> list[Prediction]:
    """The class name of every region and the box of every unambiguous text, for a few samples (to be shown).

    Names that differ in case or spacing only are one class.  Raises ValueError if there is none.
    """
    names = list(dict.fromkeys(map(canonical, class_names)))
    if not names:
        raise ValueError(NO_CLASSES)
    if not samples:
        return []
    with inference(encoder, dtype):
        bank = TextBank(encoder)
        classes = bank.embeddings(bank.ids(names))
        encoded = encoder.encode_images([sample.image for sample in samples])
        regions = encoder.encode_regions(encoded, [sample.boxes for sample in samples])
        queries = [_unambiguous(sample.texts) for sample in samples]
        ids = bank.ids_per_image([[s.texts[row] for row in rows] for s, rows in zip(samples, queries, strict=True)])
        found = encoder.ground(encoded, [bank.embeddings(i) for i in ids])
    predictions = []
    for i, sample in enumerate(samples):
        said = [names[j] for j in metrics.cosines(regions[i], classes).argmax(1).tolist()]
        grounded = []
        if found is not None:
            for row, box in zip(queries[i], found[i].float().cpu(), strict=True):
                truth = sample.boxes[row]
                overlap = iou(box, torch.from_numpy(truth)).item()
                grounded.append(Grounded(text=sample.texts[row], box=box.numpy(), truth=truth, iou=overlap))
        correct = tuple(name == canonical(text) for name, text in zip(said, sample.texts, strict=True))
        predictions.append(Prediction(sample=sample, names=tuple(said), correct=correct, grounded=tuple(grounded)))
    return predictions


def flat_metrics(evaluation: Evaluation) -> dict[str, float]:
    """The headline scores under short keys, in [0, 1]: what `metrics.json` of the quickstart holds.

    `region_top1`, `region_macc`, `i2t_r1`, `t2i_r1`, `ground_acc50`, `ground_miou`; each only if it was measured.
    """
    flat: dict[str, float] = {}
    if (recognition := evaluation.region_recognition) is not None:
        flat |= {"region_top1": recognition.overall.top1, "region_macc": recognition.overall.macc}
    if (images := evaluation.image_retrieval) is not None:
        flat |= {"i2t_r1": images.to_text.r1, "t2i_r1": images.from_text.r1}
    if (boxes := evaluation.grounding) is not None:
        flat |= {"ground_acc50": boxes.acc50, "ground_miou": boxes.mean_iou}
    return flat


# -- the pass over the samples -----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Collected:
    """Everything the metrics need, gathered batch by batch."""

    images: int = 0
    skipped: dict[str, Counter[str]] = field(default_factory=dict)
    image_embeddings: list[Tensor] = field(default_factory=list)  # of images with captions
    caption_pairs: list[tuple[int, int]] = field(default_factory=list)  # (image among those, text id)
    region_embeddings: list[Tensor] = field(default_factory=list)
    region_areas: list[Tensor] = field(default_factory=list)
    region_texts: list[int] = field(default_factory=list)  # text id of each region
    found: list[Tensor] = field(default_factory=list)
    truth: list[Tensor] = field(default_factory=list)

    def skip(self, task: Task, reason: str, count: int = 1) -> None:
        if count:
            self.skipped.setdefault(task, Counter())[reason] += count


def _collect(
    encoder: Encoder, batch: Sequence[Sample], tasks: Sequence[Task], bank: TextBank, collected: _Collected
) -> None:
    """One batch: encode its images once, then what each task needs of them."""
    collected.images += len(batch)
    encoded = encoder.encode_images([sample.image for sample in batch])
    captions = [[caption for caption in sample.captions if caption.strip()] for sample in batch]
    with_regions = [i for i, sample in enumerate(batch) if sample.texts]

    if "image_retrieval" in tasks:
        collected.skip("image_retrieval", NO_CAPTIONS, sum(not of_image for of_image in captions))
        for embedding, ids in zip(encoded.embedding, bank.ids_per_image(captions), strict=True):
            if ids:
                collected.caption_pairs += [(len(collected.image_embeddings), text) for text in ids]
                collected.image_embeddings.append(embedding.float())

    if "region_recognition" in tasks or "region_retrieval" in tasks:
        regions = encoder.encode_regions(encoded, [sample.boxes for sample in batch]) if with_regions else []
        for i in with_regions:
            collected.region_embeddings.append(regions[i].float())
            collected.region_areas.append(torch.from_numpy(area(batch[i].boxes)))
        collected.region_texts += bank.ids(text for i in with_regions for text in batch[i].texts)
    for task in ("region_recognition", "region_retrieval", "grounding"):
        if task in tasks:
            collected.skip(task, NO_REGIONS, len(batch) - len(with_regions))

    if "grounding" in tasks:
        queries = [_unambiguous(sample.texts) for sample in batch]
        num_queries = sum(map(len, queries))
        collected.skip("grounding", AMBIGUOUS, sum(len(sample.texts) for sample in batch) - num_queries)
        if not num_queries:
            return
        ids = bank.ids_per_image([[s.texts[row] for row in rows] for s, rows in zip(batch, queries, strict=True)])
        found = encoder.ground(encoded, [bank.embeddings(i) for i in ids])
        if found is None:
            collected.skip("grounding", CANNOT_GROUND, num_queries)
            return
        for sample, rows, boxes in zip(batch, queries, found, strict=True):
            if rows:
                collected.found.append(boxes.float().cpu())
                collected.truth.append(torch.from_numpy(sample.boxes[rows]))


def _unambiguous(texts: Sequence[str]) -> list[int]:
    """Which of an image's region texts name one region only."""
    count = Counter(map(canonical, texts))
    return [row for row, text in enumerate(texts) if count[canonical(text)] == 1]


# -- from what was gathered to scores ----------------------------------------------------------------------------------


def _score(
    tasks: Sequence[Task], classes: Sequence[int] | None, bank: TextBank, collected: _Collected
) -> dict[str, Any]:
    """The scores of an `Evaluation` and what was skipped; `classes` are numbers in the bank."""
    scores: dict[str, Any] = {}
    if "region_recognition" in tasks and collected.region_texts:
        scores["region_recognition"] = _score_recognition(classes, bank, collected)
    if "region_retrieval" in tasks and collected.region_texts:
        regions = torch.cat(collected.region_embeddings)
        scores["region_retrieval"] = _score_retrieval(regions, list(enumerate(collected.region_texts)), bank)
    if "image_retrieval" in tasks and collected.image_embeddings:
        images = torch.stack(collected.image_embeddings)
        scores["image_retrieval"] = _score_retrieval(images, collected.caption_pairs, bank)
    if "grounding" in tasks and collected.truth:
        scores["grounding"] = metrics.grounding(torch.cat(collected.found), torch.cat(collected.truth))
    return scores | {"skipped": {task: dict(reasons) for task, reasons in collected.skipped.items()}}


def _score_recognition(
    classes: Sequence[int] | None, bank: TextBank, collected: _Collected
) -> metrics.RegionRecognition | None:
    """None where not one region has a text among the class names."""
    ids = sorted(set(collected.region_texts)) if classes is None else classes
    place = {text: label for label, text in enumerate(ids)}
    known = [row for row, text in enumerate(collected.region_texts) if text in place]
    collected.skip("region_recognition", UNKNOWN_CLASS, len(collected.region_texts) - len(known))
    if not known:
        return None
    regions = torch.cat(collected.region_embeddings)[known]
    labels = torch.tensor([place[collected.region_texts[row]] for row in known], device=regions.device)
    areas = torch.cat(collected.region_areas)[known].to(regions.device)
    return metrics.region_recognition(regions, bank.embeddings(ids), labels, areas)


def _score_retrieval(items: Tensor, pairs: Sequence[tuple[int, int]], bank: TextBank) -> metrics.Retrieval:
    """Retrieval between items and the texts they are paired with; `pairs` are (item, number in the bank)."""
    ids = sorted({text for _, text in pairs})
    place = {text: row for row, text in enumerate(ids)}
    rows = torch.tensor([(item, place[text]) for item, text in pairs], device=items.device)
    return metrics.retrieval(items, bank.embeddings(ids), rows)


# -- small things ------------------------------------------------------------------------------------------------------


def _check_arguments(tasks: Sequence[str], batch_size: int, dtype: str) -> None:
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    if not tasks:
        raise ValueError(f"no task given; there are {', '.join(TASKS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be >= 1")
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype is {dtype!r}, must be one of {', '.join(get_args(Dtype))}")


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch
