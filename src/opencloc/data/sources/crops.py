"""Crops: every region of a source becomes an image of its own, with the region's text as its caption.

A plain CLIP can learn from region labels this way, without a Prompter (RegionCLIP does).  It is the baseline that shows
what the Prompter adds to the same labels.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from opencloc.data.sample import Sample, Source
from opencloc.errors import BadSample
from opencloc.images import crop


@dataclass(frozen=True, kw_only=True)
class CropsConfig:
    """Which crops."""

    seed: Annotated[int, Field(ge=0)] = 0


class Crops:
    """An endless `Source` of crops.  Number i shows a random region of a random sample, drawn from the seed and i.

    Of an endless source, crop i comes from sample i.  Raises `BadSample` for a sample without regions.
    """

    size: int | None = None

    def __init__(self, regions: Source, config: CropsConfig) -> None:
        self.regions, self.config = regions, config

    def __repr__(self) -> str:
        return f"Crops({self.regions!r}, {self.config})"

    def __getitem__(self, index: int) -> Sample:
        if index < 0:
            raise IndexError(f"{index}: crops are numbered from 0")
        rng = np.random.default_rng([self.config.seed, index])
        sample = self.regions[index if self.regions.size is None else int(rng.integers(self.regions.size))]
        if not sample.texts:
            raise BadSample("no regions", sample.key)
        chosen = int(rng.integers(len(sample.texts)))
        return Sample(
            key=f"{sample.key}-{chosen}",
            image=crop(sample.image, sample.boxes[chosen]),
            captions=(sample.texts[chosen],),
        )
