"""What a training step of `small` costs with some of the patches left out, as a ratio within one process.

    OMP_NUM_THREADS=1 python -m benchmarks.patch_dropout --data ../shared/data > results/tuning/patch-dropout-step.txt

Photos, texts and optimizer are those of recipes/photos.sh, on the CPU.  Batches are made beforehand.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch

from opencloc.config import TrainConfig
from opencloc.data.batch import Batch
from opencloc.data.sources.spec import open_source
from opencloc.data.stream import TrainingExamples, training_batches
from opencloc.presets import small
from opencloc.train.build import build_model
from opencloc.train.loop import backward
from opencloc.train.optim import make_optimizer

WARM_UP = 2  # rounds


def photos(config: TrainConfig, folder: str) -> TrainConfig:
    """The configuration with the data of recipes/photos.sh."""
    train = f"mosaic:{folder}/caltech101?grid=2-3&split=train&augment=true", f"coco:{folder}/coco740?split=train"
    return replace(config, data=replace(config.data, train=train, weights=(0.85, 0.15)))


def measure(config: TrainConfig, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each step with all patches and with those the configuration keeps, the same images for both."""
    model, processor = build_model(config)
    model.train()
    num_patches = model.grid[0] * model.grid[1]
    examples = TrainingExamples(
        [open_source(spec, image_px=processor.image_size) for spec in config.data.train],
        config.data.weights,
        num_regions=config.data.num_regions,
        image_size=processor.image_size,
        seed=config.seed,
        keep_patches=(config.data.kept_patches(num_patches), num_patches),
    )
    optimizer = make_optimizer(model, config.optim)

    def seconds(batch: Batch) -> float:
        begin = time.perf_counter()
        backward(model, batch, config.loss, None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - begin

    stop = WARM_UP + rounds
    batches = list(
        training_batches(examples, processor, batch_size=config.batch_size, start=0, stop=stop, num_workers=0)
    )
    times = [(seconds(replace(batch, kept=None)), seconds(batch)) for batch in batches][WARM_UP:]
    return [whole for whole, _ in times], [part for _, part in times]


def main() -> None:
    """Command line; prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="folder with caltech101/ and coco740/")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    config = photos(small(), args.data)
    whole, part = measure(config, args.rounds)
    ratios = [b / a for a, b in zip(whole, part, strict=True)]
    print(
        f"step of `small`, {config.batch_size} images, fp32, {torch.get_num_threads()} thread(s), {args.rounds} rounds"
    )
    print(f"all patches, median s            {statistics.median(whole):.2f}")
    print(f"{config.data.patch_dropout:.0%} of them left out, median s  {statistics.median(part):.2f}")
    print(f"ratio, median and range          {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
