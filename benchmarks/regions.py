"""Regions per second: the Prompter against crop-and-encode and against RoIAlign, for 1 to 1,000 boxes on an image.

    python -m benchmarks.regions --data ../shared/data --out results/regions

ViT-B/16 at 224 px with random weights (speed does not depend on their values), a photo of coco740, random boxes, one
image at a time.  The Prompter is `cross`; RoIAlign is the `roi` Prompter (RoIAlign on the image tokens, mean, MLP,
projection).  "With the image" encodes it once and then all its boxes; "image excluded" counts the boxes alone.
Crop-and-encode cuts out every box, letterboxes it and encodes it as an image of its own; beyond --crops of them the
figure is extrapolated from a batch of --crops.  Methods take turns.  Seconds are those of the GPU, or of this process
on a CPU.

Prints Markdown and writes it to OUT/tables.md, with the figures in OUT/figures.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from benchmarks.common import facts, save, table, take_turns, timed
from opencloc.data.sources.spec import open_source
from opencloc.devices import has_native_bf16
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.processor import ClocProcessor, train_tokenizer

COUNTS = (1, 10, 100, 1000)  # boxes per image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds coco740")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12, help="of the vision tower")
    parser.add_argument("--crops", type=int, default=4, help="most crops that are run at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)

    config = CLIPConfig(
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "patch_size": 16,
            "num_hidden_layers": args.layers,
            "num_attention_heads": 12,
            "image_size": 224,
        }
    )
    with device:
        clip = CLIPModel(config)
        models = {
            name: ClocModel(ClocConfig(clip_config=config, prompter=name), towers_model=clip).eval()
            for name in ("cross", "roi")
        }
    image = open_source(f"coco:{args.data}/coco740?split=train")[0].image
    bf16 = has_native_bf16(device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        seconds = measure(models, image, args.rounds, args.crops, device)
    figures = facts(device) | {
        "precision": "bf16" if bf16 else "fp32",
        "crops_at_once": args.crops,
        "seconds": seconds,
        "counts": regions_per_second(seconds, args.crops),
    }
    save(args.out, figures, report(figures), page="tables.md")


def measure(
    models: dict[str, ClocModel], image: Image.Image, rounds: int, most_crops: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds by round of encoding the image, of each method without it, and of cropping and encoding crops."""
    processor = ClocProcessor(train_tokenizer(["no text is read here"], 300, 77))
    pixels = processor.letterbox([image])[0].to(device)
    encode = models["cross"].encode_image
    features = encode(pixels)
    boxes = {count: random_boxes(count).to(device) for count in COUNTS}
    runners: dict[str, Callable[[], Any]] = {"image": lambda: encode(pixels)}
    for count in COUNTS:
        for name, model in models.items():
            runners[f"{name}, {count} boxes"] = lambda model=model, count=count: model.encode_regions(
                features, boxes[count]
            )
    for count in sorted({1, most_crops}):
        runners[f"{count} crops"] = lambda count=count: encode(
            crops(image, boxes[1000][0, :count], processor).to(device)
        )
    clocks = {name: lambda _, run=run: timed(run, device)["busy_s"] for name, run in runners.items()}
    return take_turns(clocks, rounds)


def random_boxes(count: int) -> Tensor:
    """(1, count, 4) boxes in the square, sides of 0.05 to 0.5."""
    rng = np.random.default_rng(0)
    corner, size = rng.uniform(0, 0.5, (count, 2)), rng.uniform(0.05, 0.5, (count, 2))
    return torch.from_numpy(np.concatenate([corner, corner + size], 1)).float()[None]


def crops(image: Image.Image, boxes: Tensor, processor: ClocProcessor) -> Tensor:
    """Pixels of the boxes, each letterboxed on its own."""
    boxes_px = (boxes.cpu().numpy() * max(image.size)).round().astype(int).tolist()
    return processor.letterbox([image.crop(tuple(box)) for box in boxes_px])[0]


def regions_per_second(seconds: dict[str, list[float]], most_crops: int) -> dict[str, dict[str, float]]:
    """Regions per second by number of boxes; ratios are medians over rounds of the ratio within a round."""
    found = {}
    per_crop = [s / most_crops for s in seconds[f"{most_crops} crops"]]
    for count in COUNTS:
        alone = {name: seconds[f"{name}, {count} boxes"] for name in ("cross", "roi")}
        whole = {name: [a + b for a, b in zip(alone[name], seconds["image"], strict=True)] for name in alone}
        crop = seconds["1 crops"] if count == 1 else [s * count for s in per_crop]

        def ratio(slow: list[float], fast: list[float]) -> float:
            return statistics.median(s / f for s, f in zip(slow, fast, strict=True))

        found[str(count)] = {
            "prompter": count / statistics.median(whole["cross"]),
            "roialign": count / statistics.median(whole["roi"]),
            "crops": count / statistics.median(crop),
            "prompter / crops": ratio(crop, whole["cross"]),
            "prompter / roialign": ratio(whole["roi"], whole["cross"]),
            "prompter, image excluded": count / statistics.median(alone["cross"]),
            "roialign, image excluded": count / statistics.median(alone["roi"]),
            "prompter / roialign, image excluded": ratio(alone["roi"], alone["cross"]),
        }
    return found


def report(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    columns = list(next(iter(figures["counts"].values())))
    rows = [
        [count, *(f"{row[c]:.2f}" if "/" in c else f"{row[c]:.1f}" for c in columns)]
        for count, row in figures["counts"].items()
    ]
    return f"{figures['hardware']}, {figures['precision']}\n\n{table(['boxes', *columns], rows)}"


if __name__ == "__main__":
    main()
