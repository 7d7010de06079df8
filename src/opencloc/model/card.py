"""The model card that stands beside a saved checkpoint."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from opencloc.model.prompter import PROMPTERS


def model_card(config: Any) -> str:
    """The README.md of a checkpoint: metadata of the hub, and Python that runs."""
    data = ModelCardData(
        library_name="opencloc",
        pipeline_tag="zero-shot-image-classification",
        tags=["cloc", "region-aware", str(getattr(config.clip_config, "model_type", "clip"))],
    )
    regions = (
        "It embeds and names regions of an image, given as boxes, points or masks"
        + (", and finds the box of a text." if PROMPTERS[config.prompter].has_text_prompts else ".")
        if config.regions_trained
        else "Its region parts are not trained: ask it for whole images and texts only."
    )
    return f"""---
{data.to_yaml()}
---

# A CLOC model

A region-aware CLIP ([arXiv 2410.02746](https://arxiv.org/abs/2410.02746)), trained with opencloc. {regions}

```python
import opencloc

predictor = opencloc.load("FOLDER_OR_HUB_ID")
photo = predictor.encode("photo.jpg")
names, scores = predictor.classify(photo, boxes_px=[[10, 20, 200, 180]], names=["dog", "cat"])
```

`opencloc export` writes the towers as a plain checkpoint of transformers. Fill in before sharing: the training data and
the licence.
"""
