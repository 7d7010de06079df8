"""The study: what each part of CLOC contributes, on generated scenes, at equal data, steps and seeds.

    python -m benchmarks.study --out runs/study                      # everything, two runs at a time; again to go on
    python -m benchmarks.study --out runs/study --only cross roi --seeds 0
    python -m benchmarks.study --out runs/study --device cuda --at-once 12

A run is a variant with a seed.  It trains (resuming where it was stopped), scores the checkpoints on the way and the
final model, and leaves `OUT/VARIANT-SEED/result.json`, which is written last.  Runs with a result are skipped.
`study_report.py` makes tables and pictures of the results.

Learning rates are chosen by one rule.  Each of `TUNED` is trained with each of `LEARNING_RATES` on a seed that no table
shows.  The best region mAcc (mean over the sets) decides, and a variant takes the rate of the method it is a form of.

Costs are CPU seconds per step, one thread, loader included, which do not grow when other programs compete for the
cores.  They are measured side by side before the runs that depend on them, whatever device those are on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.runs import has_result, run_all, this_program
from benchmarks.study_variants import (
    IMAGE_PX,
    LEARNING_RATES,
    NOISE,
    NUM_THINGS,
    STEPS,
    TUNING_SEED,
    WORLDS,
    Variant,
    tuning,
    variants,
)
from opencloc import files

POINTS = 5  # checkpoints scored on the way, the last included
SEEDS = (0, 1, 2, 3, 4)
SETS = {  # what the final models are scored on; no scene of them was trained on
    "seen": "split=train",
    "unseen combinations": "split=unseen_combinations",
}
NUM_IMAGES = 256  # of each set
NUM_IMAGES_ON_THE_WAY = 128
NUM_LABELLED = 6000  # scenes labelled through VESL
COSTED = ("clip", "clip_crops", "roi", "encoder", "cross")
COST_STEPS = (20, 60)  # the difference of two trainings leaves out what the start costs


# -- one run -----------------------------------------------------------------------------------------------------------


def run(variant: Variant, seed: int, out: Path, steps: int, device: str) -> None:
    """Trains and scores one variant with one seed, leaving result.json in its folder."""
    from opencloc.eval.encoders import RegionWay, load_encoder
    from opencloc.train.checkpoint import list_checkpoints
    from opencloc.train.loop import train

    folder = out / f"{variant.name}-{seed}"
    config = configuration(variant, seed, out, steps, device)
    train(config)
    is_clip = config.loss.region_weight == 0
    ways: tuple[RegionWay, ...] = ("crop", "maskclip", "pool", "roi") if is_clip else ("prompter",)
    curve = []
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        scores = score(load_encoder(checkpoint, ways[0], device=device), variant.world, "seen", NUM_IMAGES_ON_THE_WAY)
        curve.append({"step": int(checkpoint.name.removeprefix("step_")), "region_macc": scores.get("region_macc")})
    final = {}
    for way in ways:
        encoder = load_encoder(folder / "model", way, device=device)
        final[way] = {name: score(encoder, variant.world, name, NUM_IMAGES) for name in SETS}
    result = {
        "variant": variant.name,
        "seed": seed,
        "steps": config.steps,
        "lr": config.optim.lr,
        "device": device,
        "curve": curve,
        "final": final,
    }
    files.write_json(folder / "result.json", result)
    shutil.rmtree(folder / "checkpoints")


def configuration(variant: Variant, seed: int, out: Path, steps: int, device: str = "cpu") -> Any:
    """The training configuration of a run; `steps` for `STEPS`, others in proportion."""
    from opencloc.config import from_scratch_left_out
    from opencloc.presets import PRESETS

    scenes = f"scenes:rich?{WORLDS[variant.world]}{NOISE[variant.noise]}"
    train_on = (scenes,)
    if variant.labels is not None:
        train_on = (f"shards:{out / 'labelled'}?sidecar={out / 'labels' / variant.labels / 'vesl'}",)
    if variant.crops:
        train_on = (scenes, f"crops:{scenes}?seed=0")
    fields = dict(variant.fields)
    own = fields.pop("steps", STEPS) * steps / STEPS
    if variant.like is not None:
        costs = read_costs(out)
        own *= costs["cross"] / costs[variant.like]
    own = round(own)
    changes: dict[str, Any] = {
        "out": str(out / f"{variant.name}-{seed}"),
        "seed": seed,
        "steps": own,
        "device": device,
        "precision": "fp32",
        "checkpoint_every": -(-own // POINTS),
        "keep_checkpoints": POINTS,
        "data.num_regions": 4,  # the published M
        "data.train": train_on,
    }
    if "optim.lr" not in fields:
        changes["optim.lr"] = best_learning_rate(out, variant.tuned_as)
    if variant.start is not None:
        changes["model.init_from"] = str(out / f"{variant.start}-{seed}" / "model")
    config = PRESETS["tiny"]() if variant.start is None else from_scratch_left_out(PRESETS["tiny"]())
    for name, value in (changes | fields).items():
        config = replaced(config, name.split("."), value)
    return config


def replaced(config: Any, path: list[str], value: Any) -> Any:
    """A copy of nested dataclasses with one field changed."""
    first, *rest = path
    return dataclasses.replace(config, **{first: replaced(getattr(config, first), rest, value) if rest else value})


def best_learning_rate(out: Path, method: str) -> float:
    """The rate with the best region mAcc, mean over the sets, of all ways to embed a region."""

    def macc(lr: float) -> float:
        final = read_result(out, f"{method}_lr{lr:g}", TUNING_SEED)["final"]
        return max(statistics.fmean(scores[name]["region_macc"] for name in SETS) for scores in final.values())

    return max(LEARNING_RATES, key=macc)


def score(encoder: Any, world: str, name: str, num_images: int) -> dict[str, float]:
    """Headline scores on one of `SETS`; the class names are all that its scenes can show, and those of training."""
    from opencloc.data.scenes.scenes import SceneConfig
    from opencloc.data.sources.spec import open_source
    from opencloc.eval.report import flat_metrics
    from opencloc.eval.run import evaluate
    from opencloc.eval.sets.source import source_set

    source: Any = open_source(f"scenes:rich?{WORLDS[world]}&seed=1&{SETS[name]}")
    seen = dataclasses.replace(source.config, split="train")
    assert isinstance(seen, SceneConfig)
    names = sorted({*source.config.class_names(), *seen.class_names()})
    data = source_set(source, name, class_names=names)
    tasks = ("region-recognition", "image-retrieval", "grounding")
    return flat_metrics(evaluate(encoder, data, tasks, num_images=num_images))[encoder.name]


def read_result(out: Path, name: str, seed: int) -> dict[str, Any]:
    """What a finished run left."""
    return json.loads((out / f"{name}-{seed}" / "result.json").read_text())


# -- costs -------------------------------------------------------------------------------------------------------------


def read_costs(out: Path) -> dict[str, float]:
    """Variant -> CPU seconds of a step."""
    return json.loads((out / "costs.json").read_text())


def measure_costs(out: Path, repeats: int = 3) -> None:
    """Writes costs.json: the median of what a step of each of `COSTED` takes, all of them running side by side."""
    found: dict[str, list[float]] = {name: [] for name in COSTED}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for repeat in range(repeats):
        print(f"costs of a step: {repeat + 1} of {repeats}", flush=True)
        running = {
            name: subprocess.Popen(program("--cost", name), env=environment, stdout=subprocess.PIPE, text=True)
            for name in COSTED
        }
        for name, process in running.items():
            output, _ = process.communicate()
            check(process.returncode)
            found[name].append(float(output.split()[-1]))
    files.write_json(out / "costs.json", {name: statistics.median(values) for name, values in found.items()})


def cost(variant: Variant) -> float:
    """CPU seconds of a step, loader processes included, from the difference of two trainings."""
    from opencloc.train.loop import train

    spent = []
    for steps in COST_STEPS:
        with tempfile.TemporaryDirectory() as folder:
            fields = {"optim.lr": 1e-3} | dict(variant.fields)
            config = configuration(dataclasses.replace(variant, fields=fields), 0, Path(folder), STEPS)
            before = cpu_seconds()
            train(dataclasses.replace(config, steps=steps, checkpoint_every=10_000))
            spent.append(cpu_seconds() - before)
    return (spent[1] - spent[0]) / (COST_STEPS[1] - COST_STEPS[0])


def cpu_seconds() -> float:
    """CPU time of this process and of the loader processes that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


# -- labels made by VESL -----------------------------------------------------------------------------------------------


def make_labels(out: Path, workers: int = 2) -> None:
    """Scenes as shards, labelled by VESL from their captions and by n-grams from their alt-texts, if not there yet."""
    from opencloc.cli import main as opencloc

    if not (out / "labelled").exists():
        partial = out / "labelled.partial"
        shutil.rmtree(partial, ignore_errors=True)
        arguments = ["data", "scenes", "--out", str(partial), "--num-images", str(NUM_LABELLED)]
        arguments += ["--image-px", str(IMAGE_PX), "--num-things", str(NUM_THINGS), "--attributes", "colour"]
        check(opencloc(arguments))
        os.replace(partial, out / "labelled")
    for name, options in {
        "nouns": ["--captions.existing-text", "caption"],
        "n-grams": ["--captions.existing-text", "alt-text", "--phrases", "n-grams"],
    }.items():
        detector = f"{Path(__file__).with_name('scene_detector.py')}:factory?shards={out / 'labelled'}"
        arguments = ["label", "--data", str(out / "labelled"), "--out", str(out / "labels" / name), *options]
        check(opencloc([*arguments, "--detector", detector, "--resolution", str(IMAGE_PX), "--workers", str(workers)]))


def check(status: int) -> None:
    if status:
        raise SystemExit(f"failed with status {status}")


# -- all runs ----------------------------------------------------------------------------------------------------------


def program(*arguments: str) -> list[str]:
    """This program again, in a process of its own."""
    return this_program("benchmarks.study", *arguments)


def waves(chosen: list[Variant], seeds: list[int]) -> Iterator[tuple[Variant, int]]:
    """All runs: those that choose learning rates, then seed by seed, so that a study cut short has whole seeds."""
    wanted = {name for variant in chosen for name, seed in variant.needs(0) if seed == TUNING_SEED}
    yield from ((variant, TUNING_SEED) for variant in tuning() if variant.name in wanted)
    for seed in seeds:
        for variant in chosen:
            yield variant, seed


def do_all(chosen: list[Variant], seeds: list[int], out: Path, steps: int, at_once: int, device: str) -> int:
    """Does every variant and seed that has no result yet, learning rates first; returns how many failed."""
    known = {variant.name: variant for variant in [*chosen, *tuning()]}
    todo = [(v.name, seed) for v, seed in waves(chosen, seeds) if not has_result(out, (v.name, seed))]
    print(f"{len(todo)} runs to do, {at_once} at a time", flush=True)
    if any(known[name].like for name, _ in todo) and not (out / "costs.json").exists():
        measure_costs(out)
    if any(known[name].labels for name, _ in todo):
        make_labels(out)
    command = program("--out", str(out), "--steps", str(steps), "--device", device)
    return run_all(todo, out, at_once, program=command, needs=lambda run: known[run[0]].needs(run[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", help="names of variants; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS, help="of most variants; the others in proportion")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--costs", action="store_true", help="only measure the costs of a step, anew")
    parser.add_argument("--run", nargs=2, metavar=("VARIANT", "SEED"), help="do this one run, in this process")
    parser.add_argument("--cost", metavar="VARIANT", help="print the CPU seconds of its step")
    arguments = parser.parse_args()
    known = {variant.name: variant for variant in [*variants(), *tuning()]}
    for name in [*(arguments.only or []), *(arguments.run or [])[:1], *([arguments.cost] if arguments.cost else [])]:
        if name not in known:
            parser.error(f"unknown variant {name!r}; there are: {', '.join(known)}")
    if arguments.cost:
        print(cost(known[arguments.cost]))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.costs:
        measure_costs(arguments.out)
        return
    if arguments.run:
        name, seed = arguments.run
        run(known[name], int(seed), arguments.out, arguments.steps, arguments.device)
        return
    chosen = [known[name] for name in arguments.only] if arguments.only else variants()
    failed = do_all(chosen, arguments.seeds, arguments.out, arguments.steps, arguments.at_once, arguments.device)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
