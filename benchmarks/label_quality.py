"""How good labels are, against human boxes: precision and recall of sidecars.

    python -m benchmarks.label_quality --data "coco:../shared/data/coco740?split=train" \\
        --labels nouns=runs/vesl/nouns/vesl n-grams=runs/vesl/n-grams/vesl --out results/vesl
    python -m benchmarks.label_quality --data shards:../shared/data/flickr8k/val \\
        --labels nouns=runs/vesl/flickr8k/vesl --out results/vesl/flickr8k

In each image, regions take human boxes, best score first: each takes the free box it overlaps most, if their IoU is at
least 0.5.  Precision is the share of regions that got a box; recall is the share of boxes that were taken.

On COCO's classes: `box` counts any box.  `box and text` counts only boxes whose class the region text stands for (by
its last words, see examples/yolox_detector.py).  `named` recall leaves out boxes whose class no phrase of the caption
stands for, which no detector that is asked for phrases could find.  Crowd annotations are left out, as everywhere.

Where people named their boxes in free phrases (any other source): of the regions that got a box, the share whose text
is that box's phrase, and the share whose last word is the phrase's.

Prints Markdown and writes it to OUT/quality.md, with the figures in OUT/quality.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import save, table
from examples.yolox_detector import COCO_CLASSES, class_of_phrase
from opencloc import files
from opencloc.boxes import pairwise_iou
from opencloc.data.sidecar import read_labels, sidecar_path, stats_path
from opencloc.data.sources.coco import Coco
from opencloc.data.sources.spec import open_source
from opencloc.errors import BadSample
from opencloc.texts import canonical
from opencloc.vesl.phrases import extract_phrases

MIN_IOU = 0.5


def match(boxes: np.ndarray, allowed: np.ndarray, human: np.ndarray) -> np.ndarray:
    """(R,) number of the human box that each region takes, or -1; regions (R, 4) come best first.

    `allowed` (R, H): which pairs may match.
    """
    overlap = pairwise_iou(torch.from_numpy(boxes), torch.from_numpy(human)).numpy() * allowed
    taken = np.full(len(boxes), -1)
    free = np.ones(len(human), dtype=bool)
    for region in range(len(boxes)):
        if len(human) and (best := overlap[region] * free).max() >= MIN_IOU:
            taken[region] = best.argmax()
            free[taken[region]] = False
    return taken


def phrases_asked(photos: Coco, name: str) -> int:
    """How many phrases the detector was asked for in all, from the statistics beside the sidecars."""
    paths = files.glob(stats_path(sidecar_path(photos.instances_path, name, 0)).replace("-00000.", "-*."))
    return sum(json.loads(files.read_bytes(path))["phrases"] for path in paths)


def quality(photos: Coco, name: str) -> dict[str, float]:
    """Precision and recall of the labels `name`, and what they are like."""
    labels = read_labels(photos.instances_path, name)
    counts = dict.fromkeys(("regions", "boxes", "named", "box", "box and text", "named and found"), 0)
    words = failed = 0
    for index in range(photos.size):
        sample = photos[index]
        row = labels[sample.key]
        failed += row.error is not None
        human = np.array([COCO_CLASSES.index(text) for text in sample.texts], dtype=int)
        order = np.argsort(-row.scores, kind="stable")
        own = np.array([_class_number(row.texts[i]) for i in order], dtype=int)
        same = own[:, None] == human[None]
        named = np.isin(human, [_class_number(phrase) for phrase in extract_phrases(row.caption or "", 1000)])
        right = match(row.boxes[order], same, sample.boxes)
        counts["regions"] += len(own)
        counts["boxes"] += len(human)
        counts["named"] += int(named.sum())
        counts["box"] += int((match(row.boxes[order], np.ones_like(same), sample.boxes) >= 0).sum())
        counts["box and text"] += int((right >= 0).sum())
        counts["named and found"] += int(named[right[right >= 0]].sum())
        words += sum(len(text.split()) for text in row.texts)
    return {
        "images": photos.size,
        "failed": failed,
        "regions": counts["regions"],
        "regions per image": counts["regions"] / photos.size,
        "phrases per image": phrases_asked(photos, name) / photos.size,
        "words per text": words / max(1, counts["regions"]),
        "precision (box)": counts["box"] / max(1, counts["regions"]),
        "recall (box)": counts["box"] / counts["boxes"],
        "precision (box and text)": counts["box and text"] / max(1, counts["regions"]),
        "recall (box and text)": counts["box and text"] / counts["boxes"],
        "recall (named)": counts["named and found"] / max(1, counts["named"]),
        "human boxes": counts["boxes"],
        "human boxes named": counts["named"],
    }


def phrase_quality(data: str, labels: str) -> dict[str, float]:
    """Precision and recall of the labels, and how often they say what people said."""
    human, labelled = open_source(data), open_source(f"{data}?sidecar={labels}")
    counts = dict.fromkeys(("failed", "regions", "boxes", "box", "phrase", "last word"), 0)
    for index in range(human.size or 0):
        theirs = human[index]
        counts["boxes"] += len(theirs.texts)
        try:
            ours = labelled[index]
        except BadSample:
            counts["failed"] += 1
            continue
        counts["regions"] += len(ours.texts)
        order = np.argsort(np.zeros(0) if ours.scores is None else -ours.scores, kind="stable")
        taken = match(ours.boxes[order], np.ones((len(order), len(theirs.texts))), theirs.boxes)
        pairs = [
            (canonical(ours.texts[region]), canonical(theirs.texts[box]))
            for region, box in zip(order, taken, strict=True)
            if box >= 0
        ]
        counts["box"] += len(pairs)
        counts["phrase"] += sum(a == b for a, b in pairs)
        counts["last word"] += sum(a.split()[-1] == b.split()[-1] for a, b in pairs)
    return {
        "images": human.size or 0,
        "failed": counts["failed"],
        "regions": counts["regions"],
        "human boxes": counts["boxes"],
        "precision (box)": counts["box"] / max(1, counts["regions"]),
        "recall (box)": counts["box"] / counts["boxes"],
        "same phrase, of these": counts["phrase"] / max(1, counts["box"]),
        "same last word, of these": counts["last word"] / max(1, counts["box"]),
    }


def _class_number(text: str) -> int:
    found = class_of_phrase(text)
    return -1 if found is None else found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table with one column per set of labels."""
    names = [name for name in rows[0] if name != "labels"]
    shown = [[f"{row[n]:.3f}" if isinstance(row[n], float) else f"{row[n]:,}" for row in rows] for n in names]
    head = ["", *(str(row["labels"]) for row in rows)]
    return table(head, ([name, *cells] for name, cells in zip(names, shown, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", required=True, help="source with human boxes: coco:DIR?split=train, shards:DIR")
    parser.add_argument("--labels", nargs="+", required=True, help="TITLE=FOLDER/NAME of sidecars")
    parser.add_argument("--out", type=Path, required=True, help="folder for quality.md and quality.json")
    arguments = parser.parse_args()
    photos = open_source(arguments.data)
    rows: list[dict[str, Any]] = []
    for entry in arguments.labels:
        title, _, name = entry.partition("=")
        found = quality(photos, name) if isinstance(photos, Coco) else phrase_quality(arguments.data, name)
        rows.append({"labels": title, **found})
    save(arguments.out, rows, markdown(rows), page="quality.md", data="quality.json")


if __name__ == "__main__":
    main()
