"""What a training step costs: CLIP against CLOC, with and without each saving, and other implementations of CLIP.

    python -m benchmarks.step --data ../shared/data --out results/step --python VENV/bin/python     # two CPU cores
    python -m benchmarks.step --data ../shared/data --out results/step --python VENV/bin/python \\
        --batch-size 256 --rounds 30 --extra-rounds 10                                              # one GPU

A step is forward, losses, backward, clipping and AdamW for ViT-B/16 at 224 px with M regions per image.  Photos,
captions and boxes come from coco740.  A caption is four of its five human captions (48 tokens on average).  The region
texts are noun phrases of the captions, as VESL makes them, given to the boxes in order.  All variants of this project
and plain transformers share one pair of towers; open_clip runs in a process of its own (`open_clip_step.py`).  Variants
take turns and ratios are formed within a round.  Seconds are those of the GPU, or of this process on a CPU.

Prints Markdown and writes it to OUT/tables.md, with the figures in OUT/figures.json.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import facts, save, table, take_turns, timed
from benchmarks.step_setup import (
    FROZEN,
    FULL,
    Inputs,
    Step,
    make_inputs,
    make_models,
    make_parts,
    make_step,
    make_variants,
)
from opencloc.devices import has_native_bf16
from opencloc.model.cloc import ClocModel
from opencloc.model.packing import PackedTexts
from opencloc.presets import PRESETS

Timer = Callable[[int], dict[str, float]]  # number of the round -> busy and wall seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds coco740")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", help="python of a venv with open_clip; without it open_clip is left out")
    parser.add_argument("--preset", choices=list(PRESETS), default="vit_b16", help="sizes of the model")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-regions", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="of the main variants")
    parser.add_argument("--extra-rounds", type=int, default=1, help="of the others")
    parser.add_argument("--flops-batch-size", type=int, default=256, help="operations are counted at this size too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--only", nargs="*", help="names of variants")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    bf16 = has_native_bf16(device)
    model = PRESETS[args.preset]().model

    inputs, config = make_inputs(args.data, model, args.batch_size, args.num_regions, device)
    models, optimizer = make_models(config, device)
    losses, main_variants = make_variants(models, inputs)
    steps = {name: make_step(loss, optimizer, device, bf16) for name, loss in losses.items()}
    figures: dict[str, Any] = facts(device) | {
        "precision": "bf16" if bf16 else "fp32",
        "batch_size": args.batch_size,
        "num_regions": args.num_regions,
    }

    def found(name: str, value: Any) -> None:  # saved at once: later stages take long
        figures[name] = value
        save(args.out, figures)

    large, _ = make_inputs(args.data, model, args.flops_batch_size, args.num_regions, torch.device("cpu"))
    by_size = {str(len(i.pixel_values)): i for i in (inputs, large)}
    found("tokens", {size: i.tokens for size, i in by_size.items()})
    found("gflop_per_image", {size: count_flops(models, i) for size, i in by_size.items()})
    parts = timers(make_parts(models["cross"], optimizer, inputs, bf16), device)
    part_times = take_turns(parts, args.rounds)
    found("part_seconds", part_times)
    found("parts", parts_ratio(part_times))
    gflop = figures["gflop_per_image"][str(args.batch_size)]["CLOC cross"] * args.batch_size
    found("profile", profile_step(steps["CLOC cross"], gflop, bf16, device))
    with contextlib.ExitStack() as stack:
        runners = timers(steps, device)
        if args.python:
            runners["open_clip"], versions = stack.enter_context(
                open_clip_worker(args.python, inputs, args.threads, bf16)
            )
            figures["versions"] |= versions
            main_variants = [*main_variants, "open_clip"]
        if args.only:
            runners = {name: runner for name, runner in runners.items() if name in args.only}
        others = {name: args.extra_rounds for name in runners if name not in main_variants}
        times = take_turns(runners, args.rounds, fewer=others)
    found("seconds", times)
    found("ratios", ratios(times))
    save(args.out, figures, report(figures), page="tables.md")


def timers(steps: dict[str, Step], device: torch.device) -> dict[str, Timer]:
    """The steps, timed."""
    return {name: lambda _, step=step: timed(step, device) for name, step in steps.items()}


# -- measuring -----------------------------------------------------------------------------------------------------


def count_flops(models: dict[str, ClocModel], inputs: Inputs) -> dict[str, float]:
    """GFLOP per image of forward, losses and backward of each variant, on tensors without content.

    Matrix products and attention only; causal attention counts in full.
    """
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, sdpa_kernel(SDPBackend.MATH):
        fake = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, vars(inputs))
        for texts in (fake["captions"], fake["texts"], fake["all_texts"]):
            fields: dict[str, Any] = dict(vars(texts["packed"]))
            fields |= {k: mode.from_tensor(v) for k, v in fields.items() if isinstance(v, Tensor)}
            texts["packed"] = PackedTexts(**fields)
        with FakeCopyMode(mode):
            models = copy.deepcopy(models)
        for name, (forward, _) in make_variants(models, Inputs(**fake))[0].items():
            with FlopCounterMode(display=False) as counter:
                forward().backward()
            found[name] = counter.get_total_flops() / len(inputs.pixel_values) / 1e9
    return found


@contextlib.contextmanager
def open_clip_worker(python: str, inputs: Inputs, threads: int, bf16: bool) -> Iterator[tuple[Timer, dict[str, str]]]:
    """(runs one step of open_clip in its own process, versions there)."""
    with tempfile.TemporaryDirectory() as folder:
        batch = {
            "pixel_values": inputs.pixel_values.cpu(),
            "texts": inputs.captions["77"].cpu(),
            "device": str(inputs.pixel_values.device),
        }
        torch.save(batch, f"{folder}/batch.pt")
        command = [python, "-m", "benchmarks.open_clip_step", f"{folder}/batch.pt", str(threads)]
        process: Any = subprocess.Popen(
            [*command, "bf16" if bf16 else "fp32"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        versions = json.loads(process.stdout.readline())

        def step(_: int) -> dict[str, float]:
            process.stdin.write("step\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        try:
            yield step, {"open_clip": versions["open_clip"], "torch beside open_clip": versions["torch"]}
        finally:
            process.stdin.close()
            process.wait()


def ratios(times: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Each variant against the steps of CLIP, of open_clip and of CLOC: median, least and largest over the rounds."""
    found = {}
    for base in ("CLIP", "open_clip", "CLIP, captions of 77 tokens", FULL):
        for name, rows in times.items():
            if base in times and name != base and rows:
                values = [row["busy_s"] / other["busy_s"] for row, other in zip(rows, times[base], strict=False)]
                found[f"{name} / {base}"] = {
                    "median": statistics.median(values),
                    "least": min(values),
                    "largest": max(values),
                    "rounds": len(values),
                }
    return found


def matmul_peak(device: torch.device, bf16: bool, size: int | None = None) -> float:
    """FLOP/s of a large square matrix product, the best of several."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    return max(2 * size**3 / timed(lambda: torch.mm(a, b), device)["busy_s"] for _ in range(8))


def profile_step(step: Step, gflop: float, bf16: bool, device: torch.device) -> dict[str, Any]:
    """Where the time of a CLOC step goes, and how near it is to the peak of a matrix product."""
    peaks, seconds = [], []
    for _ in range(3):
        peaks.append(matmul_peak(device, bf16))
        seconds.append(timed(step, device)["busy_s"])
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as prof:
        step()
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    kinds: dict[str, float] = {}
    for event in prof.key_averages():
        kinds[kind_of(event.key)] = kinds.get(kind_of(event.key), 0.0) + getattr(event, own)
    total = sum(kinds.values())
    return {
        "gflop": gflop,
        "matmul_peak_gflops": max(peaks) / 1e9,
        "share_of_peak": 1e9 * gflop / statistics.median(seconds) / max(peaks),
        "operator_shares": {k: v / total for k, v in sorted(kinds.items(), key=lambda item: -item[1])},
    }


def kind_of(operator: str) -> str:
    """Coarse kind of a profiled operator or GPU kernel."""
    name = operator.lower()
    kinds = {
        "attention": ("scaled_dot_product", "flash", "fmha", "attention"),
        "matrix products": ("mm", "gemm", "linear", "convolution", "matmul", "cutlass", "nvjet"),
        "norms": ("layer_norm", "layernorm"),
        "GELU": ("gelu",),
        "clip and AdamW": ("adam", "foreach", "linalg_vector_norm", "multi_tensor"),
        "softmax": ("softmax", "logsumexp"),
        "copies and fills": ("copy", "fill", "zero", "cat", "clone", "empty", "memcpy", "memset"),
    }
    return next((kind for kind, words in kinds.items() if any(word in name for word in words)), "other elementwise")


def parts_ratio(times: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """CLOC step / CLIP step from the medians of their parts.  What CLOC adds is small, so its error is small too."""
    median = {name: statistics.median(row["busy_s"] for row in rows) for name, rows in times.items()}
    clip = sum(value for name, value in median.items() if name.startswith("CLIP"))
    added = sum(value for name, value in median.items() if name.startswith("CLOC"))
    added -= median["CLIP: captions"] + median["CLIP: loss"]  # which are parts of CLOC's too
    return {"clip_s": clip, "added_s": added, "ratio": 1 + added / clip}


def report(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    kinds = f"{figures['precision']}, batch {figures['batch_size']}, M = {figures['num_regions']}"
    rows = []
    for name, times in figures["seconds"].items():
        if not times:
            continue
        busy, wall = (statistics.median(row[key] for row in times) for key in ("busy_s", "wall_s"))
        to_clip, to_open = (figures["ratios"].get(f"{name} / {base}") for base in ("CLIP", "open_clip"))
        spread = f"{to_clip['least']:.3f} to {to_clip['largest']:.3f}" if to_clip else ""
        ratio = [f"{found['median']:.3f}" if found else "" for found in (to_clip, to_open)]
        speed = f"{figures['batch_size'] / busy:.2f}"
        rows.append([name, f"{busy:.2f}", speed, f"{wall:.2f}", ratio[0], spread, ratio[1]])
    frozen = figures["ratios"].get(f"{FROZEN} / {FULL}")
    faster = (
        []
        if frozen is None
        else [
            f"With frozen towers {1 / frozen['median']:.2f} times the images per second of full training "
            f"({1 / frozen['largest']:.2f} to {1 / frozen['least']:.2f} in {frozen['rounds']} rounds)\n"
        ]
    )
    counts, tokens = figures["gflop_per_image"], figures["tokens"]
    medians = {n: statistics.median(t["busy_s"] for t in times) for n, times in figures["part_seconds"].items()}
    clip, found = figures["parts"]["clip_s"], figures["profile"]
    return "\n".join(
        [
            f"{figures['hardware']}, {kinds}\n",
            table(["step", "median s", "images / s", "wall s", "/ CLIP", "least to largest", "/ open_clip"], rows),
            *faster,
            table(
                ["GFLOP per image", *(cell for size in counts for cell in (f"batch {size}", "/ CLIP"))],
                [
                    [
                        name,
                        *(cell for c in counts.values() for cell in (f"{c[name]:.1f}", f"{c[name] / c['CLIP']:.3f}")),
                    ]
                    for name in next(iter(counts.values()))
                ],
            ),
            table(
                ["texts of the batch, tokens", *tokens],
                [[name, *(by_name[name] for by_name in tokens.values())] for name in next(iter(tokens.values()))],
            ),
            table(
                ["part", "median s", "of the CLIP step"],
                [[name, f"{seconds:.3f}", f"{100 * seconds / clip:.1f} %"] for name, seconds in medians.items()],
            ),
            f"CLOC / CLIP by parts: {figures['parts']['ratio']:.3f}",
            f"{found['gflop']:.0f} GFLOP at {100 * found['share_of_peak']:.0f} % of the matmul peak "
            f"({found['matmul_peak_gflops']:.1f} GFLOP/s)\n",
            table(
                ["operators of a CLOC step", "share"],
                [[name, f"{100 * share:.1f} %"] for name, share in found["operator_shares"].items()],
            ),
        ]
    )


if __name__ == "__main__":
    main()
