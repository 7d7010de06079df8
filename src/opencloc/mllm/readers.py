"""Data sets as conversations: LLaVA's and Ferret's JSON, this project's own records, any source of regions.

    llava:FILE?images=DIR     a list of {"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}]}
    ferret:FILE?images=DIR    the same with `<bbox_locationK>` in the texts and `box_x1y1x2y2`, in pixels, beside them
    shards:DIR                records with `conversations`; those without become questions about their regions
    scenes:, coco:, ...       questions about regions (`opencloc.mllm.templates`)

Every row is a pure function of its number and a random generator; what cannot be used is a `BadSample` with file, row
and reason.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opencloc import files
from opencloc.data.sample import Sample, Source
from opencloc.data.sources.spec import open_source
from opencloc.data.tars.shards import Shards
from opencloc.errors import BadSample
from opencloc.images import decode_image
from opencloc.mllm.conversation import Conversation, RegionPrompt, Turn, decode_rle, parse_conversation
from opencloc.mllm.templates import KINDS, Kind, Questions, names_of
from opencloc.model.prompts import Box, Mask, Point

_ROLES = {"human": "user", "gpt": "assistant"}
_IMAGE = "<image>"
_LOCATION = re.compile(r"<bbox_location(\d{1,4})>")
_FEATURE = re.compile(r"\s*<region_fea>")  # follows a location where Ferret's own preparation has run


class JsonRows:
    """The rows of a LLaVA or Ferret file by number.

    `source[i]` raises `BadSample` ("unknown role", "image token missing", "missing image", ...) naming file and row.
    Raises ValueError for a file that is no list of rows, FileNotFoundError for one that is not there.
    """

    def __init__(self, path: str, images: str, form: str, image_px: int | None = None) -> None:
        self.path, self.images, self.form, self.image_px = path, images, form, image_px
        try:
            rows = json.loads(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file: {error}") from None
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{path}: needs a list of rows, with at least one")
        self.rows: list[Any] = rows

    @property
    def size(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"JsonRows({self.path!r}: {self.size} rows)"

    def identity(self, index: int) -> str:
        """The id of a row, or its number."""
        row = self.rows[index]
        return str(row.get("id", index)) if isinstance(row, dict) else str(index)

    def __getitem__(self, index: int) -> Conversation:
        row, where = self.rows[index], f"{self.path}, row {index}"
        said = row.get("conversations") if isinstance(row, dict) else None
        if not isinstance(said, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in said
        ):
            raise BadSample("bad row", where, "needs conversations, each with from and value")
        turns = []
        for number, turn in enumerate(said):
            if turn.get("from") not in _ROLES:
                raise BadSample("unknown role", where, f"turn {number} is from {str(turn.get('from'))[:40]!r}")
            turns.append(Turn(_ROLES[turn["from"]], turn["value"]))
        image = self._image(row, where)
        mentions = sum(turn.text.count(_IMAGE) for turn in turns)
        if image is None and mentions:
            raise BadSample("image missing", where, "its texts say <image>")
        if image is not None and mentions != 1:
            reason = "image token missing" if mentions == 0 else "several image tokens"
            raise BadSample(reason, where, f"{mentions} times <image>")
        turns = [Turn(turn.role, turn.text.replace(_IMAGE, "").strip()) for turn in turns]
        prompts: tuple[RegionPrompt, ...] = ()
        if self.form == "ferret":
            turns, prompts = _ferret(turns, row, where)
        return Conversation(image=image, turns=tuple(turns), prompts=prompts, where=where)

    def _image(self, row: Any, where: str) -> Any:
        name = row.get("image")
        if name is None:
            return None
        if not isinstance(name, str) or "\0" in name:
            raise BadSample("bad row", where, f"image is no name: {str(name)[:60]!r}")
        root = os.path.realpath(self.images)
        path = os.path.realpath(os.path.join(root, name))
        if os.path.commonpath([root, path]) != root:
            raise BadSample("missing image", where, f"{name} lies outside {self.images}")
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BadSample("missing image", where, str(error)) from error
        return decode_image(data, f"{where}, {name}", self.image_px)


class ConversationShards(Shards):
    """The conversations of tars by number; a record without any gives its `Sample`."""

    def __getitem__(self, index: int) -> Any:
        shard, row = self._locate(index)
        found, version = self._index(shard, row)
        image, json_bytes, _ = self._read(found, version, row)
        if json_bytes is None or b'"conversations"' not in json_bytes:
            return super().__getitem__(index)
        where = f"{found.url}/{found.keys[row]}"
        try:
            record = json.loads(json_bytes)
        except (ValueError, RecursionError) as error:
            raise BadSample("bad json", where, str(error)) from error
        if not isinstance(record, dict) or "conversations" not in record:
            return super().__getitem__(index)
        return parse_conversation(record, decode_image(image, where, self.config.image_px), where)


class Asked:
    """Any source of regions or conversations as conversations: `asked.conversation(i, rng)`."""

    def __init__(self, source: Any, kinds: Sequence[Kind] = KINDS, max_turns: int = 5) -> None:
        self.source = source
        names = [] if isinstance(source, JsonRows) else names_of(source)
        self.questions = Questions(names, kinds, max_turns)

    def conversation(self, index: int, rng: random.Random) -> Conversation:
        """The conversation of a row.  Raises `BadSample`."""
        return self.of(self.source[index], rng)

    def of(self, found: Sample | Conversation, rng: random.Random) -> Conversation:
        """What a source gave as a conversation: a sample becomes questions about it."""
        return found if isinstance(found, Conversation) else self.questions(found, rng)


def open_conversations(spec: str, *, image_px: int | None = None) -> JsonRows | ConversationShards | Source:
    """The source that a spec names (see above): of conversations, of samples, or of both.

    `image_px`: the resolution that will be needed.  Raises ValueError naming the spec and what is wrong with it, and
    FileNotFoundError for what is not there.
    """
    kind, colon, rest = spec.partition(":")
    if colon and kind in ("llava", "ferret"):
        path, mark, option = rest.rpartition("?images=")
        if not mark or not path or not option:
            raise ValueError(f"{spec}: a {kind} source is {kind}:FILE?images=DIR")
        if not files.is_folder(option):
            raise FileNotFoundError(f"{spec}: {option}: no such folder")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{spec}: {path}: no such file")
        return JsonRows(path, option, kind, image_px)
    source = open_source(spec, image_px=image_px)
    return ConversationShards(source.location, source.config) if type(source) is Shards else source


def _ferret(turns: list[Turn], row: Any, where: str) -> tuple[list[Turn], tuple[RegionPrompt, ...]]:
    """Turns and prompts of Ferret's `<bbox_locationK>`, which counts the boxes of its own turn.

    A box of two numbers is a point; a mask, where there is one, is meant in the box's place.
    """
    size = row.get("image_w"), row.get("image_h")
    boxes, masks = row.get("box_x1y1x2y2"), row.get("masks")
    if not all(type(side) in (int, float) and side > 0 for side in size):
        raise BadSample("bad row", where, "image_w and image_h are needed")
    prompts: list[RegionPrompt] = []
    said = []
    for number, turn in enumerate(turns):

        def place(match: re.Match[str], number: int = number, role: str = turn.role) -> str:
            k = int(match[1])
            try:
                box = boxes[number][k]
            except (IndexError, TypeError, KeyError):
                raise BadSample("placeholder without a prompt", where, f"turn {number}: {match[0]}") from None
            try:
                mask = masks[number][k] if role == "user" else None
            except (IndexError, TypeError, KeyError):
                mask = None
            prompts.append(_ferret_prompt(box, mask, size, f"{where}, turn {number}"))
            return f"{{{'region' if role == 'user' else 'box'}:{len(prompts) - 1}}}"

        said.append(Turn(turn.role, _LOCATION.sub(place, _FEATURE.sub("", turn.text))))
    return said, tuple(prompts)


def _ferret_prompt(box: Any, mask: Any, size: tuple[float, float], where: str) -> RegionPrompt:
    if isinstance(mask, dict):
        return Mask(decode_rle(mask, where))
    numbers = isinstance(box, list) and all(type(v) in (int, float) and abs(v) < 1e6 for v in box)
    if not numbers or len(box) not in (2, 4):
        raise BadSample("bad prompt", where, f"a box has 4 numbers, a point 2: {str(box)[:60]}")
    scaled = [v / size[i % 2] for i, v in enumerate(box)]
    # edges may reach a pixel over the image, as detectors and annotators leave them
    near = [min(max(v, 0.0), 1.0) if -0.01 <= v <= 1.01 else v for v in scaled]
    return Box(*near) if len(near) == 4 else Point(*near)
