"""Runs the parts of `benchmarks/gpu_parts.py`, most valuable first, within some minutes: see `benchmarks/gpu.sh`.

Each part is a process of its own with a time limit, so that one that fails or hangs takes no other with it; what it had
found by then is kept.  Results are written after every part, whole files at a time.  Parts for which no time is left
are named in the results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import table
from opencloc import files

ROOT = Path(__file__).parents[1]
LIMITS_S = {"machine": 60, "tests": 150, "steps": 110, "loss": 60, "tiny": 120, "compiled": 150, "data": 75}
LEAST_S = 15  # under which a part is not begun
REST_S = 5  # for the end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8, help="for everything")
    parser.add_argument("--only", nargs="+", choices=list(LIMITS_S), default=list(LIMITS_S), help="parts")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu runs small sizes")
    end = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "figures.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"parts": {}}
    figures |= {"command": shlex.join(["benchmarks/gpu.sh", *sys.argv[1:]]), "commit": commit()}
    with (args.out / "log.txt").open("a") as log:
        for part, limit in LIMITS_S.items():
            if part in args.only:
                left = end - time.monotonic() - REST_S
                figures["parts"][part] = run_part(part, args.device, min(limit, left), log)
                files.write_json(kept, figures)
                files.write_text(args.out / "README.md", report(figures))
                print(f"{part}: {figures['parts'][part]['outcome']}", file=sys.stderr, flush=True)
    print(args.out)
    print((args.out / "README.md").read_text())
    return 0 if all(part["outcome"] == "done" for part in figures["parts"].values()) else 1


def commit() -> str:
    """The commit of the code, where git and the history are there."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    return os.environ.get("COMMIT", "unknown")


def run_part(part: str, device: str, limit_s: float, log: Any) -> dict[str, Any]:
    """Outcome (done, failed, out of time, left out), seconds, and what was found."""
    if limit_s < LEAST_S:
        return {"outcome": "left out: no time was left"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.gpu_parts", part, "--out", str(found), "--device", device]
        print(f"\n== {part}", file=log, flush=True)
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(limit_s)
            outcome = "done" if process.returncode == 0 else f"failed with exit code {process.returncode}, see log.txt"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # and its children
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        result = {"outcome": outcome, "seconds": round(time.monotonic() - started, 1)}
        return result | {"found": json.loads(found.read_text()) if found.exists() else {}}


# -- the page --------------------------------------------------------------------------------------------------------


def report(figures: dict[str, Any]) -> str:
    """Everything found so far, as Markdown."""
    parts = figures["parts"]
    found = {name: part.get("found", {}) for name, part in parts.items()}
    machine = found.get("machine", {})
    lines = ["# On one GPU", "", f"`{figures['command']}` at commit {figures['commit']}.", ""]
    if machine:
        versions = machine.get("versions", {}) | machine.get("versions_gpu", {})
        named = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines += [f"{machine['hardware']}, {machine.get('cores')} CPU cores; {named}.", ""]
    rows = [(name, part["outcome"], part.get("seconds", "")) for name, part in parts.items()]
    lines += [table(["part", "outcome", "s"], rows)]
    for name, show in PAGES.items():
        if found.get(name):
            lines += [show(found[name], machine)]
    return "\n".join(lines)


def show_machine(found: dict[str, Any], _: dict[str, Any]) -> str:
    rows = [
        ("bf16 matrix product, TFLOP/s", found.get("matmul_tflops", "")),
        ("the same on the datasheet", found.get("datasheet_tflops") or "unknown"),
        ("copy on the device, GB/s read and written", found.get("copy_gb_per_s", "")),
    ]
    return "## The machine\n\n" + table(["ceiling", "measured"], rows)


def show_tests(found: dict[str, Any], _: dict[str, Any]) -> str:
    rows = [(row["name"], row["outcome"], row.get("why", ""), row["seconds"]) for row in found.get("tests", [])]
    return "## Tests\n\n" + table(["test", "outcome", "why", "s"], rows)


def show_steps(found: dict[str, Any], machine: dict[str, Any], title: str = "Training steps") -> str:
    """Images per second and share of the peaks; the arithmetic is that of the plain step."""
    lines = [f"## {title}", ""]
    if "first_step_s" in found:
        lines += [f"The first step, compilation included, took {found['first_step_s']:.0f} s.", ""]
    head = ["images", "CLIP, images/s", "CLOC, images/s", "CLOC / CLIP (least to largest)", "CLIP, GB", "CLOC, GB"]
    gflop = found.get("gflop_per_image")
    peaks = [(name, machine.get(f"{name}_tflops")) for name in ("matmul", "datasheet")] if gflop else []
    head += [f"CLOC, % of {'the measured product' if n == 'matmul' else 'the datasheet'}" for n, p in peaks if p]
    rows = []
    for size, case in found.get("batches", {}).items():
        if "out_of_memory" in case:
            rows.append([size, "out of memory", *[""] * (len(head) - 2)])
            continue
        ratio = case["ratio"]
        row = [size, f"{case['CLIP']['images_per_s']:,.0f}", f"{case['CLOC']['images_per_s']:,.0f}"]
        row += [f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['largest']:.3f})"]
        row += [case[name]["peak_gb"] or "" for name in ("CLIP", "CLOC")]
        row += [gflop["CLOC"] * case["CLOC"]["images_per_s"] / p / 10 for _, p in peaks if p and gflop]
        rows.append(row)
    lines += [table(head, rows)]
    if gflop:
        counted = ", ".join(f"{name} {value:.1f}" for name, value in gflop.items())
        lines += [f"GFLOP per image, forward and backward: {counted}. Tokens, padded: {found['tokens']}.", ""]
    if variants := found.get("variants"):
        base = variants["CLOC"]["busy_s"]
        rows = [(name, 1e3 * case["busy_s"], case["busy_s"] / base) for name, case in variants.items()]
        lines += [table(["step at the first size", "ms", "/ CLOC"], rows)]
    if optimizers := found.get("optimizers"):
        rows = [(name, 1e3 * case["busy_s"]) for name, case in optimizers.items()]
        lines += [table(["optimizer alone", "ms"], rows)]
    if "open_clip" in found:
        lines += [f"open_clip's step at the first size: {1e3 * found['open_clip']['busy_s']:.1f} ms.", ""]
    return "\n".join(lines)


def show_compiled(found: dict[str, Any], machine: dict[str, Any]) -> str:
    return show_steps(found, machine, "Training steps, layers compiled")


def show_loss(found: dict[str, Any], _: dict[str, Any]) -> str:
    rows = []
    for size, case in found.get("rows", {}).items():
        row: list[Any] = [f"{int(size):,}"]
        for form in ("tiled", "whole"):
            one = case.get(form, {})
            row += ["out of memory", ""] if "out_of_memory" in one else [one.get("seconds", ""), one.get("gb") or ""]
        rows.append(row)
    head = ["rows", "tiled, s", "tiled, GB beside the inputs", "whole matrix, s", "whole matrix, GB"]
    return "## The region-text loss, forward and backward\n\n" + table(head, rows)


def show_tiny(found: dict[str, Any], _: dict[str, Any]) -> str:
    names = ("steps", "images", "num_workers", "train_s", "images_per_s", "data_wait", "eval_s")
    rows = [(name, found[name]) for name in names if name in found]
    rows += [(name, f"{100 * value:.1f} %") for name, value in found.get("scores", {}).items()]
    return "## The quickstart's CLOC\n\n" + table(["", "found"], rows)


def show_data(found: dict[str, Any], _: dict[str, Any]) -> str:
    rows = [(workers, f"{rate:,.0f}") for workers, rate in found.get("images_per_s", {}).items()]
    title = f"## Loading photos of {found.get('photo_px')} px from tars\n\n"
    return title + table(["processes", "images/s"], rows)


PAGES = {
    "machine": show_machine,
    "tests": show_tests,
    "steps": show_steps,
    "compiled": show_compiled,
    "loss": show_loss,
    "tiny": show_tiny,
    "data": show_data,
}


if __name__ == "__main__":
    sys.exit(main())
