"""Names the boxes of a photo, finds names in it, and draws both side by side.

    python name_and_find.py runs/picture/model "coco:DATA/coco740?split=test" 0 picture.png

Left: the model's own name for each given box, with its probability.  Right: the box that the model gives each name that
people gave the photo, with its score.  The model is any that `opencloc.load` opens and that has a box head.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from PIL import Image

import opencloc


def name_and_find(predictor: opencloc.Predictor, sample: opencloc.Sample, names: Sequence[str]) -> Image.Image:
    """The photo twice: with its boxes named among `names`, and with the boxes found for the names that it has."""
    image = predictor.encode(sample.image)
    width, height = sample.image.size
    boxes_px = sample.boxes * [width, height, width, height]
    said, probabilities = predictor.classify(image, boxes_px=boxes_px, names=names)
    asked = list(dict.fromkeys(sample.texts))
    found_px, scores = predictor.ground(image, asked)
    named = [f"{name} {row.max():.0%}" for name, row in zip(said, probabilities, strict=True)]
    found = [f"{name} {score:.0%}" for name, score in zip(asked, scores.tolist(), strict=True)]
    both = Image.new("RGB", (2 * width + 8, height), "white")
    both.paste(predictor.draw(sample.image, boxes_px, named), (0, 0))
    both.paste(predictor.draw(sample.image, found_px, found), (width + 8, 0))
    return both


if __name__ == "__main__":
    folder, source_name, number, out = sys.argv[1:]
    source = opencloc.open_source(source_name)
    sample = source[int(number)]
    names = getattr(source, "class_names", None) or sorted(set(sample.texts))
    name_and_find(opencloc.load(folder), sample, names).save(out)
    print(out)
