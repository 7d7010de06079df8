"""Runs an encoder over an evaluation set: what is a query, what is a candidate, what is a hit.

One pass over the images; each is decoded and encoded once, whatever the number of its boxes and texts, and each
distinct text once.  Region tasks keep one rank per box, not the embeddings.  The arithmetic of ranks is `metrics.py`'s,
that of intervals `scores.py`'s; the sets come from `sets/`.

Ties always count against the encoder, as in `metrics.py`.

Symbols: B images in a batch, R boxes, C classes, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text
from torch import Tensor

from opencloc.boxes import iou
from opencloc.eval import metrics
from opencloc.eval.encoders import EncodedImages, Encoder
from opencloc.eval.scores import SIZES, Score, Scorer, size_words, sizes_of
from opencloc.eval.sets.item import EvalSet, Unread, load, pixel_areas
from opencloc.eval.text_bank import Dtype, TextBank, check_names, inference, template_embeddings

CANNOT_GROUND = "this encoder cannot ground"
Scores = dict[str, Score]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Scores of one encoder on one evaluation set, with their denominators and what was left out."""

    encoder: str
    task: str  # name of the set
    rules: str
    images: int  # that were scored
    dtype: Dtype
    scores: dict[str, Score]  # empty where the encoder cannot do the task
    left_out: dict[str, int]  # annotations and images, by reason


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a set is run."""

    batch_size: int = 32
    dtype: Dtype = "float32"
    resamples: int = 1000  # draws of the bootstrap
    max_missing: float = 0.01  # share of images that may be unreadable
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some encoded images of a set."""

    numbers: list[int]  # of their items
    items: list[Any]
    images: list[Image.Image]
    encoded: EncodedImages


class Pass:
    """The one pass over a set: iterating it encodes the images batch by batch."""

    def __init__(self, encoder: Encoder, data: EvalSet[Any], settings: Settings) -> None:
        self.encoder, self.data, self.settings = encoder, data, settings
        self.bank = TextBank(encoder)
        self.unread = Unread(allowed=int(settings.max_missing * len(data.items)))
        self.num_images = 0

    def __iter__(self) -> Iterator[Batch]:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            _Rate(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(),
        )
        hidden = not (self.settings.progress and console.is_terminal)
        with Progress(*columns, console=console, disable=hidden, expand=True) as progress:
            bar = progress.add_task(f"{self.data.name}: {self.encoder.name}", total=len(self.data.items))
            for loaded in load(self.data.items, self.settings.batch_size, self.unread):
                numbers, images = [number for number, _ in loaded], [image for _, image in loaded]
                self.num_images += len(images)
                encoded = self.encoder.encode_images(images)
                items = [self.data.items[number] for number in numbers]
                yield Batch(numbers=numbers, items=items, images=images, encoded=encoded)
                progress.update(bar, completed=numbers[-1] + 1)

    def scorer(self, images: np.ndarray) -> Scorer:
        return Scorer(images, resamples=self.settings.resamples)


Protocol = Callable[[Pass], Scores]


def run(encoder: Encoder, data: EvalSet[Any], protocol: Protocol, settings: Settings) -> Result:
    """The result of one of the protocols below.

    Raises ValueError when more than `settings.max_missing` of the images cannot be read, or none can.
    """
    one_pass = Pass(encoder, data, settings)
    with inference(encoder, settings.dtype):
        scores = protocol(one_pass)
    left_out = data.left_out | one_pass.unread.reasons
    if not one_pass.num_images:
        raise ValueError(f"{data.name}: no image could be read ({dict(left_out)})")
    if protocol is ground and not scores:
        left_out = left_out | {CANNOT_GROUND: sum(len(item.texts) for item in data.items)}
    return Result(
        encoder=encoder.name,
        task=data.name,
        rules=data.rules,
        images=one_pass.num_images if scores else 0,
        dtype=settings.dtype,
        scores=scores,
        left_out=left_out,
    )


# -- whole images ------------------------------------------------------------------------------------------------------


def classify(one_pass: Pass) -> Scores:
    """Zero-shot classification of images by their bare class names, and by the mean over templates if there are any."""
    data, encoder = one_pass.data, one_pass.encoder
    ways = {"bare name": one_pass.bank.embeddings(one_pass.bank.ids(check_names(data.class_names)))}
    if data.templates:
        ways[f"{len(data.templates)} templates"] = template_embeddings(encoder, data.class_names, data.templates)
    images, labels, ranks = _Column(), _Column(), {way: _Column() for way in ways}
    for batch in one_pass:
        truth = torch.tensor([item.label for item in batch.items], device=encoder.device)
        images.add(batch.numbers)
        labels.add(truth)
        for way, classes in ways.items():
            ranks[way].add(metrics.class_ranks(batch.encoded.embedding.float(), classes, truth))
    scorer = one_pass.scorer(images.array)
    for way, column in ranks.items():
        key, of = ("", "_templates")[way != "bare name"], f"{len(labels.array):,} images"
        for k in (1, 5):
            scorer.add(f"top{k}{key}", f"top-{k}, {way}", column.array <= k, images.array, of=of)
        present = f"{len(np.unique(labels.array)):,} classes present of {len(data.class_names):,}"
        hits = column.array == 1
        scorer.add(f"macc{key}", f"mAcc, {way}", hits, images.array, of=present, cells=labels.array)
    return scorer.scores


def retrieve_images(one_pass: Pass) -> Scores:
    """Recall between images and captions, both ways."""
    numbers, embeddings, texts = [], [], []
    for batch in one_pass:
        numbers += batch.numbers
        embeddings.append(batch.encoded.embedding.float())
        texts += one_pass.bank.ids_per_image([item.captions for item in batch.items])
    pairs = [(row, text) for row, of_image in enumerate(texts) for text in of_image]
    found = _both_ways(torch.cat(embeddings), pairs, one_pass.bank)
    images = np.array(numbers)
    of_caption = images[[row for row, _ in pairs]]
    scorer = one_pass.scorer(images)
    scorer.add_recall(found.to_text, images, key="i2t", label="image to text", what="images", gallery=len(pairs))
    scorer.add_recall(
        found.from_text, of_caption, key="t2i", label="text to image", what="captions", gallery=len(images)
    )
    return scorer.scores


# -- regions -----------------------------------------------------------------------------------------------------------


def recognise(one_pass: Pass) -> Scores:
    """Naming given boxes among all class names: top-1 over boxes and mean over classes, by size and class group."""
    data, device = one_pass.data, one_pass.encoder.device
    classes = one_pass.bank.embeddings(one_pass.bank.ids(check_names(data.class_names)))
    images, labels, areas, ranks = _Column(), _Column(), _Column(), _Column()
    for batch in one_pass:
        regions = one_pass.encoder.encode_regions(batch.encoded, [item.boxes for item in batch.items])
        truth = np.concatenate([item.labels for item in batch.items])
        images.add(_repeat(batch.numbers, [len(item.boxes) for item in batch.items]))
        labels.add(truth)
        areas.add(np.concatenate([item.areas_px for item in batch.items]))
        ranks.add(metrics.class_ranks(torch.cat(regions).float(), classes, torch.from_numpy(truth).to(device)))
    scorer, hits = one_pass.scorer(images.array), ranks.array == 1
    parts = {"": np.ones(len(hits), dtype=bool)}
    sizes = sizes_of(areas.array)
    parts |= {size_words(size): sizes == i for i, size in enumerate(SIZES)}
    if data.class_groups:
        groups = np.array(data.class_groups)[labels.array]
        parts |= {group: groups == group for group in ("rare", "common", "frequent")}
    for part, inside in parts.items():
        candidates = len(data.class_names)
        scorer.add_accuracy(
            hits[inside], images.array[inside], labels.array[inside], what="boxes", classes=candidates, part=part
        )
    return scorer.scores


def retrieve_regions(one_pass: Pass) -> Scores:
    """Recall between the regions of all images and their texts, both ways."""
    images, areas, embeddings, texts = _Column(), _Column(), [], []
    for batch in one_pass:
        embeddings += one_pass.encoder.encode_regions(batch.encoded, [item.boxes for item in batch.items])
        texts += one_pass.bank.ids([text for item in batch.items for text in item.texts])
        images.add(_repeat(batch.numbers, [len(item.boxes) for item in batch.items]))
        areas.add(_areas_px(batch, [item.boxes for item in batch.items]))
    found = _both_ways(torch.cat(embeddings).float(), list(enumerate(texts)), one_pass.bank)
    scorer, sizes, count = one_pass.scorer(images.array), sizes_of(areas.array), len(texts)
    for key, label, ranks in (("r2t", "region to text", found.to_text), ("t2r", "text to region", found.from_text)):
        scorer.add_recall(ranks, images.array, key=key, label=label, what="regions", gallery=count)
        for i, size in enumerate(SIZES):
            inside = sizes == i
            of = f"{inside.sum():,} regions among {count:,}"
            name = f"{label} R@10, {size_words(size)}"
            scorer.add(f"{key}_r10_{size}", name, ranks[inside] <= 10, images.array[inside], of=of)
    return scorer.scores


def choose(one_pass: Pass) -> Scores:
    """Each box's true text against its own false ones."""
    images, areas, ranks, rivals = _Column(), _Column(), [], []
    for batch in one_pass:
        regions = one_pass.encoder.encode_regions(batch.encoded, [item.boxes for item in batch.items])
        of_boxes = [choices for item in batch.items for choices in item.choices]
        ids = one_pass.bank.ids_per_image(of_boxes)
        for region, choices in zip(torch.cat(regions).float(), ids, strict=True):
            (similarity,) = metrics.cosines(region[None], one_pass.bank.embeddings(choices))
            ranks.append(1 + int((~(similarity[1:] < similarity[0] - metrics.TIE)).sum()))
            rivals.append(len(choices) - 1)
        images.add(_repeat(batch.numbers, [len(item.boxes) for item in batch.items]))
        areas.add(_areas_px(batch, [item.boxes for item in batch.items]))
    scorer, rank, sizes = one_pass.scorer(images.array), np.array(ranks), sizes_of(areas.array)
    numbers = sorted(set(rivals))
    among = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    scorer.add("top1", "top-1", rank == 1, images.array, of=f"{len(rank):,} boxes, each against {among} false texts")
    for i, size in enumerate(SIZES):
        inside = sizes == i
        of = f"{inside.sum():,} boxes"
        scorer.add(f"top1_{size}", f"top-1, {size_words(size)}", rank[inside] == 1, images.array[inside], of=of)
    return scorer.scores


# -- grounding ---------------------------------------------------------------------------------------------------------


def ground(one_pass: Pass) -> Scores:
    """Finding the box of each text; none for an encoder that cannot.

    A text with several boxes is right by the any-box protocol if the found box has IoU >= 0.5 with one of them, by the
    merged-box protocol if it has with the box around all of them.  A found box that is empty or not a number is wrong.
    """
    images, areas, any_box, merged = _Column(), _Column(), _Column(), _Column()
    several = any(len(truth) > 1 for item in one_pass.data.items for truth in item.truths)
    for batch in one_pass:
        ids = one_pass.bank.ids_per_image([item.texts for item in batch.items])
        found = one_pass.encoder.ground(batch.encoded, [one_pass.bank.embeddings(of_image) for of_image in ids])
        if found is None:
            return {}
        hulls = [np.stack([_hull(truth) for truth in item.truths]) for item in batch.items]
        for item, boxes, hull in zip(batch.items, found, hulls, strict=True):
            boxes = boxes.double().cpu()
            any_box.add([float(_overlap(box, truth).max()) for box, truth in zip(boxes, item.truths, strict=True)])
            merged.add(_overlap(boxes, hull))
        images.add(_repeat(batch.numbers, [len(item.texts) for item in batch.items]))
        areas.add(_areas_px(batch, hulls))
    scorer, sizes, of = one_pass.scorer(images.array), sizes_of(areas.array), f"{len(areas.array):,} texts"
    threshold = 0.5 - metrics.TIE  # IoUs come from float32 boxes: exactly one half must count as one half
    columns = {"": ("IoU ≥ 0.5", any_box.array)}
    if several:
        columns = {"_any": ("IoU ≥ 0.5 with any box", any_box.array), "_merged": ("IoU ≥ 0.5 with all", merged.array)}
    for key, (label, overlap) in columns.items():
        hits = overlap >= threshold
        scorer.add(f"acc50{key}", label, hits, images.array, of=of)
        scorer.add(f"miou{key}", label.replace("IoU ≥ 0.5", "mean IoU"), overlap, images.array, of=of)
        for i, size in enumerate(SIZES):
            inside = sizes == i
            name = f"{label}, {size_words(size)}"
            scorer.add(f"acc50{key}_{size}", name, hits[inside], images.array[inside], of=f"{inside.sum():,} texts")
    return scorer.scores


def _overlap(found: Tensor, truth: np.ndarray) -> np.ndarray:
    """Plain IoU of boxes, broadcasting; 0 where the found box is empty or not a number."""
    overlap = iou(found, torch.from_numpy(truth).double())
    unsound = (found[..., 2:] <= found[..., :2]).any(-1)
    return torch.where(unsound | overlap.isnan(), 0.0, overlap).numpy()


def _hull(boxes: np.ndarray) -> np.ndarray:
    """The box around all of them (K, 4)."""
    return np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])


# -- small things ------------------------------------------------------------------------------------------------------


class _Column:
    """Values of the queries, gathered batch by batch."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def add(self, values: Tensor | np.ndarray | Sequence[float]) -> None:
        self._parts.append(values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values))

    @property
    def array(self) -> np.ndarray:
        return np.concatenate(self._parts) if self._parts else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class _Ranks:
    """Ranks of both directions of retrieval: one per item, one per pair of item and text."""

    to_text: np.ndarray
    from_text: np.ndarray


def _both_ways(items: Tensor, pairs: Sequence[tuple[int, int]], bank: TextBank) -> _Ranks:
    """Ranks between items and the texts (numbers in the bank) they are paired with; see `metrics.retrieval`."""
    ids = sorted({text for _, text in pairs})
    place = {text: row for row, text in enumerate(ids)}
    rows = torch.tensor([(item, place[text]) for item, text in pairs], device=items.device)
    texts = bank.embeddings(ids)
    times = torch.bincount(rows[:, 1], minlength=len(ids))
    to_text = metrics.best_hit_ranks(items, texts, rows, weights=times)
    from_text = metrics.best_hit_ranks(texts, items, rows.flip(1))
    return _Ranks(to_text=to_text.cpu().numpy(), from_text=from_text[rows[:, 1]].cpu().numpy())


def _repeat(numbers: Sequence[int], times: Sequence[int]) -> np.ndarray:
    return np.repeat(np.array(numbers), times)


def _areas_px(batch: Batch, boxes: Sequence[np.ndarray]) -> np.ndarray:
    """Areas in pixels of the stored image, of all boxes of the batch."""
    return np.concatenate([pixel_areas(rows, image.size) for rows, image in zip(boxes, batch.images, strict=True)])


class _Rate(ProgressColumn):
    """Images per second."""

    def render(self, task: Any) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "")
