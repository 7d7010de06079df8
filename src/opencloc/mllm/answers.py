"""Answers of a model to conversations, and how likely given answers are: what chat, evaluation and lmms-eval ask.

Each image is letterboxed and encoded once, however many conversations of one call are about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from opencloc.devices import Precision, choose_device, computes_in_bf16
from opencloc.images import letterbox_array
from opencloc.mllm.conversation import Conversation
from opencloc.mllm.model import IGNORED, RegionLlava
from opencloc.mllm.processor import RegionLlavaProcessor, Row
from opencloc.model.processor import normalize


@dataclass(frozen=True, kw_only=True)
class Features:
    """Encoded images: projected tokens and the tower's layers, as LLaVA's `get_image_features` gives them."""

    output: Any
    rows: dict[int, int]  # id of an image -> its row

    def of(self, images: Sequence[Any]) -> Any:
        """The features of the images in this order, one row for each."""
        index = torch.tensor([self.rows[id(image)] for image in images], device=self.output.last_hidden_state.device)
        layers: tuple[Tensor | None, ...] = self.output.hidden_states  # those that nobody reads are left out
        chosen = type(self.output)(
            last_hidden_state=self.output.last_hidden_state[index],
            hidden_states=tuple(None if layer is None else layer[index] for layer in layers),
        )
        chosen.pooler_output = [self.output.pooler_output[i] for i in index.tolist()]
        return chosen


class Answerer:
    """A model with its processor.  Answers are greedy, so they repeat."""

    def __init__(
        self,
        model: RegionLlava,
        processor: RegionLlavaProcessor,
        *,
        batch_size: int = 16,
        precision: Precision = "fp32",
    ) -> None:
        self.model: Any = model.eval()  # transformers types neither its features nor its generation
        self.processor, self.batch_size = processor, batch_size
        self.device = model.device
        self.bf16 = computes_in_bf16(precision, self.device)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str = "cpu", *, batch_size: int = 16, precision: Precision = "fp32"
    ) -> Answerer:
        """The model of a folder that `opencloc mllm build` or training wrote.  Raises as `RegionLlava` does."""
        model = RegionLlava.from_pretrained(folder).float().to(choose_device(device))
        processor = RegionLlavaProcessor.from_pretrained(folder)
        return cls(model, processor, batch_size=batch_size, precision=precision)

    @torch.no_grad()
    def encode(self, conversations: Sequence[Conversation]) -> Features | None:
        """The features of the distinct images of some conversations; None where there is no image."""
        distinct = {id(c.image): c for c in conversations if c.image is not None}
        if not distinct:
            return None
        side, mean, std = self.processor.image_size, self.processor.image_mean, self.processor.image_std
        squares = np.stack([letterbox_array(c.image, side) for c in distinct.values() if c.image is not None])
        pixels = normalize(torch.from_numpy(squares).to(self.device), mean, std)
        with self._autocast():
            output = self.model.get_image_features(
                pixel_values=pixels,
                vision_feature_layer=self.model.config.vision_feature_layer,
                vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
                return_dict=True,
            )
        return Features(output=output, rows={image: row for row, image in enumerate(distinct)})

    @torch.no_grad()
    def answer(
        self, conversations: Sequence[Conversation], max_new_tokens: int, features: Features | None = None
    ) -> list[str]:
        """The answer to the last turn of each conversation, a user's.  `features`: its images' where they are known.

        Raises `BadSample` naming the conversation by number.
        """
        answers: dict[int, str] = {}
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.processor.end_ids[-1],
            pad_token_id=self.model.generation_config.pad_token_id,
        )
        for numbers, rows, known in self._batches(conversations, features, for_training=False):
            batch = self._inputs([conversations[i] for i in numbers], rows, known, for_training=False)
            with self._autocast():
                made = self.model.generate(**batch, generation_config=settings)
            texts = self.processor.decode_answers(made, batch["input_ids"].shape[1])
            answers.update(zip(numbers, texts, strict=True))
        return [answers[i] for i in range(len(conversations))]

    @torch.no_grad()
    def log_likelihood(self, conversations: Sequence[Conversation], features: Features | None = None) -> list[float]:
        """Log-probability of the last turn of each conversation, an assistant's, its end included.

        Raises `BadSample` naming the conversation by number.
        """
        return [total for total, _ in self.score(conversations, features)]

    @torch.no_grad()
    def score(
        self, conversations: Sequence[Conversation], features: Features | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would say it) of the last turn of each conversation."""
        scores: dict[int, tuple[float, bool]] = {}
        for numbers, rows, known in self._batches(conversations, features, for_training=True):
            batch = self._inputs([conversations[i] for i in numbers], rows, known, for_training=True)
            with self._autocast():
                logits, said = self.model.learned_logits(**batch, use_cache=False)
            logits, counts = logits.float(), [row.num_supervised for row in rows]
            token = logits.log_softmax(-1).gather(-1, said[:, None])[:, 0]
            sums = [float(part.sum()) for part in token.double().split(counts)]
            greedy = [bool(part.all()) for part in (logits.argmax(-1) == said).split(counts)]
            scores.update(zip(numbers, zip(sums, greedy, strict=True), strict=True))
        return [scores[i] for i in range(len(conversations))]

    def _batches(
        self, conversations: Sequence[Conversation], features: Features | None, *, for_training: bool
    ) -> Iterator[tuple[list[int], list[Row], Features | None]]:
        """(numbers of conversations, their rows, features of their images): similar lengths together.

        Images are encoded `batch_size` at a time; the features of one group are let go of before the next.
        """
        groups: list[list[int]] = []
        seen: set[int] = set()
        for number, conversation in enumerate(conversations):  # as many images to a group as are encoded at once
            image = id(conversation.image)
            if not groups or (image not in seen and len(seen) >= self.batch_size):
                groups.append([])
                seen = set()
            seen.add(image)
            groups[-1].append(number)
        for group in groups:
            known = features or self.encode([conversations[i] for i in group])
            rows = {
                i: _to_answer(
                    self.processor.encode(conversations[i], for_training=for_training, where=f"conversation {i}")
                )
                for i in group
            }
            order = sorted(group, key=lambda i: len(rows[i].input_ids))
            for start in range(0, len(order), self.batch_size):
                numbers = order[start : start + self.batch_size]
                yield numbers, [rows[i] for i in numbers], known

    def _inputs(
        self, conversations: Sequence[Conversation], rows: Sequence[Row], known: Features | None, *, for_training: bool
    ) -> dict[str, Any]:
        """The batch on the model's device, with image features in place of pixels."""
        batch: dict[str, Any] = {
            name: value.to(self.device) for name, value in self.processor.pad(rows, for_training=for_training).items()
        }
        images = [c.image for c in conversations if c.image is not None]
        if images:
            assert known is not None
            batch["mm_encoder_outputs"] = {"image": known.of(images)}
        return batch

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)


def _to_answer(row: Row) -> Row:
    """The row with the labels of its last answer alone, and without pixels: its image is encoded already."""
    gaps = np.flatnonzero(np.array(row.labels) == IGNORED)
    first = int(gaps[-1]) + 1 if len(gaps) else 0
    return replace(row, square=None, labels=[IGNORED] * first + row.labels[first:])
