"""Verbs from data to a published model: train, eval, label, export, card, push."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opencloc.cli.arguments import HELP, group, parse, together


def train_model(arguments: list[str]) -> int | None:
    """Train a model: opencloc train PRESET|CONFIG.json [--field value ...]"""
    from opencloc.config import TrainConfig, from_json, from_scratch_left_out
    from opencloc.presets import PRESETS
    from opencloc.train.loop import train

    if not arguments or arguments[0] in HELP:
        print(f"{train_model.__doc__}\n\nPresets:")
        for name, preset in PRESETS.items():
            print(f"  {name:<12} {(preset.__doc__ or '').splitlines()[0]}")
        print(
            "\nopencloc train PRESET --help lists all fields.  --loss.region-weight 0 trains the CLIP baseline,\n"
            "--model.init-from FOLDER starts from a CLIP.  The same command again goes on where the run stopped."
        )
        return 0
    first, rest = arguments[0], arguments[1:]
    if first in PRESETS:
        default = PRESETS[first]()
    elif Path(first).suffix == ".json":
        default = from_json(TrainConfig, Path(first).read_bytes(), first)
    else:
        raise ValueError(f"{first!r} is neither a preset ({', '.join(PRESETS)}) nor a .json configuration")
    if any(argument.replace("_", "-").startswith("--model.init-from") for argument in rest):
        default = from_scratch_left_out(default)
    config = parse(TrainConfig, rest, f"train {first}", default=default)
    if config.model.init_from == "CHECKPOINT" and not Path("CHECKPOINT").exists():
        raise ValueError(f"{first} starts from a checkpoint: --model.init-from FOLDER_OR_HUB_ID")
    return run_training(train, config, "train", "images")


def run_training(train: Callable[[Any], Path], config: Any, verb: str, unit: str) -> int:
    """Runs a training, says what came of it, and returns the exit status.  `unit`: what a batch consists of."""
    from opencloc.train.loop import Interrupted

    try:
        model = train(config)
        if os.environ.get("RANK", "0") == "0":  # under torchrun one of them says it
            print(model)
            print(f"{config.steps:,} steps of {config.batch_size:,} {unit}; how they went is in {config.out}/log.jsonl")
    except Interrupted as stop:
        print(f"opencloc {verb}: {stop}", file=sys.stderr)
        return 130
    return 0


def evaluate(arguments: list[str]) -> None:
    """Score encoders side by side: opencloc eval [TASK ...] --data LOCATION --model FOLDER ..."""
    from opencloc.eval.registry import BENCHMARKS, SOURCE_TASKS
    from opencloc.eval.run import EvalConfig, run_eval

    if not arguments or arguments[0] in HELP:
        print(f"{evaluate.__doc__}\n\nTasks on any source (default: all four): {', '.join(SOURCE_TASKS)}")
        print("Tasks on a public set, from its own files (docs/guides/evaluate.md):")
        for name, benchmark in BENCHMARKS.items():
            print(f"  {name:<24} {benchmark.help}")
        print()
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    tasks = ["--tasks", *arguments[:count]] if count else []
    run_eval(parse(EvalConfig, [*tasks, *together(arguments[count:], "--data", "--model")], "eval"))


def label(arguments: list[str]) -> int:
    """Make region-text labels for images: caption, phrases, detection (VESL)"""
    from opencloc.vesl.config import LabelConfig
    from opencloc.vesl.run import RunConfig, format_report, run_label

    parsed = parse(group("Label", label=LabelConfig, run=RunConfig), together(arguments, "--data"), "label")
    report = run_label(parsed.label, parsed.run)
    print(format_report(report))
    return report.exit_code


def export(arguments: list[str]) -> None:
    """Write a model for other programs: a plain CLIP checkpoint (LLaVA, Ferret, ...), or ONNX graphs"""
    from transformers.utils.logging import disable_progress_bar

    from opencloc.model.cloc import ClocModel
    from opencloc.model.export import check_apart, export_clip
    from opencloc.model.loading import model_path
    from opencloc.model.predictor import Predictor
    from opencloc.model.processor import ClocProcessor

    @dataclass(frozen=True, kw_only=True)
    class Export:
        """A model as a folder for other programs."""

        model: str
        """Folder of the CLOC checkpoint; for onnx any CLIP, SigLIP or SigLIP 2 too, whose pooling embeds regions."""
        out: str
        """Folder to write.  An earlier export of that name is replaced, anything else refused."""
        format: Literal["clip", "onnx"] = "clip"
        """`clip`: the towers, as transformers loads them by CLIPModel or CLIPVisionModel.  `onnx`: everything as graphs
        for onnxruntime, with an example that needs no torch."""
        int8: bool = False
        """With `onnx`: 8-bit weights, a quarter of the size, for some loss."""

    config = parse(Export, arguments, "export")
    if config.int8 and config.format != "onnx":
        raise ValueError("--int8 goes with --format onnx")
    disable_progress_bar()  # transformers' own
    check_apart(model_path(config.model), config.out)
    if config.format == "onnx":
        from opencloc.model.onnx import OPSET, export_onnx

        predictor = Predictor.from_pretrained(config.model)
        print(export_onnx(predictor.model, predictor.processor, config.out, int8=config.int8))
        print(f"{config.model} as ONNX, opset {OPSET}; its README and opencloc_onnx.py say how to use it.")
        return
    model = ClocModel.from_pretrained(config.model)
    print(export_clip(model, ClocProcessor.from_pretrained(config.model), config.out))
    print(f"The towers of {config.model} as a plain {type(model.clip).__name__}; its README says how to use it.")


def card(arguments: list[str]) -> None:
    """Write a checkpoint's model card: data, licence, scores, code that runs"""
    from opencloc.model.card import CardConfig, write_card

    print(write_card(parse(CardConfig, arguments, "card")))


def push_folder(arguments: list[str]) -> None:
    """Publish a checkpoint or an export on the Hugging Face hub"""
    from transformers.utils.logging import disable_progress_bar

    from opencloc.model.hub import PushConfig, push

    config = parse(PushConfig, arguments, "push")
    disable_progress_bar()  # transformers' own
    print(push(config))
    print(f"There are now the files of {config.model}.")
