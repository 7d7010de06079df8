"""An open-vocabulary detector for generated scenes, with the faults of real ones; for `opencloc label` in the study.

    opencloc label --data DIR --detector "benchmarks/scene_detector.py:factory?shards=DIR"

It recognises a scene by its pixels and knows what is in it.  A phrase finds an object if it names the thing, and its
score is the share of words that phrase and object have in common, at most 0.9.  A quarter of the objects are overlooked
and the edges of boxes are off by a tenth of the side, as in the study's noisy labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from opencloc.data.sample import Sample
from opencloc.data.tars.shards import expand_urls, iter_shard
from opencloc.vesl.detect import Detections

OVERLOOKED = 0.25
JITTER = 0.1


class SceneDetector:
    """Answers from the regions that lie in the tars, coloured things ("red dog")."""

    model_id = "scene_detector"

    def __init__(self, shards: str) -> None:
        found = (item for url in expand_urls(shards) for item in iter_shard(url))
        self._scenes = {fingerprint(s.image): (s.boxes, s.texts) for s in found if isinstance(s, Sample)}

    def __call__(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        return [self._detect(fingerprint(image), own) for image, own in zip(images, phrases, strict=True)]

    def _detect(self, scene: bytes, phrases: Sequence[str]) -> Detections:
        boxes, texts = self._scenes[scene]
        rng = np.random.default_rng(list(scene[:8]))
        seen = rng.random(len(texts)) >= OVERLOOKED
        low, high = boxes[:, :2], boxes[:, 2:]
        moves = JITTER * rng.normal(size=boxes.shape) * np.tile(high - low, 2)
        moved = np.clip(boxes + moves, 0, 1)
        sound = (moved[:, 2:] > moved[:, :2]).all(axis=1)
        scores = np.array([[agreement(phrase, text) for phrase in phrases] for text in texts])
        hits = np.argwhere((scores.reshape(len(texts), len(phrases)) > 0) & (seen & sound)[:, None])
        return Detections(boxes=moved[hits[:, 0]], scores=scores[hits[:, 0], hits[:, 1]], phrase=hits[:, 1])


def agreement(phrase: str, text: str) -> float:
    """How well a phrase names the object `text` ("COLOUR THING"), in [0, 0.9]; 0 unless it names the thing.

    >>> agreement("red dog", "red dog"), agreement("dog", "red dog"), agreement("hot dog stand", "red dog")
    (0.9, 0.45, 0.225)
    """
    words, described = phrase.split(), text.split()
    _, thing = text.split(" ", 1)
    if f" {thing} " not in f" {phrase} ":
        return 0.0
    return 0.9 * len({*words} & {*described}) / len({*words} | {*described})


def fingerprint(image: Image.Image) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


def factory(shards: str) -> SceneDetector:
    """The detector for the scenes in `shards`."""
    return SceneDetector(shards)
