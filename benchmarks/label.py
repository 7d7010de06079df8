"""What labelling costs: the engine around the models, the models, one worker against two, cached text embeddings.

    python -m benchmarks.label --data ../shared/data --yolox ../shared/models/yolox_nano.onnx --out results/label

Photos and captions come from coco740.  Unless --owlv2 names a checkpoint, OWLv2 has random weights of the B/16 sizes:
speed does not depend on their values.  CPU seconds are those of the process with all its threads, which do not grow
when other programs compete for the cores; wall times do.

Prints Markdown and writes it to OUT/label.md, with the figures in OUT/label.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from benchmarks.common import facts, save, table
from opencloc.data.sidecar import read_sidecar, write_sidecar
from opencloc.data.sources.coco import Coco, CocoConfig
from opencloc.data.tars.shards import ShardWriter, iter_shard
from opencloc.devices import has_native_bf16
from opencloc.vesl.captioners import CaptionConfig
from opencloc.vesl.config import LabelConfig
from opencloc.vesl.detect import Detections
from opencloc.vesl.filters import FilterConfig, filter_detections
from opencloc.vesl.label import find_shards, label_shard, load_engine
from opencloc.vesl.owl import OwlDetector, TextCache
from opencloc.vesl.phrases import extract_phrases, ngram_phrases
from opencloc.vesl.run import RunConfig, run_label

DETECTIONS = 40  # per image, what an open-vocabulary detector leaves above the threshold
RESOLUTION = 448


def constant_detector():
    """A detector that costs next to nothing: boxes drawn beforehand, one phrase after the other."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 0.7, (1024, DETECTIONS, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.05, 0.3, corner.shape)], axis=2)
    scores = rng.uniform(0.1, 1, (1024, DETECTIONS))
    numbers = itertools.cycle(range(1024))

    def detect(images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        return [
            Detections(boxes=boxes[n], scores=scores[n], phrase=np.arange(DETECTIONS) % len(own))
            for n, own in zip(numbers, phrases, strict=False)
        ]

    return detect


def make_shards(data: Path, folder: Path, num_shards: int, images_per_shard: int) -> list[str]:
    """Tars of coco740's photos, as img2dataset would have stored them, repeated if there are too few."""
    photos = Coco(str(data / "coco740"), CocoConfig(split="train"))
    with ShardWriter(str(folder), samples_per_shard=images_per_shard) as writer:
        for number in range(num_shards * images_per_shard):
            sample = dataclasses.replace(photos[number % photos.size], boxes=np.zeros((0, 4)), texts=())
            writer.write(dataclasses.replace(sample, key=f"{number:06d}"), photos.image_bytes(number % photos.size))
    return writer.paths


def per_call_ms(function: Callable[[Any], object], arguments: Sequence[Any]) -> float:
    """CPU milliseconds per call, over one pass."""
    start = time.process_time()
    for argument in arguments:
        function(argument)
    return 1e3 * (time.process_time() - start) / len(arguments)


def engine_cost(shard: str, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """(CPU milliseconds per image of all but the models, as a whole and by step; what a sidecar holds and weighs)."""
    config = LabelConfig(
        data=(shard,),
        out=str(folder / "engine"),
        detector="benchmarks.label:constant_detector",
        captions=CaptionConfig(existing_text="all-captions"),
    )
    (unit,) = find_shards(config)
    engine = load_engine(config)
    label_shard(config, unit, engine=engine)  # warms caches up
    start = time.process_time()
    report = label_shard(config, unit, engine=engine)
    total_ms = 1e3 * (time.process_time() - start) / report.images

    samples = [item for item in iter_shard(shard) if not isinstance(item, Exception)]
    captions = ["\n".join(sample.captions) for sample in samples]
    phrases = [own for caption in captions if (own := extract_phrases(caption))]
    found = [engine.detector([samples[0].image], [own])[0] for own in phrases]
    rows = list(read_sidecar(unit.sidecar).values())
    storage = {
        "words of the caption": sum(len((row.caption or "").split()) for row in rows) / len(rows),
        "regions per image": sum(len(row.boxes) for row in rows) / len(rows),
        "bytes per image": Path(unit.sidecar).stat().st_size / len(rows),
    }
    costs = {
        "total": total_ms,
        "read and decode": per_call_ms(lambda url: list(iter_shard(url, 1024)), [shard]) / len(samples),
        "phrases": per_call_ms(extract_phrases, captions),
        "filters": per_call_ms(
            lambda pair: filter_detections(pair[0], pair[1], FilterConfig()), list(zip(found, phrases, strict=True))
        ),
        "sidecar": per_call_ms(lambda part: write_sidecar(str(folder / "x.parquet"), part, {}), [rows]) / len(rows),
    }
    return costs, storage


def save_owlv2(folder: Path) -> Path:
    """A random OWLv2 of the B/16 checkpoints' sizes, with a character tokenizer (texts are padded to 16 tokens)."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-'"
    tokens = ["!", *letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocab, merges=[], pad_token="!", model_max_length=16).save_pretrained(folder)
    config = Owlv2Config(text_config={"vocab_size": 49408}, vision_config={"image_size": 960, "patch_size": 16})
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    Owlv2ImageProcessorPil().save_pretrained(folder)
    return folder


def detector_costs(shard: str, owlv2: Path, yolox: str | None, num_images: int) -> dict[str, float]:
    """CPU milliseconds per image of detectors, their own preparation of the images included."""
    samples = [item for item in iter_shard(shard) if not isinstance(item, Exception)][:num_images]
    images = [sample.image for sample in samples]
    phrases = [extract_phrases("\n".join(sample.captions)) for sample in samples]
    costs = {}
    if yolox:
        detector: Any = load_engine(LabelConfig(data=(shard,), detector=yolox)).detector
        costs["YOLOX nano, 416 px, ONNX Runtime"] = per_call_ms(
            lambda i: detector(images[i : i + 1], phrases[i : i + 1]), range(len(images))
        )
    for dtype in ("fp32", "bf16"):
        if dtype == "bf16" and not has_native_bf16(torch.device("cpu")):
            continue  # emulated, it takes a hundred times as long
        detector = OwlDetector(
            str(owlv2), resolution=RESOLUTION, dtype=dtype, device=torch.device("cpu"), score_threshold=0.1
        )
        few = range(0, min(8, len(images)), 4)
        detector(images[:1], phrases[:1])
        costs[f"OWLv2, {RESOLUTION} px, {dtype}, batches of 4"] = (
            per_call_ms(lambda i, run=detector: run(images[i : i + 4], phrases[i : i + 4]), few) / 4
        )
    return costs


def text_cache(shard: str, owlv2: Path, num_images: int) -> list[dict[str, Any]]:
    """CPU milliseconds per image for OWLv2's phrase embeddings with and without the cache, batches of 16 images."""
    samples = [item for item in iter_shard(shard) if not isinstance(item, Exception)][:num_images]
    detector = OwlDetector(
        str(owlv2), resolution=RESOLUTION, dtype="fp32", device=torch.device("cpu"), score_threshold=0.1
    )
    rows = []
    for name, extract in (("noun phrases", extract_phrases), ("n-grams", ngram_phrases)):
        own = [extract(sample.captions[0]) for sample in samples]
        batches = [own[i : i + 16] for i in range(0, len(own), 16)]
        row: dict[str, Any] = {"phrases": name, "per image": sum(map(len, own)) / len(own)}
        for label, size in (("cached", 32_768), ("uncached", 0)):
            detector.text_cache = cache = TextCache(detector._embed, size)
            with torch.inference_mode():
                row[f"{label} ms"] = per_call_ms(detector._queries, batches) * len(batches) / len(own)
            if size:
                row["found in the cache"] = cache.hits / (cache.hits + cache.misses)
        rows.append(row)
    return rows


def scaling(tars: Sequence[str], folder: Path, detector: str, counts: Sequence[int]) -> list[dict[str, float]]:
    """Images per second of whole runs with so many local workers.

    `running` counts the time in which workers label; `wall` adds starting them and loading their models.
    """
    rows = []
    for workers in counts:
        config = LabelConfig(data=tuple(tars), out=str(folder / f"workers{workers}"), detector=detector)
        report = run_label(config, RunConfig(workers=workers))
        if not report.complete:
            raise RuntimeError(f"the run with {workers} workers failed: {report.stopped or report.failed_shards}")
        busy = sum(one.seconds["total"] for one in report.reports)
        rows.append(
            {
                "workers": workers,
                "running": workers * report.images / busy,
                "wall": report.images / report.seconds,
            }
        )
    return rows


def section(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """A heading and the table of equal dictionaries."""
    return f"## {title}\n\n{table(list(rows[0]), (list(row.values()) for row in rows))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with coco740/")
    parser.add_argument("--yolox", default="../shared/models/yolox_nano.onnx", help="ONNX file; empty: leave it out")
    parser.add_argument("--owlv2", type=Path, help="folder of an OWLv2 checkpoint; default: a random B/16")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of local workers to compare")
    parser.add_argument("--images", type=int, default=256, help="images per shard; 4 shards are made")
    parser.add_argument("--out", type=Path, default=Path("results/label"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    example = Path(__file__).parents[1] / "examples" / "yolox_detector.py"
    yolox = f"{example}:make_detector?model={Path(arguments.yolox).resolve()}" if arguments.yolox else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tars = make_shards(arguments.data, folder / "tars", 4, arguments.images)
        owlv2 = arguments.owlv2 or save_owlv2(folder / "owlv2")
        engine, storage = engine_cost(tars[0], folder)
        detectors = detector_costs(tars[0], owlv2, yolox, 64)
        figures = facts() | {
            "images": arguments.images,
            "engine_cpu_ms": engine,
            "storage": storage,
            "detector_cpu_ms": detectors,
            "text_embeddings": text_cache(tars[0], owlv2, min(128, arguments.images)),
            "scaling": scaling(tars, folder, yolox or "benchmarks.label:constant_detector", arguments.workers),
        }
    parts = [
        "# Labelling",
        "",
        f"{figures['hardware']}; {arguments.images} photos of coco740 per shard (short side 256 px).",
        "",
        section("Engine, CPU ms per image", [{"step": k, "ms": v} for k, v in engine.items()]),
        section("Sidecars", [figures["storage"]]),
        section(
            "Detectors, CPU ms per image", [{"detector": k, "ms": v} for k, v in figures["detector_cpu_ms"].items()]
        ),
        section("OWLv2 text embeddings, CPU ms per image", figures["text_embeddings"]),
        section("Local workers, images per second", figures["scaling"]),
    ]
    save(arguments.out, figures, "\n".join(parts), page="label.md", data="label.json")


if __name__ == "__main__":
    main()
