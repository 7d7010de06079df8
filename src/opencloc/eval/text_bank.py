"""Embeddings of texts, each distinct text encoded once per run.

Texts are compared and encoded in one form (`texts.canonical`), so "Dog" and "dog" are one text.

Symbols: C texts or classes, P texts of one image, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from opencloc.eval.encoders import Encoder
from opencloc.texts import canonical

CLASSES_AT_ONCE = 16  # classes whose templates are encoded together


class TextBank:
    """Embeddings of texts by number, each distinct canonical text encoded once."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._ids: dict[str, int] = {}
        self._rows: list[Tensor] = []

    def ids(self, texts: Iterable[str]) -> list[int]:
        """Numbers of the texts; the new ones are encoded together.  Raises ValueError if an embedding is not finite."""
        texts = [canonical(text) for text in texts]
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        if new:
            rows = self._encoder.encode_texts(new).float()
            check_finite(self._encoder, "text", rows)
            self._ids |= {text: len(self._ids) + i for i, text in enumerate(new)}
            self._rows += rows.unbind()
        return [self._ids[text] for text in texts]

    def ids_per_image(self, texts: Sequence[Sequence[str]]) -> list[list[int]]:
        """Numbers of each image's texts; the new ones of all images are encoded together."""
        self.ids(text for of_image in texts for text in of_image)
        return [self.ids(of_image) for of_image in texts]

    def embeddings(self, ids: Sequence[int]) -> Tensor:
        """Embeddings (P, E) by number; (0, 0) for none."""
        return torch.stack([self._rows[i] for i in ids]) if ids else torch.zeros(0, 0)

    def of(self, texts: Iterable[str]) -> Tensor:
        """Embeddings (P, E) of some texts."""
        return self.embeddings(self.ids(texts))

    def by_templates(self, names: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "C E"]:
        """Of each class the normalised mean of its name's embeddings in all templates (CLIP paper, section 3.1.4)."""
        rows = []
        for i in range(0, len(names), CLASSES_AT_ONCE):
            texts = [canonical(t.replace("{}", name)) for name in names[i : i + CLASSES_AT_ONCE] for t in templates]
            rows.append(self._encoder.encode_texts(texts).float().unflatten(0, (-1, len(templates))).mean(1))
        return F.normalize(torch.cat(rows), dim=-1)


def check_finite(encoder: Encoder, what: str, embeddings: Tensor) -> None:
    """Raises ValueError naming the encoder if an embedding is not finite or zero: its scores would mean nothing."""
    if not bool(torch.isfinite(embeddings).all()):
        raise ValueError(f"{encoder.name}: it gives {what} embeddings that are not finite")
    if not bool(embeddings.any(-1).all()):
        raise ValueError(f"{encoder.name}: it gives {what} embeddings that are zero")
