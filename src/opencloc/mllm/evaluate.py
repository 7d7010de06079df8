"""`opencloc mllm eval`: multimodal models and data in; one table, JSON, a page and every answer out.

The sets, the pass over their images, the intervals and the tables are those of `opencloc eval`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from transformers.utils.logging import disable_progress_bar

from opencloc import files
from opencloc.config import Count
from opencloc.data.sources.spec import open_source
from opencloc.devices import Precision, choose_device
from opencloc.errors import BadSample
from opencloc.eval.report import Result, to_json, to_markdown, write_html_report
from opencloc.eval.run import one_pass, open_sets
from opencloc.eval.sets import ferret_bench, flickr_entities, pope, refcoco
from opencloc.eval.sets.item import EvalSet, by_unit
from opencloc.mllm import tasks
from opencloc.mllm.answers import Answerer
from opencloc.mllm.interview import Interview, Speaker
from opencloc.mllm.judge import Case, Judge, JudgeConfig, answers_file, instructions
from opencloc.mllm.templates import names_of
from opencloc.texts import canonical, is_text

SOURCE_TASKS: dict[str, tasks.Task] = {  # on any source of the project
    "refer-choice": tasks.choose_names,
    "refer-open": tasks.name_regions,
    "ground": tasks.find_texts,
    "exists": tasks.tell_presence,
    "caption": tasks.describe_images,
}
BENCHMARKS: dict[str, tuple[Callable[..., EvalSet], tasks.Task]] = {  # on a public set: how it is read, what is asked
    "refcoco": (refcoco.refcoco, tasks.find_texts),
    "refcoco+": (refcoco.refcoco_plus, tasks.find_texts),
    "refcocog": (refcoco.refcocog, tasks.find_texts),
    "flickr30k-entities": (flickr_entities.flickr30k_entities, tasks.find_texts),
    "pope": (pope.pope, tasks.answer_yes_no),
    "ferret-bench": (ferret_bench.ferret_bench, tasks.answer_ferret_bench),
}
TASKS: dict[str, tasks.Task] = SOURCE_TASKS | {name: task for name, (_, task) in BENCHMARKS.items()}


@dataclass(frozen=True, kw_only=True)
class MllmEvalConfig(JudgeConfig):
    """Scores of any number of multimodal models on the same questions, side by side."""

    model: tuple[str, ...]
    """Models as `[NAME=]FOLDER`, of `opencloc mllm build` or training."""
    data: tuple[str, ...]
    """Where the data lie, as `[TASK=]LOCATION[?key=value&...]`: any source for the tasks on a source, a folder for a
    public set.  Without TASK= it serves all tasks that have none of their own."""
    tasks: tuple[str, ...] = tuple(SOURCE_TASKS)
    """Which questions; default: the five on a source."""
    num_images: Count | None = None
    """At most so many, from the first on; default: 1000 of a source, all of a public set."""
    out: str | None = None
    """Folder for metrics.json, evaluation.json, evaluation.md, report.html, answers.jsonl and, of Ferret-Bench, the
    answers in its own form."""
    caption_tokens: Count = 128
    """Longest caption or answer to an open question, in tokens."""
    batch_size: Count = 16
    """Images encoded, and questions answered, at a time."""
    precision: Precision = "fp32"
    """What the models compute in: `fp32`, `bf16`, or `auto` (bf16 where the hardware has it)."""
    device: str = "auto"
    """`auto` (cuda if there is one), `cpu`, `cuda`, ..."""
    max_missing: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the images that may be missing or broken before the run fails."""
    resamples: Annotated[int, Field(ge=0)] = 1000
    """Draws of the bootstrap that gives the intervals; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for task in self.tasks:
            task_name(task)
        if not (self.tasks and self.model and self.data):
            raise ValueError("tasks, model and data need at least one value each")
        if "ferret-bench" in map(task_name, self.tasks) and self.judge is None and self.out is None:
            raise ValueError(
                "ferret-bench needs a judge (--judge URL), or --out for the answers to be judged elsewhere"
            )


def task_name(text: str) -> str:
    """The task called `text`, in which underscores stand for hyphens.  Raises ValueError for an unknown one."""
    if (name := text.replace("_", "-")) not in TASKS:
        raise ValueError(f"unknown task {text!r}; there are {', '.join(TASKS)}")
    return name


def list_tasks() -> str:
    """The tasks, a line for each, as the command's help shows them."""
    on_source = [f"  {name:<20} {(task.__doc__ or '').splitlines()[0]}" for name, task in SOURCE_TASKS.items()]
    public = [f"  {name:<20} {(read.__doc__ or '').splitlines()[0]}" for name, (read, _) in BENCHMARKS.items()]
    heads = "Tasks on any source (default: all five):", "Tasks on a public set, from its own files:"
    return "\n".join([heads[0], *on_source, heads[1], *public])


def run_mllm_eval(config: MllmEvalConfig) -> list[Result]:
    """The results of all models on all sets, after printing them and writing the files asked for."""
    disable_progress_bar()  # transformers' own, one for every model
    device = str(choose_device(config.device))
    named = _named(config.model)
    sets = open_sets(
        list(dict.fromkeys(map(task_name, config.tasks))),
        config.data,
        None,
        on_source=SOURCE_TASKS,
        readers={name: read for name, (read, _) in BENCHMARKS.items()},
    )
    results: list[Result] = []
    answers: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        judge = None
        if config.judge is not None and any("ferret-bench" in asked for asked, _ in sets):
            judge = Judge(config)  # before any model is loaded: it may not be there
            stack.callback(judge.close)
        for name, folder in named:
            answerer = Answerer.from_pretrained(
                folder, device, batch_size=config.batch_size, precision=config.precision
            )
            for asked, data in sets:
                found, said = interview(
                    answerer,
                    name,
                    data,
                    asked,
                    names=_names(data) if any(task in SOURCE_TASKS for task in asked) else {},
                    judge=judge,
                    location=_location(config.data),
                    config=config,
                )
                results += found
                answers += said
            del answerer
    table = to_markdown(results)
    if config.out is not None:
        _write_folder(Path(config.out), config, results, answers, table)
        print(config.out)
    print(table)
    return results


def interview(
    speaker: Speaker,
    name: str,
    data: EvalSet,
    asked: Sequence[str],
    *,
    names: dict[str, int],
    config: MllmEvalConfig,
    judge: Judge | None = None,
    location: str = "",
) -> tuple[list[Result], list[dict[str, Any]]]:
    """(the result of each task on a set, from one pass over its images; every answer, as answers.jsonl has them).

    `names`: what things of a source are called, and how often.  `location`: where Ferret-Bench's own rules may lie.
    Raises ValueError when too many of the images cannot be read, or none can.
    """
    told = instructions(location) if judge is not None else {}

    def finish(cases: list[Case]) -> list[tuple[float, float] | BadSample] | None:
        """Writes the answers of Ferret-Bench, then asks the judge, if there is one, who may fail."""
        if config.out is not None:
            path = Path(config.out) / f"ferret-bench/{_file_name(name)}/{data.name}.jsonl"
            files.write_text(path, answers_file(cases))
        return None if judge is None else judge.points(cases, [told[case.category] for case in cases])

    asks = [
        Interview(
            speaker=speaker,
            data=data,
            resamples=config.resamples,
            names=names,
            caption_tokens=config.caption_tokens,
            category=data.name,
            finish=finish,
        )
        for _ in asked
    ]
    done = one_pass(
        data,
        [TASKS[task](ask) for task, ask in zip(asked, asks, strict=True)],
        lambda loaded: loaded,
        what=f"{asked[0] if len(asked) == 1 else data.name}: {name}",
        num_images=config.num_images,
        batch_size=config.batch_size,
        max_missing=config.max_missing,
    )
    results, answers = [], []
    for task, ask, scores in zip(asked, asks, done.scores, strict=True):
        rules = [(TASKS[task].__doc__ or "").partition("\n")[0].rstrip("."), data.rules]
        if task == "ferret-bench" and judge is None:
            rules.append(f"not judged: the answers are in {config.out}/ferret-bench")
        elif task == "ferret-bench" and judge is not None:
            rules.append(f"judged by {judge.name}, {'by its own rules' if _has_rules(location) else 'by our wording'}")
        results.append(
            Result(
                encoder=name,
                task=task,
                data=data.name,
                rules="; ".join(filter(None, rules)),
                precision="bf16" if getattr(speaker, "bf16", False) else "fp32",
                images=ask.num_images,
                of_images=done.of_images,
                class_names=tuple(data.class_names or names) if task in ("refer-open", "caption") else (),
                scores=scores,
                skipped=by_unit(done.skipped + ask.skipped),
                noted=dict(done.noted),
            )
        )
        answers += [{"model": name, "task": task, "data": data.name} | answer for answer in ask.answers]
    return results, answers


def _names(data: EvalSet) -> dict[str, int]:
    """What things of a source are called, canonical, and how often; its categories where it has any."""
    names = Counter(canonical(name) for name in names_of(open_source(data.name)) if is_text(name) and name.strip())
    classes = {canonical(name) for name in data.class_names}
    return {name: count for name, count in names.items() if not classes or name in classes}


def _named(models: Sequence[str]) -> list[tuple[str, str]]:
    """(name, folder) of every `[NAME=]FOLDER`, each name once."""
    found = []
    for spec in models:
        name, _, folder = spec.rpartition("=")
        path = Path(folder).resolve()
        found.append((name or (path.parent if path.name == "model" else path).name, folder))  # runs/NAME/model
    count = Counter(name for name, _ in found)
    found = [(name if count[name] == 1 else folder, folder) for name, folder in found]
    if len(set(found)) < len(models) or len({name for name, _ in found}) < len(models):
        raise ValueError(f"two models of one name: {', '.join(models)}; tell them apart by NAME=FOLDER")
    return found


def _location(places: Sequence[str]) -> str:
    """The folder of Ferret-Bench among the data."""
    for place in places:
        head, equals, rest = place.partition("=")
        if equals and head.replace("_", "-") == "ferret-bench":
            return rest.partition("?")[0].rstrip("/")
    return places[0].partition("?")[0].rstrip("/")


def _has_rules(location: str) -> bool:
    return files.exists(f"{location}/rule.json")


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


def _write_folder(
    out: Path, config: MllmEvalConfig, results: Sequence[Result], answers: Sequence[dict[str, Any]], table: str
) -> None:
    files.write_json(out / "metrics.json", _metrics(results))
    files.write_text(out / "evaluation.json", to_json(results))
    files.write_text(out / "evaluation.md", table)
    files.write_text(out / "answers.jsonl", "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers))
    models = list(dict.fromkeys(result.encoder for result in results))
    write_html_report(
        out / "report.html",
        title="Evaluation of multimodal models",
        lede=f"{len(models)} model{'s' * (len(models) > 1)} on the same questions about {', '.join(config.data)}.",
        results=results,
        facts={"models": ", ".join(config.model), "tasks": ", ".join(config.tasks), "data": ", ".join(config.data)},
    )


def _metrics(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """For each model its scores in [0, 1] as `TASK SCORE`, where a task has several sets as `TASK SET SCORE`."""
    sets: dict[str, set[str]] = {}
    for result in results:
        sets.setdefault(result.task, set()).add(result.data)
    flat: dict[str, dict[str, float]] = {}
    for result in results:
        where = f"{result.task} {result.data}" if len(sets[result.task]) > 1 else result.task
        scores = {f"{where} {key}": one.value for key, one in result.scores.items() if not math.isnan(one.value)}
        flat.setdefault(result.encoder, {}).update(scores)
    return flat
