"""The study: what each part of CLOC contributes, on generated scenes, at equal data, steps and seeds.

    python -m benchmarks.study --out runs/study                      # everything, two runs at a time; again to go on
    python -m benchmarks.study --out runs/study --only cross roi --seeds 0

A run is a variant with a seed.  It trains (resuming where it was stopped), scores the checkpoints on the way and the
final model, and leaves `OUT/VARIANT-SEED/result.json`, which is written last.  Runs with a result are skipped.
`study_report.py` makes tables and pictures of the results.

Every run has one thread.  Its cost is its CPU time, loader included, which does not grow when other programs compete
for the cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opencloc import files

NUM_THINGS, IMAGE_PX = 30, 64
WORLD = f"num_things={NUM_THINGS}&attributes=colour&image_px={IMAGE_PX}"  # each thing in 9 colours
NOISE = {
    "exact": "",
    "noisy": "&box_jitter=0.1&wrong_text=0.1&missing_region=0.25",
    "very noisy": "&box_jitter=0.2&wrong_text=0.3&missing_region=0.5",
}
STEPS = 500
POINTS = 5  # checkpoints scored on the way, the last included
SEEDS = (0, 1, 2)
SETS = {  # what the final models are scored on; no scene of them was trained on
    "seen": "split=train",
    "unseen combinations": "split=unseen_combinations",
    "unseen things": "split=unseen_things",
    "second style": "split=train&style=sketch",
}
NUM_IMAGES = 256  # of each set
NUM_IMAGES_ON_THE_WAY = 128
NUM_LABELLED = 6000  # scenes labelled through VESL


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the study's table."""

    name: str
    title: str
    group: str
    noise: str = "noisy"
    fields: Mapping[str, Any] = field(default_factory=dict)  # dotted fields of TrainConfig that differ from the base's
    crops: bool = False  # also trains on the crops of the regions, as many as whole images
    labels: str | None = None  # labels made by `opencloc label` instead of the scenes' own
    start: str | None = None  # variant whose trained model (same seed) it starts from
    like: str | None = None  # variant that it is but for the number of steps: as many as the CPU time of `cross` allows

    @property
    def needs(self) -> tuple[str, ...]:
        """Variants that have to have a result (same seed) first."""
        return tuple(name for name in (self.start, self.like, self.like and "cross") if name)


def variants() -> list[Variant]:
    """All rows, in the order of the table."""
    rows = [Variant(name="clip", title="CLIP", group="method", fields={"loss.region_weight": 0.0})]
    clip_crops = Variant(
        name="clip_crops",
        title="CLIP + region crops as images",
        group="method",
        fields={"loss.region_weight": 0.0, "batch_size": 64},
        crops=True,
    )
    roi = Variant(name="roi", title="CLOC, RoIAlign", group="method", fields={"model.prompter": "roi"})
    encoder = Variant(
        name="encoder", title="CLOC, published Prompter", group="method", fields={"model.prompter": "encoder"}
    )
    cross = Variant(name="cross", title="CLOC, cross Prompter (default)", group="method")
    rows += [clip_crops, roi, encoder, cross]
    rows += [
        dataclasses.replace(v, name=f"{v.name}_same_time", group="equal CPU time", like=v.name)
        for v in (clip_crops, encoder)
    ]
    for noise, chosen in (("exact", (clip_crops, roi, encoder, cross)), ("very noisy", (roi, cross))):
        rows += [
            dataclasses.replace(v, name=f"{v.name}_{noise.replace(' ', '_')}", group=f"{noise} labels", noise=noise)
            for v in chosen
        ]
    ablations: list[tuple[str, str, dict[str, Any]]] = [
        ("no_filter", "no conflict filter", {"loss.conflict_filter": "none"}),
        ("identical_filter", "filter of identical texts only", {"loss.conflict_filter": "identical"}),
        ("no_grounding", "no grounding loss", {"loss.grounding_weight": 0.0}),
        ("published_grounding", "published box head and loss", {"model.box_head": "mlp", "loss.grounding": "squared"}),
        ("mlp_l1_giou", "published box head, L1 + GIoU", {"model.box_head": "mlp"}),
        ("m1", "M = 1", {"data.num_regions": 1}),
        ("m2", "M = 2", {"data.num_regions": 2}),
        ("m8", "M = 8", {"data.num_regions": 8}),
        ("no_prior", "no soft prior", {"model.prior_slope": None}),
        ("no_shared_positions", "no shared position basis", {"model.shared_positions": False}),
    ]
    rows += [Variant(name=name, title=title, group="ablation", fields=fields) for name, title, fields in ablations]
    rows += [
        Variant(name="vesl", title="VESL: phrases of captions", group="labels", labels="nouns"),
        Variant(name="n_grams", title="n-grams of alt-texts", group="labels", labels="n-grams"),
        Variant(name="from_clip", title="starts from the trained CLIP", group="start", start="clip"),
    ]
    return rows


# -- one run -----------------------------------------------------------------------------------------------------------


def run(variant: Variant, seed: int, out: Path, steps: int) -> None:
    """Trains and scores one variant with one seed, leaving result.json in its folder."""
    from opencloc.eval.encoders import load_encoder
    from opencloc.train.checkpoint import list_checkpoints
    from opencloc.train.loop import train

    folder = out / f"{variant.name}-{seed}"
    if variant.like is not None:
        own, budget = (read_result(out, name, seed) for name in (variant.like, "cross"))
        steps = round(budget["steps"] * budget["cpu_seconds_per_step"] / own["cpu_seconds_per_step"])
    config = configuration(variant, seed, out, steps)
    before = cpu_seconds()
    train(config)
    cost = spent(folder, cpu_seconds() - before)
    is_clip = config.loss.region_weight == 0
    curve = []
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        encoder = load_encoder(checkpoint, "crop" if is_clip else "prompter")
        scores = score(encoder, "seen", NUM_IMAGES_ON_THE_WAY)
        curve.append({"step": int(checkpoint.name.removeprefix("step_")), "region_macc": scores.get("region_macc")})
    ways = ("crop", "roi") if is_clip else ("prompter",)
    final = {way: {name: score(load_encoder(folder / "model", way), name, NUM_IMAGES) for name in SETS} for way in ways}
    result = {
        "variant": variant.name,
        "seed": seed,
        "steps": steps,
        "cpu_seconds_per_step": cost / steps,
        "parameters": sum(p.numel() for p in load_encoder(folder / "model", ways[0])._model.parameters()),  # pyright: ignore[reportAttributeAccessIssue]
        "curve": curve,
        "final": final,
    }
    files.write_json(folder / "result.json", result)
    shutil.rmtree(folder / "checkpoints")


def configuration(variant: Variant, seed: int, out: Path, steps: int) -> Any:
    """The training configuration of a run."""
    from opencloc.presets import PRESETS

    scenes = f"scenes:rich?{WORLD}{NOISE[variant.noise]}"
    train_on = (scenes,)
    if variant.labels is not None:
        train_on = (f"shards:{out / 'labelled'}?sidecar={out / 'labels' / variant.labels / 'vesl'}",)
    if variant.crops:
        train_on = (scenes, f"crops:{scenes}?seed=0")
    changes: dict[str, Any] = {
        "out": str(out / f"{variant.name}-{seed}"),
        "seed": seed,
        "steps": steps,
        "checkpoint_every": -(-steps // POINTS),
        "keep_checkpoints": POINTS,
        "data.num_regions": 4,  # the published M
        "data.train": train_on,
    }
    if variant.start is not None:
        changes["model.init_from"] = str(out / f"{variant.start}-{seed}" / "model")
    config = PRESETS["tiny"]()
    for name, value in (changes | dict(variant.fields)).items():
        config = replaced(config, name.split("."), value)
    return config


def replaced(config: Any, path: list[str], value: Any) -> Any:
    """A copy of nested dataclasses with one field changed."""
    first, *rest = path
    return dataclasses.replace(config, **{first: replaced(getattr(config, first), rest, value) if rest else value})


def score(encoder: Any, name: str, num_images: int) -> dict[str, float]:
    """Headline scores on one of `SETS`; the class names are all that its scenes can show, and those of training."""
    from opencloc.data.scenes.scenes import SceneConfig
    from opencloc.data.sources.spec import open_source
    from opencloc.eval.report import flat_metrics
    from opencloc.eval.run import evaluate
    from opencloc.eval.sets.source import source_set

    source: Any = open_source(f"scenes:rich?{WORLD}&seed=1&{SETS[name]}")
    seen = dataclasses.replace(source.config, split="train")
    assert isinstance(seen, SceneConfig)
    names = sorted({*source.config.class_names(), *seen.class_names()})
    data = source_set(source, name, class_names=names)
    tasks = ("region-recognition", "image-retrieval", "grounding")
    return flat_metrics(evaluate(encoder, data, tasks, num_images=num_images))[encoder.name]


def read_result(out: Path, name: str, seed: int) -> dict[str, Any]:
    """What a finished run left."""
    return json.loads((out / f"{name}-{seed}" / "result.json").read_text())


def cpu_seconds() -> float:
    """CPU time of this process and of the loader processes that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def spent(folder: Path, seconds: float) -> float:
    """CPU seconds of the training in all: a run that was interrupted adds to what it had spent before."""
    path = folder / "cpu_seconds.json"
    total = seconds + (json.loads(path.read_text()) if path.exists() else 0.0)
    files.write_json(path, total)
    return total


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


def waves(chosen: list[Variant], seeds: list[int]) -> Iterator[tuple[Variant, int]]:
    """All runs, seed by seed, so that a study cut short has whole seeds."""
    for seed in seeds:
        for variant in chosen:
            yield variant, seed


def run_all(chosen: list[Variant], seeds: list[int], out: Path, steps: int, at_once: int) -> int:
    """Runs every variant and seed that has no result yet, `at_once` at a time; returns how many failed."""
    todo = [(v, s) for v, s in waves(chosen, seeds) if not (out / f"{v.name}-{s}" / "result.json").exists()]
    print(f"{len(todo)} runs to do, {at_once} at a time", flush=True)
    if any(variant.labels for variant, _ in todo):
        make_labels(out)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running: dict[subprocess.Popen[bytes], str] = {}  # process -> name of its run
    started, done, failed = time.time(), 0, 0
    waiting = list(todo)
    while waiting or running:
        while waiting and len(running) < at_once and (n := ready(waiting, out)) is not None:
            variant, seed = waiting.pop(n)
            name = f"{variant.name}-{seed}"
            command = [sys.executable, "-m", "benchmarks.study", "--out", str(out), "--steps", str(steps)]
            command += ["--run", variant.name, str(seed)]
            with (out / f"{name}.log").open("ab") as log:
                running[subprocess.Popen(command, env=environment, stdout=log, stderr=log)] = name
        if not running:
            raise SystemExit(f"runs wait for runs that failed: {[variant.name for variant, _ in waiting]}")
        time.sleep(1)
        for process in [p for p in running if p.poll() is not None]:
            name = running.pop(process)
            done += 1
            failed += process.returncode != 0
            state = "done" if process.returncode == 0 else f"FAILED, see {out / name}.log"
            eta = (time.time() - started) / done * (len(todo) - done)
            print(f"{name}: {state}  ({done} of {len(todo)}, ETA {eta / 60:.0f} min)", flush=True)
    return failed


def ready(waiting: list[tuple[Variant, int]], out: Path) -> int | None:
    """Number of the first run that waits for no other."""
    for n, (variant, seed) in enumerate(waiting):
        if all((out / f"{name}-{seed}" / "result.json").exists() for name in variant.needs):
            return n
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", help="names of variants; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--run", nargs=2, metavar=("VARIANT", "SEED"), help="do this one run, in this process")
    arguments = parser.parse_args()
    known = {variant.name: variant for variant in variants()}
    for name in [*(arguments.only or []), *(arguments.run or [])[:1]]:
        if name not in known:
            parser.error(f"unknown variant {name!r}; there are: {', '.join(known)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.run:
        run(known[arguments.run[0]], int(arguments.run[1]), arguments.out, arguments.steps)
        return
    chosen = [known[name] for name in arguments.only or known]
    sys.exit(1 if run_all(chosen, arguments.seeds, arguments.out, arguments.steps, arguments.at_once) else 0)


if __name__ == "__main__":
    main()
