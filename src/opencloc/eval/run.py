"""`opencloc eval`: encoders and data in; one table, JSON and a page with pictures out."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from opencloc.data.sample import Sample, class_names
from opencloc.data.sources.spec import open_source, take
from opencloc.eval.encoders import Encoder, RegionWay, View, load_encoder, model_type
from opencloc.eval.protocols import Result, Settings, run
from opencloc.eval.registry import BENCHMARKS, open_set
from opencloc.eval.report import to_json, to_markdown, write_html_report
from opencloc.eval.sets.item import EvalSet
from opencloc.eval.tasks import TASKS, Evaluation, Prediction, Task, evaluate, flat_metrics, predict
from opencloc.eval.text_bank import Dtype

SOURCE_IMAGES = 1000  # of a source, where no number is given
_TASK_NAMES = (*(task.replace("_", "-") for task in TASKS), *BENCHMARKS)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Scores of any number of encoders on the same images, side by side.

    Raises ValueError, naming the field, for values out of range.
    """

    model: tuple[str, ...]
    """Encoders as `[NAME=]FOLDER[@prompter|crop|roi]`: a CLOC, CLIP, SigLIP or SigLIP 2 checkpoint, and how it embeds a
    region."""
    data: tuple[str, ...]
    """Where the data lie, as `[TASK=]LOCATION[?key=value&...]`: a folder for the tasks on a public set, any source for
    the four on a source, e.g. `coco:DIR?split=test`.  Without TASK= it serves all tasks that have none of their own;
    with it, it may be given several times, e.g. once for each split."""
    tasks: tuple[str, ...] = TASKS
    """Which scores; default: the four on a source."""
    regions: RegionWay | None = None
    """How models without `@...` embed a region; default: the Prompter of a CLOC checkpoint, crops for any other."""
    view: View = "letterbox"
    """How an image becomes the square that a model sees: `letterbox` (as CLOC's paper), `squash` (SigLIP's own) or
    `centre` (CLIP's own; with crops only)."""
    num_images: int | None = None
    """At most so many images, from the first on; default: 1000 of a source, all of a public set."""
    class_names: str | None = None
    """Text file, one class name per line, for region-recognition; default: the distinct region texts of the images."""
    json: str | None = None
    """File for all scores, denominators, intervals and what was left out."""
    markdown: str | None = None
    """File for the table that is printed."""
    out: str | None = None
    """Folder for metrics.json, evaluation.json, evaluation.md and, of tasks on a source, report.html."""
    title: str = "Evaluation"
    """Heading of report.html."""
    num_pictures: int = 12
    """Images shown in report.html, with the first encoder's predictions."""
    batch_size: int = 32
    """Images at a time."""
    dtype: Dtype = "float32"
    """Autocast type of the encoders; scores are always float32."""
    device: str = "auto"
    """`auto` (cuda if there is one), `cpu`, `cuda`, ..."""
    max_missing: float = 0.01
    """Share of the images of a public set that may be missing or broken before the run fails."""
    resamples: int = 1000
    """Draws of the bootstrap that gives the intervals; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.resamples < 0:
            raise ValueError(f"resamples must be >= 0, got {self.resamples}")
        if not 0 <= self.max_missing <= 1:
            raise ValueError(f"max_missing must be in [0, 1], got {self.max_missing}")
        for spec in self.model:
            parse_model(spec)
        for task in self.tasks:
            if task.replace("_", "-") not in _TASK_NAMES:
                raise ValueError(f"unknown task {task!r}; there are {', '.join(_TASK_NAMES)}")
        if not (self.tasks and self.model and self.data):
            raise ValueError("tasks, model and data need at least one value each")


@dataclass(kw_only=True)
class _Outcome:
    """What the encoders gave, and what report.html needs besides."""

    evaluations: list[Evaluation]
    results: list[Result]
    samples: Sequence[Sample] = ()
    unusable: Counter[str]
    pictures: Sequence[Prediction] = ()


def parse_model(spec: str, regions: RegionWay = "prompter") -> tuple[str | None, str, RegionWay]:
    """(name or None, folder, way) of `[NAME=]FOLDER[@WAY]`; `regions` where no way is given.

    Raises ValueError for an unknown way.
    """
    name, _, rest = spec.rpartition("=")
    folder, _, way = rest.rpartition("@") if "@" in rest else (rest, "", regions)
    ways: tuple[RegionWay, ...] = get_args(RegionWay)
    for known in ways:
        if way == known:
            return name or None, folder, known
    raise ValueError(f"model {spec!r}: a region is embedded by {', '.join(ways)}, not by {way!r}")


def run_eval(config: EvalConfig, console: Console | None = None) -> tuple[list[Evaluation], list[Result]]:
    """The scores of the tasks on a source and on public sets, after printing them and writing the files asked for."""
    console = console or Console(stderr=True)
    disable_progress_bar()  # transformers' own, one for every model
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    tasks = [task.replace("-", "_") for task in config.tasks]
    models = _named(config)
    on_source: list[Task] = [task for task in TASKS if task in tasks]
    places = [(task, place) for task in config.tasks if task in BENCHMARKS for place in _places(config, task)]
    sets = [(BENCHMARKS[task].protocol, open_set(task, place)) for task, place in places]
    if len({data.name for _, data in sets}) < len(sets):
        raise ValueError(f"the same set twice: {', '.join(data.name for _, data in sets)}")
    if config.num_images is not None:
        sets = [(protocol, _first(data, config.num_images)) for protocol, data in sets]
    settings = Settings(
        batch_size=config.batch_size,
        dtype=config.dtype,
        resamples=config.resamples,
        max_missing=config.max_missing,
    )
    outcome = _Outcome(evaluations=[], results=[], unusable=Counter())
    names = None
    if on_source:
        outcome.samples, outcome.unusable = _take(config, on_source, console)
        if config.class_names is not None:
            names = [line.strip() for line in Path(config.class_names).read_text().splitlines() if line.strip()]
    for name, folder, way in models:
        encoder = load_encoder(folder, way, name=name, device=device, view=config.view)
        outcome.results += [run(encoder, data, protocol, settings) for protocol, data in sets]
        if on_source:
            _evaluate(encoder, on_source, names, config, outcome)
    print(to_markdown(outcome.evaluations, outcome.results))
    if config.json is not None:
        write_text(Path(config.json), to_json(outcome.evaluations, outcome.results))
    if config.markdown is not None:
        write_text(Path(config.markdown), to_markdown(outcome.evaluations, outcome.results))
    if config.out is not None:
        _write_folder(Path(config.out), config, outcome)
    return outcome.evaluations, outcome.results


def _places(config: EvalConfig, task: str) -> list[str]:
    """The locations for a task: its own, else those without a task."""
    split = [place.partition("=") for place in config.data]
    named = [(head.replace("_", "-"), rest) for head, equals, rest in split if equals]
    own = [rest for head, rest in named if head == task.replace("_", "-")]
    shared = [
        place for place, (head, equals, _) in zip(config.data, split, strict=True)
        if not equals or head.replace("_", "-") not in _TASK_NAMES
    ]  # fmt: skip
    if not (own or shared):
        raise ValueError(f"no data for {task}: --data {task}=LOCATION")
    return own or shared


def _first(data: EvalSet[Any], num_images: int) -> EvalSet[Any]:
    """The first images of a set."""
    rest = max(0, len(data.items) - num_images)
    left_out = data.left_out | ({f"image after the first {num_images:,}": rest} if rest else {})
    return replace(data, items=data.items[:num_images], left_out=left_out)


def _take(config: EvalConfig, tasks: Sequence[Task], console: Console) -> tuple[list[Sample], Counter[str]]:
    """The samples of the one source that the tasks on a source share."""
    places = list(dict.fromkeys(place for task in tasks for place in _places(config, task)))
    if len(places) != 1:
        raise ValueError(f"{', '.join(tasks)} need one source, got {', '.join(places)}")
    samples, unusable = take(open_source(places[0]), config.num_images or SOURCE_IMAGES)
    if not samples:
        raise ValueError(f"{places[0]}: no usable samples ({dict(unusable)})")
    if unusable:
        console.print(f"left out: {dict(unusable)}", highlight=False)
    return samples, unusable


def _named(config: EvalConfig) -> list[tuple[str, Path, RegionWay]]:
    """(name, folder, way) of every model, each name once; raises ValueError if a folder holds no checkpoint."""
    models = []
    for spec in config.model:
        folder = Path(parse_model(spec)[1])
        natural: RegionWay = "prompter" if model_type(folder) == "cloc" else "crop"
        name, _, way = parse_model(spec, config.regions or natural)
        models.append((name or f"{folder.resolve().name}, {way}", folder, way))
    count = Counter(name for name, _, _ in models)
    # every run's folder is called model
    named = [
        (name if count[name] == 1 else spec, *rest) for spec, (name, *rest) in zip(config.model, models, strict=True)
    ]
    if config.view != "letterbox":
        named = [(f"{name} ({config.view})", *rest) for name, *rest in named]
    if len({name for name, *_ in named}) < len(named):
        raise ValueError(f"two models of one name: {', '.join(config.model)}; tell them apart by NAME=FOLDER")
    return named


def _evaluate(
    encoder: Encoder, tasks: Sequence[Task], names: list[str] | None, config: EvalConfig, outcome: _Outcome
) -> None:
    """Adds the scores of the tasks on a source, and the pictures of the first encoder."""
    outcome.evaluations.append(
        evaluate(
            encoder,
            outcome.samples,
            tasks=tasks,
            class_names=names,
            batch_size=config.batch_size,
            dtype=config.dtype,
        )
    )
    if not outcome.pictures and config.out is not None and config.num_pictures:
        shown = [sample for sample in outcome.samples if len(sample.boxes)][: config.num_pictures]
        outcome.pictures = predict(encoder, shown, names or class_names(outcome.samples), dtype=config.dtype)


def _write_folder(out: Path, config: EvalConfig, outcome: _Outcome) -> None:
    """metrics.json (headline scores by encoder), evaluation.json (all), evaluation.md and report.html."""
    out.mkdir(parents=True, exist_ok=True)
    flat: dict[str, dict[str, Any]] = {e.encoder: dict(flat_metrics(e)) for e in outcome.evaluations}
    for result in outcome.results:
        scores = {f"{result.task} {key}": score.value for key, score in result.scores.items() if score.count}
        flat.setdefault(result.encoder, {}).update(scores)
    write_text(out / "metrics.json", json.dumps(flat, indent=2) + "\n")
    write_text(out / "evaluation.json", to_json(outcome.evaluations, outcome.results))
    write_text(out / "evaluation.md", to_markdown(outcome.evaluations, outcome.results))
    if not outcome.evaluations:
        return
    runs = {Path(parse_model(spec)[1]).resolve().parent for spec in config.model}
    count, unusable = len(outcome.samples), dict(outcome.unusable)
    facts = {
        "data": ", ".join(config.data),
        "images": f"{count:,}" + (f" (unusable: {unusable})" if unusable else ""),
        "encoders": "; ".join(config.model),
        "precision": config.dtype,
    }
    write_html_report(
        out / "report.html",
        title=config.title,
        lede=f"{len(outcome.evaluations)} encoders on the same {count:,} images of {', '.join(config.data)}.",
        evaluations=outcome.evaluations,
        logs={run.name: run / "log.jsonl" for run in sorted(runs) if (run / "log.jsonl").is_file()},
        pictures=outcome.pictures,
        facts=facts,
    )


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
