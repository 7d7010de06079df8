"""What the region-text loss costs: the whole matrix against tiles, time and peak memory, forward and backward.

    python -m benchmarks.loss --out results/loss                                   # 1 k to 64 k rows, one thread
    python -m benchmarks.loss --out results/loss --rows 1024 2048 4096 8192 16384 32768

Each case runs in a fresh process, so that peaks are its own, and the two forms take turns.  Seconds are CPU seconds of
the process (one thread), medians of the repeats.  Memory is the largest resident size above that of the process with
its inputs after a small warm-up: what the loss itself needs.  The dense form stops where it would need more than
--max-gb; beyond that its figures are extrapolated from the largest measured case with the square of the rows, and
marked so.

Rows are float32 embeddings of width 512.  A tenth of them are invalid, four rows share a text, and the conflict filter
is the published one.  Prints Markdown and writes it to OUT/README.md, with the figures in OUT/figures.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import facts, save
from opencloc.contrastive import info_nce

WIDTH = 512
INVALID = 0.1
ROWS_PER_TEXT = 4
SIMILAR_ABOVE = 0.9
DENSE_MATRICES = 10  # of rows x rows in float32, at the peak: a first guess for --max-gb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024 << k for k in range(7)])
    parser.add_argument("--repeats", type=int, default=3, help="of each case up to 4,096 rows; larger ones run once")
    parser.add_argument("--max-gb", type=float, default=16.0)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # FORM ROWS, in a process of its own
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case[0], int(args.case[1]))))
        return
    figures = []
    for rows in args.rows:
        forms = ["tiled"] if DENSE_MATRICES * 4 * rows**2 > args.max_gb * 1e9 else ["dense", "tiled"]
        found: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
        for _ in range(args.repeats if rows <= 4096 else 1):
            for form in forms:
                found[form].append(in_fresh_process(form, rows))
                print(f"{rows} rows, {form}: {found[form][-1]}", file=sys.stderr)
        figures.append({"rows": rows} | {form: summary(cases) for form, cases in found.items()})
    settings = {"width": WIDTH, "invalid": INVALID, "rows_per_text": ROWS_PER_TEXT, "similar_above": SIMILAR_ABOVE}
    save(args.out, facts() | {"settings": settings, "cases": figures}, report(figures))


def in_fresh_process(form: str, rows: int) -> dict[str, float]:
    """What `measure` finds in a new process."""
    command = [sys.executable, "-m", "benchmarks.loss", "--out", ".", "--case", form, str(rows)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(form: str, rows: int) -> dict[str, float]:
    """CPU seconds of one forward and backward pass and the memory it needs beside its inputs, in MB; and its loss."""
    torch.set_num_threads(1)
    loss_of = {"dense": dense_loss, "tiled": tiled_loss}[form]
    run(loss_of, inputs(128))
    batch = inputs(rows)
    before = float(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    start = time.process_time()
    loss = run(loss_of, batch)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "mb": (peak - before) / 1e6, "loss": loss}


def inputs(rows: int) -> dict[str, Tensor]:
    """Embeddings with a common direction, as texts have, and their texts' identities."""
    generator = torch.Generator().manual_seed(0)

    def unit(count: int) -> Tensor:
        return F.normalize(torch.randn(count, WIDTH, generator=generator) + 0.5, dim=-1)

    which = torch.randint(max(1, rows // ROWS_PER_TEXT), (rows,), generator=generator)
    return {
        "region": unit(rows).requires_grad_(),
        "text": unit(max(1, rows // ROWS_PER_TEXT))[which].requires_grad_(),
        "scale": torch.tensor(30.0, requires_grad=True),
        "valid": torch.rand(rows, generator=generator) >= INVALID,
        "text_hash": which,
    }


def run(loss_of: Any, batch: dict[str, Tensor]) -> float:
    """One forward and backward pass; the loss."""
    loss = loss_of(**batch)
    loss.backward()
    return loss.item()


def tiled_loss(region: Tensor, text: Tensor, scale: Tensor, valid: Tensor, text_hash: Tensor) -> Tensor:
    return info_nce(region, text, scale, valid=valid, text_hash=text_hash, similar_above=SIMILAR_ABOVE)[0]


def dense_loss(region: Tensor, text: Tensor, scale: Tensor, valid: Tensor, text_hash: Tensor) -> Tensor:
    """The same loss with the whole matrix, as plain PyTorch writes it."""
    negatives = dense_negatives(text, text_hash, valid)
    logits = scale * region @ text.T
    kept = negatives | torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(~kept, float("-inf"))
    positive = logits.diagonal()
    both = (logits.logsumexp(1) - positive) + (logits.logsumexp(0) - positive)
    return torch.where(valid, both, 0).sum() / (2 * valid.sum().clamp_min(1))


@torch.no_grad()
def dense_negatives(text: Tensor, text_hash: Tensor, valid: Tensor) -> Tensor:
    pairs = valid[:, None] & valid[None]
    pairs.fill_diagonal_(False)
    distinct = pairs & (text_hash[:, None] != text_hash[None])
    cosine = text @ text.T
    count = distinct.sum().clamp_min(1)
    mean = torch.where(distinct, cosine, 0).sum() / count
    deviation = (torch.where(distinct, cosine - mean, 0).square().sum() / count).sqrt()
    return distinct & (cosine <= torch.clamp_min(mean + 3 * deviation, SIMILAR_ABOVE))


def summary(cases: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "seconds": round(statistics.median(case["seconds"] for case in cases), 3),
        "mb": round(statistics.median(case["mb"] for case in cases), 1),
        "loss": cases[0]["loss"],
        "repeats": len(cases),
    }


def report(figures: list[dict[str, Any]]) -> str:
    """The table, dense figures beyond the largest measured extrapolated and marked."""
    lines = [
        "# The region-text loss at any size",
        "",
        "Forward and backward pass, embeddings of width 512 in float32, one CPU thread. How: the first lines of",
        "`benchmarks/loss.py`. (x) marks what was not run but extrapolated from the largest dense case with the",
        "square of the rows.",
        "",
        "| rows | dense, s | tiled, s | time | dense, MB | tiled, MB | memory |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    largest = max((case for case in figures if "dense" in case), key=lambda case: case["rows"], default=None)
    for case in figures:
        tiled, dense, mark = case["tiled"], case.get("dense"), ""
        if dense is None and largest is not None:
            factor, mark = (case["rows"] / largest["rows"]) ** 2, " (x)"
            dense = {name: largest["dense"][name] * factor for name in ("seconds", "mb")}
        if dense is None:
            lines.append(f"| {case['rows']:,} | | {tiled['seconds']:.2f} | | | {tiled['mb']:,.0f} | |")
            continue
        lines.append(
            f"| {case['rows']:,} | {dense['seconds']:.2f}{mark} | {tiled['seconds']:.2f} "
            f"| {tiled['seconds'] / dense['seconds']:.2f} x | {dense['mb']:,.0f}{mark} | {tiled['mb']:,.0f} "
            f"| 1/{dense['mb'] / tiled['mb']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
