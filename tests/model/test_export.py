"""Exports: plain transformers checkpoints that give what the CLOC model gives, from photos of any shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

from opencloc.cli import main
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.export import PAD_RGB, export_clip
from opencloc.model.processor import ClocProcessor
from opencloc.model.towers import vision_forward

TEXTS = ["a red dog", "  Two\n blue  CATS "]
Pair = tuple[ClocModel, ClocProcessor]


@pytest.fixture
def make(tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Pair]:
    def make(family: str) -> Pair:
        torch.manual_seed(0)
        config = tower_config(family)
        return ClocModel(ClocConfig(clip_config=config)).eval(), ClocProcessor.for_towers(config, tokenizer)

    return make


def photo(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_the_towers_alone_give_the_embeddings_of_the_whole_model(
    make: Callable[[str], Pair], tmp_path: Path, family: str
) -> None:
    model, processor = make(family)
    folder = export_clip(model, processor, tmp_path / "export")
    towers = AutoModel.from_pretrained(folder).eval()
    assert type(towers) is type(model.clip)
    pixels, ids = processor.letterbox([photo(32, 32)])[0], processor.tokenize(TEXTS)
    with torch.no_grad():
        image = normalize(vision_forward(towers, pixels)[0], dim=-1)
        torch.testing.assert_close(image, model.encode_image(pixels).embedding)
        text = normalize(towers.get_text_features(input_ids=ids).pooler_output, dim=-1)
        torch.testing.assert_close(text, model.encode_text(ids))


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("size", [(90, 30), (30, 77), (40, 40)])
def test_the_folders_own_processor_makes_the_square_that_training_saw(
    make: Callable[[str], Pair], tmp_path: Path, family: str, size: tuple[int, int]
) -> None:
    model, processor = make(family)
    folder = export_clip(model, processor, tmp_path / "export")
    own = AutoImageProcessor.from_pretrained(folder, backend="pil")
    theirs = own(images=photo(*size), return_tensors="pt")["pixel_values"]
    ours = processor.letterbox([photo(*size)])[0]
    bars = (ours - processor.letterbox([Image.new("RGB", (1, 1), PAD_RGB)])[0]).abs().amax(1, keepdim=True) < 1e-6
    assert (theirs - ours).abs().amax(1, keepdim=True)[bars].le(1e-5).all()
    assert (theirs - ours).abs().mean() < 0.06  # the photo lies up to half a pixel elsewhere, much at this size


def test_the_exports_of_real_photos_embed_as_they_do_here(
    photos: Path, make: Callable[[str], Pair], tmp_path: Path
) -> None:
    model, processor = make("clip")
    folder = export_clip(model, processor, tmp_path / "export")
    own, towers = AutoImageProcessor.from_pretrained(folder, backend="pil"), AutoModel.from_pretrained(folder).eval()
    images = [Image.open(path).convert("RGB") for path in sorted(photos.glob("coco740/**/*.jpg"))[:20]]
    with torch.no_grad():
        ours = model.encode_image(processor.letterbox(images)[0]).embedding
        pixels = own(images=images, return_tensors="pt")["pixel_values"]
        theirs = normalize(towers.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    assert (ours * theirs).sum(-1).min() > 0.99


@pytest.mark.parametrize("square", [2, 4, 5])
def test_a_siglip2_export_names_its_patches(
    tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, square: int
) -> None:
    config = tower_config("siglip2")
    config.vision_config.num_patches = square**2
    model, processor = ClocModel(ClocConfig(clip_config=config)).eval(), ClocProcessor.for_towers(config, tokenizer)
    folder = export_clip(model, processor, tmp_path / "export")
    inputs = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=photo(64, 64), return_tensors="pt")
    assert inputs["spatial_shapes"].tolist() == [[square, square]]
    towers: Any = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = normalize(towers.get_image_features(**inputs).pooler_output, dim=-1)
        ours = model.encode_image(processor.letterbox([photo(64, 64)])[0]).embedding
    assert (theirs * ours).sum() > 0.99


def test_the_exported_tokenizer_reads_texts_as_training_did(make: Callable[[str], Pair], tmp_path: Path) -> None:
    for family, load in (("clip", AutoTokenizer), ("siglip", AutoTokenizer), ("siglip2", PreTrainedTokenizerFast)):
        model, processor = make(family)
        folder = export_clip(model, processor, tmp_path / family)
        padding = {"padding": "max_length", "max_length": 16} if processor.pad_to_max_length else {"padding": True}
        ids = load.from_pretrained(folder)(TEXTS, return_tensors="pt", **padding)["input_ids"]
        assert torch.equal(ids, processor.tokenize(TEXTS))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # the name that transformers 4 knows too


@pytest.mark.filterwarnings("ignore")  # transformers reports the tower that each class leaves out
def test_an_export_loads_as_the_classes_that_others_use(make: Callable[[str], Pair], tmp_path: Path) -> None:
    model, processor = make("clip")
    folder = export_clip(model, processor, tmp_path / "export")
    inputs = AutoProcessor.from_pretrained(folder, backend="pil")(
        text=["a red dog"], images=photo(32, 32), return_tensors="pt"
    )
    with torch.no_grad():
        features = model.encode_image(inputs["pixel_values"])
        vision: Any = CLIPVisionModel.from_pretrained(folder).eval()
        tokens = vision(pixel_values=inputs["pixel_values"]).last_hidden_state[:, 1:]
        torch.testing.assert_close(tokens, features.tokens)
        image: Any = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
        embedding = normalize(image(pixel_values=inputs["pixel_values"]).image_embeds, dim=-1)
        torch.testing.assert_close(embedding, features.embedding)
        text: Any = CLIPTextModelWithProjection.from_pretrained(folder).eval()
        embedding = normalize(text(input_ids=inputs["input_ids"]).text_embeds, dim=-1)
        torch.testing.assert_close(embedding, model.encode_text(inputs["input_ids"]))
    assert CLIPImageProcessorPil.from_pretrained(folder).crop_size["height"] == 32
    llava = json.loads((folder / "preprocessor_config.json").read_text())  # what LLaVA reads, and what of it
    assert (llava["crop_size"]["height"], llava["size"]["shortest_edge"]) == (32, 32)


@pytest.fixture
def checkpoint(make: Callable[[str], Pair], tmp_path: Path) -> Path:
    for part in make("clip"):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_export_replaces_its_own_folder_and_nothing_else(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(out: Path) -> int:
        return main(["export", "--model", str(checkpoint), "--out", str(out)])

    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    assert export(tmp_path / "new" / "export") == 0
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "new" / "export")
    assert export(tmp_path / "new" / "export") == 0
    for refused in (checkpoint, checkpoint / "export", tmp_path, tmp_path / "other"):
        assert export(refused) == 1
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    assert export(tmp_path / "other" / "thesis.txt") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "new", "other"]  # nothing half written


def test_the_readme_says_what_to_set(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["export", "--model", str(checkpoint), "--out", str(tmp_path / "export")]) == 0
    readme = (tmp_path / "export" / "README.md").read_text()
    for words in ("image_aspect_ratio pad", "Ferret", "32 x 32"):
        assert words in readme


def test_an_export_loaded_as_a_clip_sees_the_pixels_of_training(make: Callable[[str], Pair], tmp_path: Path) -> None:
    for family in ("clip", "siglip", "siglip2"):
        model, processor = make(family)
        again = ClocProcessor.from_clip(export_clip(model, processor, tmp_path / family))
        expected = processor.letterbox([photo(90, 30)])[0]
        torch.testing.assert_close(again.letterbox([photo(90, 30)])[0], expected, atol=1e-5, rtol=1e-5)
