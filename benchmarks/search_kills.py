"""Kills `opencloc index` at random moments, and compares the library it ends with to an undisturbed one.

    python -m benchmarks.search_kills --model runs/quickstart/cloc/model --out results/search --kills 30

A folder of generated scenes is indexed, in commits of a few photos each.  The process is killed (SIGKILL) a random time
after it began to work, and started again, until it has been killed so often; before every start some photos are
added, changed, moved and deleted.  Then one run is left to end.  Writes OUT/kills.json.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import facts, save
from opencloc.data.sources.spec import open_source
from opencloc.search.index import IndexConfig, run_index
from opencloc.search.store import open_store

RUN = """
import sys
from opencloc.search import index
index.IMAGES_AT_ONCE, index.COMMIT_EVERY_S = 4, 0.0
first = index.make_store
def make_store(*arguments):
    store = first(*arguments)
    print("working", flush=True)
    return store
index.make_store = make_store
index.run_index(index.IndexConfig(photos=(sys.argv[1],), out=sys.argv[2], model=sys.argv[3], device="cpu"))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--num-images", type=int, default=60)
    parser.add_argument("--longest", type=float, default=1.5, help="seconds from the start of the work to a kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        photos, out = Path(place, "photos"), Path(place, "index")
        photos.mkdir()
        scenes: Any = open_source("scenes:rich?num_things=120&seed=1")
        number = 0
        for number in range(args.num_images):
            scenes[number].image.save(photos / f"{number}.png")
        killed = finished = 0
        while killed < args.kills:
            number = disturb(photos, scenes, number, rng)
            if run_and_kill(photos, out, args.model, rng.uniform(0, args.longest)):
                killed += 1
            else:  # it was quicker: it finds more to do next time
                finished += 1
            print(f"{killed} killed, {finished} finished", file=sys.stderr, flush=True)
        for index in (out, Path(place, "undisturbed")):
            run_index(IndexConfig(photos=(str(photos),), out=str(index), model=args.model, device="cpu"))
        same = equal(out, Path(place, "undisturbed"))
        known = open_store(str(out)).check()
        whole = not (known.broken or known.doubled or known.unused)
    figures = facts() | {"kills": killed, "ended before the kill": finished, "photos": len(known.versions)}
    save(args.out, figures | {"equal": same, "whole": whole}, data="kills.json")
    print(f"{killed} kills; equal to an undisturbed library: {same}; whole: {whole}")
    return 0 if same and whole else 1


def disturb(photos: Path, scenes: Any, number: int, rng: random.Random) -> int:
    """Adds eight photos, changes, moves and deletes one each; returns the number of the last scene used."""
    for _ in range(8):
        number += 1
        scenes[number].image.save(photos / f"{number}.png")
    there = sorted(photos.glob("*.png"))
    changed, moved, deleted = rng.sample(there, 3)
    scenes[number + 1].image.save(changed)
    moved.rename(photos / f"moved-{moved.name}")
    deleted.unlink()
    return number + 1


def run_and_kill(photos: Path, out: Path, model: str, after_s: float) -> bool:
    """Whether a run was killed so long after it began to work, rather than having ended before."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(photos), str(out), model],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "working\n", "the run did not start"
        time.sleep(after_s)
        if process.poll() is None:
            process.kill()
        return process.wait() == -signal.SIGKILL


def equal(one: Path, other: Path) -> bool:
    """Whether two libraries hold the same; vectors may differ by the rounding of batches of other sizes."""
    photos, regions = zip(*(content(path) for path in (one, other)), strict=True)
    if photos[0] != photos[1] or len(regions[0]) != len(regions[1]):
        return False
    names = [[(row["photo"], row["number"], row["box"]) for row in rows] for rows in regions]
    vectors = [np.array([row["vector"] for row in rows], dtype=np.float32) for rows in regions]
    return names[0] == names[1] and bool(np.allclose(*vectors, atol=2e-3))


def content(path: Path) -> tuple[list[Any], list[Any]]:
    """(photos, regions) of a library, in one order."""
    store = open_store(str(path))
    photos = store.photos.search().limit(None).to_arrow().to_pylist()
    regions = store.regions.search().limit(None).to_arrow().to_pylist()
    return (
        sorted(photos, key=lambda row: row["path"]),
        sorted(regions, key=lambda row: (row["photo"], row["number"])),
    )


if __name__ == "__main__":
    sys.exit(main())
