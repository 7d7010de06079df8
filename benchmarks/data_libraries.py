"""One reader of `benchmarks/data.py`, in an interpreter that has the `webdataset` and `datasets` libraries.

    python benchmarks/data_libraries.py {webdataset,datasets} {as-documented,scaled} TAR...

Every line on standard input asks for one pass over all images: shuffled, decoded and letterboxed to 224 pixels, with
their captions.  The answer is one line, {"images": ..., "cpu_s": ...}.  `as-documented` lets the library decode;
`scaled` asks it for the bytes and decodes the JPEG at the scale needed, as opencloc does.  Needs neither torch nor
opencloc.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

SIDE = 224
SHUFFLED = 1000  # samples in the libraries' shuffle buffers


def letterbox(image: Image.Image) -> np.ndarray:
    """The image in a square, (SIDE, SIDE, 3) uint8, by the same resampling as opencloc's."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    scale = SIDE / max(image.size)
    inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    square = Image.new("RGB", (SIDE, SIDE), (123, 117, 104))
    square.paste(image.resize(inner, Image.Resampling.BICUBIC), ((SIDE - inner[0]) // 2, (SIDE - inner[1]) // 2))
    return np.asarray(square)


def scaled(data: bytes) -> Image.Image:
    """The JPEG at 1/1, 1/2, 1/4 or 1/8 of its size, its long side not below SIDE."""
    image = Image.open(io.BytesIO(data))
    factor = SIDE / max(image.size)
    image.draft(None, (max(1, int(np.ceil(image.width * factor))), max(1, int(np.ceil(image.height * factor)))))
    return image


def webdataset_reader(tars: list[str], mode: str) -> Iterator[tuple[np.ndarray, str]]:
    import webdataset  # pyright: ignore[reportMissingImports]

    stream = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(SHUFFLED)
    if mode == "as-documented":
        stream = stream.decode("pil")
    for sample in stream:
        if mode == "as-documented":
            yield letterbox(sample["jpg"]), sample["txt"]
        else:
            yield letterbox(scaled(sample["jpg"])), sample["txt"].decode()


def datasets_reader(tars: list[str], mode: str) -> Iterator[tuple[np.ndarray, str]]:
    import datasets  # pyright: ignore[reportMissingImports]

    stream = datasets.load_dataset("webdataset", data_files={"train": tars}, split="train", streaming=True)
    if mode == "scaled":
        stream = stream.cast_column("jpg", datasets.Image(decode=False))
    for sample in stream.shuffle(seed=0, buffer_size=SHUFFLED):
        image = sample["jpg"] if mode == "as-documented" else scaled(sample["jpg"]["bytes"])
        yield letterbox(image), sample["txt"]


def main() -> None:
    library, mode, *tars = sys.argv[1:]
    reader = {"webdataset": webdataset_reader, "datasets": datasets_reader}[library]
    for _ in sys.stdin:
        start, images = time.process_time(), 0
        for square, caption in reader(tars, mode):
            assert square.shape == (SIDE, SIDE, 3)
            assert caption
            images += 1
        print(json.dumps({"images": images, "cpu_s": time.process_time() - start}), flush=True)


if __name__ == "__main__":
    main()
