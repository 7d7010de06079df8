"""What a photo library costs: indexing against bare encoding, and queries of up to a million regions.

    python -m benchmarks.search --model runs/quickstart/cloc/model --out results/search

* Indexing: generated scenes as JPEG files are indexed (read, decode, hash, encode, prompt, thin, write), and the same
  scenes, already in memory, are only encoded and prompted with the same boxes, in turns.  Both use the same threads.
* Queries: vectors are drawn around those that were stored (each a real one plus noise of a third of its length), and
  the 10 nearest of other such vectors are looked for: in LanceDB, all vectors and by its index, with NumPy and with
  usearch.  Each engine has a process of its own.  Recall is against NumPy in float32 on the same vectors.

Prints Markdown and writes it to OUT/costs.md, with the figures in OUT/costs.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import facts, save, table, take_turns, versions

TOP = 10
ENGINES = ("numpy", "lancedb, all", "lancedb, index", "usearch, index")
NOISE = 1 / 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--num-images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="regions")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        indexing, real = indexing_costs(args.model, args.num_images, args.rounds, Path(place))
        queries = {str(size): query_costs(real, size, args.queries, Path(place)) for size in args.sizes}
    figures = facts() | {"indexing": indexing, "queries": queries}
    figures["versions"] |= versions("lancedb", "usearch")
    save(args.out, figures, page_of(figures), page="costs.md", data="costs.json")


# -- indexing ----------------------------------------------------------------------------------------------------------


def indexing_costs(model: str, count: int, rounds: int, place: Path) -> tuple[dict[str, Any], np.ndarray]:
    """(photos per second of both, the vectors that were stored)."""
    import torch

    from opencloc.data.sample import encode_image
    from opencloc.data.sources.spec import open_source
    from opencloc.model.fingerprint import model_id
    from opencloc.model.predictor import load
    from opencloc.search.index import IMAGES_AT_ONCE, Job, Shard, index_shard
    from opencloc.search.photos import list_photos
    from opencloc.search.regions import grid_boxes
    from opencloc.search.store import Settings, make_store, open_store

    predictor: Any = load(model)
    scenes = open_source("scenes:rich?num_things=120&seed=1", image_px=480)
    images = [scenes[number].image for number in range(count)]
    (place / "photos").mkdir()
    for number, image in enumerate(images):
        (place / "photos" / f"{number:05d}.jpg").write_bytes(encode_image(image, "jpg", 90))
    settings = Settings(
        model=model, model_id=model_id(predictor.model), width=predictor.model.embed_dim, regions="grid"
    )
    shard = Shard(source=str(place / "photos"), entries=list_photos(str(place / "photos")).entries)

    def index(number: int) -> float:
        out = str(place / f"index{number}")
        make_store(out, settings)
        start = time.perf_counter()
        index_shard(Job(out=out, settings=settings, device="cpu"), predictor, shard)
        return count / (time.perf_counter() - start)

    @torch.no_grad()
    def bare(_: int) -> float:
        boxes = torch.from_numpy(grid_boxes())
        start = time.perf_counter()
        for first in range(0, count, IMAGES_AT_ONCE):
            pixels, letterboxes = predictor.processor.letterbox(images[first : first + IMAGES_AT_ONCE])
            features = predictor.model.encode_image(pixels)
            squares = torch.stack([letterbox.to_square(boxes).clamp(0, 1) for letterbox in letterboxes])
            predictor.model.encode_regions(features, squares)
        return count / (time.perf_counter() - start)

    found = take_turns({"index": index, "bare": bare}, rounds)
    ratios = np.array(found["index"]) / np.array(found["bare"])
    stored = open_store(str(place / f"index{rounds}")).regions.search().select(["vector"]).limit(None).to_arrow()
    vectors = stored["vector"].combine_chunks().flatten().to_numpy().reshape(len(stored), -1).astype(np.float32)
    figures = {
        "photos": count,
        "photos/s, indexing": float(np.median(found["index"])),
        "photos/s, bare": float(np.median(found["bare"])),
        "ratio": float(np.median(ratios)),
        "boxes per photo": len(grid_boxes()),
        "stored per photo": len(vectors) / count,
    }
    return figures, vectors


# -- queries -----------------------------------------------------------------------------------------------------------


def drawn(real: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count, E) unit vectors around real ones, float16."""
    rng = np.random.default_rng(seed)
    out = np.empty((count, real.shape[1]), dtype=np.float16)
    for start in range(0, count, 100_000):
        rows = real[rng.integers(0, len(real), min(100_000, count - start))]
        noise = rng.normal(size=rows.shape).astype(np.float32)
        rows = rows + NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
        out[start : start + len(rows)] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return out


def query_costs(real: np.ndarray, size: int, queries: int, place: Path) -> dict[str, dict[str, float]]:
    """Engine -> seconds to build, ms of a query, MB of memory, bytes on the disk, recall."""
    folder = place / f"queries{size}"
    folder.mkdir()
    np.save(folder / "vectors.npy", drawn(real, size, seed=1))
    np.save(folder / "queries.npy", drawn(real, queries, seed=2).astype(np.float32))
    context = multiprocessing.get_context("spawn")
    costs = {}
    for engine in ENGINES:
        with context.Pool(1) as pool:
            costs[engine] = pool.apply(engine_costs, (engine, str(folder)))
        print(f"{size:,} {engine}: {costs[engine]}", file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    return costs


def engine_costs(engine: str, folder: str) -> dict[str, float]:
    """The costs of one engine, in a process of its own; `numpy` comes first and writes the true answers."""
    vectors, queries = np.load(f"{folder}/vectors.npy", mmap_mode="r"), np.load(f"{folder}/queries.npy")
    prepare: dict[str, Callable[[], Callable[[np.ndarray], np.ndarray]]] = {
        "numpy": lambda: with_numpy(vectors),
        "lancedb, all": lambda: with_lancedb(vectors, folder, index=False),
        "lancedb, index": lambda: with_lancedb(vectors, folder, index=True),
        "usearch, index": lambda: with_usearch(vectors, folder),
    }
    start = time.perf_counter()
    search = prepare[engine]()
    build_s = time.perf_counter() - start
    search(queries[0])  # opens files
    times, answers = [], []
    for query in queries:
        start = time.perf_counter()
        answers.append(search(query))
        times.append(time.perf_counter() - start)
    if engine == "numpy":
        np.save(f"{folder}/truth.npy", np.array(answers))
    truth = np.load(f"{folder}/truth.npy")
    hits = [len(set(own.tolist()) & set(true.tolist())) for own, true in zip(answers, truth, strict=True)]
    return {
        "build_s": build_s,
        "median_ms": 1e3 * float(np.median(times)),
        "p95_ms": 1e3 * float(np.percentile(times, 95)),
        "memory_mb": memory_mb(),
        "bytes_per_region": disk_bytes(f"{folder}/{engine}") / len(vectors),
        "recall": sum(hits) / truth.size,
    }


def with_numpy(vectors: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    matrix = vectors.astype(np.float32)

    def search(query: np.ndarray) -> np.ndarray:
        scores = matrix @ query
        return np.argpartition(-scores, min(TOP, len(scores) - 1))[:TOP]

    return search


def with_lancedb(vectors: np.ndarray, folder: str, *, index: bool) -> Callable[[np.ndarray], np.ndarray]:
    """The table of regions as a library has it, asked as a library does."""
    from opencloc.search import store as store_module
    from opencloc.search.query import CANDIDATES, PROBES
    from opencloc.search.regions import Regions
    from opencloc.search.store import Settings, make_store

    path = f"{folder}/lancedb, {'index' if index else 'all'}"
    width = vectors.shape[1]
    store = make_store(path, Settings(model="none", model_id="none", width=width, regions="grid"))
    for start in range(0, len(vectors), 100_000):  # one content each, whose number is the row
        part = vectors[start : start + 100_000]
        boxes = np.tile(np.array([[0, 0, 1, 1]], np.float32), (len(part), 1))
        rows = {start + i: Regions(boxes=boxes[i : i + 1], vectors=part[i : i + 1]) for i in range(len(part))}
        store.commit("benchmark", [], rows)
    store_module.APPROXIMATE_FROM = 0 if index else len(vectors) + 1
    store.tidy()

    def search(query: np.ndarray) -> np.ndarray:
        asked = store.regions.search(query, vector_column_name="vector").distance_type("cosine")
        asked = asked.select(["photo", "number", "box", "_distance"]).limit(TOP)
        asked = asked.nprobes(PROBES).refine_factor(CANDIDATES) if index else asked.bypass_vector_index()
        return asked.to_arrow()["photo"].to_numpy()

    return search


def with_usearch(vectors: np.ndarray, folder: str) -> Callable[[np.ndarray], np.ndarray]:
    from usearch.index import Index

    index: Any = Index(ndim=vectors.shape[1], metric="cos", dtype="f16")
    index.add(np.arange(len(vectors)), np.ascontiguousarray(vectors), threads=os.cpu_count() or 1)
    index.save(f"{folder}/usearch, index")
    return lambda query: index.search(query.astype(np.float16), TOP).keys


def memory_mb() -> float:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def disk_bytes(path: str) -> int:
    place = Path(path)
    if place.is_file():
        return place.stat().st_size
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())


def page_of(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    one = figures["indexing"]
    formats = {
        "median_ms": ".3g",
        "p95_ms": ".3g",
        "build_s": ".3g",
        "memory_mb": ".0f",
        "bytes_per_region": ".0f",
        "recall": ".1%",
    }
    rows = [
        [f"{int(size):,}", engine, *(format(cost[name], spec) for name, spec in formats.items())]
        for size, costs in figures["queries"].items()
        for engine, cost in costs.items()
    ]
    head = ("regions", "engine", "ms", "ms, 95 %", "build s", "memory MB", "bytes/region", "recall@10")
    return (
        f"Indexing {one['photos']} photos: {one['photos/s, indexing']:.1f} photos/s, {one['ratio']:.2f} times the speed"
        f" of bare encoding and prompting ({one['photos/s, bare']:.1f} photos/s). {one['boxes per photo']} boxes per "
        f"photo, {one['stored per photo']:.0f} of them stored.\n\n"
        + table(head, rows, "---:")
        + "\nMemory: of the process that asks, with what it imports. Bytes: on the disk, with the old versions that "
        "LanceDB keeps for an hour.\n"
    )


if __name__ == "__main__":
    main()
