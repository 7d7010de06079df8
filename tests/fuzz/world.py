"""What broken inputs are made from and tried on, and the checks that all kinds share."""

from __future__ import annotations

import contextlib
import io
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opencloc.config import ModelConfig
from opencloc.errors import BadSample
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.predictor import Predictor
from opencloc.model.processor import ClocProcessor, train_tokenizer
from opencloc.train.build import tower_config
from tests.eval import sets_on_disk as on_disk

TINY = ModelConfig(
    image_size=32, patch_size=8, vision_width=32, vision_layers=1, vision_heads=2, text_width=32, text_layers=1,
    text_heads=2, text_length=16, embed_dim=24, vocab_size=300,
)  # fmt: skip


class Refused(Exception):
    """The input was refused, as it may be."""


class World:
    """What the inputs are broken versions of, made once in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        tokenizer = train_tokenizer(["a red dog and a blue cat", "two trains in the snow"] * 5, 300, 16)
        torch.manual_seed(0)
        clip = tower_config(TINY, tokenizer)
        model, processor = ClocModel(ClocConfig(clip_config=clip)), ClocProcessor.for_towers(clip, tokenizer)
        self.predictor = Predictor(model, processor)
        self.image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))
        self.photo = self.predictor.encode(self.image)
        self.images = image_files(self.image)
        self.checkpoints = [folder / "cloc", folder / "clip"]
        for part in (model, processor):
            part.save_pretrained(self.checkpoints[0])
        for part in (model.clip, tokenizer):
            part.save_pretrained(self.checkpoints[1])
        self.sets = folder / "sets"
        on_disk.write_coco(self.sets / "coco")
        on_disk.write_lvis(self.sets / "lvis")
        on_disk.write_fg_ovd(self.sets / "fg_ovd")
        on_disk.write_karpathy(self.sets / "karpathy", "coco")
        on_disk.write_karpathy(self.sets / "flickr", "flickr30k")
        on_disk.write_refer(self.sets / "refer")
        on_disk.write_mdetr(self.sets / "mdetr")
        on_disk.write_entities(self.sets / "entities")
        on_disk.write_panoptic(self.sets / "panoptic")
        on_disk.write_open_images(self.sets / "open_images")
        on_disk.write_sugarcrepe(self.sets / "sugarcrepe")
        on_disk.write_vsr(self.sets / "vsr")
        on_disk.write_grit(self.sets / "grit", parquet=True)

    @contextlib.contextmanager
    def fresh(self, copy_of: Path | None = None) -> Iterator[Path]:
        """A new folder, a copy of another one if that is given, which is removed after use."""
        self._count += 1
        folder = self.folder / f"{self._count:06d}"
        if copy_of is None:
            folder.mkdir()
        else:
            shutil.copytree(copy_of, folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def refusing(*names: object) -> Iterator[None]:
    """Turns an error of a documented type, whose message holds one of the names, into `Refused`."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        is_ours = isinstance(error, BadSample) or type(error) in (ValueError, TypeError)
        if is_ours:  # raised by a line of ours, not by a library below
            is_ours = "/opencloc/" in traceback.extract_tb(error.__traceback__)[-1].filename
        if not is_ours and not (isinstance(error, OSError) and type(error).__module__ == "builtins"):
            raise
        if not any(str(name) in str(error) for name in names):
            raise AssertionError(f"the error names none of {names}: {error!r}") from error
        raise Refused from error


def check(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def check_unit(embeddings: Tensor, count: int) -> None:
    check(len(embeddings) == count, f"{len(embeddings)} embeddings of {count}")
    norms = embeddings.detach().float().norm(dim=-1)
    check(bool(torch.isfinite(embeddings).all() and ((norms - 1).abs() < 1e-3).all()), "embeddings of another length")


def check_boxes(boxes: Any, what: str = "boxes") -> None:
    boxes = np.asarray(boxes).reshape(-1, 4)
    inside = (boxes >= -1e-6).all() and (boxes <= 1 + 1e-6).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    check(bool(inside), f"{what} outside the image or empty: {boxes.tolist()}")


def image_files(image: Image.Image) -> list[bytes]:
    rgba = image.copy()
    rgba.putalpha(100)
    deep = Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = [
        (image, "JPEG", {}),
        (image, "JPEG", {"exif": exif, "progressive": True}),
        (image.convert("CMYK"), "JPEG", {}),
    ]
    forms += [(one, "PNG", {}) for one in (image, rgba, deep, image.convert("LA"), image.convert("1"))]
    forms += [(image.quantize(16), "PNG", {"transparency": 3}), (image, "WEBP", {}), (rgba, "WEBP", {"lossless": True})]
    forms += [(image, "GIF", {"save_all": True, "append_images": [rgba.convert("RGB")]}), (image, "BMP", {})]
    forms += [(image, "AVIF", {}), (image, "TIFF", {}), (image, "PPM", {})]  # the last two are not read
    found = []
    for one, form, options in forms:
        buffer = io.BytesIO()
        one.save(buffer, form, **options)
        found.append(buffer.getvalue())
    return found
