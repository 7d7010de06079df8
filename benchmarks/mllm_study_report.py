"""Table and plots of `benchmarks.mllm_study`: its runs' results, side by side.

python -m benchmarks.mllm_study_report --runs runs/mllm_study --out results/mllm
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import save, table
from benchmarks.mllm_study import LANGUAGE, Arm, arms

SCORES = {  # name in the results -> head of the column
    "refer": "names the region",
    "ground": "Acc@0.5",
    "of some thing": "a box of some thing",
    "mean IoU": "mean IoU",
    "exists": "yes / no",
    "caption recall": "caption recall",
    "caption precision": "precision",
}
DRAWN = ("refer", "ground", "exists", "caption recall")


def read_results(runs: Path) -> dict[str, list[dict[str, Any]]]:
    """Arm -> results of its seeds, for the arms that have any."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in arms():
        paths = sorted(runs.glob(f"{arm.name}-[0-9]*/result.json"))
        if paths:
            found[arm.name] = [json.loads(path.read_text()) for path in paths]
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation in percent."""
    shown = f"{100 * statistics.mean(values):.1f}"
    return f"{shown} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else shown


def page(found: dict[str, list[dict[str, Any]]]) -> str:
    """The tables as Markdown: encoders, the language model, models at the end and at a third of the steps."""
    known = {arm.name: arm for arm in arms()}
    encoders = [
        [known[name].title, str(len(results)), steps_of(results), spread([r["retrieval"] for r in results])]
        for name, results in found.items()
        if name.startswith("encoder_")
    ]
    heads = ["seeds", *SCORES.values()]

    def row(results: list[dict[str, Any]], when: str) -> list[str]:
        return [str(len(results)), *(spread([r[when][score] for r in results]) for score in SCORES)]

    text = "# Multimodal models on generated scenes\n\nPercent, mean and standard deviation over seeds.\n"
    text += "\n## Encoders\n\n" + table(["encoder", "seeds", "steps", "image to text R@1"], encoders)
    if LANGUAGE in found:
        text += "\n## The language model, of scenes as tables of words\n\n"
        text += table(["steps", *heads], [[steps_of(found[LANGUAGE]), *row(found[LANGUAGE], "scores")]])
    models = {name: results for name, results in found.items() if known[name].encoder is not None}
    for when, title in (("final", "Models"), ("third", "Models at a third of the steps")):
        rows = [[known[name].title, *row(results, when)] for name, results in models.items()]
        text += f"\n## {title}\n\n" + table(["model", *heads], rows)
    return text


def steps_of(results: list[dict[str, Any]]) -> str:
    counts = sorted({r["steps"] for r in results})
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Bars of the final scores, a dot for every seed and a line for the score at a third of the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown: list[tuple[Arm, list[dict[str, Any]]]] = [
        (arm, found[arm.name]) for arm in reversed(arms()) if arm.name in found and arm.encoder is not None
    ]
    figure, axes = pyplot.subplots(1, len(DRAWN), figsize=(13, 0.5 * len(shown) + 1.5), sharey=True, squeeze=False)
    for axis, score in zip(axes[0], DRAWN, strict=True):
        for place, (arm, results) in enumerate(shown):
            final = [100 * r["final"][score] for r in results]
            colour = "#0071bc" if "cloc" in arm.name else "#a0a0a0"
            axis.barh(place, statistics.mean(final), color=colour, height=0.6)
            axis.plot(final, [place] * len(final), ".", color="black", markersize=4)
            early = 100 * statistics.mean(r["third"][score] for r in results)
            axis.plot([early] * 2, [place - 0.3, place + 0.3], color="#d55e00", linewidth=2)
        axis.set_title(f"{SCORES[score]} (%)", fontsize=10)
        axis.set_xlim(0, 100)
        axis.set_yticks(range(len(shown)), [arm.title for arm, _ in shown], fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Dots: seeds. Red line: at a third of the steps.", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/mllm_study"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("results/mllm"), help="folder for tables and plots")
    arguments = parser.parse_args()
    found = read_results(arguments.runs)
    if not any(arm.encoder for arm in arms() if arm.name in found):
        raise SystemExit(f"{arguments.runs}: no results of models yet")
    arguments.out.mkdir(parents=True, exist_ok=True)
    save(arguments.out, found, page(found))
    draw(found, arguments.out / "scores.svg")


if __name__ == "__main__":
    main()
