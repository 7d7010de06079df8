"""The kinds of question: what is a query, what is a candidate, what is a hit.  One function for each kind.

A task is a generator: it takes the batches of one pass over a set and returns its scores when there are no more, so
any number of tasks shares one pass.  Each image is encoded once, whatever the number of its boxes and texts, and each
distinct text once.  Ties always count against the encoder (`metrics.py`).

Symbols: B images in a batch, R boxes, C classes, E width of the joint embedding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from opencloc.eval import metrics
from opencloc.eval.encoders import EncodedImages, Encoder
from opencloc.eval.metrics import Rows, Score, Scorer, by_size
from opencloc.eval.sets.item import (
    BOXES,
    IMAGES,
    NO_CAPTIONS,
    NO_REGIONS,
    TEXTS,
    EvalSet,
    Item,
    Loaded,
    Skipped,
    merge_names,
    pixel_areas,
)
from opencloc.eval.text_bank import TextBank
from opencloc.texts import canonical

UNKNOWN_CLASS = "of none of the classes"
AMBIGUOUS, NO_QUERIES = "naming several regions of their image", "without a text that names one region"
NO_PAIRS, NO_CLAIMS = "without a pair of captions", "without a statement"
GROUPS = ("rare", "common", "frequent", "things", "stuff")  # of classes, in the order of tables
CANNOT_GROUND = "asked of an encoder that cannot ground"


class Batch:
    """Some encoded images of a set."""

    def __init__(self, encoder: Encoder, loaded: Sequence[Loaded], encoded: EncodedImages) -> None:
        self.encoder, self.loaded, self.encoded = encoder, loaded, encoded
        self.numbers = [one.number for one in loaded]
        self.items = [one.item for one in loaded]

    @cached_property
    def regions(self) -> list[Tensor]:
        """The embeddings (R, E) of each image's boxes."""
        boxes = [item.boxes for item in self.items]
        if not any(map(len, boxes)):
            return [self.encoded.embedding[:0].float() for _ in boxes]
        return [rows.float() for rows in self.encoder.encode_regions(self.encoded, boxes)]

    @cached_property
    def segments(self) -> list[Tensor] | None:
        """The embeddings (R, E) of each image's masks; None where there are none, or the encoder takes none."""
        masks = [one.masks() for one in self.loaded]
        found = self.encoder.encode_masks(self.encoded, masks) if any(masks) else None
        return None if found is None else [rows.float() for rows in found]

    def repeat(self, counts: Sequence[int]) -> np.ndarray:
        """The number of each image as often as `counts` says."""
        return np.repeat(np.array(self.numbers), counts)

    def rows_of_boxes(self) -> dict[str, np.ndarray]:
        """For each box the number of its image and its area in pixels."""
        boxes = [item.boxes for item in self.items]
        return {"images": self.repeat([len(of_image) for of_image in boxes]), "areas": self.areas_px(boxes)}

    def areas_px(self, boxes: Sequence[np.ndarray]) -> np.ndarray:
        """Areas of all images' boxes in pixels of the images as they were annotated."""
        return np.concatenate(
            [pixel_areas(rows, one.annotated_px) for rows, one in zip(boxes, self.loaded, strict=True)]
        )


@dataclass(kw_only=True)
class Ask:
    """What a task works with, and what it tells besides its scores."""

    encoder: Encoder
    data: EvalSet
    bank: TextBank
    resamples: int
    skipped: Skipped = field(default_factory=Counter)
    num_images: int = 0  # that had a query
    class_names: tuple[str, ...] = ()  # candidates

    def scorer(self, images: np.ndarray) -> Scorer:
        """The scorer of all queries, by the numbers of their images."""
        self.num_images = len(np.unique(images))
        return Scorer(images, resamples=self.resamples)

    def with_regions(self, batch: Batch) -> list[Item]:
        """The items of a batch that have regions; the others are counted."""
        items = [item for item in batch.items if len(item.boxes)]
        self.skipped[IMAGES, NO_REGIONS] += len(batch.items) - len(items)
        return items


Scores = dict[str, Score]
Task = Callable[[Ask], Generator[None, Batch | None, Scores]]


# -- whole images ------------------------------------------------------------------------------------------------------


def classify_images(ask: Ask) -> Generator[None, Batch | None, Scores]:
    """Name each image among the class names, bare and by the mean over templates if there are any."""
    ask.class_names, templates = ask.data.class_names, ask.data.templates
    ways = {"bare name": ask.bank.of(ask.class_names)}
    if templates:
        ways[f"{len(templates)} templates"] = ask.bank.by_templates(ask.class_names, templates)
    rows = Rows()
    while (batch := (yield)) is not None:
        labels = torch.tensor([item.label for item in batch.items], device=ask.encoder.device)
        embedding = batch.encoded.embedding.float()
        ranks = {way: metrics.class_ranks(embedding, classes, labels) for way, classes in ways.items()}
        rows.add(images=batch.numbers, labels=labels, **ranks)
    if not len(rows):
        return {}
    scorer, images, labels = ask.scorer(rows["images"]), rows["images"], rows["labels"]
    for way in ways:
        key, of = ("", "_templates")[way != "bare name"], f"{len(labels):,} images"
        for k in (1, 5):
            scorer.add(f"top{k}{key}", f"top-{k}, {way}", rows[way] <= k, images, of=of)
        present = f"{len(np.unique(labels)):,} classes present of {len(ask.class_names):,}"
        scorer.add(f"macc{key}", f"mAcc, {way}", rows[way] == 1, images, of=present, cells=labels)
    return scorer.scores


def retrieve_images(ask: Ask) -> Generator[None, Batch | None, Scores]:
    """Every image against all captions, every caption against all images; any caption of an image is a hit."""
    numbers, embeddings, pairs = [], [], []
    while (batch := (yield)) is not None:
        texts = ask.bank.ids_per_image([item.captions for item in batch.items])
        ask.skipped[IMAGES, NO_CAPTIONS] += sum(not of_image for of_image in texts)
        for number, embedding, of_image in zip(batch.numbers, batch.encoded.embedding.float(), texts, strict=True):
            if of_image:
                pairs += [(len(numbers), text) for text in of_image]
                numbers.append(number)
                embeddings.append(embedding)
    if not numbers:
        return {}
    to_text, from_text = _both_ways(torch.stack(embeddings), pairs, ask.bank)
    images = np.array(numbers)
    of_caption = images[[row for row, _ in pairs]]
    scorer = ask.scorer(images)
    scorer.add_recall(to_text, images, key="i2t", label="image to text", what="images", gallery=len(pairs))
    scorer.add_recall(from_text, of_caption, key="t2i", label="text to image", what="captions", gallery=len(images))
    return scorer.scores


def choose_captions(ask: Ask) -> Generator[None, Batch | None, Scores]:
    """Rank each image's true caption above its false one, pair by pair."""
    rows, kinds = Rows(), {}
    while (batch := (yield)) is not None:
        pairs = [item.pairs for item in batch.items]
        ask.skipped[IMAGES, NO_PAIRS] += sum(not of_image for of_image in pairs)
        if not any(pairs):
            continue
        true, false = (_match(ask, batch, [[pair[side] for pair in of_image] for of_image in pairs]) for side in (1, 2))
        labels = [kinds.setdefault(kind, len(kinds)) for of_image in pairs for kind, _, _ in of_image]
        rows.add(images=batch.repeat(list(map(len, pairs))), labels=labels, right=false < true - metrics.TIE)
    if not len(rows):
        return {}
    scorer, images, right, labels = ask.scorer(rows["images"]), rows["images"], rows["right"], rows["labels"]
    scorer.add("top1", "all pairs", right, images, of=f"{len(right):,} pairs")
    scorer.add("macc", "mean over categories", right, images, of=f"{len(kinds)} categories", cells=labels)
    for kind in sorted(kinds):
        inside = labels == kinds[kind]
        scorer.add(f"top1_{kind}", kind, right[inside], images[inside], of=f"{inside.sum():,} pairs")
    return scorer.scores


def judge_claims(ask: Ask) -> Generator[None, Batch | None, Scores]:
    """Rank true statements above false ones, each by its cosine with its own image (area under the ROC curve)."""
    rows = Rows()
    while (batch := (yield)) is not None:
        claims = [item.claims for item in batch.items]
        ask.skipped[IMAGES, NO_CLAIMS] += sum(not of_image for of_image in claims)
        if any(claims):
            cosine = _match(ask, batch, [[text for text, _ in of_image] for of_image in claims])
            true = [is_true for of_image in claims for _, is_true in of_image]
            rows.add(images=batch.repeat(list(map(len, claims))), cosine=cosine, true=true)
    if not len(rows) or rows["true"].all() or not rows["true"].any():
        return {}
    scorer, true = ask.scorer(rows["images"]), rows["true"]
    share = metrics.share_below(*(torch.from_numpy(rows["cosine"][one]) for one in (true, ~true))).numpy()
    of = f"{true.sum():,} true statements against {(~true).sum():,} false ones"
    scorer.add("auc", "AUC", share, rows["images"][true], of=of)
    return scorer.scores


def _match(ask: Ask, batch: Batch, texts: Sequence[Sequence[str]]) -> Tensor:
    """The cosine of each text of each image with its image."""
    counts = torch.tensor([len(of_image) for of_image in texts], device=batch.encoded.embedding.device)
    embedding = batch.encoded.embedding.float().repeat_interleave(counts, 0)
    return (embedding * ask.bank.of(text for of_image in texts for text in of_image)).sum(1)


# -- regions -----------------------------------------------------------------------------------------------------------


def recognise_regions(ask: Ask) -> Generator[None, Batch | None, Scores]:
    """Name each given box among all class names, bare.

    They are those of the set, else the distinct texts of its regions.  Masks are named beside boxes, where the set has
    them and the encoder takes them.
    """
    rows, embeddings, texts = Rows(), [], []
    known, _ = merge_names(ask.data.class_names)
    classes, label_of = ask.bank.of(known), {name: label for label, name in enumerate(known)}
    while (batch := (yield)) is not None:
        if not ask.with_regions(batch):
            continue
        names = [canonical(text) for item in batch.items for text in item.texts]
        regions, places = torch.cat(batch.regions), batch.rows_of_boxes()
        if known:
            inside, images = [row for row, name in enumerate(names) if name in label_of], places["images"]
            ask.skipped[BOXES, UNKNOWN_CLASS] += len(names) - len(inside)
            ask.skipped[IMAGES, UNKNOWN_CLASS] += len(set(images.tolist())) - len(set(images[inside].tolist()))
            if not inside:
                continue
            labels = torch.tensor([label_of[names[row]] for row in inside], device=regions.device)
            ways = {"boxes": batch.regions} | ({} if batch.segments is None else {"masks": batch.segments})
            ranks = {way: metrics.class_ranks(torch.cat(of)[inside], classes, labels) for way, of in ways.items()}
            rows.add(**{name: column[inside] for name, column in places.items()}, labels=labels, **ranks)
        else:  # the classes are known at the end only
            ask.bank.ids(names)
            rows.add(**places)
            embeddings.append(regions)
            texts += names
    if not len(rows):
        return {}
    ask.class_names = known or tuple(dict.fromkeys(texts))
    if known:
        labels, ranks = rows["labels"], {way: rows[way] for way in ("boxes", "masks") if way in rows}
    else:
        label_of = {name: label for label, name in enumerate(ask.class_names)}
        labels = np.array([label_of[name] for name in texts])
        regions = torch.cat(embeddings)
        own = torch.from_numpy(labels).to(regions.device)
        ranks = {"boxes": metrics.class_ranks(regions, ask.bank.of(ask.class_names), own).cpu().numpy()}
    images = rows["images"]
    parts = {"": np.ones(len(images), dtype=bool)} | by_size(rows["areas"])
    if ask.data.class_groups:
        groups = np.array(ask.data.class_groups)[labels]
        parts |= {group: groups == group for group in GROUPS if group in ask.data.class_groups}
    scorer = ask.scorer(images)
    for way, of_way in ranks.items():
        for part, inside in parts.items():
            among = {"what": way, "classes": len(ask.class_names), "parts": (way.removeprefix("boxes"), part)}
            scorer.add_accuracy(of_way[inside] == 1, images[inside], labels[inside], **among)
    return scorer.scores


def recognise_segments(ask: Ask) -> Generator[None, Batch | None, Scores]:
    """Name each segment among all class names, bare, by its box and, where the encoder takes masks, by its mask."""
    return recognise_regions(ask)


def retrieve_regions(ask: Ask) -> Generator[None, Batch | None, Scores]:
    """Every region against all region texts, and back; equal texts are all hits."""
    rows, embeddings, texts = Rows(), [], []
    while (batch := (yield)) is not None:
        if ask.with_regions(batch):
            embeddings += batch.regions
            texts += ask.bank.ids([text for item in batch.items for text in item.texts])
            rows.add(**batch.rows_of_boxes())
    if not len(rows):
        return {}
    both = _both_ways(torch.cat(embeddings), list(enumerate(texts)), ask.bank)
    scorer, images = ask.scorer(rows["images"]), rows["images"]
    for key, label, ranks in zip(("r2t", "t2r"), ("region to text", "text to region"), both, strict=True):
        scorer.add_recall(ranks, images, key=key, label=label, what="regions", gallery=len(texts))
        what = f"regions among {len(texts):,}"
        scorer.add_sizes(f"{key}_r10", f"{label} R@10", ranks <= 10, images, rows["areas"], what=what)
    return scorer.scores


def choose_texts(ask: Ask) -> Generator[None, Batch | None, Scores]:
    """Rank each box's true text among its own false ones."""
    rows, rivals = Rows(), set()
    while (batch := (yield)) is not None:
        if not ask.with_regions(batch):
            continue
        ids = ask.bank.ids_per_image([choices for item in batch.items for choices in item.choices])
        right = []
        for region, choices in zip(torch.cat(batch.regions), ids, strict=True):
            (similarity,) = metrics.cosines(region[None], ask.bank.embeddings(choices))
            right.append(bool((similarity[1:] < similarity[0] - metrics.TIE).all()))
            rivals.add(len(choices) - 1)
        rows.add(**batch.rows_of_boxes(), right=right)
    if not len(rows):
        return {}
    scorer, images, right = ask.scorer(rows["images"]), rows["images"], rows["right"]
    among = f"{min(rivals)}" if len(rivals) == 1 else f"{min(rivals)} to {max(rivals)}"
    scorer.add("top1", "top-1", right, images, of=f"{len(right):,} boxes, each against {among} false texts")
    scorer.add_sizes("top1", "top-1", right, images, rows["areas"], what="boxes")
    return scorer.scores


# -- grounding ---------------------------------------------------------------------------------------------------------


def ground_texts(ask: Ask) -> Generator[None, Batch | None, Scores]:
    """Find the box of each text that names one region of its image; right at plain IoU ≥ 0.5.

    A text with several boxes is right by the any-box protocol if the found box has IoU >= 0.5 with one of them, by the
    merged-box protocol if it has with the box around all of them.  A found box that is empty or not a number is wrong.
    """
    rows = Rows()
    while (batch := (yield)) is not None:
        for item in batch.items:  # of a public set they have queries only
            ask.skipped[TEXTS, AMBIGUOUS] += max(0, len(item.texts) - len(item.queries))
            if not item.queries:
                ask.skipped[IMAGES, NO_QUERIES if item.texts else NO_REGIONS] += 1
        counts = [len(item.queries) for item in batch.items]
        if not sum(counts):
            continue
        ids = ask.bank.ids_per_image([item.queries for item in batch.items])
        found = ask.encoder.ground(batch.encoded, [ask.bank.embeddings(of_image) for of_image in ids])
        if found is None:
            ask.skipped[TEXTS, CANNOT_GROUND] += sum(counts)
            continue
        hulls = [_hulls(item.truths) for item in batch.items]
        any_box, merged = [], []
        for item, boxes, hull in zip(batch.items, found, hulls, strict=True):
            boxes = boxes.cpu()
            any_box += [metrics.overlaps(box, truth).max() for box, truth in zip(boxes, item.truths, strict=True)]
            merged += metrics.overlaps(boxes, hull).tolist()
        several = [len(truth) > 1 for item in batch.items for truth in item.truths]
        areas = batch.areas_px(hulls)
        rows.add(images=batch.repeat(counts), areas=areas, any_box=any_box, merged=merged, several=several)
    if not len(rows):
        return {}
    scorer, images = ask.scorer(rows["images"]), rows["images"]
    threshold = 0.5 - metrics.TIE  # IoUs come from float32 boxes: exactly one half must count as one half
    for key, (label, overlap) in phrase_columns(rows).items():
        hits, of = overlap >= threshold, f"{len(images):,} texts"
        scorer.add(f"acc50{key}", label, hits, images, of=of)
        scorer.add(f"miou{key}", label.replace("IoU ≥ 0.5", "mean IoU"), overlap, images, of=of)
        scorer.add_sizes(f"acc50{key}", label, hits, images, rows["areas"], what="texts")
    return scorer.scores


def phrase_columns(rows: metrics.Rows) -> dict[str, tuple[str, np.ndarray]]:
    """Suffix of a score's key -> (label, overlaps): by any box and the box around all, where phrases have several."""
    if not rows["several"].any():
        return {"": ("IoU ≥ 0.5", rows["any_box"])}
    return {
        "_any": ("IoU ≥ 0.5 with any box", rows["any_box"]),
        "_merged": ("IoU ≥ 0.5 with the box around all", rows["merged"]),
    }


def _hulls(truths: Sequence[np.ndarray]) -> np.ndarray:
    """For each text the box around all of its boxes: (P, 4)."""
    hulls = [np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)]) for boxes in truths]
    return np.array(hulls, dtype=np.float32).reshape(-1, 4)


def _both_ways(items: Tensor, pairs: Sequence[tuple[int, int]], bank: TextBank) -> tuple[np.ndarray, np.ndarray]:
    """`metrics.retrieval_ranks` of items and the texts (numbers in the bank) they are paired with."""
    ids = sorted({text for _, text in pairs})
    place = {text: row for row, text in enumerate(ids)}
    rows = torch.tensor([(item, place[text]) for item, text in pairs], device=items.device)
    to_text, from_text = metrics.retrieval_ranks(items, bank.embeddings(ids), rows)
    return to_text.cpu().numpy(), from_text.cpu().numpy()
