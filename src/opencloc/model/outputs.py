"""What a `ClocModel` returns.

Symbols: B images, M regions per image, N patches, L tokens that the tower pools, D width of the vision tower, E width
of the joint embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """What `encode_image` returns: everything any number of prompts needs."""

    embedding: Float[Tensor, "B E"]  # of the whole image, L2-normalised
    tokens: Float[Tensor, "B N D"]  # before pooling and projection
    grid: tuple[int, int]  # (rows, columns), rows * columns = N
    pool_input: Float[Tensor, "B L D"] | None = None  # for the `pool` Prompter: what the tower's pooling reads


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
