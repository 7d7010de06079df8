"""`opencloc eval`: encoders and data in; one table, JSON and a page with pictures out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from transformers.utils.logging import disable_progress_bar

from opencloc import files
from opencloc.data.sources.spec import open_source
from opencloc.devices import Precision, choose_device, computes_in_bf16
from opencloc.errors import and_skipped
from opencloc.eval.encoders import Encoder, RegionWay, View, check_regions, load_encoder, natural_way
from opencloc.eval.pictures import Prediction, predict
from opencloc.eval.registry import BENCHMARKS, SOURCE_TASKS, TASKS, read_set, task_name
from opencloc.eval.report import SERIES, Result, flat_metrics, to_json, to_markdown, write_html_report
from opencloc.eval.sets.item import IMAGES, EvalSet, Loaded, Skipped, Unread, by_unit, in_words, load
from opencloc.eval.sets.source import source_set
from opencloc.eval.tasks import Ask, Batch, Scores
from opencloc.eval.text_bank import TextBank, check_finite
from opencloc.progress import Meter


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Scores of any number of encoders on the same images, side by side.

    Raises ValueError, naming the field, for values out of range.
    """

    model: tuple[str, ...]
    """Encoders as `[NAME=]FOLDER[@prompter|crop|roi|maskclip|pool]`: a CLOC, CLIP, SigLIP or SigLIP 2 checkpoint (or
    its hub id) or an OpenCLIP folder, and how it embeds a region."""
    data: tuple[str, ...]
    """Where the data lie, as `[TASK=]LOCATION[?key=value&...]`: a folder for the tasks on a public set, any source for
    the four on a source, e.g. `coco:DIR?split=test`.  Without TASK= it serves all tasks that have none of their own;
    with it, a task may have several, e.g. one for each split."""
    tasks: tuple[str, ...] = tuple(SOURCE_TASKS)
    """Which scores; default: the four on a source."""
    regions: RegionWay | None = None
    """How models without `@...` embed a region; default: the Prompter of a CLOC checkpoint, crops for any other."""
    view: View = "letterbox"
    """How an image becomes the square that a model sees: `letterbox` (as CLOC's paper), `squash` (SigLIP's own) or
    `centre` (CLIP's own; with crops only)."""
    num_images: int | None = None
    """At most so many images, from the first on; default: 1000 of a source, all of a public set."""
    class_names: str | None = None
    """Text file, one class name per line, for region-recognition; default: the categories of a COCO file, else the
    distinct region texts of the images."""
    out: str | None = None
    """Folder for metrics.json, evaluation.json, evaluation.md and report.html."""
    title: str = "Evaluation"
    """Heading of report.html."""
    num_pictures: int = 12
    """Images shown in report.html, with the first encoder's predictions."""
    batch_size: int = 32
    """Images at a time."""
    precision: Precision = "fp32"
    """What the encoders compute in: `fp32`, `bf16`, or `auto` (bf16 where the hardware has it); scores are always
    fp32."""
    device: str = "auto"
    """`auto` (cuda if there is one), `cpu`, `cuda`, ..."""
    max_missing: float = 0.01
    """Share of the images that may be missing or broken before the run fails."""
    resamples: int = 1000
    """Draws of the bootstrap that gives the intervals; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        for name in ("resamples", "num_pictures"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        if not 0 <= self.max_missing <= 1:
            raise ValueError(f"max_missing must be in [0, 1], got {self.max_missing}")
        for spec in self.model:
            parse_model(spec)
        for task in self.tasks:
            task_name(task)
        if not (self.tasks and self.model and self.data):
            raise ValueError("tasks, model and data need at least one value each")


def parse_model(spec: str) -> tuple[str | None, str, RegionWay | None]:
    """(name or None, folder, way or None) of `[NAME=]FOLDER[@WAY]`.  Raises ValueError for an unknown way."""
    name, _, rest = spec.rpartition("=")
    folder, at, way = rest.rpartition("@")
    if not at:
        return name or None, rest, None
    for known in get_args(RegionWay):
        if way == known:
            return name or None, folder, known
    raise ValueError(f"model {spec!r}: a region is embedded by {', '.join(get_args(RegionWay))}, not by {way!r}")


def run_eval(config: EvalConfig) -> list[Result]:
    """The results of all encoders on all sets, after printing them and writing the files asked for."""
    disable_progress_bar()  # transformers' own, one for every model
    device = choose_device(config.device)
    models = _named(config)
    sets = open_sets(
        list(dict.fromkeys(map(task_name, config.tasks))),
        config.data,
        config.class_names,
        on_source=SOURCE_TASKS,
        readers={name: benchmark.read for name, benchmark in BENCHMARKS.items()},
    )
    results: list[Result] = []
    pictures: list[Prediction] = []
    for name, folder, way in models:
        encoder = load_encoder(folder, way, name=name, device=device, view=config.view)
        for tasks, data in sets:
            results += evaluate(
                encoder,
                data,
                tasks,
                num_images=config.num_images,
                batch_size=config.batch_size,
                precision=config.precision,
                resamples=config.resamples,
                max_missing=config.max_missing,
            )
        if not pictures and config.out is not None and config.num_pictures:
            pictures = _pictures(encoder, [data for _, data in sets], results, config.num_pictures)
        del encoder
    table = to_markdown(results)
    if config.out is not None:
        _write_folder(Path(config.out), config, results, pictures, table)
        print(config.out)
    print(table)
    return results


def evaluate(
    encoder: Encoder,
    data: EvalSet,
    tasks: Sequence[str],
    *,
    num_images: int | None = None,
    batch_size: int = 32,
    precision: Precision = "fp32",
    resamples: int = 1000,
    max_missing: float = 0.01,
) -> list[Result]:
    """The result of each of `tasks` (names of `registry.TASKS`) on a set, from one pass over its images.

    `num_images`: at most so many, from the first on; None: the set's own number, as a rule all.  `precision` is the
    encoder's; scores are always fp32.  `resamples`: draws of the bootstrap that gives the intervals.

    Raises ValueError for an unknown task, when more than `max_missing` of the images cannot be read, or none can, and
    when an encoder gives embeddings that are not finite.
    """
    tasks = [task_name(task) for task in tasks]
    bank, bf16 = TextBank(encoder), computes_in_bf16(precision, encoder.device)
    asks = [Ask(encoder=encoder, data=data, bank=bank, resamples=resamples) for _ in tasks]

    def encode(loaded: list[Loaded]) -> Batch:
        encoded = encoder.encode_images([one.image for one in loaded])
        check_finite(encoder, "image", encoded.embedding)
        return Batch(encoder, loaded, encoded)

    with (
        torch.inference_mode(),
        torch.autocast(encoder.device.type, dtype=torch.bfloat16, enabled=bf16),
    ):
        done = one_pass(
            data,
            [TASKS[task](ask) for task, ask in zip(tasks, asks, strict=True)],
            encode,
            what=f"{tasks[0] if len(tasks) == 1 else data.name}: {encoder.name}",
            num_images=num_images,
            batch_size=batch_size,
            max_missing=max_missing,
        )
    return [
        Result(
            encoder=encoder.name,
            task=task,
            data=data.name,
            rules=_rules(task, ask),
            precision="bf16" if bf16 else "fp32",
            images=ask.num_images,
            of_images=done.of_images,
            class_names=ask.class_names,
            scores=scores,
            skipped=by_unit(done.skipped + ask.skipped),
            noted=dict(done.noted),
        )
        for task, ask, scores in zip(tasks, asks, done.scores, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one pass over a set came to."""

    scores: list[Scores]  # of each task
    of_images: int | None  # in the set; None: an endless source
    skipped: Skipped
    noted: Counter[str]  # images that were used, by what is unusual about them


def one_pass(
    data: EvalSet,
    tasks: Sequence[Generator[None, Any, Scores]],
    prepare: Callable[[list[Loaded]], Any],
    *,
    what: str,
    num_images: int | None,
    batch_size: int,
    max_missing: float,
) -> Pass:
    """The scores of all tasks from one pass over the images; every batch is prepared once, then sent to each task.

    Raises ValueError when more than `max_missing` of the images cannot be read, or none can.
    """
    num_images = num_images or data.num_images
    if num_images is None and data.num_items is None:
        raise ValueError(f"{data.name} is endless: num_images must say how many are used")
    most = min(n for n in (num_images, data.num_items) if n is not None)
    unread, noted, skipped, read = Unread(allowed=int(max_missing * most)), Counter[str](), Counter(data.skipped), 0
    with Meter(what, most) as meter:
        for task in tasks:
            next(task)
        for loaded in load(data, num_images, batch_size, unread):
            batch = prepare(loaded)
            for task in tasks:
                task.send(batch)
                meter.advance(0)  # shows that it goes on, however long a batch takes
            for one in loaded:
                noted.update(one.noted)
                skipped.update(one.item.skipped)
            read += len(loaded)
            meter.advance(len(loaded))
        scores = [_finish(task) for task in tasks]
    skipped.update({(IMAGES, reason): count for reason, count in unread.reasons.items()})
    if not read:
        raise ValueError(f"{data.name}: no image can be used{and_skipped(in_words(skipped))}")
    of_images = None
    if data.num_items is not None:
        of_images = data.num_items + sum(count for (unit, _), count in data.skipped.items() if unit == IMAGES)
        skipped[IMAGES, f"after the first {read:,}"] = data.num_items - read - unread.reasons.total()
    return Pass(scores=scores, of_images=of_images, skipped=skipped, noted=noted)


def _rules(task: str, ask: Ask) -> str:
    """What was asked: the rules of the task, the classes, the rules of the set."""
    classes = f"{len(ask.class_names):,} classes" if ask.class_names else ""
    if classes and not ask.data.class_names:
        classes += ", the distinct texts of the regions"
    return "; ".join(
        filter(None, [(TASKS[task].__doc__ or "").partition("\n")[0].rstrip("."), classes, ask.data.rules])
    )


def _finish(task: Generator[None, Any, Scores]) -> Scores:
    """The scores of a task that has seen all batches."""
    try:
        task.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("a task ends when there are no more batches")


# -- what the command line names ---------------------------------------------------------------------------------------


def _named(config: EvalConfig) -> list[tuple[str, str, RegionWay]]:
    """(name, folder, way) of every model, each name once; raises as `load_encoder` for what can't be one."""
    models = []
    for spec in config.model:
        name, folder, way = parse_model(spec)
        way = way or config.regions or natural_way(folder)
        check_regions(folder, way, config.view)
        models.append((spec, name or f"{Path(folder).resolve().name}, {way}", folder, way))
    count = Counter(name for _, name, _, _ in models)
    view = "" if config.view == "letterbox" else f" ({config.view})"
    named = [  # every run's folder is called model
        ((name if count[name] == 1 else spec) + view, folder, way) for spec, name, folder, way in models
    ]
    if len({name for name, *_ in named}) < len(named):
        raise ValueError(f"two models of one name: {', '.join(config.model)}; tell them apart by NAME=FOLDER")
    return named


def open_sets(
    tasks: Sequence[str],
    locations: Sequence[str],
    class_names: str | None,
    *,
    on_source: Collection[str],
    readers: Mapping[str, Callable[..., EvalSet]],
) -> list[tuple[list[str], EvalSet]]:
    """The sets at `[TASK=]LOCATION`, each with the tasks asked of it; those on one source share it.

    `class_names`: a file of them; `on_source`: the tasks that any source serves; `readers`: of the others what reads
    their public set.  Raises ValueError for a task without data, data without a task, and a set that comes twice.
    """
    own: dict[str, list[str]] = {}
    shared: list[str] = []
    for place in locations:
        head, equals, rest = place.partition("=")
        name = head.replace("_", "-")
        if equals and (name in on_source or name in readers):
            if name not in tasks:
                raise ValueError(f"--data {place}: the task {name} is not asked for")
            own.setdefault(name, []).append(rest)
        else:
            shared.append(place)
    if without := [task for task in tasks if task not in own and not shared]:
        raise ValueError(f"no data for {without[0]}: --data {without[0]}=LOCATION")
    if shared and all(task in own for task in tasks):
        raise ValueError(f"--data {shared[0]}: every task has data of its own")
    places = {task: own.get(task, shared) for task in tasks}
    names = None
    if class_names is not None:
        names = [line.strip() for line in files.read_text(class_names).splitlines() if line.strip()]
    sets: list[tuple[list[str], EvalSet]] = [
        ([task], read_set(readers[task], task, place)) for task in tasks if task in readers for place in places[task]
    ]
    asked_of_sources = [task for task in tasks if task in on_source]
    for place in dict.fromkeys(place for task in asked_of_sources for place in places[task]):
        data = source_set(open_source(place), place, class_names=names)
        sets.append(([task for task in asked_of_sources if place in places[task]], data))
    count = Counter(f"{task} {data.name}" for asked, data in sets for task in asked)
    if twice := [name for name, times in count.items() if times > 1]:
        raise ValueError(f"the same set twice: {', '.join(twice)}")
    return sets


# -- what is written ---------------------------------------------------------------------------------------------------


def _pictures(encoder: Encoder, sets: Sequence[EvalSet], results: Sequence[Result], count: int) -> list[Prediction]:
    """The encoder's predictions on the first images with named regions of the first set that has some."""
    for data in sets:
        names = [one.class_names for one in results if one.data == data.name and one.class_names]
        shown: list[Loaded] = []
        if names:
            unread = Unread(allowed=2**63)
            for loaded in load(data, data.num_images, 16, unread):
                shown += [one for one in loaded if one.item.texts]
                if len(shown) >= count:
                    break
        if shown:
            return predict(encoder, shown[:count], names[0])
    return []


def _write_folder(
    out: Path, config: EvalConfig, results: Sequence[Result], pictures: Sequence[Prediction], table: str
) -> None:
    """metrics.json (headline scores by encoder), evaluation.json (all), evaluation.md and report.html."""
    files.write_json(out / "metrics.json", flat_metrics(results))
    files.write_text(out / "evaluation.json", to_json(results))
    files.write_text(out / "evaluation.md", table)
    runs = {Path(parse_model(spec)[1]).resolve().parent for spec in config.model}
    logs = {run.name: run / "log.jsonl" for run in sorted(runs) if (run / "log.jsonl").is_file()}
    left_out = {"loss curves": f"left out: {len(logs)} runs, of which {len(SERIES)} could be told apart"}
    encoders = list(dict.fromkeys(result.encoder for result in results))
    write_html_report(
        out / "report.html",
        title=config.title,
        lede=f"{len(encoders)} encoder{'s' * (len(encoders) > 1)} on the same images of {', '.join(config.data)}.",
        results=results,
        logs=logs if len(logs) <= len(SERIES) else {},
        pictures=pictures,
        facts={
            "data": ", ".join(config.data),
            "encoders": "; ".join(config.model),
            "precision": ", ".join(dict.fromkeys(result.precision for result in results)),
            **(left_out if len(logs) > len(SERIES) else {}),
        },
    )
