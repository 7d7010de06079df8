"""`opencloc export --format onnx`: a model as ONNX graphs, for programs without torch.

Four graphs, each with any batch and any number of prompts: the image encoder runs once per image, the others on what it
gave.  `opencloc_onnx.py`, copied beside them, shows how they are used with onnxruntime, numpy, tokenizers and Pillow.

| file | inputs | outputs |
|---|---|---|
| `image_encoder.onnx` | `pixel_values` (B, 3, S, S) | `image_embedding` (B, E), FEATURES, `patch_embeddings` |
| `text_encoder.onnx` | `input_ids` (U, T) | `text_embedding` (U, E) |
| `prompter.onnx` | FEATURES, `prompts` (B, P, 4) | `region_embedding` (B, P, E) |
| `box_head.onnx` | FEATURES, `text_embedding` (B, P, E) | `boxes` (B, P, 4) |

FEATURES are `tokens` (B, N, D) and, where the Prompter reads the tower's pooling, `pool_input` (B, L, D).  Boxes are
XYXY in [0, 1] of the letterboxed square; a prompt is a box, or a point as (x, y, x, y).  Masks and texts as prompts
stay with torch.  Embeddings are L2-normalised.

Symbols: as in `cloc.py`.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from opencloc import files
from opencloc.model.cloc import ClocModel
from opencloc.model.export import MARK, may_be_replaced, save_exported_tokenizer
from opencloc.model.outputs import ImageFeatures
from opencloc.model.predictor import EVERYDAY, WINDOWS
from opencloc.model.processor import ClocProcessor
from opencloc.model.prompts import PromptBatch, PromptEncoder

OPSET = 18
EXAMPLE = Path(__file__).with_name("opencloc_onnx.py")
QUANTIZED = ("MatMul", "Gemm")  # whose weights become int8


def export_onnx(model: ClocModel, processor: ClocProcessor, folder: str | Path, *, int8: bool = False) -> Path:
    """The folder, which appears when it is complete: graphs, tokenizer.json, opencloc_onnx.json, an example, a README.

    `int8`: weights of linear layers as 8-bit integers, activations quantised as they come (onnxruntime's dynamic
    quantisation).  An older export of that name is replaced.  Raises ValueError where the name holds anything else and
    where the model's Prompter was never trained, and without the extra `onnx`.
    """
    _check_installed(int8)
    model._check_trained()
    folder = Path(folder)
    if folder.exists() and not may_be_replaced(folder):
        raise ValueError(f"{folder} is there already and is no earlier export: it is not replaced")
    model = model.float().cpu().eval()
    with files.new_folder(folder) as partial:
        names = _write_graphs(model, processor, partial)
        if int8:
            for name in names:
                _quantize(partial / name)
        save_exported_tokenizer(processor, partial / "transformers")
        (partial / "transformers" / "tokenizer.json").replace(partial / "tokenizer.json")
        shutil.rmtree(partial / "transformers")  # settings that the library tokenizers does not read
        files.write_json(partial / "opencloc_onnx.json", _settings(model, processor, names, int8))
        shutil.copyfile(EXAMPLE, partial / EXAMPLE.name)
        files.write_text(partial / "README.md", _readme(model, names, int8))
    return folder


class ImageEncoder(nn.Module):
    """Pixels -> image embedding, features, and the patches in the joint space where the Prompter can embed them."""

    def __init__(self, model: ClocModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Float[Tensor, "B 3 S S"]) -> tuple[Tensor, ...]:
        features = self.model.encode_image(pixel_values)
        found = [features.embedding, *_listed(features)]
        if self.model.prompter.has_patch_embeddings:
            found.append(self.model.prompter.patch_embeddings(features.tokens, features.pool_input))
        return tuple(found)


class TextEncoder(nn.Module):
    """Token ids -> text embeddings."""

    def __init__(self, model: ClocModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Int[Tensor, "U T"]) -> Float[Tensor, "U E"]:
        return self.model.encode_text(input_ids)


class RegionEncoder(nn.Module):
    """Features and prompts -> region embeddings."""

    def __init__(self, model: ClocModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Float[Tensor, "B N D"], prompts: Float[Tensor, "B P 4"], pool_input: Tensor | None = None
    ) -> Float[Tensor, "B P E"]:
        batch = boxes_and_points(self.model.prompt_encoder, prompts)
        return self.model._prompt(_features(self.model, tokens, pool_input), batch)


class Grounder(nn.Module):
    """Features and text embeddings -> boxes."""

    def __init__(self, model: ClocModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Float[Tensor, "B N D"], text_embedding: Float[Tensor, "B P E"], pool_input: Tensor | None = None
    ) -> Float[Tensor, "B P 4"]:
        return self.model.ground(_features(self.model, tokens, pool_input), text_embedding)


def boxes_and_points(encoder: PromptEncoder, prompts: Float[Tensor, "B P 4"]) -> PromptBatch:
    """The prompts of rows (x0, y0, x1, y1), of which those without extent are points: one graph takes both."""
    is_point = (prompts[..., :2] == prompts[..., 2:]).all(-1)
    boxes, points = encoder.boxes(prompts), encoder.points(prompts[..., :2])
    valid = torch.stack([torch.ones_like(is_point), ~is_point], -1)  # a point is one token, a box two
    return PromptBatch(
        tokens=torch.where(is_point[..., None, None], points.tokens, boxes.tokens),
        penalty=torch.where(is_point[..., None, None], points.penalty, boxes.penalty),
        valid=valid,
        asks=valid,
        boxes=torch.where(is_point[..., None], points.boxes, boxes.boxes),
    )


def _write_graphs(model: ClocModel, processor: ClocProcessor, folder: Path) -> list[str]:
    """The names of the graphs that this model has, after writing them."""
    side, length = processor.image_size, processor.max_text_length
    pixels = torch.zeros(2, 3, side, side)
    ids = torch.full((2, length if processor.pad_to_max_length else min(5, length)), processor.tokenizer.eos_token_id)
    with torch.no_grad():
        features = model.encode_image(pixels)
    given = dict(zip(_feature_names(model), _listed(features), strict=True))
    of_images = {name: {0: "batch"} for name in given}
    outputs = ["image_embedding", *given]
    if model.prompter.has_patch_embeddings:
        outputs.append("patch_embeddings")
    text_axes = {0: "texts"} if processor.pad_to_max_length else {0: "texts", 1: "length"}
    asked = {0: "batch", 1: "prompts"}
    graphs: dict[str, tuple[nn.Module, dict[str, Tensor], dict[str, dict[int, str]], list[str]]] = {
        "image_encoder.onnx": (ImageEncoder(model), {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}, outputs),
        "text_encoder.onnx": (TextEncoder(model), {"input_ids": ids}, {"input_ids": text_axes}, ["text_embedding"]),
        "prompter.onnx": (
            RegionEncoder(model),
            given | {"prompts": torch.tensor([0.1, 0.2, 0.7, 0.9]).repeat(2, 3, 1)},
            of_images | {"prompts": asked},
            ["region_embedding"],
        ),
    }
    if model.box_head is not None and model.config.grounding_trained:
        texts = torch.nn.functional.normalize(torch.ones(2, 3, model.embed_dim), dim=-1)
        graphs["box_head.onnx"] = (
            Grounder(model),
            given | {"text_embedding": texts},
            of_images | {"text_embedding": asked},
            ["boxes"],
        )
    for name, (module, inputs, axes, output_names) in graphs.items():
        with _exporting(model):
            program: Any = torch.onnx.export(
                module.eval(),
                kwargs=inputs,
                dynamic_shapes=axes,
                output_names=output_names,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        program.save(str(folder / name))
    return list(graphs)


def _quantize(file: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = file.with_name(f"int8_{file.name}")
    with _quiet():
        quantize_dynamic(
            file,
            small,
            op_types_to_quantize=list(QUANTIZED),
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=file.with_name(f"{file.name}.data").exists(),  # more than 2 GB
        )
    small.replace(file)


def _settings(model: ClocModel, processor: ClocProcessor, names: Sequence[str], int8: bool) -> dict[str, Any]:
    """What a program must know beside the graphs."""
    with torch.no_grad():
        scale = model.scale("region").item()
    return {
        "opset": OPSET,
        "precision": "int8" if int8 else "fp32",
        "graphs": list(names),
        "features": _feature_names(model),
        "prompter": model.config.prompter,
        "image_size": processor.image_size,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        "grid": list(model.grid),
        "embed_dim": model.embed_dim,
        "max_text_length": processor.max_text_length,
        "pad_to_max_length": processor.pad_to_max_length,
        "pad_id": processor.tokenizer.pad_token_id,
        "region_scale": scale,
        "windows": WINDOWS,
        "everyday_names": EVERYDAY.split(", "),
    }


def _features(model: ClocModel, tokens: Tensor, pool_input: Tensor | None) -> ImageFeatures:
    embedding = tokens.new_zeros(tokens.shape[0], model.embed_dim)  # prompts do not read it
    return ImageFeatures(embedding=embedding, tokens=tokens, grid=model.grid, pool_input=pool_input)


def _feature_names(model: ClocModel) -> list[str]:
    return ["tokens", "pool_input"] if model.prompter.reads_pool_input else ["tokens"]


def _listed(features: ImageFeatures) -> list[Tensor]:
    return [x for x in (features.tokens, features.pool_input) if x is not None]


@contextlib.contextmanager
def _exporting(model: ClocModel) -> Iterator[None]:
    """Makes the towers traceable for any batch, and keeps the exporter from printing."""
    vision = model.clip.vision_model.embeddings
    if is_siglip2 := model.clip.config.model_type == "siglip2":
        # transformers resizes the positions image by image; on our square grid there is nothing to resize
        vision.resize_positional_embeddings = lambda table, shapes, max_length: table.flatten(0, 1).expand(
            shapes.shape[0], max_length, -1
        )
    try:
        with _quiet():
            yield
    finally:
        if is_siglip2:
            del vision.resize_positional_embeddings


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's and the quantiser's notes about themselves from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _check_installed(int8: bool) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401

        if int8:
            import onnxruntime.quantization  # noqa: F401
    except ImportError as error:
        raise ValueError(f"export to ONNX needs the extra `onnx`: pip install 'opencloc[onnx]' ({error})") from error


def _readme(model: ClocModel, names: Sequence[str], int8: bool) -> str:
    graphs = {
        "image_encoder.onnx": "once per image: its embedding, and the features that the others take",
        "text_encoder.onnx": "embeddings of texts",
        "prompter.onnx": "embeddings of boxes and points, (x, y, x, y), in [0, 1] of the letterboxed square",
        "box_head.onnx": "the box of a text",
    }
    rows = "\n".join(f"| `{name}` | {graphs[name]} |" for name in names)
    finds = 'boxes_px, scores = model.ground(image, ["a dog"])' if "box_head.onnx" in names else ""
    weights = "int8 (dynamic quantisation)" if int8 else "float32"
    return f"""---
tags:
- {MARK}
- onnx
---

# A CLOC model for ONNX

Written by `opencloc export --format onnx`: opset {OPSET}, {weights}, Prompter `{model.config.prompter}`.

| file | what |
|---|---|
{rows}
| `tokenizer.json` | of the library tokenizers; brings texts to the form of training by itself |
| `opencloc_onnx.json` | sizes, pixel mean and deviation, scale |
| `opencloc_onnx.py` | how they are used; needs onnxruntime, numpy, tokenizers, Pillow |

```python
from opencloc_onnx import Model

model = Model(".")
image = model.encode("photo.jpg")
names, probabilities = model.classify(image, [[10, 20, 200, 180]], ["dog", "cat"])
{finds}
```
"""
