"""Before and after fine-tuning: the mean and spread over seeds of scores that `opencloc eval --out` wrote.

    python -m benchmarks.finetune_table runs/finetune/flickr8k runs/finetune/coco740 --out results/finetune

Encoders are called NAME or NAME-SEED; those of one NAME are one column, in the order of the files.  A cell is the mean
in percent and, with several seeds, the standard deviation of a seed.  The last columns say how far each NAME is from
the first.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import save, table

KEYS = {
    "region-recognition": ("top1", "macc"),
    "region-retrieval": ("r2t_r1", "r2t_r10", "t2r_r1", "t2r_r10"),
    "grounding": ("acc50", "miou"),
    "image-retrieval": ("i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10"),
    "coco-recognition": ("top1", "macc"),
    "lvis-recognition": ("top1", "macc"),
    "coco-retrieval": ("i2t_r1", "t2i_r1"),
    "refcoco": ("acc50",),
    "refcoco+": ("acc50",),
    "refcocog": ("acc50",),
}
Scores = dict[tuple[str, str, str], dict[str, list[float]]]


def main() -> None:
    """Reads the evaluations, prints the table and writes figures.json and README.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("evaluations", type=Path, nargs="+", help="folders with an evaluation.json")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    scores = read(args.evaluations)
    figures = [
        {"set": place, "task": task, "score": key, "values": values} for (place, task, key), values in scores.items()
    ]
    save(args.out, figures, before_and_after(scores))


def read(folders: list[Path]) -> Scores:
    """(set, task, score) -> name -> values in percent, one for each seed.

    A set is called as its folder.  Raises ValueError where seeds of one name differ in what was scored.
    """
    found: Scores = {}
    for folder in folders:
        results: list[dict[str, Any]] = json.loads((folder / "evaluation.json").read_text())
        seeds: dict[str, set[str]] = {}
        for result in results:
            name = re.sub(r"-\d+$", "", result["encoder"])
            seeds.setdefault(name, set()).add(result["encoder"])
            for key in KEYS.get(result["task"], ()):
                if (score := result["scores"].get(key)) is not None and score["value"] is not None:
                    line = found.setdefault((folder.name, result["task"], score["label"]), {})
                    line.setdefault(name, []).append(100 * score["value"])
        for (place, task, label), line in found.items():
            for name, values in line.items():
                if place == folder.name and len(values) != len(seeds[name]):
                    raise ValueError(f"{folder}: {task} {label} of {name}: {len(values)} of {len(seeds[name])} seeds")
    return found


def before_and_after(scores: Scores) -> str:
    """The table in Markdown."""
    names = list(dict.fromkeys(name for line in scores.values() for name in line))
    rows = []
    for (place, task, label), line in scores.items():
        cells = [_cell(line.get(name)) for name in names]
        gains = [_gain(line.get(names[0]), line.get(name)) for name in names[1:]]
        rows.append([f"{place}, {task.replace('-', ' ')}: {label}", *cells, *gains])
    head = ["%", *names, *(f"{name} − {names[0]}" for name in names[1:])]
    return table(head, rows, align="---:")


def _cell(values: list[float] | None) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _gain(before: list[float] | None, after: list[float] | None) -> str:
    return f"{statistics.fmean(after) - statistics.fmean(before):+.1f}" if before and after else "–"


if __name__ == "__main__":
    main()
