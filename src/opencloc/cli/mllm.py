"""Verbs of multimodal language models: mllm build, train, chat, eval, export."""

from __future__ import annotations

from pathlib import Path

from opencloc.cli.arguments import HELP, parse, together, value
from opencloc.cli.training import run_training


def build_model(arguments: list[str]) -> None:
    """Make a multimodal model of a vision encoder and a language model"""
    from transformers.utils.logging import disable_progress_bar

    from opencloc.mllm.build import BuildConfig, build

    config = parse(BuildConfig, arguments, "mllm build")
    disable_progress_bar()  # transformers' own
    print(build(config))
    print(f"{config.encoder} and {config.llm}, regions by {config.sampler}; opencloc mllm train align is next")


def train_model(arguments: list[str]) -> int | None:
    """Train a multimodal model: opencloc mllm train align|instruct|CONFIG.json --model FOLDER [--field value ...]"""
    from opencloc.config import from_json
    from opencloc.mllm.config import STAGES, MllmTrainConfig
    from opencloc.mllm.train import train

    if not arguments or arguments[0] in HELP:
        print(f"{train_model.__doc__}\n\nStages:")
        for name, stage in STAGES.items():
            print(f"  {name:<12} {(stage.__doc__ or '').splitlines()[0]}")
        print("\nopencloc mllm train STAGE --help lists all fields.  The same command again goes on where it stopped.")
        return 0
    first, rest = arguments[0], arguments[1:]
    if first in STAGES:
        if (given := value(rest, "--model")) is None and not any(flag in rest for flag in HELP):
            raise ValueError(f"mllm train {first} needs --model FOLDER, of opencloc mllm build or an earlier stage")
        default = STAGES[first](given or "MODEL")
    elif Path(first).suffix == ".json":
        default = from_json(MllmTrainConfig, Path(first).read_bytes(), first)
    else:
        raise ValueError(f"{first!r} is neither a stage ({', '.join(STAGES)}) nor a .json configuration")
    config = parse(MllmTrainConfig, rest, f"mllm train {first}", default=default)
    return run_training(train, config, "mllm train", "conversations")


def chat(arguments: list[str]) -> None:
    """Talk with a multimodal model about a photo, in the terminal"""
    from opencloc.mllm.terminal import ChatConfig, run_chat

    run_chat(parse(ChatConfig, arguments, "mllm chat"))


def evaluate(arguments: list[str]) -> None:
    """Score multimodal models: opencloc mllm eval [TASK ...] --data LOCATION --model FOLDER ..."""
    from opencloc.mllm.evaluate import MllmEvalConfig, list_tasks, run_mllm_eval

    if not arguments or arguments[0] in HELP:
        print(f"{evaluate.__doc__}\n\n{list_tasks()}\n")
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    tasks = ["--tasks", *arguments[:count]] if count else []
    run_mllm_eval(parse(MllmEvalConfig, [*tasks, *together(arguments[count:], "--data", "--model")], "mllm eval"))


def export(arguments: list[str]) -> None:
    """Write a multimodal model as a plain LLaVA, for transformers, vLLM, lmms-eval and others"""
    from opencloc.mllm.export import MllmExportConfig, run_export

    config = parse(MllmExportConfig, arguments, "mllm export")
    print(run_export(config))
    print(f"{config.model} as a plain LlavaForConditionalGeneration; regions need {config.model} itself.")
