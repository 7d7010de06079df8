"""What a `ClocModel` returns.

Symbols: B images, M regions per image, N patches, L tokens that the tower pools, D width of the vision tower, E width
of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """What `encode_image` returns: everything any number of prompts needs."""

    embedding: Float[Tensor, "B E"]  # of the whole image, L2-normalised
    tokens: Float[Tensor, "B N D"]  # before pooling and projection
    grid: tuple[int, int]  # (rows, columns), rows * columns = N
    pool_input: Float[Tensor, "B L D"] | None = None  # for the `pool` Prompter: what the tower's pooling reads

    def map(self, change: Callable[[Tensor], Tensor]) -> ImageFeatures:
        """The features with every tensor changed: cut to some rows, moved to a device, ..."""
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    @classmethod
    def cat(cls, parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """The features of several batches as those of one."""
        names = [name for name, value in vars(parts[0]).items() if isinstance(value, Tensor)]
        return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True, kw_only=True)
class ClocOutput:
    """What `forward` returns for the losses.  Embeddings are L2-normalised; scales are exp(parameter), clipped.

    The first three are None where no captions were given.  The region fields are None where no boxes were given;
    `ground_boxes` also where the Prompter has no text prompts.
    """

    image: Float[Tensor, "B E"] | None = None
    caption: Float[Tensor, "B E"] | None = None
    logit_scale: Float[Tensor, ""] | None = None
    region: Float[Tensor, "B M E"] | None = None
    region_text: Float[Tensor, "B M E"] | None = None
    ground_boxes: Float[Tensor, "B M 4"] | None = None
    region_logit_scale: Float[Tensor, ""] | None = None
