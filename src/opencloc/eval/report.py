"""Results and training logs as JSON, Markdown and one self-contained HTML page.

How results are shown is decided here, never what they are: no score is computed.  The page's markup lies beside this
file in `report.html.j2`; everything else the page needs (styles, curves, pictures) is inside the page.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files as resources
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from opencloc import files
from opencloc.eval.metrics import Score
from opencloc.eval.pictures import Prediction
from opencloc.eval.registry import SOURCE_TASKS

CURVES = {"image_text": "Image-text loss", "region_text": "Region-text loss", "grounding": "Grounding loss"}
PICTURE_PX = 512  # longest side of a picture in the page
SERIES = ("#010101", "#020202", "#030303", "#040404")  # placeholders that the page's styles give their colours
INK = "#050505"
READING = (
    "In brackets: 95 % intervals, by a bootstrap over images (Wilson's by images where all queries agree). "
    "Sizes are COCO's: areas of boxes in pixels of the image as annotated. Ties count as wrong."
)
# Short keys of metrics.json for the tasks on a source; all other scores are called by task, set and key.
FLAT = {
    ("region-recognition", "top1"): "region_top1",
    ("region-recognition", "macc"): "region_macc",
    ("image-retrieval", "i2t_r1"): "i2t_r1",
    ("image-retrieval", "t2i_r1"): "t2i_r1",
    ("grounding", "acc50"): "ground_acc50",
    ("grounding", "miou"): "ground_miou",
}
HEADLINE = ("top1", "macc", "acc50", "acc50_any", "i2t_r1", "t2i_r1")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Scores of one encoder for one task on one set, with their denominators and what was skipped."""

    encoder: str
    task: str  # its name, as on the command line
    data: str  # the split or source
    rules: str  # what is asked, of which boxes, against which texts
    precision: str  # of the encoder: bf16 or fp32
    images: int  # that had something to score
    of_images: int | None  # in the set; None: an endless source
    class_names: tuple[str, ...]  # the candidates, where there are classes
    scores: dict[str, Score]  # empty where the encoder cannot do the task
    skipped: dict[str, dict[str, int]]  # unit (images, boxes, texts, files) -> reason -> how many
    noted: dict[str, int]  # images that were used, by what is unusual about them


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the tables: a score of several encoders."""

    group: str
    key: str
    label: str
    cells: tuple[str, ...]  # one for each encoder, a dash where it was not measured
    values: tuple[float | None, ...]  # in [0, 1]
    of: str  # the denominator in words


def flat_metrics(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """For each encoder its scores in [0, 1] under short keys: what metrics.json holds.

    Of tasks on a source: `region_top1`, `region_macc`, `i2t_r1`, `t2i_r1`, `ground_acc50`, `ground_miou`, where there
    are several sources after the name of each.  Of public sets every score, as `coco-recognition instances_val2017
    top1`.
    """
    sources = {result.data for result in results if result.task in SOURCE_TASKS}
    flat: dict[str, dict[str, float]] = {}
    for result in results:
        of_encoder = flat.setdefault(result.encoder, {})
        for key, score in result.scores.items():
            if result.task not in SOURCE_TASKS:
                name = f"{result.task} {result.data} {key}"
            elif (name := FLAT.get((result.task, key), "")) and len(sources) > 1:
                name = f"{result.data} {name}"
            if name and score.count:
                of_encoder[name] = score.value
    return flat


def to_json(results: Sequence[Result]) -> str:
    """Results as one strict JSON list, scores in [0, 1]; a score or bound without a denominator is null."""
    return json.dumps([_plain(asdict(result)) for result in results], indent=2, allow_nan=False) + "\n"


def to_markdown(results: Sequence[Result]) -> str:
    """One Markdown table with a column per encoder and the denominators, then the rules and what was skipped."""
    encoders = list(dict.fromkeys(result.encoder for result in results))
    lines = [
        f"| score in % | {' | '.join(map(_cell, encoders))} | of |",
        f"|---|{'---:|' * len(encoders)}---|",
        *(
            f"| {_cell(row.group)}: {_cell(row.label)} | {' | '.join(row.cells)} | {_cell(row.of)} |"
            for row in rows(results)
        ),
    ]
    for title, notes in (
        ("Rules", rules(results)),
        ("Skipped", skipped(results)),
        ("Used, and unusual", noted(results)),
    ):
        if notes:
            lines += ["", f"{title}:", "", *(f"* {_cell(note)}" for note in notes)]
    return "\n".join([*lines, "", READING]) + "\n"


def rows(results: Sequence[Result]) -> list[Row]:
    """For each task and set the images used and every score that at least one encoder has, but those of nothing."""
    encoders = list(dict.fromkeys(result.encoder for result in results))
    table: list[Row] = []
    for group, of_group in _by_group(results).items():
        by_encoder = {result.encoder: result for result in of_group}
        used = tuple(_used(by_encoder.get(encoder)) for encoder in encoders)
        empty = (None,) * len(encoders)
        table.append(Row(group=group, key="images", label="images used", cells=used, values=empty, of="of the set"))
        for key in dict.fromkeys(key for result in of_group for key in result.scores):
            scores = [by_encoder[one].scores.get(key) if one in by_encoder else None for one in encoders]
            measured = [score for score in scores if score is not None]
            if not any(score.count for score in measured):  # no box of this size
                continue
            table.append(
                Row(
                    group=group,
                    key=key,
                    label=measured[0].label,
                    cells=tuple(map(_with_interval, scores)),
                    values=tuple(score and score.value for score in scores),
                    of=" / ".join(dict.fromkeys(score.of for score in measured)),
                )
            )
    return table


def rules(results: Sequence[Result]) -> list[str]:
    """Of each task and set what was asked, a sentence each."""
    groups = _by_group(results).items()
    return [f"{group}, on {of_group[0].data}: {of_group[0].rules}" for group, of_group in groups]


def skipped(results: Sequence[Result]) -> list[str]:
    """What was skipped, a line for each unit and reason, with the tasks and encoders where they are not all."""
    return _lines(
        results,
        [(r, f"{unit}: {why}", n) for r in results for unit, whys in r.skipped.items() for why, n in whys.items()],
    )


def noted(results: Sequence[Result]) -> list[str]:
    """What is unusual about images that were used, as `skipped`."""
    return _lines(results, [(r, f"images: {what}", n) for r in results for what, n in r.noted.items()])


def percent(score: float | None) -> str:
    """A score in [0, 1] as a percentage with one decimal, a dash for none."""
    return "–" if score is None or math.isnan(score) else f"{100 * score:.1f}"


def write_html_report(
    path: str | Path,
    *,
    title: str,
    lede: str,
    results: Sequence[Result],
    logs: Mapping[str, str | Path] = {},
    pictures: Sequence[Prediction] = (),
    facts: Mapping[str, str] = {},
) -> None:
    """Writes one HTML file that needs nothing beside it: scores, pictures, loss curves, all numbers, how it was made.

    `logs` name the training runs and their JSON-lines files, at most four; `pictures` are one encoder's predictions;
    `facts` (what: value) close the page.  All texts are escaped.  Raises ValueError for a line that is not JSON.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources("opencloc.eval").joinpath("report.html.j2").read_text("utf-8"))
    table = rows(results)
    page = template.render(
        title=title,
        lede=lede,
        encoders=list(dict.fromkeys(result.encoder for result in results)),
        headline=_headline(table),
        groups={group: list(lines) for group, lines in groupby(table, key=lambda row: row.group)},
        reading=READING,
        notes={"Rules": rules(results), "Skipped": skipped(results), "Used, and unusual": noted(results)},
        runs=list(logs),
        curves=_curves({name: read_log(log) for name, log in logs.items()}),
        pictures=[_Picture.of(p) for p in pictures],
        facts=facts,
        percent=percent,
    )
    files.write_bytes(path, page.encode("utf-8", "replace"))


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
        image, item = prediction.loaded.image, prediction.loaded.item
        regions = zip(item.boxes, item.texts, prediction.names, prediction.correct, strict=True)
        return cls(
            source=_data_url(image),
            width=image.width,
            height=image.height,
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


def _headline(table: Sequence[Row]) -> list[Row]:
    """The columns of the first table: at most six scores."""
    wanted = [row for row in table if row.key in HEADLINE]
    return sorted(wanted, key=lambda row: HEADLINE.index(row.key))[:6]


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


def _by_group(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results by what tables call them: the task, and its set where it has several."""
    sets: dict[str, set[str]] = {}
    for result in results:
        sets.setdefault(result.task, set()).add(result.data)
    groups: dict[str, list[Result]] = {}
    for result in results:
        name = result.task if len(sets[result.task]) == 1 else f"{result.task} {result.data}"
        groups.setdefault(name, []).append(result)
    return groups


def _lines(results: Sequence[Result], counts: Sequence[tuple[Result, str, int]]) -> list[str]:
    """A line for each thing that was counted, with the tasks and encoders where they are not all."""
    group_of = {id(result): group for group, of_group in _by_group(results).items() for result in of_group}
    found: dict[str, list[Result]] = {}
    for result, what, count in counts:
        found.setdefault(f"{what} ({count:,})", []).append(result)
    lines = []
    for line, where in found.items():
        groups = list(dict.fromkeys(group_of[id(result)] for result in where))
        encoders = list(dict.fromkeys(result.encoder for result in where))
        all_here = {result.encoder for result in results if group_of[id(result)] in groups}
        if len(groups) < len(set(group_of.values())):
            line += f", in {', '.join(groups)}"
        lines.append(line + (f", by {'; '.join(encoders)}" if set(encoders) < all_here else ""))
    return lines


def _used(result: Result | None) -> str:
    if result is None or not result.scores:
        return "–"
    return f"{result.images:,}" + (
        f" of {result.of_images:,}" if result.of_images is not None else " of an endless source"
    )


def _with_interval(score: Score | None) -> str:
    if score is None or math.isnan(score.low):
        return percent(score and score.value)
    return f"{percent(score.value)} ({percent(score.low)} to {percent(score.high)})"


def _plain(value: Any) -> Any:
    """JSON's own types: a NaN becomes null."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _cell(text: str) -> str:
    """Text for one cell of a Markdown table, in which nothing is markup."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text).replace("<", "&lt;")
