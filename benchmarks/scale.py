"""What billions of samples ask of the program itself: opening, order, resuming, sharing, labelling state, checkpoints.

    python -m benchmarks.scale --out results/scale

No image is read.  200,000 tars of 10,000 samples are names and counts: in memory, or as empty files of fsspec's
`memory:` file system, which stands for an object store and whose calls are counted.  One process measures; what many
ranks do is computed from the order that they share, and marked so.

Prints Markdown and writes it to OUT/README.md, with the figures in OUT/figures.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from benchmarks.common import facts, save, table
from benchmarks.estimate import num_parameters
from opencloc import files
from opencloc.data.shuffle import SHUFFLE, WindowedOrder
from opencloc.data.stream import TrainingExamples
from opencloc.data.tars.shards import Shards
from opencloc.presets import PRESETS
from opencloc.train.build import build_model
from opencloc.train.checkpoint import load_checkpoint, save_checkpoint
from opencloc.train.optim import make_optimizer
from opencloc.vesl import run as label_run
from opencloc.vesl.config import LabelConfig, write_manifests
from opencloc.vesl.label import find_shards

FOLDER = "memory://bucket/laion"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=200_000)
    parser.add_argument("--samples", type=int, default=10_000, help="per shard")
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=8, help="of every rank")
    parser.add_argument("--preset", choices=list(PRESETS), default="vit_b16", help="whose checkpoint is measured")
    args = parser.parse_args()
    figures: dict[str, Any] = facts() | {"settings": {n: v for n, v in vars(args).items() if n != "out"}}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OPENCLOC_CACHE"] = f"{folder}/cache"
        figures["order"] = order(args.shards, args.samples)
        figures["sharing"] = sharing(args.shards, args.samples, args.ranks)
        figures["exact"] = every_sample_once(args.shards, args.ranks)
        figures["opening"] = opening(args.shards, args.samples)
        figures["labelling"] = labelling(args.shards)
        figures["checkpoint"] = checkpoint(args.preset, Path(folder))
    save(args.out, figures, report(figures))


def seconds(do: Callable[[], Any]) -> float:
    started = time.perf_counter()
    do()
    return time.perf_counter() - started


def megabytes(do: Callable[[], Any]) -> float:
    """What is kept as long as the result of the call is."""
    tracemalloc.start()
    try:
        kept = do()
        size = tracemalloc.get_traced_memory()[0]
        del kept
    finally:
        tracemalloc.stop()
    return size / 1e6


# -- the order of samples ----------------------------------------------------------------------------------------------


def order(shards: int, samples: int) -> dict[str, float]:
    """Making the order of an epoch and beginning in the middle of one: time and memory, as each loader process pays."""

    def begin(epoch: int, share: float, tars: int = shards) -> WindowedOrder:
        made = WindowedOrder(np.full(tars, samples, dtype=np.int64), (0, 2, 0), lanes=16, shuffle=SHUFFLE)
        for place in range(int(made.size * share), int(made.size * share) + 64):
            made.number(epoch, place)
        return made

    made = begin(0, 0)
    places = np.random.default_rng(0).integers(made.size // 2, made.size // 2 + 32_768, 20_000).tolist()
    return {
        "samples": made.size,
        "start_s": seconds(lambda: begin(0, 0)),
        "resume_s": seconds(lambda: begin(7, 0.5)),
        "mb": megabytes(lambda: begin(7, 0.5)),
        "mb_of_a_hundredth": megabytes(lambda: begin(7, 0.5, max(1, shards // 100))),
        "us_per_sample": 1e6 * seconds(lambda: [made.number(0, place) for place in places]) / len(places),
    }


def sharing(shards: int, samples: int, ranks: int) -> dict[str, Any]:
    """How many ranks read each tar in an epoch, for several numbers of lanes; computed from the order."""
    found = {}
    for lanes in (16, ranks):
        made = WindowedOrder(np.full(shards, samples, dtype=np.int64), (0, 2, 0), lanes=lanes, shuffle=SHUFFLE)
        tars, ends = made._tars(0)
        readers = np.zeros(shards, dtype=np.int64)  # of every tar: lanes that have samples of it
        for lane in range(lanes):
            first, last = made._lane_start(lane), made._lane_start(lane + 1) - 1
            low, high = np.searchsorted(ends, [first, last], side="right")
            readers[tars[low : high + 1]] += 1
        found[str(lanes)] = {
            "tars_of_a_rank": float(readers.sum() / lanes) * max(1, lanes // ranks),
            "tars_in_no_lane": int((readers == 0).sum()),
            "tars_in_two_lanes": int((readers > 1).sum()),
            "ranks_that_read_a_tar": float(readers.mean()) * max(1, ranks // lanes),
        }
    return found


def every_sample_once(shards: int, ranks: int) -> dict[str, Any]:
    """All positions of an epoch over as many tars with two samples each: how many samples come once."""
    made = WindowedOrder(np.full(shards, 2, dtype=np.int64), (0, 2, 0), lanes=min(ranks, shards), shuffle=SHUFFLE)
    seen = np.bincount([made.number(3, place) for place in range(made.size)], minlength=made.size)
    return {"positions": made.size, "once": int((seen == 1).sum()), "lanes": made.lanes}


# -- an object store ---------------------------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The calls of fsspec's memory file system, by kind: listings, looks at one file, reads, writes."""
    calls: Counter[str] = Counter()

    def watch(method: str, kind: str) -> Any:
        original = getattr(MemoryFileSystem, method)

        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            writing = method == "_open" and "r" not in str(options.get("mode", (*arguments, "rb")[1]))
            calls["writes" if writing else kind] += 1
            return original(self, *arguments, **options)

        return patch.object(MemoryFileSystem, method, call)

    kinds = {
        "ls": "listings",
        "info": "looks",
        "exists": "looks",
        "isdir": "looks",
        "_open": "reads",
        "cat_file": "reads",
    }
    patches = [watch(method, kind) for method, kind in kinds.items()]
    for one in patches:
        one.start()
    try:
        yield calls
    finally:
        for one in patches:
            one.stop()


def put(name: str, content: bytes) -> None:
    """A file of the store, put there without its interface, which would take minutes for so many."""
    path = f"/{FOLDER.removeprefix('memory://')}/{name}"
    MemoryFileSystem.store[path] = MemoryFile(MemoryFileSystem(), path, content)


def clear() -> None:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def opening(shards: int, samples: int) -> dict[str, Any]:
    """Opening tars with img2dataset's counts beside them, the first time on a machine and again, and resuming there."""
    clear()
    for number in range(shards):
        put(f"{number:06d}.tar", b"")
        put(f"{number:06d}_stats.json", b'{"successes": %d}' % samples)
    location = f"{FOLDER}/{{000000..{shards - 1:06d}}}.tar"
    found: dict[str, Any] = {}
    # counts are kept where finding them took a second, as it does at a real store
    with patch("opencloc.data.tars.index._COUNTS_WORTH_KEEPING_S", 0.0):
        for name in ("first", "again"):
            with counted() as calls:
                started = time.perf_counter()
                source = Shards(location)
                found[name] = {"seconds": time.perf_counter() - started, "calls": dict(calls)}
    examples = TrainingExamples([source], (), num_regions=4, image_size=224, seed=0)
    middle = source.size // 2
    with patch.object(Shards, "prefetch", lambda *_: None):
        found["resume_s"] = seconds(lambda: [examples.locate(position) for position in range(middle, middle + 64)])
    found["fingerprint_s"] = seconds(lambda: examples.fingerprint)
    clear()
    return found


def labelling(shards: int) -> dict[str, Any]:
    """What a labelling run asks the store before its first image: half of the shards finished, a tenth with errors."""
    clear()
    config = LabelConfig(data=(f"{FOLDER}/{{000000..{shards - 1:06d}}}.tar",), detector="owl")
    for number in range(shards):
        put(f"{number:06d}.tar", b"")
    found: dict[str, Any] = {}
    with counted() as calls:
        started = time.perf_counter()
        jobs = find_shards(config)
        found["find"] = {"seconds": time.perf_counter() - started, "calls": dict(calls)}
    write_manifests(config, [os.path.dirname(jobs[0].sidecar)])
    for number, job in enumerate(jobs[: shards // 2]):
        name = os.path.basename(job.sidecar)
        put(name, b"")
        skipped = b'{"skipped": {"broken image": 1}}' if number % 10 == 0 else b'{"skipped": {}}'
        put(os.path.basename(label_run.stats_path(job.sidecar)), skipped)
    with counted() as calls:
        started = time.perf_counter()
        pending, finished = label_run._split(config, jobs)
        found["resume"] = {"seconds": time.perf_counter() - started, "calls": dict(calls)}
    found |= {"pending": len(pending), "finished": len(finished)}
    with counted() as calls:
        started = time.perf_counter()
        redo = label_run._with_skipped(finished)
        found["retry"] = {"seconds": time.perf_counter() - started, "calls": dict(calls), "redone": len(redo)}
    clear()
    return found


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoint(preset: str, folder: Path) -> dict[str, Any]:
    """Bytes of a checkpoint: computed for the largest preset, written and read for another."""
    largest = num_parameters(PRESETS["vit_h14_336"]().model)
    config = PRESETS[preset]()
    config = replace(config, data=replace(config.data, train=("scenes:rich",)))  # whose texts train the tokenizer
    model, processor = build_model(config)
    optimizer = make_optimizer(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    save_s = seconds(lambda: save_checkpoint(folder / "checkpoints", 1, model, processor, optimizer, {}, keep=1))
    saved = folder / "checkpoints" / "step_0000001"
    load_s = seconds(lambda: load_checkpoint(saved, model, optimizer))
    size = sum(files.version(str(path)).size or 0 for path in saved.iterdir())
    return {
        "computed": {"preset": "vit_h14_336", "parameters": largest, "gb": 12 * largest / 1e9},
        "measured": {"preset": preset, "parameters": parameters, "gb": size / 1e9, "save_s": save_s, "load_s": load_s},
    }


# -- the page ----------------------------------------------------------------------------------------------------------


def report(figures: dict[str, Any]) -> str:
    settings, order, opened, labels = (figures[name] for name in ("settings", "order", "opening", "labelling"))
    size, exact = figures["checkpoint"], figures["exact"]

    def calls(one: dict[str, Any]) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in one["calls"].items()) or "none"

    measured = [
        ("the order of an epoch, from its start", f"{order['start_s']:.3f} s", ""),
        ("the same from the middle of epoch 8 (resume)", f"{order['resume_s']:.3f} s", ""),
        ("memory of the order in one process", f"{order['mb']:.1f} MB", ""),
        ("the same for a hundredth of the tars", f"{order['mb_of_a_hundredth']:.1f} MB", ""),
        ("one sample found", f"{order['us_per_sample']:.1f} µs", ""),
        ("opened the first time on a machine", f"{opened['first']['seconds']:.1f} s", calls(opened["first"])),
        ("opened again there", f"{opened['again']['seconds']:.1f} s", calls(opened["again"])),
        ("first positions after a resume in the middle", f"{opened['resume_s']:.3f} s", ""),
        ("fingerprint of the data for a checkpoint", f"{opened['fingerprint_s']:.2f} s", ""),
        ("labelling: finding the shards", f"{labels['find']['seconds']:.1f} s", calls(labels["find"])),
        ("labelling: which are finished (half)", f"{labels['resume']['seconds']:.1f} s", calls(labels["resume"])),
        ("labelling: which finished ones have errors", f"{labels['retry']['seconds']:.1f} s", calls(labels["retry"])),
    ]
    shared = [
        (
            lanes,
            f"{one['tars_of_a_rank']:,.0f}",
            f"{one['ranks_that_read_a_tar']:.1f}",
            one["tars_in_no_lane"],
            one["tars_in_two_lanes"],
        )
        for lanes, one in figures["sharing"].items()
    ]
    sizes = [
        (how, one["preset"], f"{one['parameters'] / 1e6:,.1f} M", f"{one['gb']:.2f}", *times)
        for how, one in size.items()
        for times in [[f"{one[name]:.1f}" if name in one else "not measured" for name in ("save_s", "load_s")]]
    ]
    return "\n".join(
        [
            "# Billions of samples",
            "",
            f"{settings['shards']:,} tars of {settings['samples']:,} samples, {order['samples']:,} in all;",
            f"{settings['ranks']:,} ranks of {settings['workers']} loader processes. How: the first lines of",
            f"`benchmarks/scale.py`. {figures['hardware']}.",
            "",
            "## Measured in one process",
            "",
            "The file system is in memory: its calls count, its seconds are the program's own share.",
            "",
            table(["what", "found", "calls to the file system"], measured),
            f"Of {exact['positions']:,} positions of an epoch over as many tars with two samples each, in "
            f"{exact['lanes']:,} lanes, {exact['once']:,} samples came exactly once.",
            "",
            "## Computed from the order",
            "",
            f"What {settings['ranks']:,} ranks read in an epoch, by `data.lanes`.",
            "",
            table(["lanes", "tars of a rank", "ranks that read a tar", "tars in no lane", "tars in two"], shared),
            f"{settings['ranks'] * settings['workers']:,} loader processes hold the order each: "
            f"{settings['ranks'] * settings['workers'] * order['mb'] / 1e3:,.0f} GB over all machines, "
            f"{settings['workers'] * 8 * order['mb'] / 1e3:.1f} GB on one of 8 GPUs.",
            "",
            "## Checkpoints",
            "",
            "Weights and two moments in float32, 12 bytes per parameter.",
            "",
            table(["", "preset", "parameters", "GB", "save, s", "load, s"], sizes),
        ]
    )


if __name__ == "__main__":
    main()
