"""Time to open an annotation file as large as COCO's train2017: the first time, again, and `json.load` alone.

    python -m benchmarks.data_open --out results/data_open

The file is generated: 118,287 images, 860,001 boxes in 80 classes, with polygons about as long as COCO's.  Every
opening is a process of its own, since a process keeps what it read; all take turns, and medians of their CPU time are
compared.  "First" starts without anything kept, "again" finds what another process kept in the cache.

Prints Markdown and writes it to OUT/README.md, with the figures in OUT/figures.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import facts, save, table, take_turns

_CLOCK = "import sys, time; a = time.process_time(); b = time.perf_counter();"
_END = "print(time.process_time() - a, time.perf_counter() - b)"
_PROGRAMS = {
    "json.load": f"import json; {_CLOCK} json.load(open(sys.argv[1], 'rb')); {_END}",
    "first": f"from opencloc.data.sources.coco_json import read_coco; {_CLOCK} read_coco(sys.argv[1]); {_END}",
}
_PROGRAMS["again"] = _PROGRAMS["first"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for README.md and figures.json")
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--boxes", type=int, default=860_001)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        path = Path(work, "instances.json")
        write(path, arguments.images, arguments.boxes)
        seconds = take_turns(
            {name: lambda _, name=name: measure(name, path, Path(work, "cache")) for name in _PROGRAMS},
            arguments.rounds,
        )
        kept_mb = sum(file.stat().st_size for file in Path(work, "cache").rglob("*.npz")) / 1e6
        figures: dict[str, Any] = facts() | {
            "images": arguments.images,
            "boxes": arguments.boxes,
            "file_mb": path.stat().st_size / 1e6,
            "kept_mb": kept_mb,
            "seconds": seconds,
        }
    save(arguments.out, figures, markdown(figures))


def write(path: Path, num_images: int, num_boxes: int) -> None:
    """A file like COCO's instances_train2017.json."""
    rng = random.Random(0)

    def image(number: int) -> str:
        url = f"http://images.cocodataset.org/train2017/{number:012}.jpg"
        flickr = f"http://farm{number % 9}.staticflickr.com/{number % 9999}/{number}_o.jpg"
        return (
            f'{{"license": 3,"file_name": "{number:012}.jpg","coco_url": "{url}","height": 480,"width": 640,'
            f'"date_captured": "2013-11-14 11:18:45","flickr_url": "{flickr}","id": {number}}}'
        )

    def annotation(number: int) -> str:
        x, y = rng.randrange(500), rng.randrange(400)
        points = (f"{x + rng.random() * 100:.2f},{y + rng.random() * 70:.2f}" for _ in range(23))
        return (
            f'{{"segmentation": [[{",".join(points)}]],"area": {rng.random() * 9999:.4f},"iscrowd": 0,'
            f'"image_id": {1 + rng.randrange(num_images)},"bbox": [{x},{y},{rng.random() * 99 + 1:.2f},'
            f'{rng.random() * 69 + 1:.2f}],"category_id": {1 + number % 80},"id": {number}}}'
        )

    categories = [{"supercategory": "thing", "id": one, "name": f"thing {one}"} for one in range(1, 81)]
    with open(path, "w") as stream:
        stream.write('{"info": {},"licenses": [],"images": [')
        stream.write(",".join(map(image, range(1, num_images + 1))))
        stream.write('],"annotations": [')
        for number in range(num_boxes):
            stream.write(("," if number else "") + annotation(number))
        stream.write(f'],"categories": {json.dumps(categories)}}}')


def measure(name: str, path: Path, cache: Path) -> dict[str, float]:
    """Seconds of one opening by a process of its own."""
    environment = {**os.environ, "OPENCLOC_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _PROGRAMS[name], str(path)]
    if name == "first":
        shutil.rmtree(cache, ignore_errors=True)
    elif name == "again":  # whoever came before has kept it, whatever the order of the round
        subprocess.run(command, env=environment, check=True, capture_output=True)
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    cpu_s, wall_s = map(float, done.stdout.split())
    return {"cpu_s": cpu_s, "wall_s": wall_s}


def markdown(figures: dict[str, Any]) -> str:
    names = {
        "json.load": "`json.load` alone",
        "first": "first opening: boxes checked, arrays made and kept",
        "again": "opening again, in any process",
    }
    medians = {
        name: [statistics.median(one[clock] for one in rounds) for clock in ("cpu_s", "wall_s")]
        for name, rounds in figures["seconds"].items()
    }
    rows = [
        (names[name], f"{cpu_s:.2f}", f"{wall_s:.2f}", f"{cpu_s / medians['json.load'][0]:.2f}")
        for name, (cpu_s, wall_s) in medians.items()
    ]
    return "\n".join(
        [
            "# Opening a large annotation file",
            "",
            f"{figures['images']:,} images, {figures['boxes']:,} boxes, {figures['file_mb']:.0f} MB of JSON; "
            f"{figures['kept_mb']:.0f} MB are kept.",
            f"{figures['hardware']}, Python {figures['versions']['python']}; medians; rounds in "
            f"which all take turns: {len(figures['seconds']['first'])}.",
            "",
            f"    {figures['command']}",
            "",
            table(("", "CPU s", "wall s", "CPU, `json.load` = 1"), rows),
        ]
    )


if __name__ == "__main__":
    main()
