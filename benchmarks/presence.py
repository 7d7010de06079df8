"""Does the score of `Predictor.ground` tell names that are in an image from names that are not?

    python -m benchmarks.presence --model runs/quickstart/cloc/model --out results/presence

For every scene the names of its things (present) and as many names of the same world that are not in it (absent) are
grounded together.  Beside the score: the parts that it is made of and the cosine with the whole image.  AUC is the
chance that a present name scores above an absent one.

Prints Markdown and writes it to OUT/tables.md, with the figures in OUT/figures.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import opencloc
from benchmarks.common import facts, save, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a CLOC model")
    parser.add_argument("--data", default="scenes:rich?num_things=120&seed=1", help="a source with named regions")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    predictor, source = opencloc.load(args.model), opencloc.open_source(args.data)
    samples = [source[i] for i in range(args.num_images)]
    names = sorted({text for sample in samples for text in sample.texts})
    rng = np.random.default_rng(0)
    present: list[bool] = []
    scores: dict[str, list[float]] = {"score": [], "own box": [], "whole image": []}
    for sample in samples:
        there = list(dict.fromkeys(sample.texts))
        others = [name for name in names if name not in there]
        asked = [*there, *rng.choice(others, min(len(there), len(others)), replace=False).tolist()]
        photo = predictor.encode(sample.image)
        texts = predictor.embed_texts(asked)
        boxes, score = predictor.ground(photo, asked)
        present += [name in there for name in asked]
        scores["score"] += score.tolist()
        scores["own box"] += (predictor.embed(photo, boxes_px=boxes) * texts).sum(-1).tolist()
        scores["whole image"] += (texts @ photo.features.embedding[0]).tolist()

    is_there = np.array(present)
    figures = facts() | {
        "images": len(samples),
        "present": int(is_there.sum()),
        "absent": int((~is_there).sum()),
        "auc": {what: auc(np.array(values), is_there) for what, values in scores.items()},
        "score of present, 5 / 50 / 95 %": np.percentile(np.array(scores["score"])[is_there], (5, 50, 95)).tolist(),
        "score of absent, 5 / 50 / 95 %": np.percentile(np.array(scores["score"])[~is_there], (5, 50, 95)).tolist(),
        "right at 0.5": float(((np.array(scores["score"]) > 0.5) == is_there).mean()),
    }
    count = f"{len(samples)} images, {figures['present']} present names and {figures['absent']} absent ones"
    rows = [[what, f"{value:.3f}"] for what, value in figures["auc"].items()]
    save(args.out, figures, f"{count}\n\n{table(['by', 'AUC'], rows)}", page="tables.md")


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Share of pairs in which the positive scores above the negative, ties counting half."""
    above = torch.from_numpy(scores[positive])[:, None] - torch.from_numpy(scores[~positive])[None]
    return float((above > 0).double().mean() + (above == 0).double().mean() / 2)


if __name__ == "__main__":
    main()
