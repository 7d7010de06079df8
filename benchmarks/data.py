"""Images per second and core of the training stream, against bare decoding and two libraries, on the same tars.

    python -m venv /tmp/venv-data
    /tmp/venv-data/bin/pip install webdataset datasets pillow==13.0.0 numpy
    export OMP_NUM_THREADS=1
    python -m benchmarks.data --data ../shared/data --python /tmp/venv-data/bin/python --out results/data

The libraries run in their own interpreter (`benchmarks/data_libraries.py`).  Every reader does the same work: photo and
caption out of the tar, shuffled, JPEG decoded, letterboxed to 224 pixels.  Each is one process, measured in CPU
seconds, which other programs on the machine hardly prolong.  All take turns, and medians are compared.  Bare decoding
has the bytes in memory: it decodes at the scale needed and resizes, nothing else.

Two sets of tars are made from the photos of coco740, as img2dataset makes them (`KEY.jpg`, `KEY.json`, `KEY.txt` with a
caption): the photos as they are (short side 256), and enlarged three times (short side 768), as photos lie on the web.
The libraries know nothing of regions, so only the reader `opencloc, with regions` gets tars that have them.

Prints Markdown and writes it to OUT/README.md, with the figures in OUT/figures.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import facts, save, table, take_turns
from opencloc.data.sources.coco import Coco, CocoConfig
from opencloc.data.stream import TrainingExamples, training_batches
from opencloc.data.tars.shards import Shards, ShardsConfig, ShardWriter
from opencloc.model.processor import ClocProcessor, train_tokenizer

SIDE = 224
Round = Callable[[int], tuple[int, float]]  # number of the round -> images, CPU seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with coco740/")
    parser.add_argument("--python", help="interpreter with webdataset and datasets; without it they are left out")
    parser.add_argument("--out", type=Path, required=True, help="folder for README.md and figures.json")
    parser.add_argument("--photos", type=int, default=320, help="of the first set; of the second a quarter")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.photos < 4 * arguments.batch_size:
        parser.error(f"--photos must be at least {4 * arguments.batch_size}, four batches")
    figures: dict[str, Any] = facts() | {"rounds": arguments.rounds, "sets": {}}
    with tempfile.TemporaryDirectory() as work:
        os.environ["OPENCLOC_CACHE"] = f"{work}/cache"
        for name, enlarge, limit in (
            ("short side 256", 1, arguments.photos),
            ("short side 768", 3, arguments.photos // 4),
        ):
            folder = f"{work}/{enlarge}"
            photos = write_tars(f"{arguments.data}/coco740", folder, enlarge, limit)
            figures["sets"][name] = measure(folder, photos, arguments.python, arguments.rounds, arguments.batch_size)
    save(arguments.out, figures, markdown(figures))


def write_tars(location: str, folder: str, enlarge: int, limit: int) -> list[bytes]:
    """Writes the photos into four tars without regions and four with them, and returns their bytes."""
    sources = [Coco(location, CocoConfig(split=split)) for split in ("train", "test")]
    found = [(source, index) for source in sources for index in range(source.size)][:limit]
    photos = []
    with (
        ShardWriter(f"{folder}/plain", samples_per_shard=-(-len(found) // 4)) as plain,
        ShardWriter(f"{folder}/regions", samples_per_shard=-(-len(found) // 4)) as regions,
    ):
        for source, index in found:
            sample, data = source[index], source.image_bytes(index)
            if enlarge > 1:
                buffer = io.BytesIO()
                size = sample.image.width * enlarge, sample.image.height * enlarge
                sample.image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
                data = buffer.getvalue()
            photos.append(data)
            plain.write(replace(sample, boxes=sample.boxes[:0], texts=()), data)
            regions.write(sample, data)
    for tar in [*plain.paths, *regions.paths]:
        add_captions(tar)
    return photos


def add_captions(tar: str) -> None:
    """Puts a KEY.txt with the first caption behind every KEY.jpg, as img2dataset does."""
    with tarfile.open(tar) as old, tarfile.open(f"{tar}.new", "w") as new:
        for info in old:
            member = old.extractfile(info)
            assert member is not None
            data = member.read()
            new.addfile(info, io.BytesIO(data))
            if info.name.endswith(".json"):
                caption = json.loads(data).get("caption") or ["a photo"]
                text = (caption if isinstance(caption, str) else caption[0]).encode()
                note = tarfile.TarInfo(info.name.removesuffix(".json") + ".txt")
                note.size = len(text)
                new.addfile(note, io.BytesIO(text))
    os.replace(f"{tar}.new", tar)


def measure(folder: str, photos: list[bytes], python: str | None, rounds: int, batch_size: int) -> dict[str, Any]:
    """Microseconds of CPU per image of every reader, all rounds."""
    readers: dict[str, Round] = {"bare decode and resize": lambda _: bare(photos)}
    source, with_regions = (Shards(f"{folder}/{kind}", ShardsConfig(image_px=SIDE)) for kind in ("plain", "regions"))
    assert source.size == with_regions.size == len(photos)
    readers["opencloc"] = lambda number: stream(source, number)
    readers["opencloc, with regions"] = lambda number: stream(with_regions, number)
    processor = ClocProcessor(train_tokenizer(["a photo of a dog"], 300, 32), image_size=SIDE, max_text_length=32)
    readers["opencloc, batches of tensors"] = lambda number: batches(with_regions, processor, number, batch_size)
    children = []
    if python is not None:
        for library in ("webdataset", "datasets"):
            for mode in ("as-documented", "scaled"):
                child = start_library(python, library, mode, source.urls)
                children.append(child)
                readers[f"{library}, {mode.replace('-', ' ')}"] = lambda _, child=child: ask(child)
    spent = take_turns(readers, rounds)
    micros = {name: [1e6 * cpu_s / images for images, cpu_s in found] for name, found in spent.items()}
    counts = {images for found in spent.values() for images, _ in found}
    assert counts <= {len(photos), len(photos) // batch_size * batch_size}, f"some reader read {counts}"
    for child in children:
        child.communicate()
    mean_kb = statistics.mean(map(len, photos)) / 1000
    return {"photos": len(photos), "mean_kb": round(mean_kb, 1), "cpu_us_per_image": micros}


def bare(photos: list[bytes]) -> tuple[int, float]:
    start = time.process_time()
    for data in photos:
        image = Image.open(io.BytesIO(data))
        factor = SIDE / max(image.size)
        image.draft("RGB", (max(1, int(np.ceil(image.width * factor))), max(1, int(np.ceil(image.height * factor)))))
        factor = SIDE / max(image.size)
        inner = max(1, round(image.width * factor)), max(1, round(image.height * factor))
        np.asarray(image.resize(inner, Image.Resampling.BICUBIC))
    return len(photos), time.process_time() - start


def fresh(source: Shards) -> TrainingExamples:
    """The stream as a worker gets it: nothing read yet."""
    again = pickle.loads(pickle.dumps(source))
    return TrainingExamples([again], (), num_regions=4, image_size=SIDE, seed=0)


def stream(source: Shards, number: int) -> tuple[int, float]:
    start = time.process_time()
    examples = fresh(source)
    for position in range(number * source.size, (number + 1) * source.size):
        examples[position]
    return source.size, time.process_time() - start


def batches(source: Shards, processor: ClocProcessor, number: int, batch_size: int) -> tuple[int, float]:
    """With captions and region texts tokenised, images stacked and normalised."""
    start = time.process_time()
    per_epoch = source.size // batch_size
    first = number * per_epoch
    made = training_batches(
        fresh(source), processor, batch_size=batch_size, start=first, stop=first + per_epoch, num_workers=0
    )
    images = sum(len(batch) for batch in made)
    return images, time.process_time() - start


def start_library(python: str, library: str, mode: str, tars: list[str]) -> subprocess.Popen[str]:
    script = str(Path(__file__).with_name("data_libraries.py"))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen(
        [python, script, library, mode, *tars],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def ask(child: subprocess.Popen[str]) -> tuple[int, float]:
    """One round of a library's process."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("again\n")
    child.stdin.flush()
    answer = json.loads(child.stdout.readline())
    return answer["images"], answer["cpu_s"]


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a page."""
    versions = figures["versions"]
    parts = [
        "# The data path\n",
        f"{figures['hardware']}, Python {versions['python']}, Pillow {versions['pillow']}; medians of "
        f"{figures['rounds']} rounds in which the readers take turns, in CPU time.  `ratio`: speed relative to bare "
        "decoding, with the lowest and highest of the rounds (each against the bare decoding of its own round).\n",
        f"    {figures['command']}\n",
    ]
    for name, found in figures["sets"].items():
        rounds, rows = found["cpu_us_per_image"], []
        for reader, micros in rounds.items():
            median = statistics.median(micros)
            ratios = sorted(b / m for b, m in zip(rounds["bare decode and resize"], micros, strict=True))
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            rows.append([reader, f"{median:,.0f}", f"{1e6 / median:,.0f}", f"{statistics.median(ratios):.2f}", spread])
        parts.append(f"## {found['photos']} photos, {name}, {found['mean_kb']} kB each\n")
        parts.append(table(["reader", "CPU µs per image", "images/s per core", "ratio", "range"], rows))
    return "\n".join(parts)


if __name__ == "__main__":
    main()
