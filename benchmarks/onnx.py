"""An ONNX export beside torch: top-1 of naming boxes in generated scenes, seconds, size; fp32 and int8.

    python -m benchmarks.onnx --model tiny --out results/onnx

The scenes are those that the quickstart scores (seed 1, never trained on).  All three name the same boxes among the
same 120 names.  Seconds are CPU time of this process for encoding one image and naming its boxes; they take turns, each
on one thread.

Prints Markdown and writes it to OUT/README.md, with the figures in OUT/figures.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

import opencloc
from benchmarks.common import facts, save, table, take_turns, timed, versions
from opencloc.model.onnx import OPSET, export_onnx
from opencloc.model.opencloc_onnx import Model

WORLD = "scenes:rich?num_things=120&seed=1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    predictor = opencloc.load(args.model)
    source = opencloc.open_source(WORLD, image_px=predictor.processor.image_size)
    scenes = [source[i] for i in range(args.num_images)]
    names = sorted({text for scene in scenes for text in scene.texts})
    with tempfile.TemporaryDirectory() as folder:
        engines: dict[str, Any] = {"torch": predictor}
        megabytes: dict[str, float] = {}
        for precision in ("fp32", "int8"):
            out = export_onnx(predictor.model, predictor.processor, Path(folder, precision), int8=precision == "int8")
            engines[f"onnx {precision}"] = Model(out, threads=1)
            megabytes[f"onnx {precision}"] = sum(file.stat().st_size for file in out.glob("*.onnx")) / 1e6
        megabytes["torch"] = sum(p.numel() * p.element_size() for p in predictor.model.parameters()) / 1e6
        regions = {name: [embed(engine, scene) for scene in scenes] for name, engine in engines.items()}
        texts = {name: np.asarray(engine.embed_texts(names)) for name, engine in engines.items()}
        clocks: dict[str, Callable[[int], float]] = {
            name: lambda i, engine=engine: timed(lambda: embed(engine, scenes[i % len(scenes)]), torch.device("cpu"))[
                "busy_s"
            ]
            for name, engine in engines.items()
        }
        seconds = take_turns(clocks, args.rounds)
    truth = np.array([names.index(text) for scene in scenes for text in scene.texts])
    found: dict[str, Any] = {}
    for name in engines:
        embeddings = np.concatenate(regions[name])
        found[name] = {
            "top1": float(((embeddings @ texts[name].T).argmax(-1) == truth).mean()),
            "largest difference to torch": float(np.abs(embeddings - np.concatenate(regions["torch"])).max()),
            "ms an image": 1e3 * statistics.median(seconds[name]),
            "speed against torch": statistics.median(
                t / s for t, s in zip(seconds["torch"], seconds[name], strict=True)
            ),
            "megabytes": megabytes[name],
        }
    figures = facts() | {
        "commit": commit(),
        "versions of onnx": versions("onnx", "onnxruntime", "onnxscript"),
        "opset": OPSET,
        "model": args.model,
        "data": WORLD,
        "images": len(scenes),
        "boxes": len(truth),
        "names": len(names),
        "seconds": seconds,
        "found": found,
    }
    save(args.out, figures, report(figures))


def embed(engine: Any, scene: opencloc.Sample) -> np.ndarray:
    """The region embeddings of a scene's boxes, from its pixels on."""
    boxes_px = scene.boxes * np.tile(scene.image.size, 2)
    return np.asarray(engine.embed(engine.encode(scene.image), boxes_px=boxes_px))


def commit() -> str:
    """The commit that is checked out, as far as git tells it."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def report(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [
        [
            name,
            f"{100 * one['top1']:.1f}",
            f"{one['largest difference to torch']:.1e}",
            f"{one['ms an image']:.1f}",
            f"{one['speed against torch']:.2f}",
            f"{one['megabytes']:.1f}",
        ]
        for name, one in figures["found"].items()
    ]
    head = ["", "top-1, %", "largest difference to torch", "ms an image", "speed / torch", "MB"]
    return (
        f"# ONNX beside torch\n\n`{figures['command']}` at commit {figures['commit'][:12]}; {figures['hardware']}\n\n"
        f"{figures['boxes']:,} boxes in {figures['images']:,} generated scenes, {figures['names']} names, opset "
        f"{figures['opset']}. Speed: median over rounds of the ratio within a round.\n\n{table(head, rows, '---:')}"
    )


if __name__ == "__main__":
    main()
