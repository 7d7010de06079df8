"""Short names of weights: whether two checkpoints are the same model, or have the same vision tower."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from opencloc.model import towers
from opencloc.model.cloc import ClocModel


def model_id(model: ClocModel) -> str:
    """A hash of all weights and of the kind of Prompter: 16 hexadecimal digits.

    The rest of the configuration is left out: what matters of it is in the weights' names and shapes, and versions of
    transformers write it differently.
    """
    return _hash(model.config.prompter, model.state_dict())


def vision_tower_id(clip: Any) -> str:
    """A hash of the weights of a CLIP's vision tower, projection included, and of its family: 16 hexadecimal digits.

    The text tower and a model's region parts do not count.
    """
    weights = {name: value for name, value in clip.state_dict().items() if name.startswith(towers.VISION_PARTS)}
    return _hash(clip.config.model_type, weights)


def _hash(kind: str, weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(kind.encode(), digest_size=8)
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
