"""The study of multimodal models: what the encoder and the region sampler contribute, at equal data, steps and seeds.

    python -m benchmarks.mllm_study --out runs/mllm_study                    # everything; again to go on
    python -m benchmarks.mllm_study --out runs/mllm_study --only cloc_prompter clip --seeds 0 --at-once 8 --device cuda

Encoders come first: CLOC and CLIP of the preset `tiny`, and a CLIP trained as long as it takes for its retrieval to
equal CLOC's; and a small Llama that learns to read (`benchmarks.mllm_language`).  Then each arm joins a frozen encoder
to that language model and trains it on questions about scenes in LLaVA's two stages: projector and sampler alone, then
the language model too.  A run leaves `OUT/NAME-SEED/result.json`, written last; runs with a result are skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import mllm_language
from benchmarks.mllm_language import (
    BATCH_SIZE,
    COORDINATE_STEPS,
    IMAGE_PX,
    QUESTIONS,
    RATE,
    WARMUP_STEPS,
    WEIGHT_DECAY,
    WORLD,
    language_model,
    new_scenes,
)
from benchmarks.mllm_scores import score
from benchmarks.runs import Run, has_result, run_all, this_program
from opencloc import files
from opencloc.data.sources.spec import open_source
from opencloc.devices import choose_device
from opencloc.eval.encoders import load_encoder
from opencloc.eval.report import flat_metrics
from opencloc.eval.run import evaluate
from opencloc.eval.sets.source import source_set
from opencloc.mllm.build import BuildConfig, build, save
from opencloc.mllm.config import MllmDataConfig, MllmOptimConfig, MllmTrainConfig, Rates
from opencloc.mllm.model import RegionLlava
from opencloc.mllm.processor import RegionLlavaProcessor
from opencloc.mllm.train import train as train_mllm
from opencloc.presets import PRESETS
from opencloc.train.loop import train as pretrain

STEPS = 1500
MICRO_BATCH_SIZE = 16  # rows of like length, with little padding: a quarter less time
ALIGN_SHARE = 0.2  # of the steps: the first stage
LANGUAGE_STEPS = 2400
SEEDS = (0, 1, 2)
NUM_IMAGES = 512  # scored, of scenes that no run trains on
LANGUAGE = "language"  # the run of the language model
LONGER = (2, 4, 8)  # times the preset's steps, until the long CLIP retrieves as CLOC does


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A run: an encoder or the language model to be trained, or (with `encoder`) a multimodal model upon both."""

    name: str
    title: str
    encoder: str | None = None
    sampler: str = "roi"
    refer: str = "coords"
    layer: int = -1
    blind: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """Arms that have to have a result (same seed) first."""
        if self.encoder is not None:
            return (self.encoder, LANGUAGE)
        return ("encoder_cloc",) if self.name == "encoder_clip_long" else ()


def arms() -> list[Arm]:
    """All runs, encoders first, in the order of the table."""
    cloc, clip, long = "encoder_cloc", "encoder_clip", "encoder_clip_long"
    return [
        Arm(name=cloc, title="CLOC"),
        Arm(name=clip, title="CLIP"),
        Arm(name=long, title="CLIP trained until it retrieves as CLOC"),
        Arm(name=LANGUAGE, title="language model"),
        Arm(name="no_image", title="no image", encoder=clip, blind=True),
        Arm(name="clip", title="CLIP, last layer", encoder=clip),
        Arm(name="clip_2", title="CLIP, last layer but one", encoder=clip, layer=-2),
        Arm(name="clip_long_2", title="CLIP trained longer, last layer but one", encoder=long, layer=-2),
        Arm(name="clip_roi_2", title="CLIP, last layer but one + RoIAlign", encoder=clip, refer="both", layer=-2),
        Arm(name="cloc", title="CLOC, last layer", encoder=cloc),
        Arm(name="cloc_2", title="CLOC, last layer but one", encoder=cloc, layer=-2),
        Arm(name="cloc_points", title="CLOC + points", encoder=cloc, sampler="points", refer="both"),
        Arm(name="cloc_roi", title="CLOC + RoIAlign", encoder=cloc, sampler="roi", refer="both"),
        Arm(name="cloc_prompter", title="CLOC + Prompter", encoder=cloc, sampler="prompter", refer="both"),
    ]


# -- one run -----------------------------------------------------------------------------------------------------------


def run(arm: Arm, seed: int, out: Path, steps: int, num_images: int, device: str) -> None:
    """Trains and scores one arm with one seed, leaving result.json in its folder."""
    folder = out / f"{arm.name}-{seed}"
    if arm.name == LANGUAGE:
        count = max(2, LANGUAGE_STEPS * steps // STEPS)
        scores = language_model(folder / "model", seed, count, num_images, device)
        result = {"steps": count, "scores": scores, "model": str((folder / "model").relative_to(out))}
    elif arm.encoder is None:
        result = train_encoder(arm, seed, out, steps, num_images, device)
    else:
        result = train_model(arm, seed, out, steps, num_images, device)
    files.write_json(folder / "result.json", {"arm": arm.name, "seed": seed} | result)


def train_encoder(arm: Arm, seed: int, out: Path, steps: int, num_images: int, device: str) -> dict[str, Any]:
    """Trains an encoder of the preset `tiny`; its steps shrink with those of the arms."""
    preset = PRESETS["tiny"]()
    base = max(1, preset.steps * steps // STEPS)
    wanted = None
    if arm.name == "encoder_clip_long":
        wanted = json.loads((out / f"encoder_cloc-{seed}" / "result.json").read_text())["retrieval"]
    weight = preset.loss.region_weight if arm.name == "encoder_cloc" else 0.0
    result: dict[str, Any] = {}
    for times in (1,) if wanted is None else LONGER:
        folder = out / f"{arm.name}-{seed}" / f"times_{times}"
        changes: dict[str, Any] = {"out": str(folder), "seed": seed, "steps": base * times, "device": device}
        pretrain(replace(preset, loss=replace(preset.loss, region_weight=weight), **changes))
        recall = retrieval(folder / "model", num_images, device)
        result = {"steps": base * times, "retrieval": recall, "model": str((folder / "model").relative_to(out))}
        if wanted is not None and recall >= wanted:
            break
    return result | ({} if wanted is None else {"wanted_retrieval": wanted})


def retrieval(folder: Path, num_images: int, device: str) -> float:
    """Image-to-text recall at 1 among the captions of so many scenes, which models are not scored on."""
    encoder = load_encoder(folder, "crop", device=device)
    data = source_set(open_source(f"{WORLD}&seed=2&image_px={IMAGE_PX}"), "scenes")
    found = flat_metrics(evaluate(encoder, data, ("image-retrieval",), num_images=num_images))[encoder.name]
    return next(value for name, value in found.items() if "i2t" in name and name.endswith("1"))


def train_model(arm: Arm, seed: int, out: Path, steps: int, num_images: int, device: str) -> dict[str, Any]:
    """Builds, trains and scores a multimodal model, at a third of the steps and at the end."""
    folder = out / f"{arm.name}-{seed}"
    encoder, language = (
        out / json.loads((out / f"{name}-{seed}" / "result.json").read_text())["model"] for name in arm.needs
    )
    start = folder / "start"
    if not start.exists():
        config = BuildConfig(
            encoder=str(encoder),
            llm=str(language),
            out=str(folder / "seeing" if arm.blind else start),
            sampler=arm.sampler,  # pyright: ignore[reportArgumentType]
            refer=arm.refer,  # pyright: ignore[reportArgumentType]
            layer=arm.layer,
            coordinate_steps=COORDINATE_STEPS,
            shared_positions=True,
            seed=seed,
        )
        if not Path(config.out).exists():  # a seeing model may be there already
            build(config)
        if arm.blind:
            make_blind(Path(config.out), start)
    align = max(1, round(ALIGN_SHARE * steps))
    early, model = max(1, steps // 3 - align), start
    stages = (
        ("align", align, Rates(projector=RATE, sampler=RATE)),
        ("instruct", max(1, steps - align), Rates(projector=RATE, sampler=RATE, language_model=RATE)),
    )
    for number, (stage, count, rates) in enumerate(stages):
        config = MllmTrainConfig(
            model=str(model),
            out=str(folder / stage),
            data=MllmDataConfig(train=(WORLD,), questions=QUESTIONS, num_workers=1 if device == "cuda" else 0),
            rates=rates,
            optim=MllmOptimConfig(name="muon", weight_decay=WEIGHT_DECAY, warmup_steps=min(WARMUP_STEPS, count)),
            steps=count,
            batch_size=BATCH_SIZE,
            micro_batch_size=MICRO_BATCH_SIZE,
            attention="eager" if device == "cpu" else "sdpa",
            device=device,
            seed=len(stages) * seed + number,
            checkpoint_every=early,
            keep_checkpoints=count // early + 1,  # that at a third of all steps is scored
        )
        model = train_mllm(config)
    return {
        "steps": steps,
        "third": score_folder(folder / "instruct" / "checkpoints" / f"step_{early:07d}", num_images, device),
        "final": score_folder(model, num_images, device),
    }


def make_blind(seeing: Path, out: Path) -> None:
    """Writes the model with zeroes for the weights that read pixels: all images look the same to it."""
    model = RegionLlava.from_pretrained(seeing)
    with torch.no_grad():
        model.model.vision_tower.embeddings.patch_embedding.weight.zero_()
    save(model, RegionLlavaProcessor.from_pretrained(seeing), out)


def score_folder(folder: Path, num_images: int, device: str) -> dict[str, float]:
    """Shares of right answers of a model about scenes that nobody trained on."""
    model = RegionLlava.from_pretrained(folder).to(choose_device(device)).eval()
    processor = RegionLlavaProcessor.from_pretrained(folder)

    @torch.no_grad()
    def answer(_: Sequence[Any], conversations: Sequence[Any], length: int) -> list[str]:
        batch = processor(conversations).to(model.device)
        ids = model.generate(**batch, max_new_tokens=length, do_sample=False)
        return processor.decode_answers(ids, batch["input_ids"].shape[1])

    return score(answer, new_scenes(), num_images)


# -- all runs ----------------------------------------------------------------------------------------------------------


def check_settings(out: Path, steps: int, num_images: int) -> None:
    """Writes what the runs of a folder are made with.  Exits if they were begun with something else."""
    constants = {
        name: value
        for name, value in (vars(mllm_language) | globals()).items()
        if name.isupper() and isinstance(value, int | float | str | tuple)
    }
    settings = json.loads(json.dumps(constants | {"steps": steps, "num_images": num_images}))
    path = out / "settings.json"
    if not path.exists():
        files.write_json(path, settings)
    made_with = json.loads(path.read_text())
    if other := [name for name in settings | made_with if settings.get(name) != made_with.get(name)]:
        listed = ", ".join(f"{name} {made_with.get(name)}, now {settings.get(name)}" for name in other)
        raise SystemExit(f"{out}: its runs are made with other settings: {listed}; choose another --out")


def do_all(chosen: list[Arm], arguments: argparse.Namespace) -> int:
    """Does every arm and seed that has no result yet; returns how many failed."""
    out, known = arguments.out, {arm.name: arm for arm in chosen}
    todo = [(arm.name, seed) for seed in arguments.seeds for arm in chosen if not has_result(out, (arm.name, seed))]
    print(f"{len(todo)} runs to do, {arguments.at_once} at a time", flush=True)
    command = this_program("benchmarks.mllm_study", "--out", str(out), "--steps", str(arguments.steps))
    command += ["--num-images", str(arguments.num_images), "--device", arguments.device]

    def needs(run: Run) -> list[Run]:
        return [(name, run[1]) for name in known[run[0]].needs]

    return run_all(todo, out, arguments.at_once, program=command, needs=needs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mllm_study"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", help="names of arms; encoders and language model are added; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--num-images", type=int, default=NUM_IMAGES, help="scenes to score on")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, one CPU thread each")
    parser.add_argument("--device", default="auto", help="auto is cuda where there is one")
    parser.add_argument("--run", nargs=2, metavar=("ARM", "SEED"), help="do this one run, in this process")
    arguments = parser.parse_args()
    known = {arm.name: arm for arm in arms()}
    for name in [*(arguments.only or []), *(arguments.run or [])[:1]]:
        if name not in known:
            parser.error(f"unknown arm {name!r}; there are: {', '.join(known)}")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.out.mkdir(parents=True, exist_ok=True)
    check_settings(arguments.out, arguments.steps, arguments.num_images)
    if arguments.run:
        arm, seed = known[arguments.run[0]], int(arguments.run[1])
        run(arm, seed, arguments.out, arguments.steps, arguments.num_images, arguments.device)
        return
    wanted = set(arguments.only or known)
    for _ in range(2):
        wanted |= {name for arm in known.values() if arm.name in wanted for name in arm.needs}
    sys.exit(1 if do_all([arm for arm in known.values() if arm.name in wanted], arguments) else 0)


if __name__ == "__main__":
    main()
