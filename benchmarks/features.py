"""What stored features save: training steps on a frozen vision tower, from images and from features.

    OMP_NUM_THREADS=1 python -m benchmarks.features --data ../shared/data --out results/features

An untrained CLOC model of the preset's sizes encodes photos of coco740 (`opencloc data features`).  Then whole training
steps take turns: reading, decoding, tokenising, forward and backward pass, clipping and optimizer, all in this process.
Ratios are formed within a round.  Seconds are those of the GPU, or of this process on a CPU.

Prints Markdown and writes it to OUT/tables.md, with the figures in OUT/figures.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import facts, save, table, take_turns, timed
from opencloc.config import DataConfig, LrFactors, ModelConfig, OptimConfig, TrainConfig
from opencloc.data.encode import EncodeConfig, encode
from opencloc.data.sources.spec import open_source
from opencloc.data.stream import TrainingExamples, training_batches
from opencloc.devices import has_native_bf16
from opencloc.presets import PRESETS
from opencloc.train.build import build_model
from opencloc.train.checkpoint import save_model
from opencloc.train.distributed import clip_gradients
from opencloc.train.features import check_features
from opencloc.train.loop import backward
from opencloc.train.optim import make_optimizer, set_trained_parts

KINDS = {"both towers frozen": LrFactors(towers=0), "vision tower frozen": LrFactors(vision=0)}
Turn = Callable[[int], dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds coco740")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", choices=list(PRESETS), default="vit_b16", help="sizes of the model")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-images", type=int, default=96, help="that are encoded")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    disable_progress_bar()  # transformers' own
    device = torch.device(args.device)
    photos = f"coco:{args.data}/coco740?split=train"
    figures: dict[str, Any] = facts(device) | {
        "precision": "bf16" if has_native_bf16(device) else "fp32",
        "preset": args.preset,
        "batch_size": args.batch_size,
    }
    with tempfile.TemporaryDirectory() as folder:
        start = save_start(PRESETS[args.preset](), photos, Path(folder) / "start")
        settings = EncodeConfig(
            model=start,
            data=photos,
            out=f"{folder}/features",
            num_images=args.num_images,
            batch_size=args.batch_size,
            num_workers=0,
            device=args.device,
        )
        seconds = timed(lambda: encode(settings), device)
        report = encode(settings)  # finished: says what is there
        figures["encoding"] = seconds | {
            "images": report.images,
            "kb_per_image": report.num_bytes / report.images / 1e3,
        }
        runners: dict[str, Turn] = {}
        for kind, factors in KINDS.items():
            for name, source in (("images", photos), ("features", f"features:{folder}/features")):
                config = run_config(start, source, factors, args.batch_size, args.rounds + 1)
                runners[f"{kind}: {name}"] = make_turn(config, device)
        times = take_turns(runners, args.rounds)
    figures |= {"seconds": times, "faster": {kind: speed_up(times, kind) for kind in KINDS}}
    save(args.out, figures, report_of(figures), page="tables.md")


def save_start(preset: TrainConfig, photos: str, folder: Path) -> str:
    """An untrained model of the preset's sizes, and a tokenizer of the photos' captions."""
    model, processor = build_model(replace(preset, data=DataConfig(train=(photos,))))
    save_model(folder, model, processor)
    return str(folder)


def run_config(start: str, source: str, factors: LrFactors, batch_size: int, steps: int) -> TrainConfig:
    """A run on a frozen vision tower."""
    return TrainConfig(
        model=ModelConfig(init_from=start),
        data=DataConfig(train=(source,), num_workers=0),
        optim=OptimConfig(name="adamw", lr=1e-6, lr_factors=factors),
        batch_size=batch_size,
        steps=steps,
    )


def make_turn(config: TrainConfig, device: torch.device) -> Turn:
    """Runs the next training step, timed."""
    model, processor = build_model(config)
    sources = [open_source(spec, image_px=processor.image_size, features=True) for spec in config.data.train]
    check_features(sources, config, model, processor, is_start=True)
    set_trained_parts(model, config.optim.lr_factors)
    model.to(device)  # pyright: ignore[reportArgumentType]
    optimizer = make_optimizer(model, config.optim)
    examples = TrainingExamples(
        sources, (), num_regions=config.data.num_regions, image_size=processor.image_size, seed=config.seed
    )
    batches = training_batches(
        examples, processor, batch_size=config.batch_size, start=0, stop=config.steps, num_workers=0, device=device
    )
    bf16, captions = has_native_bf16(device), model.clip.logit_scale.requires_grad

    def step() -> None:
        backward(model, next(batches), config.loss, None, bf16=bf16, captions=captions)
        clip_gradients(model, config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return lambda _: timed(step, device)


def speed_up(times: dict[str, list[dict[str, float]]], kind: str) -> dict[str, float]:
    """How many times the images per second features give: median, least and largest over the rounds."""
    pairs = zip(times[f"{kind}: images"], times[f"{kind}: features"], strict=True)
    ratios = [images["busy_s"] / features["busy_s"] for images, features in pairs]
    return {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}


def report_of(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = []
    for name, times in figures["seconds"].items():
        busy, wall = (statistics.median(row[key] for row in times) for key in ("busy_s", "wall_s"))
        kind, _, source = name.partition(": ")
        ratio = figures["faster"][kind]
        faster = (
            f"{ratio['median']:.1f} ({ratio['least']:.1f} to {ratio['largest']:.1f})" if source == "features" else "1"
        )
        rows.append([name, f"{figures['batch_size'] / busy:.1f}", f"{figures['batch_size'] / wall:.1f}", faster])
    encoding = figures["encoding"]
    setting = f"{figures['preset']}, {figures['precision']}, batch {figures['batch_size']}"
    return "\n".join(
        [
            f"{figures['hardware']}, {setting}, medians of {len(next(iter(figures['seconds'].values())))} rounds\n",
            table(["training step", "images / s", "images / wall s", "times as fast"], rows),
            f"Encoding once: {encoding['images'] / encoding['busy_s']:.1f} images / s, model loaded and hashed; "
            f"{encoding['kb_per_image']:.0f} KB per image.\n",
        ]
    )


if __name__ == "__main__":
    main()
