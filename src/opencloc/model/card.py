"""The model card that stands beside a saved checkpoint, and becomes its page on the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from opencloc import files
from opencloc.model.loading import load_config
from opencloc.model.prompter import PROMPTERS

MARK = "<!-- Written by opencloc. Take this line out to keep the page from being written anew. -->"
PLACE = "FOLDER_OR_HUB_ID"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """What the README.md of a checkpoint says beside what the checkpoint knows itself."""

    model: str
    """Folder of the CLOC checkpoint."""
    repo: str | None = None
    """Hub id it will have, for the lines of code."""
    base_model: str | None = None
    """What training started from, as a hub id or in words."""
    data: tuple[str, ...] = ()
    """What it was trained on: data sets as hub ids or in words."""
    license: str | None = None
    """Licence of the weights, by the hub's short names: `apache-2.0`, `mit`, `cc-by-nc-4.0`, `other`."""
    evaluation: str | None = None
    """Folder that `opencloc eval --out` wrote: its table goes into the card."""


def write_card(config: CardConfig) -> Path:
    """The README.md, written anew.

    Raises ValueError where the one that is there was written or edited by hand, and where the evaluation has no table.
    """
    loaded = load_config(config.model)
    if loaded.model_type != "cloc":
        raise ValueError(f"{config.model} holds a {loaded.model_type!r} model, not a CLOC checkpoint")
    card = Path(config.model) / "README.md"
    if card.is_file() and MARK not in card.read_text("utf-8"):
        raise ValueError(f"{card} was not written by opencloc, or edited: it is left as it is")
    table = None
    if config.evaluation is not None:
        page = Path(config.evaluation) / "evaluation.md"
        if not page.is_file():
            raise ValueError(f"{page} is not there: --evaluation takes a folder that opencloc eval --out wrote")
        table = page.read_text("utf-8")
    text = model_card(
        loaded,
        repo=config.repo,
        base_model=config.base_model,
        data=config.data,
        licence=config.license,
        evaluation=table,
    )
    files.write_text(card, text)
    return card


def model_card(
    config: Any,
    *,
    repo: str | None = None,
    base_model: str | None = None,
    data: Sequence[str] = (),
    licence: str | None = None,
    evaluation: str | None = None,
) -> str:
    """The README.md of a checkpoint with this `ClocConfig`: metadata of the hub, Python that runs, what was measured.

    `evaluation`: a table in Markdown.  What is not given is said to be missing.
    """
    metadata = ModelCardData(
        library_name="opencloc",
        pipeline_tag="zero-shot-image-classification",
        tags=["cloc", "region-aware", str(getattr(config.clip_config, "model_type", "clip"))],
        license=licence,
        base_model=base_model if base_model is not None and _HUB_ID.fullmatch(base_model) else None,
        datasets=[one for one in data if _HUB_ID.fullmatch(one)] or None,
    )
    answers = config.regions_trained or not PROMPTERS[config.prompter].is_trained
    grounds = answers and config.grounding_trained and PROMPTERS[config.prompter].has_text_prompts
    regions = (
        "It embeds and names regions of an image, given as boxes, points or masks"
        + (", and finds the box of a text." if grounds else ".")
        if answers
        else "Its region parts are not trained: ask it for whole images and texts only."
    )
    lines = ["import opencloc", "", f'predictor = opencloc.load("{repo or PLACE}")']
    lines += ['photo = predictor.encode("photo.jpg")']
    if answers:
        lines += [
            'names, scores = predictor.classify(photo, boxes_px=[[10, 20, 200, 180]], names=["dog", "cat"])',
        ]
    else:
        lines += ['similarities = predictor.embed_texts(["a dog", "a cat"]) @ photo.features.embedding[0]']
    if grounds:
        lines += ['boxes_px, scores = predictor.ground(photo, ["a dog"])']
    facts = {
        "Started from": base_model,
        "Trained on": ", ".join(data) or None,
        "Licence": licence,
    }
    known = [f"* {what}: {value}" for what, value in facts.items() if value is not None]
    missing = [what.lower() for what, value in facts.items() if value is None]
    if missing:
        known.append(f"* Not said here: {', '.join(missing)} (`opencloc card`).")
    return "\n".join(
        [
            "---",
            metadata.to_yaml(),
            "---",
            "",
            "# A CLOC model",
            "",
            "A region-aware CLIP ([arXiv 2410.02746](https://arxiv.org/abs/2410.02746)), trained with opencloc. "
            + regions,
            "",
            "```python",
            *lines,
            "```",
            "",
            "`opencloc export` writes the towers as a plain checkpoint of transformers.",
            "",
            *known,
            *([] if evaluation is None else ["", "## Evaluation", "", evaluation.strip()]),
            "",
            MARK,
            "",
        ]
    )
