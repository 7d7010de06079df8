"""`opencloc eval`: encoders and a data source in; a table, JSON and a page with pictures out."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from opencloc.data.sample import Sample, class_names
from opencloc.data.source import open_source, take
from opencloc.eval.encoders import RegionWay, load_encoder
from opencloc.eval.report import to_json, to_markdown, write_html_report
from opencloc.eval.tasks import TASKS, Dtype, Evaluation, Task, evaluate, flat_metrics, predict


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Scores of any number of encoders on the same samples, side by side.

    Raises ValueError, naming the field, for values out of range.
    """

    model: tuple[str, ...]
    """Encoders as `[NAME=]FOLDER[@prompter|crop|roi]`: a CLOC, CLIP, SigLIP or SigLIP 2 checkpoint, and how it embeds a
    region (default: prompter)."""
    data: str
    """What to score on: any source, e.g. `coco:DIR?split=test`."""
    tasks: tuple[Task, ...] = TASKS
    """Which scores."""
    num_images: int = 1000
    """At most so many images, from the first on."""
    class_names: str | None = None
    """Text file, one class name per line, for region recognition; default: the distinct region texts of the images."""
    out: str | None = None
    """Folder for metrics.json, evaluation.json, evaluation.md and report.html."""
    title: str = "Evaluation"
    """Heading of report.html."""
    num_pictures: int = 12
    """Images shown in report.html, with the first encoder's predictions."""
    batch_size: int = 32
    dtype: Dtype = "float32"
    """Autocast type of the encoders; scores are always float32."""
    device: str = "auto"
    """`auto` (cuda if there is one), `cpu`, `cuda`, ..."""

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for spec in self.model:
            parse_model(spec)


def parse_model(spec: str) -> tuple[str | None, str, RegionWay]:
    """(name or None, folder, way) of `[NAME=]FOLDER[@WAY]`.  Raises ValueError for an unknown way."""
    name, _, rest = spec.rpartition("=")
    folder, _, way = rest.rpartition("@") if "@" in rest else (rest, "", "prompter")
    ways: tuple[RegionWay, ...] = get_args(RegionWay)
    for known in ways:
        if way == known:
            return name or None, folder, known
    raise ValueError(f"model {spec!r}: a region is embedded by {', '.join(ways)}, not by {way!r}")


def run_eval(config: EvalConfig, console: Console | None = None) -> list[Evaluation]:
    """The evaluations, after printing them as Markdown and writing `config.out`."""
    console = console or Console(stderr=True)
    disable_progress_bar()  # transformers' own, one for every model
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    samples, unusable = take(open_source(config.data), config.num_images)
    if not samples:
        raise ValueError(f"{config.data}: no usable samples ({dict(unusable)})")
    if unusable:
        console.print(f"left out: {dict(unusable)}", highlight=False)
    names = None
    if config.class_names is not None:
        names = [line.strip() for line in Path(config.class_names).read_text().splitlines() if line.strip()]
    evaluations, pictures = [], []
    for spec in config.model:
        name, folder, way = parse_model(spec)
        encoder = load_encoder(folder, way, name=name, device=device)
        evaluations.append(
            evaluate(
                encoder,
                samples,
                tasks=config.tasks,
                class_names=names,
                batch_size=config.batch_size,
                dtype=config.dtype,
            )
        )
        if not pictures and config.out is not None and config.num_pictures:
            shown = [sample for sample in samples if len(sample.boxes)][: config.num_pictures]
            pictures = predict(encoder, shown, names or class_names(samples), dtype=config.dtype)
    print(to_markdown(evaluations))
    if config.out is not None:
        write_results(Path(config.out), config, evaluations, pictures, samples, dict(unusable))
    return evaluations


def write_results(
    out: Path,
    config: EvalConfig,
    evaluations: Sequence[Evaluation],
    pictures: Sequence[Any],
    samples: Sequence[Sample],
    unusable: dict[str, int],
) -> None:
    """metrics.json (headline scores by encoder), evaluation.json (all), evaluation.md and report.html."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "metrics.json", json.dumps({e.encoder: flat_metrics(e) for e in evaluations}, indent=2) + "\n")
    write_text(out / "evaluation.json", to_json(evaluations))
    write_text(out / "evaluation.md", to_markdown(evaluations))
    runs = {Path(parse_model(spec)[1]).resolve().parent for spec in config.model}
    facts = {
        "data": config.data,
        "images": f"{len(samples):,}" + (f" (unusable: {unusable})" if unusable else ""),
        "encoders": "; ".join(config.model),
        "precision": config.dtype,
    }
    write_html_report(
        out / "report.html",
        title=config.title,
        lede=f"{len(evaluations)} encoders on the same {len(samples):,} images of {config.data}.",
        evaluations=evaluations,
        logs={run.name: run / "log.jsonl" for run in sorted(runs) if (run / "log.jsonl").is_file()},
        pictures=pictures,
        facts=facts,
    )


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
