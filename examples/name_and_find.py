"""Names the boxes of photos, finds names in them, and draws both side by side.

    python name_and_find.py tiny "scenes:rich?seed=1" picture.jpg 0 5 7
    python name_and_find.py runs/photos/cloc/model "coco:DATA/coco740?split=test" picture.jpg 0 5 7

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


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """The images one below the other."""
    whole = Image.new("RGB", (max(i.width for i in images), sum(i.height + 8 for i in images) - 8), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height + 8
    return whole


if __name__ == "__main__":
    folder, source_name, out, *numbers = sys.argv[1:]
    predictor, source = opencloc.load(folder), opencloc.open_source(source_name)
    samples = [source[int(number)] for number in numbers]
    names = getattr(source, "class_names", None) or sorted({text for sample in samples for text in sample.texts})
    stacked([name_and_find(predictor, sample, names) for sample in samples]).save(out)
    print(out)
