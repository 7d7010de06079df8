"""Evaluations and training logs as JSON, Markdown and one self-contained HTML page.

This file owns how results are shown, never what they are: it computes no score.  The page's markup lies beside it in
`report.html.j2`; everything else the page needs (styles, curves, pictures) is inside the page.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from opencloc.eval.metrics import SIZE_LIMITS, Accuracy, Recall
from opencloc.eval.protocols import Result
from opencloc.eval.tasks import Evaluation, Prediction

CURVES = {"image_text": "Image-text loss", "region_text": "Region-text loss", "grounding": "Grounding loss"}
PICTURE_PX = 512  # longest side of a picture in the page
SERIES = ("#010101", "#020202", "#030303", "#040404")  # placeholders that the page's styles give their colours
INK = "#050505"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One score of several encoders: a line of the tables."""

    group: str
    label: str
    values: tuple[float | None, ...]  # in [0, 1], one per encoder; None where it was not measured
    of: str  # the denominator in words
    intervals: tuple[tuple[float, float] | None, ...] = ()  # of each value, where there are any


def to_json(evaluations: Sequence[Evaluation], results: Sequence[Result] = ()) -> str:
    """Evaluations and results as one strict JSON list, scores in [0, 1]; a score without a denominator is null."""
    return json.dumps([_plain(asdict(e)) for e in (*evaluations, *results)], indent=2, allow_nan=False) + "\n"


def to_markdown(evaluations: Sequence[Evaluation], results: Sequence[Result] = ()) -> str:
    """One Markdown table with a column per encoder and the denominators, then the rules and what was left out."""
    encoders = list(dict.fromkeys(part.encoder for part in (*evaluations, *results)))
    lines = [
        f"| score in % | {' | '.join(map(_cell, encoders))} | of |",
        f"|---|{'---:|' * len(encoders)}---|",
        *map(_markdown_line, rows(evaluations)),
        *map(_markdown_line, result_rows(results, encoders)),
    ]
    if results:
        rules = dict.fromkeys(f"* {_cell(result.task)}: {_cell(result.rules)}" for result in results)
        lines += ["", "In brackets: 95 % intervals, bootstrap over images. Rules:", "", *rules]
    if left_out := [f"* {_cell(line)}" for line in (*skipped(evaluations), *_left_out(results))]:
        lines += ["", "Left out:", "", *left_out]
    return "\n".join(lines) + "\n"


def result_rows(results: Sequence[Result], encoders: Sequence[str]) -> list[Row]:
    """Every score of every set in a fixed order, with a value for each of `encoders` that has it."""
    table: list[Row] = []
    for task in dict.fromkeys(result.task for result in results):
        by_encoder = {result.encoder: result.scores for result in results if result.task == task}
        for key in dict.fromkeys(key for scores in by_encoder.values() for key in scores):
            scores = [by_encoder.get(encoder, {}).get(key) for encoder in encoders]
            measured = [score for score in scores if score is not None]
            table.append(
                Row(
                    group=task,
                    label=measured[0].label,
                    values=tuple(score and score.value for score in scores),
                    of=" / ".join(dict.fromkeys(score.of for score in measured)),
                    intervals=tuple(score and (score.low, score.high) for score in scores),
                )
            )
    return table


def rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    """Every score that at least one of the evaluations has, in a fixed order."""
    table: list[Row] = []

    def add(group: str, label: str, get: Callable[[Evaluation], Any], score: str, of: Callable[[Any], str]) -> None:
        """`get` picks the part of an evaluation that has the score, or None."""
        parts = [get(e) for e in evaluations]
        if any(part is not None for part in parts):
            values = tuple(None if part is None else getattr(part, score) for part in parts)
            denominators = dict.fromkeys(of(part) for part in parts if part is not None)
            table.append(Row(group=group, label=label, values=values, of=" / ".join(denominators)))

    def boxes(part: Accuracy) -> str:
        return f"{part.boxes:,} boxes"

    def queries(part: Recall) -> str:
        return f"{part.queries:,} queries among {part.gallery:,}"

    def overall(e: Evaluation) -> Accuracy | None:
        return e.region_recognition and e.region_recognition.overall

    names = _one_or_more(e.region_recognition.classes for e in evaluations if e.region_recognition)
    group = "region recognition"
    add(group, "top-1", overall, "top1", boxes)
    add(group, "mAcc", overall, "macc", lambda part: f"{part.classes_present:,} classes present of {names}")
    for size in SIZE_LIMITS:
        add(
            group,
            f"top-1, {size}",
            lambda e, size=size: e.region_recognition and e.region_recognition.by_size[size],
            "top1",
            boxes,
        )
    for task, item in (("region_retrieval", "region"), ("image_retrieval", "image")):
        for way, label in (("to_text", f"{item} to text"), ("from_text", f"text to {item}")):
            for score, k in (("r1", 1), ("r5", 5), ("r10", 10)):
                add(
                    f"{item} retrieval",
                    f"{label} R@{k}",
                    lambda e, task=task, way=way: getattr(getattr(e, task), way, None),
                    score,
                    queries,
                )
    for score, label in (("acc50", "IoU ≥ 0.5"), ("mean_iou", "mean IoU")):
        add("grounding", label, lambda e: e.grounding, score, lambda part: f"{part.queries:,} texts")
    return table


def skipped(evaluations: Sequence[Evaluation]) -> list[str]:
    """What the tasks left out, a sentence for each task and reason, with the encoders if they differ."""
    sentences: dict[str, list[str]] = {}
    for e in evaluations:
        for task, reasons in e.skipped.items():
            for reason, count in reasons.items():
                sentences.setdefault(f"{task.replace('_', ' ')}: {reason} ({count:,})", []).append(e.encoder)
    return [
        line if len(encoders) == len(evaluations) else f"{line}: {'; '.join(encoders)}"
        for line, encoders in sentences.items()
    ]


def percent(score: float | None) -> str:
    """A score in [0, 1] as a percentage with one decimal, a dash for none."""
    return "–" if score is None or math.isnan(score) else f"{100 * score:.1f}"


def write_html_report(
    path: str | Path,
    *,
    title: str,
    lede: str,
    evaluations: Sequence[Evaluation],
    logs: Mapping[str, str | Path] = {},
    pictures: Sequence[Prediction] = (),
    facts: Mapping[str, str] = {},
) -> None:
    """Writes one HTML file that needs nothing beside it: scores, pictures, loss curves, all numbers, how it was made.

    `logs` name the training runs and their JSON-lines files, at most four; `pictures` are one encoder's predictions;
    `facts` (what: value) close the page.  All texts are escaped.  Raises ValueError for a line that is not JSON.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("opencloc.eval").joinpath("report.html.j2").read_text(encoding="utf-8"))
    html = template.render(
        title=title,
        lede=lede,
        evaluations=evaluations,
        headline=_headline(evaluations),
        groups={group: list(lines) for group, lines in groupby(rows(evaluations), key=lambda row: row.group)},
        sizes=SIZE_LIMITS,
        skipped=skipped(evaluations),
        runs=list(logs),
        curves=_curves({name: read_log(log) for name, log in logs.items()}),
        pictures=[_Picture.of(p) for p in pictures],
        facts=facts,
        percent=percent,
    )
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, path)


def read_log(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of a JSON-lines training log: for each numeric key its (step, value) pairs, in order of steps.

    A resumed run logs some steps again: the last entry counts.  Raises ValueError for a line that is not JSON.
    """
    curves: dict[str, dict[int, float]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            step = entry["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object with a step ({error!r})") from None
        for key, value in entry.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                curves.setdefault(key, {})[step] = float(value)
    return {key: sorted(points.items()) for key, points in curves.items()}


# -- the parts of the page ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """A prediction as the template needs it; places are CSS percentages of the picture."""

    source: str  # data URL
    width: int
    height: int
    named: list[dict[str, Any]]
    grounded: list[dict[str, Any]]

    @classmethod
    def of(cls, prediction: Prediction) -> _Picture:
        sample = prediction.sample
        regions = zip(sample.boxes, sample.texts, prediction.names, prediction.correct, strict=True)
        return cls(
            source=_data_url(sample.image),
            width=sample.image.width,
            height=sample.image.height,
            named=[{"place": _place(box), "text": text, "name": name, "right": ok} for box, text, name, ok in regions],
            grounded=[
                {
                    "place": _place(g.box),
                    "truth": _place(g.truth),
                    "text": g.text,
                    "iou": f"{g.iou:.2f}",
                    "right": g.iou >= 0.5,
                }
                for g in prediction.grounded
            ],
        )


def _place(box: Any) -> str:
    x0, y0, x1, y1 = (100 * float(v) for v in box)
    return f"left:{x0:.2f}%;top:{y0:.2f}%;width:{x1 - x0:.2f}%;height:{y1 - y0:.2f}%"


def _data_url(image: Image.Image) -> str:
    image, file = image.convert("RGB"), io.BytesIO()
    image.thumbnail((PICTURE_PX, PICTURE_PX))  # only ever makes it smaller
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _headline(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The columns of the first table: one score each, with its denominator."""
    wanted = {
        ("region recognition", "top-1"): ("Region names", "top-1"),
        ("region recognition", "mAcc"): ("Region names", "mean over classes"),
        ("grounding", "IoU ≥ 0.5"): ("Regions found", "IoU ≥ 0.5"),
        ("image retrieval", "image to text R@1"): ("Image to caption", "R@1"),
        ("image retrieval", "text to image R@1"): ("Caption to image", "R@1"),
    }
    measured = {(row.group, row.label): row for row in rows(evaluations)}
    columns = []
    for key, (what, score) in wanted.items():
        if key in measured:
            row = measured[key]
            best = max(value for value in row.values if value is not None)
            columns.append({"what": what, "score": score, "of": row.of, "values": row.values, "best": best})
    return columns


def _curves(logs: Mapping[str, dict[str, list[tuple[int, float]]]]) -> list[tuple[str, Markup]]:
    """(Title, SVG) for each loss that a log has; run i is drawn in SERIES[i]."""
    if len(logs) > len(SERIES):
        raise ValueError(f"{len(logs)} logs, at most {len(SERIES)} can be told apart")
    drawn = []
    for key, title in CURVES.items():
        lines = [(colour, log[key]) for colour, log in zip(SERIES, logs.values(), strict=False) if key in log]
        if lines:
            drawn.append((title, _line_chart(key, lines)))
    return drawn


def _line_chart(salt: str, lines: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> Markup:
    """An inline SVG of the curves, faint as logged and bold as a running mean; styles colour the placeholders."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "font.size": 9.0,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.2, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for colour, points in lines:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _running_mean(values, max(1, len(values) // 40)), color=colour, linewidth=1.8)
        axes.set_xlabel("step", color=INK)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(INK)
        axes.tick_params(colors=INK, length=0)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # no XML prologue inside HTML
    for i, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--run-{i + 1})")
    return Markup(svg.replace(INK, "currentColor"))


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean over up to `reach` values on either side."""
    return [
        sum(window) / len(window) for window in (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    ]


# -- small things ------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """JSON's own types: a NaN becomes null."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _one_or_more(counts: Any) -> str:
    return " / ".join(dict.fromkeys(f"{count:,}" for count in counts))


def _left_out(results: Sequence[Result]) -> list[str]:
    """As `skipped`, of results."""
    sentences: dict[str, list[str]] = {}
    for result in results:
        for reason, count in result.left_out.items():
            sentences.setdefault(f"{result.task}: {reason} ({count:,})", []).append(result.encoder)
    encoders = {result.encoder for result in results}
    return [line if set(names) == encoders else f"{line}: {'; '.join(names)}" for line, names in sentences.items()]


def _markdown_line(row: Row) -> str:
    intervals = row.intervals or (None,) * len(row.values)
    values = [percent(value) + _bounds(bounds) for value, bounds in zip(row.values, intervals, strict=True)]
    return f"| {row.group}: {row.label} | {' | '.join(values)} | {row.of} |"


def _bounds(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None or math.isnan(bounds[0]) else f" ({percent(bounds[0])} to {percent(bounds[1])})"


def _cell(text: str) -> str:
    """Text for one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
