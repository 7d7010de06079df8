"""The parts of `benchmarks/gpu.py`, each one in a process of its own that saves what it has found as it goes on.

python -m benchmarks.gpu_parts steps --out steps.json                  # on the GPU
python -m benchmarks.gpu_parts steps --out steps.json --device cpu     # sizes that a test can afford
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import loss as loss_benchmark
from benchmarks.common import facts, take_turns, timed, versions
from benchmarks.gpu_steps import (
    ADAMW,
    CLIP,
    CPU,
    GPU,
    Found,
    Sizes,
    count_flops,
    free,
    grow,
    make_batch,
    make_model,
    optimizers,
    peak_gb,
    summary,
    training_step,
    variants,
)
from benchmarks.step import matmul_peak, open_clip_worker
from opencloc import files
from opencloc.config import LossConfig, TrainConfig
from opencloc.data.sources.spec import open_source
from opencloc.data.stream import TrainingExamples, training_batches
from opencloc.data.tars.writer import ShardWriter
from opencloc.model.processor import ClocProcessor, train_tokenizer
from opencloc.presets import PRESETS
from opencloc.train.build import apply_options
from opencloc.train.optim import make_optimizer

ROOT = Path(__file__).parents[1]
DATASHEET_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312}  # dense bf16; first match


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.device == "cuda":  # as in training: what stays float32 is multiplied as TF32
        torch.set_float32_matmul_precision("high")
    figures: dict[str, Any] = {}

    def found(name: str, value: Any) -> None:
        figures[name] = value
        files.write_json(args.out, figures)
        print(f"{name}: {json.dumps(value)}", file=sys.stderr, flush=True)

    PARTS[args.part](torch.device(args.device), GPU if args.device == "cuda" else CPU, found)


# -- the machine -----------------------------------------------------------------------------------------------------


def machine(device: torch.device, sizes: Sizes, found: Found) -> None:
    """What it is, and the two ceilings: a large bf16 matrix product and a copy."""
    found("hardware", facts(device)["hardware"])
    found("cores", len(os.sched_getaffinity(0)))
    found("versions", facts(device)["versions"] | versions("triton", "open_clip_torch"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if device.type == "cuda":
        found("gpu_gb", torch.cuda.get_device_properties(device).total_memory / 1e9)
        nccl: Any = torch.cuda.nccl  # pyright: ignore[reportAttributeAccessIssue]
        found("versions_gpu", {"cuda": torch.version.cuda, "nccl": ".".join(map(str, nccl.version()))})
    found("matmul_tflops", max(matmul_peak(device, device.type == "cuda", sizes.matmul) for _ in range(3)) / 1e12)
    found("datasheet_tflops", next((value for key, value in DATASHEET_TFLOPS.items() if key in name), None))
    source = torch.randn(8 * sizes.matmul**2, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device)["busy_s"] for _ in range(8))
    found("copy_gb_per_s", 2 * source.nbytes / seconds / 1e9)  # read and written


# -- the tests -------------------------------------------------------------------------------------------------------


def tests(device: torch.device, sizes: Sizes, found: Found) -> None:
    """The outcome of every test under tests/gpu; without a GPU they skip themselves."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "results.xml"
        # other versions than the pinned ones may warn
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-W", "default", "-p", "no:cacheprovider"]
        environment = os.environ | ({} if device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
        done = subprocess.run([*command, f"--junitxml={xml}"], cwd=ROOT, env=environment, stdout=sys.stderr)
        found("exit_code", done.returncode)
        found("tests", [outcome(case) for case in ElementTree.parse(xml).iter("testcase")])
    if done.returncode:
        raise SystemExit(f"pytest ended with {done.returncode}")


def outcome(case: ElementTree.Element) -> dict[str, Any]:
    """Name, seconds, outcome of a test, and why it did not pass."""
    bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
    name = str(case.get("name")).removeprefix("test_").replace("_", " ")
    row: dict[str, Any] = {"name": name, "seconds": float(case.get("time", 0))}
    if bad is None:
        return row | {"outcome": "passed"}
    why = str(bad.get("message", "")).splitlines()[:1]
    return row | {"outcome": "failed" if bad.tag != "skipped" else "skipped", "why": " ".join(why)[:300]}


# -- training steps --------------------------------------------------------------------------------------------------


def steps(device: torch.device, sizes: Sizes, found: Found) -> None:
    """CLIP and CLOC steps at growing batches, and at the first one what variants of the step cost."""
    model, processor = make_model(sizes, device)
    optimizer = make_optimizer(model, ADAMW)
    found("parameters", sum(p.numel() for p in model.parameters()))
    first = make_batch(processor, sizes.batches[0], sizes.num_regions, device)
    found("tokens", {"caption": first.input_ids.shape[1], "region text": first.text_ids.shape[1]})
    flops = {name: count_flops(model, first, loss) for name, loss in (("CLIP", CLIP), ("CLOC", LossConfig()))}
    found("gflop_per_image", flops)
    grow(model, optimizer, processor, sizes, device, found)
    found("variants", variants(model, optimizer, processor, first, sizes, device))
    found("optimizers", optimizers(model, first, sizes, device))
    if find_spec("open_clip") and device.type == "cuda":
        texts = torch.nn.functional.pad(first.input_ids, (0, 77 - first.input_ids.shape[1]))
        inputs: Any = SimpleNamespace(pixel_values=first.pixel_values, captions={"77": texts})
        with open_clip_worker(sys.executable, inputs, 1, True) as (step, _):
            found("open_clip", summary(take_turns({"open_clip": step}, sizes.rounds))["open_clip"])


def compiled(device: torch.device, sizes: Sizes, found: Found) -> None:
    """The same with compiled layers; on a CPU without code generation, which takes minutes there."""
    model, processor = make_model(sizes, device)
    if device.type == "cpu":
        torch.compiler.set_stance("force_eager")
    apply_options(model, TrainConfig(compile=True))
    started = time.perf_counter()
    batch = make_batch(processor, sizes.batches[0], sizes.num_regions, device)
    training_step(model, make_optimizer(model, ADAMW), batch, LossConfig())()
    found("first_step_s", time.perf_counter() - started)
    fewer = replace(sizes, batches=sizes.batches[:3])  # the second size compiles once more, for any size
    grow(model, make_optimizer(model, ADAMW), processor, fewer, device, found)


# -- the loss --------------------------------------------------------------------------------------------------------


def loss(device: torch.device, sizes: Sizes, found: Found) -> None:
    """Forward and backward pass of the region-text loss in tiles, and with the whole matrix where it fits."""
    cases: dict[str, Any] = {}
    for rows in sizes.rows:
        cases[str(rows)] = case = {}
        for form, loss_of in (("tiled", loss_benchmark.tiled_loss), ("whole", loss_benchmark.dense_loss)):
            batch = {n: leaf(value, device) for n, value in loss_benchmark.inputs(rows).items()}
            inputs_gb = sum(value.nbytes for value in batch.values()) / 1e9

            def run(loss_of: Any = loss_of, batch: Any = batch) -> float:
                return loss_benchmark.run(loss_of, batch)

            try:
                value = run()
                peak = peak_gb(run, device)
                seconds = statistics.median(timed(run, device)["busy_s"] for _ in range(3))
                case[form] = {"seconds": seconds, "loss": value, "gb": None if peak is None else peak - inputs_gb}
            except torch.OutOfMemoryError as error:
                case[form] = {"out_of_memory": str(error).split(". ")[0]}
            del run, batch
            free(device)
            found("rows", cases)


def leaf(value: Tensor, device: torch.device) -> Tensor:
    return value.detach().to(device).requires_grad_(value.requires_grad)


# -- the quickstart's model --------------------------------------------------------------------------------------------


def tiny(device: torch.device, sizes: Sizes, found: Found) -> None:
    """`opencloc train tiny` and `opencloc eval`, as the quickstart runs them but for the processes that load."""
    workers = 0 if device.type == "cpu" else min(8, len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        options = ["--data.num-workers", str(workers), "--device", device.type]
        options += [] if sizes.tiny_steps is None else ["--steps", str(sizes.tiny_steps)]
        found("train_s", opencloc("train", "tiny", "--out", f"{folder}/cloc", *options))
        records = [json.loads(line) for line in (Path(folder) / "cloc" / "log.jsonl").read_text().splitlines()]
        found("num_workers", workers)
        found("steps", records[-1]["step"])
        found("images", records[-1]["images"])
        # the first record has the start of the workers in it
        found("images_per_s", statistics.median(record["images_per_s"] for record in records[1:] or records))
        found("data_wait", statistics.median(record["data_wait"] for record in records[1:] or records))
        found("last", {key: records[-1][key] for key in ("total", "image_text", "region_text", "grounding")})
        scored = ["--num-images", str(sizes.tiny_images), "--model", f"cloc={folder}/cloc/model"]
        scored += ["--device", device.type]
        data = "scenes:rich?num_things=120&seed=1"
        found("eval_s", opencloc("eval", "--data", data, *scored, "--out", f"{folder}/eval"))
        found("scores", json.loads((Path(folder) / "eval" / "metrics.json").read_text())["cloc"])


def opencloc(*arguments: str) -> float:
    """Seconds of the command; a failure ends this part."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "opencloc", *arguments], check=True, stdout=sys.stderr)
    return time.perf_counter() - started


# -- loading -----------------------------------------------------------------------------------------------------------


def data(device: torch.device, sizes: Sizes, found: Found) -> None:
    """Images per second that worker processes load, letterbox and hand over as batches on the device."""
    config = PRESETS[sizes.preset]()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OPENCLOC_CACHE"] = f"{folder}/cache"
        scenes = open_source("scenes:rich?seed=3", image_px=sizes.photo_px)
        with ShardWriter(f"{folder}/tars", samples_per_shard=max(1, sizes.photos // 4)) as writer:
            for number in range(sizes.photos):
                writer.write(replace(scenes[number], key=f"{number:06d}"))
        source = open_source(f"shards:{folder}/tars", image_px=config.model.side_px)
        found("photo_px", sizes.photo_px)
        tokenizer = train_tokenizer(["a photo of a dog"], 300, 77)
        processor = ClocProcessor(tokenizer, image_size=config.model.side_px, max_text_length=77)
        rates = {}
        for workers in sizes.workers:
            rates[str(workers)] = loading_rate(source, processor, workers, sizes, device)
            found("images_per_s", rates)


def loading_rate(source: Any, processor: ClocProcessor, workers: int, sizes: Sizes, device: torch.device) -> float:
    """Images per second after the first batches, which have the start of the workers in them."""
    batch_size = sizes.batches[0]
    examples = TrainingExamples([source], (), num_regions=4, image_size=processor.image_size, seed=0)
    batches = training_batches(
        examples,
        processor,
        batch_size=batch_size,
        start=0,
        stop=2 + sizes.load_batches,
        num_workers=workers,
        device=device,
    )
    for _ in range(2):
        next(batches)
    started = time.perf_counter()
    count = sum(len(batch) for batch in batches)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - started)


PARTS = {part.__name__: part for part in (machine, tests, steps, loss, tiny, compiled, data)}


if __name__ == "__main__":
    main()
