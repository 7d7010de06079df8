"""An encoder that knows the answers it is told, to test what is asked and how answers are scored."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from opencloc.eval.encoders import EncodedImages
from opencloc.texts import canonical

WIDTH = 256


class Oracle:
    """Embeds a text as a direction of its own, and images and boxes as what `knows` says of their photo's colour.

    `knows[colour]` is the text of the whole image, `knows[colour, box]` that of a box (4 rounded numbers);
    `finds[text]` is the box of a text, in every image.
    """

    def __init__(self, knows: dict[Any, str], finds: Mapping[str, Sequence[float]] | None = None) -> None:
        self.name, self.device, self.takes_masks = "oracle", torch.device("cpu"), False
        self.knows = knows
        self.finds = None if finds is None else {canonical(text): list(box) for text, box in finds.items()}
        self.encoded: Counter[Any] = Counter()
        self.computed_in: set[torch.dtype] = set()
        self.asked: dict[str, Tensor] = {}

    def vector(self, text: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(canonical(text).encode()))
        return F.normalize(torch.randn(WIDTH, generator=generator), dim=0)

    def encode_images(self, images: Sequence[Image.Image]) -> EncodedImages:
        # the middle of the left edge is of one colour
        pixels = [np.asarray(image)[image.height // 2, 0] for image in images]
        names = [("red", "green", "blue")[pixel.argmax()] if pixel.max() > 127 else "black" for pixel in pixels]
        self.encoded.update(names)
        self.computed_in.add((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return EncodedImages(
            embedding=torch.stack([self.vector(self.knows.get(name, "nothing")) for name in names]), state=names
        )

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        self.encoded.update(texts)
        self.asked |= {text: self.vector(text) for text in texts}
        return torch.stack([self.vector(text) for text in texts])

    def encode_regions(self, encoded: EncodedImages, boxes: Sequence[np.ndarray]) -> list[Tensor]:
        regions = []
        for colour, rows in zip(encoded.state, boxes, strict=True):
            assert np.isfinite(rows).all()
            said = [self.knows[colour, tuple(np.round(box, 3).tolist())] for box in rows.astype(np.float64)]
            regions.append(torch.stack([self.vector(text) for text in said]) if said else torch.zeros(0, WIDTH))
        return regions

    def encode_masks(self, encoded: EncodedImages, masks: Sequence[Sequence[np.ndarray]]) -> list[Tensor] | None:
        """What is known of the mask's extent, with "mask" before it."""
        if not self.takes_masks:
            return None
        regions = []
        for colour, of_image in zip(encoded.state, masks, strict=True):
            said = []
            for mask in of_image:
                y, x = np.nonzero(mask)
                box = (x.min() / mask.shape[1], y.min() / mask.shape[0])
                box += ((x.max() + 1) / mask.shape[1], (y.max() + 1) / mask.shape[0])
                said.append(self.knows[colour, "mask", tuple(np.round(box, 3).tolist())])
            regions.append(torch.stack([self.vector(text) for text in said]) if said else torch.zeros(0, WIDTH))
        return regions

    def ground(self, encoded: EncodedImages, texts: Sequence[Tensor]) -> list[Tensor] | None:
        if self.finds is None:
            return None
        names = [[next(n for n, v in self.asked.items() if torch.equal(v, row)) for row in rows] for rows in texts]
        return [torch.tensor([self.finds[name] for name in of_image]).reshape(-1, 4) for of_image in names]
