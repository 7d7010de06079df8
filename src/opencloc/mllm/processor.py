"""RegionLlavaProcessor: conversations -> the tensors of `RegionLlava`, saved beside the model.

The image is letterboxed, prompts are moved into the square, placeholders become coordinates and region tokens, and
questions and answers are tokenised piece by piece (`chat_format`).

Symbols: B conversations, T tokens, I images, P regions, S side of the square, V side of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, no_type_check

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature
from transformers.processing_utils import ProcessorMixin

from opencloc.boxes import Letterbox
from opencloc.errors import BadSample
from opencloc.images import MEAN_RGB, STD_RGB, letterbox_array
from opencloc.mllm.boxes_text import STEPS, box_text, point_text
from opencloc.mllm.chat_format import ChatFormat
from opencloc.mllm.conversation import PLACEHOLDER, Conversation, RegionPrompt
from opencloc.mllm.model import IGNORED, RegionLlavaConfig
from opencloc.mllm.sampler import BOX, MASK, NONE, POINT
from opencloc.model import loading
from opencloc.model.processor import normalize, save_tokenizer
from opencloc.model.prompts import Box, Point

IMAGE, REGION = "<image>", "<region>"
Refer = Literal["coords", "token", "both"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversation made ready, not yet padded."""

    input_ids: list[int]
    labels: list[int]  # `IGNORED` but for the answers and their ends
    square: np.ndarray | None  # (S, S, 3) uint8
    boxes: np.ndarray  # (P, 4) in the square, one for each region token
    kinds: list[int]
    masks: list[np.ndarray | None]  # (V, V) bool, where the kind is MASK

    @property
    def num_supervised(self) -> int:
        """How many tokens are learned: the first one has nothing before it to be predicted from."""
        return sum(label != IGNORED for label in self.labels[1:])


class RegionLlavaProcessor(ProcessorMixin):
    """`processor(conversations)` makes prompts to answer, `processor(conversations, for_training=True)` adds labels.

    `refer`: whether `{region:K}` becomes coordinates, a region token, or both (Ferret's way).
    `coordinate_steps`: how many different numbers boxes are written in.  `max_length`: most tokens of a row.
    """

    @no_type_check  # transformers reads the argument names off this function, which a type checker would wrap
    def __init__(
        self,
        tokenizer: Any = None,
        image_size: int = 336,
        num_image_tokens: int = 576,
        refer: str = "both",
        coordinate_steps: int = STEPS,
        max_length: int = 2048,
        chat: dict | None = None,
        image_mean: Sequence[float] = MEAN_RGB,
        image_std: Sequence[float] = STD_RGB,
        **kwargs: Any,
    ) -> None:
        if refer not in ("coords", "token", "both"):
            raise ValueError(f"refer is {refer!r}, must be coords, token or both")
        for name, value, least in (
            ("image_size", image_size, 1),
            ("num_image_tokens", num_image_tokens, 1),
            ("coordinate_steps", coordinate_steps, 2),
            ("max_length", max_length, 2),
        ):
            if type(value) is not int or not least <= value <= 2**20:
                raise ValueError(f"{name} is {value!r}, must be a whole number from {least} to {2**20}")
        self.image_size, self.num_image_tokens = image_size, num_image_tokens
        self.refer, self.coordinate_steps, self.max_length = refer, coordinate_steps, max_length
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.chat = chat
        super().__init__(tokenizer, **kwargs)
        if tokenizer is None or chat is None:
            return
        self.format = ChatFormat(**chat)
        self.image_token_id, self.region_token_id = (tokenizer.convert_tokens_to_ids(t) for t in (IMAGE, REGION))
        self.end_ids = self._ids(self.format.end)
        self._reserved = tuple(sorted({IMAGE, REGION, *tokenizer.all_special_tokens}))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> RegionLlavaProcessor:
        """The processor of a folder that `build` or training wrote.

        Raises ValueError naming the folder where files are missing or broken.
        """
        path = pretrained_model_name_or_path
        folder = Path(loading.model_path(path))
        if folder.is_dir() and not (folder / "processor_config.json").is_file():
            raise ValueError(f"{path}: there is no processor_config.json")
        loading.check_tokenizer_files(path)
        with loading.naming(path):
            load: Any = super().from_pretrained
            processor = load(str(folder), **options | {"trust_remote_code": False})
            if not isinstance(processor, cls) or processor.chat is None:
                raise ValueError(f"{path}: its processor is not one of `opencloc mllm build`")
        return processor

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> list[str]:
        """Writes processor and tokenizer: the same files however often they were saved and loaded."""
        written = super().save_pretrained(save_directory, **options)
        save_tokenizer(self.tokenizer, save_directory, self.max_length)
        return written

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, conversations: Conversation | Sequence[Conversation], *, for_training: bool = False
    ) -> BatchFeature:
        """The batch: `input_ids`, `attention_mask` (B, T), `pixel_values` (I, 3, S, S), `region_boxes` (B, P, 4),
        `region_kinds` (B, P), `region_masks` (B, P, V, V), the last four only where there are any.

        Prompts are padded on the left and end where the answer begins.  `for_training` adds `labels` (B, T), padded on
        the right; every conversation then ends with an answer.  Raises `BadSample` naming the conversation by number.
        """
        listed = [conversations] if isinstance(conversations, Conversation) else list(conversations)
        rows = [self.encode(c, for_training=for_training, where=f"conversation {i}") for i, c in enumerate(listed)]
        return self.pad(rows, for_training=for_training)

    def encode(self, conversation: Conversation, *, for_training: bool, where: str = "conversation") -> Row:
        """One conversation made ready.

        Raises `BadSample` ("special token in a text", "too many tokens", "no answer at the end", ...) naming `where`.
        """
        turns, image = conversation.turns, conversation.image
        if (turns[-1].role == "assistant") != for_training:
            reason = "no answer at the end" if for_training else "no question at the end"
            raise BadSample(reason, where, f"the last turn is the {turns[-1].role}'s")
        for number, turn in enumerate(turns):
            if found := [token for token in self._reserved if token in turn.text]:
                raise BadSample("special token in a text", where, f"turn {number}: {found[0]}")
        letterbox = None if image is None else Letterbox(width_px=image.width, height_px=image.height)
        placed = [_in_square(prompt, letterbox, self.image_size // 2) for prompt in conversation.prompts]
        texts = [self._coordinates(kind, box) for kind, box, _ in placed]
        pointed: list[int] = []  # numbers of the prompts that region tokens stand for
        ids: list[int] = []
        labels: list[int] = []
        for number, turn in enumerate(turns):
            text = self._with_prompts(turn.text.strip(), texts, pointed)
            if turn.role == "assistant":
                answer = [*self._ids(self.format.lead + text), *self.end_ids]
                ids += answer
                labels += answer
                continue
            before = self.format.between if number else self.format.head + (f"{IMAGE}\n" if image is not None else "")
            question = self._ids(before + text + self.format.ask)
            if number == 0 and image is not None:
                at = question.index(self.image_token_id)
                question[at : at + 1] = [self.image_token_id] * self.num_image_tokens
            ids += question
            labels += [IGNORED] * len(question)
        if len(ids) > self.max_length:
            raise BadSample("too many tokens", where, f"{len(ids)}, at most {self.max_length}")
        boxes = np.asarray([placed[k][1] for k in pointed], dtype=np.float32).reshape(-1, 4)
        return Row(
            input_ids=ids,
            labels=labels,
            square=None if image is None else letterbox_array(image, self.image_size),
            boxes=boxes,
            kinds=[placed[k][0] for k in pointed],
            masks=[placed[k][2] for k in pointed],
        )

    def pad(self, rows: Sequence[Row], *, for_training: bool) -> BatchFeature:
        """The batch of some rows, see `__call__`."""
        length = max(len(row.input_ids) for row in rows)
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_ids[-1]

        def padded(name: str, fill: int) -> torch.Tensor:
            lists = [getattr(row, name) for row in rows]
            gaps = [[fill] * (length - len(ids)) for ids in lists]
            both = zip(lists, gaps, strict=True)
            return torch.tensor([[*ids, *gap] if for_training else [*gap, *ids] for ids, gap in both])

        ids, lengths = padded("input_ids", pad_id), torch.tensor([len(row.input_ids) for row in rows])
        places = torch.arange(length) if for_training else torch.arange(length).flip(0)
        batch = {"input_ids": ids, "attention_mask": (places < lengths[:, None]).long()}
        if for_training:
            batch["labels"] = padded("labels", IGNORED)
        squares = [row.square for row in rows if row.square is not None]
        if squares:
            batch["pixel_values"] = normalize(torch.from_numpy(np.stack(squares)), self.image_mean, self.image_std)
        if (most := max(len(row.kinds) for row in rows)) > 0:
            batch |= _padded_regions(rows, most, self.image_size // 2)
        return BatchFeature(batch)

    def decode_answers(self, ids: torch.Tensor, prompt_length: int = 0) -> list[str]:
        """The texts of what `generate` made, without the prompt's first `prompt_length` tokens and what ends them."""
        end = self.end_ids[-1]
        rows = [row[prompt_length:] for row in ids.tolist()]
        rows = [row[: row.index(end)] if end in row else row for row in rows]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _coordinates(self, kind: int, box: np.ndarray) -> str:
        x0, y0, x1, y1 = box.tolist()
        steps = self.coordinate_steps
        return point_text(x0, y0, steps) if kind == POINT else box_text([x0, y0, x1, y1], steps)

    def _with_prompts(self, text: str, coordinates: list[str], pointed: list[int]) -> str:
        """The text with its placeholders filled in; `pointed` receives what region tokens stand for."""

        def fill(match: Any) -> str:
            kind, number = match[1], int(match[2])
            if kind == "box" or self.refer == "coords":
                return coordinates[number]
            pointed.append(number)
            return REGION if self.refer == "token" else f"{coordinates[number]} {REGION}"

        return PLACEHOLDER.sub(fill, text)


def _in_square(
    prompt: RegionPrompt, letterbox: Letterbox | None, side: int
) -> tuple[int, np.ndarray, np.ndarray | None]:
    """(kind, box (4,), mask (side, side)) of a prompt, moved from its image into the square."""
    assert letterbox is not None
    if isinstance(prompt, Box):
        box = np.array([prompt.x0, prompt.y0, prompt.x1, prompt.y1], dtype=np.float64)
        return BOX, letterbox.to_square(box.clip(0, 1)), None
    if isinstance(prompt, Point):
        return POINT, letterbox.to_square(np.array([prompt.x, prompt.y, prompt.x, prompt.y], dtype=np.float64)), None
    mask = np.asarray(prompt.mask) > 0
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    box = np.array([columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height])
    return MASK, letterbox.to_square(box), _mask_in_square(mask, letterbox, side)


def _mask_in_square(mask: np.ndarray, letterbox: Letterbox, side: int) -> np.ndarray:
    """The mask over the square: pixels that are covered by half, or if there are none by most."""
    left, top, right, bottom = letterbox.to_square(np.array([0.0, 0.0, 1.0, 1.0])) * side
    first = round(left), round(top)
    size = max(1, round(right) - first[0]), max(1, round(bottom) - first[1])
    part = Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX)
    coverage = np.zeros((side, side), dtype=np.float32)
    coverage[first[1] : first[1] + size[1], first[0] : first[0] + size[0]] = np.asarray(part)
    return coverage >= min(0.5, float(coverage.max()))


def _padded_regions(rows: Sequence[Row], most: int, side: int) -> dict[str, torch.Tensor]:
    boxes = np.tile(np.array([0, 0, 1, 1], dtype=np.float32), (len(rows), most, 1))
    kinds = np.full((len(rows), most), NONE)
    masks = np.zeros((len(rows), most, side, side), dtype=np.float32)
    for i, row in enumerate(rows):
        boxes[i, : len(row.kinds)], kinds[i, : len(row.kinds)] = row.boxes, row.kinds
        for k, mask in enumerate(row.masks):
            if mask is not None:
                masks[i, k] = mask
    batch = {"region_boxes": torch.from_numpy(boxes), "region_kinds": torch.from_numpy(kinds)}
    return batch | ({"region_masks": torch.from_numpy(masks)} if (kinds == MASK).any() else {})


def make_processor(tokenizer: Any, chat: ChatFormat, config: RegionLlavaConfig, **options: Any) -> RegionLlavaProcessor:
    """The processor for a model of that configuration."""
    vision: Any = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    return RegionLlavaProcessor(
        tokenizer, image_size=vision.image_size, num_image_tokens=tokens, chat=asdict(chat), **options
    )


AutoProcessor.register(RegionLlavaConfig, RegionLlavaProcessor)
