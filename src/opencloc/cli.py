"""The `opencloc` command: verbs, their arguments, and how errors are shown.  No work is done here.

Arguments are made by tyro from the configuration dataclasses; their docstrings are the help.  Verbs import what they
need when they run, so that help comes at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

Config = TypeVar("Config")
HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_group = any(name.split()[:-1] == arguments[:1] for name in VERBS)  # `data` of `data stats`
    if not arguments or arguments[0] in HELP or (is_group and arguments[1:] in ([], *([flag] for flag in HELP))):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from opencloc import __version__

        print(__version__)
        return 0
    verb = next((name for name in VERBS if arguments[: len(name.split())] == name.split()), None)
    if verb is None:
        print(f"opencloc: there is no verb {' '.join(arguments[:2])!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"opencloc {verb}: {message}", file=sys.stderr)
            return VERBS[verb](arguments[len(verb.split()) :]) or 0
    except KeyboardInterrupt:
        print("opencloc: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ not in ("RuntimeError", "OutOfMemoryError"):
            raise  # torch's other subclasses are bugs, not messages
        from opencloc.errors import redacted

        print(f"opencloc {verb}: {redacted(str(error))}", file=sys.stderr)
        return 1


def usage() -> str:
    """The help of the command itself."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: opencloc VERB ...",
            "",
            "Contrastive localized language-image pre-training: a CLIP whose regions can be prompted.",
            "",
            *lines,
            "",
            "opencloc VERB --help says more of each.",
        ]
    )


def _train(arguments: list[str]) -> int | None:
    """Train a model: opencloc train PRESET|CONFIG.json [--field value ...]"""
    from opencloc.config import TrainConfig, from_json, from_scratch_left_out
    from opencloc.presets import PRESETS
    from opencloc.train.loop import Interrupted, train

    if not arguments or arguments[0] in HELP:
        print(f"{_train.__doc__}\n\nPresets:")
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
    config = _parse(TrainConfig, rest, f"train {first}", default=default)
    if config.model.init_from == "CHECKPOINT" and not Path("CHECKPOINT").exists():
        raise ValueError(f"{first} starts from a checkpoint: --model.init-from FOLDER_OR_HUB_ID")
    try:
        model = train(config)
        if os.environ.get("RANK", "0") == "0":  # under torchrun one of them says it
            print(model)
            print(f"{config.steps:,} steps of {config.batch_size:,} images; how they went is in {config.out}/log.jsonl")
    except Interrupted as stop:
        print(f"opencloc train: {stop}", file=sys.stderr)
        return 130
    return 0


def _eval(arguments: list[str]) -> None:
    """Score encoders side by side: opencloc eval [TASK ...] --data LOCATION --model FOLDER ..."""
    from opencloc.eval.registry import BENCHMARKS, SOURCE_TASKS
    from opencloc.eval.run import EvalConfig, run_eval

    if not arguments or arguments[0] in HELP:
        print(f"{_eval.__doc__}\n\nTasks on any source (default: all four): {', '.join(SOURCE_TASKS)}")
        print("Tasks on a public set, from its own files (docs/guides/evaluate.md):")
        for name, benchmark in BENCHMARKS.items():
            print(f"  {name:<24} {benchmark.help}")
        print()
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    tasks = ["--tasks", *arguments[:count]] if count else []
    run_eval(_parse(EvalConfig, [*tasks, *_together(arguments[count:], "--data", "--model")], "eval"))


def _label(arguments: list[str]) -> int:
    """Make region-text labels for images: caption, phrases, detection (VESL)"""
    from opencloc.vesl.config import LabelConfig
    from opencloc.vesl.run import RunConfig, format_report, run_label

    parsed = _parse(_group("Label", label=LabelConfig, run=RunConfig), _together(arguments, "--data"), "label")
    report = run_label(parsed.label, parsed.run)
    print(format_report(report))
    return report.exit_code


def _data_stats(arguments: list[str]) -> None:
    """Figures of a labelled data set: counts, lengths, histograms, frequent texts"""
    from opencloc.data.inspect.stats import StatsConfig, write_stats
    from opencloc.errors import and_skipped, counted

    config = _parse(StatsConfig, arguments, "data stats")
    stats = write_stats(config)
    print(config.out)
    images = f"{stats.images_with_regions:,} of {stats.images:,} images"
    print(f"{stats.regions:,} regions on {images}{and_skipped(stats.skipped)}")
    if stats.noticed:
        print(
            f"opencloc data stats: worth a look: {counted(stats.noticed)}; see {config.out}/stats.md", file=sys.stderr
        )


def _data_view(arguments: list[str]) -> None:
    """An HTML contact sheet with boxes and texts drawn on the images"""
    from opencloc.data.inspect.view import ViewConfig, write_view
    from opencloc.errors import and_skipped

    config = _parse(ViewConfig, arguments, "data view")
    sheet = write_view(config)
    print(config.out)
    print(f"{sheet.regions:,} regions on {sheet.images:,} images{and_skipped(sheet.skipped)}")


def _data_check(arguments: list[str]) -> None:
    """Look at a data set before training: counts, skips, suspicious boxes, a picture of samples"""
    from opencloc.data.inspect.check import CheckConfig, write_check
    from opencloc.errors import and_skipped

    config = _parse(CheckConfig, arguments, "data check")
    found = write_check(config)
    print(config.out)
    images = f"{found.stats.images_with_regions:,} of {found.stats.images:,} images read"
    print(f"{found.stats.regions:,} regions on {images}{and_skipped(found.stats.skipped)}")
    for one in found.suspicions:
        print(f"opencloc data check: SUSPICIOUS: {one.what} ({one.share:.0%}): {one.advice}", file=sys.stderr)
    if not found.suspicions:
        print(f"Nothing suspicious; look at {config.out}/samples.png all the same.")


def _data_pack(arguments: list[str]) -> None:
    """Write images and their labels as self-contained shards"""
    from opencloc.data.inspect.pack import PackConfig, pack

    config = _parse(PackConfig, arguments, "data pack")
    report = pack(config)
    print(f"{config.out}\n{report}")


def _data_cache(arguments: list[str]) -> None:
    """Show or clear the cache of remote tars: its place, its size"""
    from opencloc.data.tars.cache import CacheConfig, cache_report

    print(cache_report(_parse(CacheConfig, arguments, "data cache")))


def _data_scenes(arguments: list[str]) -> None:
    """Write generated scenes as shards"""
    from opencloc.data.scenes.scenes import SceneConfig, write_scenes

    @dataclass(frozen=True, kw_only=True)
    class Out:
        """Where the tars go."""

        out: str
        """Folder for the tars."""
        num_images: int = 1000
        images_per_shard: int = 1000

    parsed = _parse(_group("WriteScenes", out=Out, scenes=SceneConfig), arguments, "data scenes")
    out = parsed.out
    paths = write_scenes(parsed.scenes, out.num_images, out.out, out.images_per_shard)
    print(out.out)
    print(f"{out.num_images:,} images in {len(paths):,} tars")


def _export(arguments: list[str]) -> None:
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
        """Folder of the CLOC checkpoint; for onnx any CLIP, SigLIP or SigLIP 2 too, whose own pooling embeds regions."""
        out: str
        """Folder to write.  An earlier export of that name is replaced, anything else refused."""
        format: Literal["clip", "onnx"] = "clip"
        """`clip`: the towers, as transformers loads them by CLIPModel or CLIPVisionModel.  `onnx`: everything as graphs
        for onnxruntime, with an example that needs no torch."""
        int8: bool = False
        """With `onnx`: 8-bit weights, a quarter of the size, for some loss."""

    config = _parse(Export, arguments, "export")
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


def _interpolate(arguments: list[str]) -> None:
    """Write the checkpoint between a fine-tuned model and its start (WiSE-FT)"""
    from transformers.utils.logging import disable_progress_bar

    from opencloc.model.interpolate import InterpolateConfig, write_interpolated

    config = _parse(InterpolateConfig, arguments, "interpolate")
    disable_progress_bar()  # transformers' own
    print(write_interpolated(config))
    print(f"{100 * config.share:g} % of the way from {config.start} to {config.model}")


def _card(arguments: list[str]) -> None:
    """Write a checkpoint's model card: data, licence, scores, code that runs"""
    from opencloc.model.card import CardConfig, write_card

    print(write_card(_parse(CardConfig, arguments, "card")))


def _push(arguments: list[str]) -> None:
    """Publish a checkpoint or an export on the Hugging Face hub"""
    from transformers.utils.logging import disable_progress_bar

    from opencloc.model.hub import PushConfig, push

    config = _parse(PushConfig, arguments, "push")
    disable_progress_bar()  # transformers' own
    print(push(config))
    print(f"There are now the files of {config.model}.")


def _group(name: str, **parts: type) -> Any:
    """A class of several configurations, whose fields the command line takes without the parts' names."""
    import tyro

    fields = [(part, Annotated[kind, tyro.conf.arg(name="")]) for part, kind in parts.items()]
    return make_dataclass(name, fields, kw_only=True)


def _together(arguments: list[str], *options: str) -> list[str]:
    """The arguments with all values of an option that comes several times behind it; tyro would take the last only."""
    values: dict[str, list[str]] = {option: [] for option in options}
    others: list[str] = []
    into = others
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in values:
            into = values[name]
            into += [value] if equals else []
        else:
            into = others if argument.startswith("--") else into
            into.append(argument)
    return [*others, *(part for option, found in values.items() if found for part in (option, *found))]


def _parse(kind: Callable[..., Config], arguments: list[str], verb: str, default: Any = None) -> Config:
    import tyro

    return tyro.cli(
        kind,
        args=arguments,
        prog=f"opencloc {verb}",
        default=tyro.MISSING_NONPROP if default is None else default,
    )


VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "train": _train,
    "eval": _eval,
    "label": _label,
    "export": _export,
    "interpolate": _interpolate,
    "card": _card,
    "push": _push,
    "data scenes": _data_scenes,
    "data stats": _data_stats,
    "data view": _data_view,
    "data check": _data_check,
    "data pack": _data_pack,
    "data cache": _data_cache,
}

if __name__ == "__main__":
    sys.exit(main())
