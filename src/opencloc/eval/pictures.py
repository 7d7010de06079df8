"""What an encoder says of a few images, to be shown in the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opencloc.eval import metrics
from opencloc.eval.encoders import Encoder
from opencloc.eval.sets.item import Loaded, merge_names
from opencloc.eval.tasks import Batch
from opencloc.eval.text_bank import TextBank
from opencloc.texts import canonical


@dataclass(frozen=True, kw_only=True)
class Grounded:
    """One text of an image with the box found for it."""

    text: str
    box: np.ndarray  # (4,) normalised to the image
    truth: np.ndarray  # (4,) the text's own box
    iou: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What an encoder says of one image: a class name for every box, a box for every query with one box."""

    loaded: Loaded
    names: tuple[str, ...]  # one per box
    correct: tuple[bool, ...]
    grounded: tuple[Grounded, ...]  # empty if the encoder cannot ground


def predict(encoder: Encoder, loaded: Sequence[Loaded], class_names: Sequence[str]) -> list[Prediction]:
    """The class name of every box and the box of every query, for a few images (to be shown).

    Names that differ in case or spacing only are one class.  Raises ValueError if there is none.
    """
    names, _ = merge_names(class_names)
    if not names:
        raise ValueError("no class names to choose from")
    if not loaded:
        return []
    bank = TextBank(encoder)
    with torch.inference_mode():
        classes = bank.of(names)
        batch = Batch(encoder, loaded, encoder.encode_images([one.image for one in loaded]))
        ids = bank.ids_per_image([item.queries for item in batch.items])
        found = encoder.ground(batch.encoded, [bank.embeddings(of_image) for of_image in ids])
        best_names = [metrics.cosines(rows, classes).argmax(1).tolist() for rows in batch.regions]
    predictions = []
    for i, one in enumerate(loaded):
        said = [names[j] for j in best_names[i]]
        grounded = []
        for text, truth, box in zip(one.item.queries, one.item.truths, found[i] if found else (), strict=False):
            overlap = metrics.overlaps(box.cpu(), truth)
            best = int(overlap.argmax())
            box = box.float().cpu().numpy()
            grounded.append(Grounded(text=text, box=box, truth=truth[best], iou=float(overlap[best])))
        correct = tuple(name == canonical(text) for name, text in zip(said, one.item.texts, strict=True))
        predictions.append(
            Prediction(loaded=one, names=tuple(said), correct=correct, grounded=tuple(grounded))
        )  # fmt: skip
    return predictions
