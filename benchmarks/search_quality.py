"""Does an index of regions find more than one of whole photos?

    python -m benchmarks.search_quality --model runs/quickstart/cloc/model --out results/search --data NAME=SPEC ...

Every photo of a source goes into two libraries of the same model, one of regions and one of whole photos.  Asked are
all region texts that belong to at most 10 photos.  A pair (text, photo) counts as found if the photo is among the first
10, and as found with its region if the box shown there has IoU >= 0.5 with one the text belongs to.  Small: all of the
text's boxes in that photo are below 10 % of it.  Then the index of regions is made approximate and asked again.

For scenes it also measures how well "nothing found" tells names that are in a small library from those that are not.
Writes OUT/quality.md and OUT/quality.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import facts, save, table
from benchmarks.presence import auc
from opencloc.boxes import area, pairwise_iou
from opencloc.data.sources.spec import open_source, take
from opencloc.search import store as store_module
from opencloc.search.index import IndexConfig, run_index
from opencloc.search.photos import list_photos
from opencloc.search.query import Found, Library
from opencloc.search.regions import RegionKind

TOP = 10
SMALL = 0.1
FEW = 32  # photos of the library whose names are told from others
Truth = dict[str, dict[str, np.ndarray]]  # text -> path of a photo -> boxes (R, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True, help="NAME=SPEC of sources with named regions")
    parser.add_argument("--num-images", type=int, default=256, help="of a source without an end")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sets = {}
    for one in args.data:
        name, _, spec = one.partition("=")
        sets[name] = measure(spec, args.model, args.num_images)
    figures = facts() | {"model": args.model, "sets": sets}
    save(args.out, figures, page_of(sets), page="quality.md", data="quality.json")


def measure(spec: str, model: str, num_images: int) -> dict[str, Any]:
    """Recalls of both libraries, exact and approximate.  `num_images`: of a source without an end."""
    number = num_images if open_source(spec).size is None else None
    truth, photos = truth_of(spec, number)
    asked = sorted(text for text, where in truth.items() if len(where) <= TOP)
    figures: dict[str, Any] = {"photos": photos, "texts": len(asked)}
    with tempfile.TemporaryDirectory() as folder:
        regions = indexed(spec, model, number, f"{folder}/regions", "grid")
        exact = {text: regions.search(text, top=TOP, exact=True) for text in asked}
        figures["regions"] = recall(exact, truth) | {"stored": regions.store.regions.count_rows()}
        whole = indexed(spec, model, number, f"{folder}/whole", "whole")
        figures["whole photos"] = recall({text: whole.search(text, top=TOP) for text in asked}, truth)
        before, store_module.APPROXIMATE_FROM = store_module.APPROXIMATE_FROM, 0
        try:
            regions.store.tidy()
        finally:
            store_module.APPROXIMATE_FROM = before
        near = {text: regions.search(text, top=TOP) for text in asked}
        figures["regions, approximate"] = recall(near, truth)
        same = [len(photos_of(near[text]) & photos_of(exact[text])) / max(1, len(exact[text].rows)) for text in asked]
        figures["same photos among the first 10"] = float(np.mean(same))
        if spec.startswith("scenes:"):
            figures["nothing found"] = nothing(spec, model, num_images, f"{folder}/few")
    return figures


def truth_of(spec: str, num_images: int | None) -> tuple[Truth, int]:
    """(which boxes of which photos have a text, number of photos)."""
    source = open_source(spec)
    entries = list_photos(spec, num_images).entries
    truth: Truth = defaultdict(dict)
    for number, entry in enumerate(entries):
        sample = source[number]
        for text in set(sample.texts):
            rows = [row for row, other in enumerate(sample.texts) if other == text]
            truth[text][entry.path] = sample.boxes[rows]
    return truth, len(entries)


def indexed(spec: str, model: str, num_images: int | None, out: str, kind: RegionKind) -> Library:
    """A new library of a source."""
    run_index(IndexConfig(photos=(spec,), out=out, model=model, regions=kind, num_images=num_images, device="cpu"))
    return Library.open(out, device="cpu")


def photos_of(found: Found) -> set[str]:
    """Paths of the photos of an answer."""
    return {path for row in found.rows for path in (row.photo, *row.also)}


def recall(answers: dict[str, Found], truth: Truth) -> dict[str, float]:
    """Shares of the pairs (text, photo) that are found, with and without the right region."""
    photo, region, small = list[bool](), list[bool](), list[bool]()
    for text, found in answers.items():
        shown = {path: row.box for row in found.rows for path in (row.photo, *row.also)}
        for path, boxes in truth[text].items():
            box = torch.tensor([shown.get(path, (0.0, 0.0, 0.0, 0.0))])
            photo.append(path in shown)
            region.append(path in shown and bool((pairwise_iou(box, torch.from_numpy(boxes)) >= 0.5).any()))
            small.append(bool((area(boxes) < SMALL).all()))
    found, placed, little = np.array(photo), np.array(region), np.array(small)
    return {
        "pairs": len(found),
        "photo": float(found.mean()),
        "region": float(placed.mean()),
        "small pairs": int(little.sum()),
        "small photo": float(found[little].mean()) if little.any() else float("nan"),
        "small region": float(placed[little].mean()) if little.any() else float("nan"),
    }


def nothing(spec: str, model: str, num_images: int, out: str) -> dict[str, float]:
    """How the probability tells names that are in a library of few scenes from the other names of the same world."""
    few = indexed(spec, model, min(FEW, num_images), out, "grid")
    samples, _ = take(open_source(spec), 20 * num_images)
    there = {text for sample in samples[: len(few)] for text in sample.texts}
    names = sorted({text for sample in samples for text in sample.texts})
    answers = [few.search(name) for name in names]
    is_there = np.array([name in there for name in names])
    found = np.array([not answer.nothing for answer in answers])
    return {
        "photos": len(few),
        "names there": int(is_there.sum()),
        "names not there": int((~is_there).sum()),
        "auc": auc(np.array([answer.presence for answer in answers]), is_there),
        "found, of those there": float(found[is_there].mean()),
        "nothing found, of those not there": float((~found)[~is_there].mean()) if not is_there.all() else float("nan"),
    }


def page_of(sets: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    rows, lines = [], []
    for name, figures in sets.items():
        for kind in ("whole photos", "regions", "regions, approximate"):
            one = figures[kind]
            columns = ("photo", "region", "small photo", "small region")
            rows.append([name, kind, *(f"{100 * one[column]:.1f}" for column in columns)])
        pairs, same = figures["regions"], figures["same photos among the first 10"]
        lines.append(
            f"* {name}: {figures['photos']} photos, {pairs['stored']:,} regions stored, {figures['texts']} texts with "
            f"{pairs['pairs']} pairs, {pairs['small pairs']} of them small. The approximate index shows "
            f"{100 * same:.1f} % of the exact first 10."
        )
        if none := figures.get("nothing found"):
            lines.append(
                f"* Nothing found, in {none['photos']} of these scenes: AUC {none['auc']:.3f}; "
                f"{100 * none['found, of those there']:.0f} % of the {none['names there']} names that are there are "
                f"found, and of the {none['names not there']} that are not "
                f"{100 * none['nothing found, of those not there']:.0f} % are not."
            )
    head = ("", "index of", "photo", "and region", "small: photo", "small: and region")
    text = "Recall@10 in per cent, of pairs (text, photo).\n\n" + table(head, rows, "---:") + "\n"
    return text.replace("|---|---:|", "|---|---|", 1) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
