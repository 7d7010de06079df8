"""Tables and pictures of the study's runs.

    python -m benchmarks.study_report --runs runs/study --out results/study

Reads every OUT/VARIANT-SEED/result.json that is there, so it may be called while the study runs.  Writes table.md (laid
out like the paper's Table 2), differences.md (pairs of rows, seed by seed), curves.png and, from the model of `cross`,
examples.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.study import SETS
from benchmarks.study_variants import NOISE, WORLDS, Variant, variants

COLUMNS = (  # heading, set, score
    ("i2t R@1", "seen", "i2t_r1"),
    ("t2i R@1", "seen", "t2i_r1"),
    ("top-1", "seen", "region_top1"),
    ("mAcc", "seen", "region_macc"),
    ("mAcc, unseen combinations", "unseen combinations", "region_macc"),
    ("Acc@0.5", "seen", "ground_acc50"),
    ("Acc@0.5, unseen combinations", "unseen combinations", "ground_acc50"),
)
METHODS = ("cross", "roi", "encoder", "clip_crops", "clip")
COMPARED = (  # pairs of rows, in every world and with all labels where both have runs
    ("cross", "roi"),
    ("cross", "clip_crops_same_time"),
    ("cross", "clip_crops"),
    ("cross", "encoder"),
    ("cross", "pool"),
    ("cross", "clip"),
    ("cross_robust", "cross"),
    ("roi_robust", "roi"),
    ("cross_robust", "roi_robust"),
    ("cross_robust", "clip_crops_same_time"),
    ("from_clip_cross", "from_clip_pool"),
    ("from_clip_cross", "from_clip_pool_cross"),
    ("from_clip_cross", "cross"),
    ("from_clip_long_cross", "from_clip_long_pool"),
    ("from_clip_long_cross", "from_clip_long_pool_cross"),
)
COLOURS = dict(zip(METHODS, ("#c0392b", "#2471a3", "#7d3c98", "#b9770e", "#707b7c"), strict=True))
PICTURES = 6


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the table: a variant, or for a CLIP one of its ways to embed a region."""

    variant: Variant
    way: str  # to embed a region
    runs: list[dict[str, Any]]  # one per seed
    cost: float | None  # CPU seconds of a step, where they were measured

    @property
    def title(self) -> str:
        """Of the method, the time it had and the way to embed a region."""
        time = " at the CPU time of cross" if self.variant.like else ""
        return self.variant.title + time + ("" if self.way == "prompter" else f", {self.way}")

    def values(self, where: str, score: str) -> list[float]:
        """The score of every seed that has it."""
        found = [run["final"][self.way][where].get(score) for run in self.runs]
        return [value for value in found if value is not None]

    def mean(self, where: str, score: str) -> float | None:
        values = self.values(where, score)
        return statistics.fmean(values) if values else None


def read_lines(runs: Path) -> list[Line]:
    """The rows of the table for which there is at least one run."""
    costs = json.loads(path.read_text()) if (path := runs / "costs.json").exists() else {}
    lines = []
    for variant in variants():
        method = max((name for name in costs if variant.name.startswith(name)), key=len, default=None)
        results = [json.loads(path.read_text()) for path in sorted(runs.glob(f"{variant.name}-[0-9]*/result.json"))]
        ways = dict.fromkeys(way for result in results for way in result["final"])
        cost = costs[method] if method is not None and variant.group not in ("start", "ablation", "labels") else None
        lines += [Line(variant=variant, way=way, runs=results, cost=cost) for way in ways]
    return lines


def table(lines: Sequence[Line]) -> str:
    """The table in Markdown: mean ± standard deviation over seeds, in %; the difference to `cross` with labels as noisy
    is taken seed by seed.
    """
    head = ["", *(heading for heading, _, _ in COLUMNS), "mAcc less cross", "CPU s per step", "steps", "seeds"]
    defaults = [line for line in lines if line.variant.name.startswith("cross") and not line.variant.fields]
    cross = {(line.variant.world, line.variant.noise): line for line in defaults}
    rows = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    group = ""
    for line in lines:
        if line.variant.group != group:
            group = line.variant.group
            rows.append(f"| **{group}** |" + " |" * (len(head) - 1))
        cells = [line.title, *(spread(line.values(where, score)) for _, where, score in COLUMNS)]
        against = cross.get((line.variant.world, line.variant.noise))
        cells.append("" if against in (None, line) else spread(paired_differences(line, against), sign="+"))
        cost = "–" if line.cost is None else f"{line.cost:.2f}"
        steps = "/".join(dict.fromkeys(str(run["steps"]) for run in line.runs))
        rows.append("| " + " | ".join([*cells, cost, steps, str(len(line.runs))]) + " |")
    return "\n".join(rows) + "\n"


def paired_differences(line: Line, other: Line, where: str = "seen", score: str = "region_macc") -> list[float]:
    """The score of `line` less that of `other`, of every seed both have: same seed, same scenes in the same order."""
    theirs = {run["seed"]: run["final"][other.way][where].get(score) for run in other.runs}
    ours = {run["seed"]: run["final"][line.way][where].get(score) for run in line.runs}
    both = [(ours[seed], theirs[seed]) for seed in sorted(ours) if seed in theirs]
    return [mine - its for mine, its in both if mine is not None and its is not None]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation in %."""
    if not values:
        return "–"
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):{sign}.1f}{deviation}"


def differences(lines: Sequence[Line]) -> str:
    """Pairs of rows in Markdown: the differences of all seeds, and in how many of them the first is ahead."""
    first = {line.variant.name: line for line in reversed(lines)}  # of a CLIP's ways the first, crop
    suffixes = ("", *(f"_{noise.replace(' ', '_')}" for noise in NOISE if noise != "noisy"), "_pairs")
    scores = ("region_macc", "seen"), ("region_macc", "unseen combinations"), ("i2t_r1", "seen")
    rows = [
        "In points: mean ± standard deviation over seeds (each seed's difference; seeds in which the first is ahead).",
        "",
        "| labels | | mAcc | mAcc, unseen combinations | i2t R@1 |",
        "|---|---|---|---|---|",
    ]
    for suffix in suffixes:
        for one, other in COMPARED:
            if (a := first.get(one + suffix)) is None or (b := first.get(other + suffix)) is None:
                continue
            found = [paired_differences(a, b, where, score) for score, where in scores]
            if all(found):
                labels = a.variant.noise if a.variant.world == "things" else f"{a.variant.noise}, {a.variant.world}"
                rows.append(f"| {labels} | {a.title} less {b.title} | {' | '.join(map(in_seeds, found))} |")
    if "cross" in first and "encoder" in first and (share := catch_up(first["cross"], first["encoder"])) is not None:
        rows += ["", f"cross has the final mAcc of the published Prompter in {100 * share:.0f} % of its CPU time."]
    return "\n".join(rows) + "\n"


def in_seeds(values: Sequence[float]) -> str:
    """Mean ± standard deviation in points, every value, and how many are positive."""
    each = " ".join(f"{100 * value:+.1f}" for value in values)
    return f"{spread(values, sign='+')} ({each}; {sum(value > 0 for value in values)} of {len(values)})"


def curve(line: Line) -> tuple[list[int], list[float]]:
    """(steps, mean mAcc over seeds) of the checkpoints on the way."""
    points: dict[int, list[float]] = {}
    for run in line.runs:
        for point in run["curve"]:
            points.setdefault(point["step"], []).append(point["region_macc"])
    return sorted(points), [statistics.fmean(points[step]) for step in sorted(points)]


def catch_up(fast: Line, slow: Line) -> float | None:
    """CPU time at which `fast` has the final score of `slow`, as a share of that one's; None if it never has, and where
    no costs were measured."""
    if fast.cost is None or slow.cost is None:
        return None
    target = curve(slow)[1][-1]
    steps, scores = curve(fast)
    reached = next((step for step, value in zip(steps, scores, strict=True) if value >= target), None)
    if reached is None:
        return None
    return reached * fast.cost / (curve(slow)[0][-1] * slow.cost)


def draw_curves(lines: Sequence[Line], path: Path) -> None:
    """Region mAcc against steps, CPU time and label noise."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    by_steps, by_time, by_noise = figure.subplots(1, 3)
    first = {line.variant.name: line for line in reversed(lines)}  # of a CLIP's ways the first, crop
    for name in METHODS:
        if name not in first:
            continue
        line = first[name]
        steps, scores = curve(line)
        style = {"color": COLOURS[name], "marker": "o", "markersize": 3, "label": line.title}
        by_steps.plot(steps, [100 * s for s in scores], **style)
        if line.cost is not None:
            by_time.plot([s * line.cost for s in steps], [100 * s for s in scores], **style)
        levels = [first.get(name if noise == "noisy" else f"{name}_{noise.replace(' ', '_')}") for noise in NOISE]
        scores_by_noise = {
            n: level.mean("seen", "region_macc") for n, level in zip(NOISE, levels, strict=True) if level
        }
        if len(scores_by_noise) > 1:
            by_noise.plot(list(scores_by_noise), [100 * (score or 0) for score in scores_by_noise.values()], **style)
    for axes, title in ((by_steps, "steps"), (by_time, "CPU seconds"), (by_noise, "label noise")):
        axes.set_xlabel(title)
        axes.set_ylabel("region mAcc in %, seen combinations")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    by_steps.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def draw_examples(model: Path, path: Path) -> None:
    """Unseen scenes with the name that `cross` gives each box, and the box it finds for each text."""
    from opencloc.data.sources.spec import open_source
    from opencloc.eval.encoders import load_encoder
    from opencloc.eval.pictures import predict
    from opencloc.eval.sets.item import Unread, load
    from opencloc.eval.sets.source import source_set

    source: Any = open_source(f"scenes:rich?{WORLDS['things']}&seed=1&{SETS['seen']}")
    (loaded,) = load(source_set(source, "seen"), PICTURES, PICTURES, Unread(allowed=0))
    predictions = predict(load_encoder(model, "prompter"), loaded, source.config.class_names())
    figure = Figure(figsize=(3.2 * PICTURES, 6.6), layout="constrained")
    for column, prediction in enumerate(predictions):
        named, grounded = (figure.add_subplot(2, PICTURES, row * PICTURES + column + 1) for row in (0, 1))
        side = prediction.loaded.image.width
        for axes in (named, grounded):
            axes.imshow(prediction.loaded.image)
            axes.set_axis_off()
        for box, name, right in zip(prediction.loaded.item.boxes, prediction.names, prediction.correct, strict=True):
            _draw(named, box * side, name, "#1e8449" if right else "#c0392b")
        for found in prediction.grounded:
            _draw(grounded, found.box * side, found.text, "#1e8449" if found.iou >= 0.5 else "#c0392b")
    figure.suptitle("top: given boxes, the model's names; below: given texts, the model's boxes (green: right)")
    figure.savefig(path, dpi=80)


def _draw(axes: Any, box_px: Any, text: str, colour: str) -> None:
    x0, y0, x1, y1 = box_px
    axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, color=colour, linewidth=1.5))
    axes.text(x0, y0 - 1, text, color="white", fontsize=7, backgroundcolor=colour, va="bottom", clip_on=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--out", type=Path, default=Path("results/study"))
    arguments = parser.parse_args()
    matplotlib.rcParams["font.family"] = "sans-serif"
    lines = read_lines(arguments.runs)
    if not lines:
        raise SystemExit(f"{arguments.runs}: no run has a result yet")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text(table(lines))
    (arguments.out / "differences.md").write_text(differences(lines))
    results = list({(run["variant"], run["seed"]): run for line in lines for run in line.runs}.values())
    (arguments.out / "runs.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_curves(lines, arguments.out / "curves.png")
    if (model := arguments.runs / "cross-0" / "model").is_dir():
        draw_examples(model, arguments.out / "examples.png")
    print(table(lines))


if __name__ == "__main__":
    main()
