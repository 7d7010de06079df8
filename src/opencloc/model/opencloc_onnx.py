"""Regions of photos without torch: the folder of `opencloc export --format onnx`.

Needs onnxruntime, numpy, tokenizers and Pillow.

    python opencloc_onnx.py FOLDER photo.jpg --names dog cat --box 10 20 200 180

Copy this file: it needs nothing of opencloc and no torch.  Boxes are XYXY, points XY, in pixels of the image as viewers
show it.  An image is encoded once; everything after it prompts what was encoded.

Symbols: P prompts, C names, E width of the joint embedding, S side of the square that the model sees.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

BAR_RGB = (123, 117, 104)  # of the letterbox
SMALLEST = 1 / 64  # side of a box, of the square
IMAGES_OF_16_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class EncodedImage:
    """One encoded image: what the graphs take, its embedding (E,) and its size in pixels."""

    features: dict[str, np.ndarray]
    embedding: np.ndarray
    patches: np.ndarray | None  # every patch in the joint space, (N, E), where the model has heat maps
    size_px: tuple[int, int]

    def to_square(self, points_px: np.ndarray) -> np.ndarray:
        """Points (..., 2) in pixels of the image, in [0, 1] of the letterboxed square."""
        size, side = np.array(self.size_px), max(self.size_px)
        return ((points_px + (side - size) / 2) / side).astype(np.float32)

    def to_image_px(self, points: np.ndarray) -> np.ndarray:
        """The inverse of `to_square`, clipped to the image."""
        size, side = np.array(self.size_px), max(self.size_px)
        return np.clip(points.astype(np.float64) * side - (side - size) / 2, 0, size).astype(np.float32)


class Model:
    """An exported model.  `providers` are onnxruntime's, e.g. CUDAExecutionProvider; `threads` of the CPU, 0: all."""

    def __init__(
        self, folder: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",), threads: int = 0
    ) -> None:
        folder = Path(folder)
        if not (folder / "opencloc_onnx.json").is_file():
            raise FileNotFoundError(f"{folder} holds no export: opencloc export --format onnx writes one")
        self.settings: dict[str, Any] = json.loads((folder / "opencloc_onnx.json").read_text("utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._graphs = {
            name.removesuffix(".onnx"): onnxruntime.InferenceSession(str(folder / name), options, list(providers))
            for name in self.settings["graphs"]
        }
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        length = self.settings["max_text_length"]
        self._tokenizer.enable_truncation(length)
        pad_to = length if self.settings["pad_to_max_length"] else None
        self._tokenizer.enable_padding(pad_id=self.settings["pad_id"], length=pad_to)
        self._everyday: np.ndarray | None = None

    # -- encoding ------------------------------------------------------------------------------------------------

    def encode(self, image: str | Path | Image.Image) -> EncodedImage:
        """The image encoded, once for all prompts."""
        photo = upright_rgb(image)
        square = letterbox(photo, self.settings["image_size"]).astype(np.float32) / 255
        mean, std = (np.array(self.settings[name], np.float32) for name in ("image_mean", "image_std"))
        pixels = np.ascontiguousarray(((square - mean) / std).transpose(2, 0, 1)[None])
        found = self._run("image_encoder", pixel_values=pixels)
        patches = found.get("patch_embeddings")
        return EncodedImage(
            features={name: found[name] for name in self.settings["features"]},
            embedding=found["image_embedding"][0],
            patches=None if patches is None else patches[0],
            size_px=photo.size,
        )

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """L2-normalised text embeddings, (C, E)."""
        if any(not text.strip() for text in texts):
            raise ValueError("a text is empty")
        if not len(texts):
            return np.zeros((0, self.settings["embed_dim"]), np.float32)
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        return self._run("text_encoder", input_ids=np.array(ids, np.int64))["text_embedding"]

    def embed(self, image: EncodedImage, boxes_px: Any = (), points_px: Any = ()) -> np.ndarray:
        """L2-normalised region embeddings (P, E): of the boxes (P, 4), then of the points (P, 2)."""
        boxes = image.to_square(_inside(boxes_px, 4, image.size_px).reshape(-1, 2, 2)).reshape(-1, 4)
        points = image.to_square(_inside(points_px, 2, image.size_px))
        return self._prompt(image, np.concatenate([boxes, np.tile(points, 2)]))

    def _prompt(self, image: EncodedImage, prompts: np.ndarray) -> np.ndarray:
        if not len(prompts):
            return np.zeros((0, self.settings["embed_dim"]), np.float32)
        return self._run("prompter", **image.features, prompts=prompts[None])["region_embedding"][0]

    # -- answers -------------------------------------------------------------------------------------------------

    def classify(self, image: EncodedImage, boxes_px: Any, names: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """(best name of each box, probabilities over the names (P, C))."""
        if not len(names):
            raise ValueError("there are no names to choose from")
        texts = self.embed_texts([name.replace("_", " ") for name in names])
        logits = self.settings["region_scale"] * self.embed(image, boxes_px) @ texts.T
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities = weights / weights.sum(-1, keepdims=True)
        return [names[int(i)] for i in probabilities.argmax(-1)], probabilities

    def ground(self, image: EncodedImage, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(box of each text in pixels (P, 4), score in [0, 1] that it is there at all (P,)).

        The score compares the text's best fit, with its own box or a window of the image, with what everyday names
        reach in the same image.
        """
        if "box_head" not in self._graphs:
            raise ValueError(f"this model ({self.settings['prompter']}) cannot find texts: it has no box head")
        if not len(texts):
            return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
        embeddings = self.embed_texts(texts)
        boxes = self._run("box_head", **image.features, text_embedding=embeddings[None])["boxes"][0]
        low = boxes[:, :2].clip(max=1 - SMALLEST)
        own = np.concatenate([low, np.maximum(boxes[:, 2:], low + SMALLEST)], -1)
        windows = np.array(self.settings["windows"]).reshape(-1, 2, 2) * image.size_px
        regions = self._prompt(image, np.concatenate([image.to_square(windows).reshape(-1, 4), own]))
        windowed, own_regions = regions[: len(windows)], regions[len(windows) :]
        fit = np.maximum((embeddings @ windowed.T).max(-1), (embeddings * own_regions).sum(-1))
        if self._everyday is None:
            self._everyday = self.embed_texts(self.settings["everyday_names"])
        level = np.quantile((self._everyday @ windowed.T).max(-1), 0.9)
        scores = 1 / (1 + np.exp(-self.settings["region_scale"] * (fit - level)))
        return image.to_image_px(boxes.reshape(-1, 2, 2)).reshape(-1, 4), scores.astype(np.float32)

    def heatmap(self, image: EncodedImage, texts: Sequence[str]) -> np.ndarray:
        """Cosine of each text with every place of the image, (P, H, W): its long side has S values."""
        if image.patches is None:
            raise ValueError(f"this model ({self.settings['prompter']}) has no heat maps")
        side, (rows, columns) = self.settings["image_size"], self.settings["grid"]
        corners = image.to_square(np.array([[0, 0], image.size_px]))
        (x0, y0), (x1, y1) = (
            (round(float(x) * side) for x in corners[0]),
            (round(float(x) * side) for x in corners[1]),
        )
        heat = (self.embed_texts(texts) @ image.patches.T).reshape(-1, rows, columns)
        maps = [Image.fromarray(one).resize((side, side), Image.Resampling.BILINEAR) for one in heat]
        cut = [np.asarray(one)[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] for one in maps]
        return np.stack(cut) if cut else np.zeros((0, max(y1 - y0, 1), max(x1 - x0, 1)), np.float32)

    def _run(self, graph: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        session = self._graphs[graph]
        names = [output.name for output in session.get_outputs()]
        outputs: list[Any] = session.run(names, inputs)  # pyright: ignore[reportAssignmentType]
        return dict(zip(names, outputs, strict=True))


def upright_rgb(image: str | Path | Image.Image) -> Image.Image:
    """The image as 8-bit RGB, turned upright by its EXIF orientation, transparency laid over white."""
    if not isinstance(image, Image.Image):
        with Image.open(image) as file:
            return upright_rgb(file)
    photo = ImageOps.exif_transpose(image)
    if photo.mode in IMAGES_OF_16_BIT:
        return Image.fromarray((np.asarray(photo).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if photo.has_transparency_data:
        rgba = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return photo.convert("RGB")


def letterbox(image: Image.Image, side: int) -> np.ndarray:
    """The image resized into a square (side, side, 3) of bytes: its long side fills it, bars cover the rest."""
    size, scale = image.size, side / max(image.size)
    inner = [max(1, round(length * scale)) for length in size]
    start = [(side - length) // 2 for length in inner]
    offset = [(side - length * scale) / 2 for length in size]  # where the content starts, to a part of a pixel
    low = [max(0.0, (s - o) / scale) for s, o in zip(start, offset, strict=True)]
    high = [min(w, (s + i - o) / scale) for w, s, i, o in zip(size, start, inner, offset, strict=True)]
    resized = image.resize((inner[0], inner[1]), Image.Resampling.BICUBIC, box=(low[0], low[1], high[0], high[1]))
    square = Image.new("RGB", (side, side), BAR_RGB)
    square.paste(resized, (start[0], start[1]))
    return np.asarray(square)


def _inside(rows: Any, width: int, size_px: tuple[int, int]) -> np.ndarray:
    """Boxes or points as (P, `width`), clipped to the image.  Raises ValueError for what does not lie in it."""
    array = np.asarray(rows, np.float64)
    array = array.reshape(-1, width) if array.size == 0 else array
    if array.ndim != 2 or array.shape[1] != width:
        raise ValueError(f"shape {array.shape}: needs rows of {width} numbers")
    size = np.tile(np.array(size_px, np.float64), width // 2)
    slack = np.maximum(1, 0.01 * size) if width == 4 else 0  # detectors reach over the edge a little
    clipped = array.clip(0, size)
    bad = ~np.isfinite(array).all(-1) | (array < -slack).any(-1) | (array > size + slack).any(-1)
    if width == 4:
        bad |= (clipped[:, 2:] <= clipped[:, :2]).any(-1)
        bad |= (array.max(-1, initial=-np.inf) <= 1) & (max(size_px) > 2)  # normalised, not pixels
    if bad.any():
        raise ValueError(f"{array[bad][0].tolist()} is no {'box' if width == 4 else 'point'} in {size_px} pixels")
    return clipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="written by opencloc export --format onnx")
    parser.add_argument("image")
    parser.add_argument("--names", nargs="+", required=True)
    parser.add_argument("--box", nargs=4, type=float, action="append", default=[], metavar=("X0", "Y0", "X1", "Y1"))
    args = parser.parse_args()
    model = Model(args.folder)
    image = model.encode(args.image)
    if args.box:
        said, probabilities = model.classify(image, args.box, args.names)
        for box, name, row in zip(args.box, said, probabilities, strict=True):
            print(f"{[round(x) for x in box]} is {name} ({row.max():.0%})")
    if "box_head.onnx" in model.settings["graphs"]:
        for name, box, score in zip(args.names, *model.ground(image, args.names), strict=True):
            print(f"{name} at {box.round().astype(int).tolist()} ({score:.0%})")


if __name__ == "__main__":
    main()
