"""ONNX exports give what the model gives, in a program that has no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import config as jaxtyping_config
from PIL import Image
from transformers import AutoModel, PreTrainedTokenizerFast

from opencloc.cli import main
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.onnx import export_onnx
from opencloc.model.opencloc_onnx import Model
from opencloc.model.predictor import Predictor
from opencloc.model.processor import ClocProcessor
from opencloc.model.prompter import PROMPTERS

pytest.importorskip("onnxscript", reason="the extra onnx is not installed")

FAMILIES = ("clip", "siglip", "siglip2")
QUICK = (("clip", "cross"), ("siglip", "pool_cross"), ("siglip2", "roi"))
BOXES = [[3, 4, 20, 30], [0, 0, 70, 40], [10.5, 1, 11.5, 39]]
POINTS = [[5, 5], [70, 40], [0, 0]]
TEXTS = [
    "a red dog",
    "  Two\n blue  CATS ",
    "a photo of a pizza in the snow and two trains and a cat and a dog and more",
]


@pytest.fixture(autouse=True)
def shapes_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checking shapes while a graph is traced would fix the sizes that are to stay open."""
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)


def photo(width: int = 70, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def make(tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast) -> Callable[..., Predictor]:
    def make(family: str, prompter: Any, **options: Any) -> Predictor:
        torch.manual_seed(0)
        config = tower_config(family)
        model = ClocModel(ClocConfig(clip_config=config, prompter=prompter, **options))
        with torch.no_grad():
            for part in (model.prompter, model.prompt_encoder, model.box_head):
                for weights in [] if part is None else part.parameters():
                    weights.add_(0.1 * torch.randn_like(weights))  # nothing stays at its simple start
        return Predictor(model, ClocProcessor.for_towers(config, tokenizer))

    return make


def check_equal(predictor: Predictor, folder: Path) -> None:
    """Everything that both can do, on photos of several shapes."""
    model = Model(folder, threads=1)
    texts = predictor.embed_texts(TEXTS)
    for size in ((70, 40), (40, 70), (64, 64)):
        theirs, ours = model.encode(photo(*size)), predictor.encode(photo(*size))
        np.testing.assert_allclose(theirs.embedding, ours.features.embedding[0], atol=1e-4)
        boxes = np.minimum(BOXES, [*size, *size])
        points = np.minimum(POINTS, size)
        found = model.embed(theirs, boxes, points)
        np.testing.assert_allclose(found, predictor.embed(ours, boxes_px=boxes, points_px=points), atol=1e-4)
        names, probabilities = model.classify(theirs, boxes, TEXTS)
        expected_names, expected = predictor.classify(ours, boxes, TEXTS)
        assert names == expected_names
        np.testing.assert_allclose(probabilities, expected, atol=1e-3)
        if predictor.model.prompter.has_patch_embeddings:
            np.testing.assert_allclose(model.heatmap(theirs, TEXTS), predictor.heatmap(ours, TEXTS), atol=1e-4)
        if predictor.model.box_head is not None:
            boxes_px, scores = model.ground(theirs, TEXTS)
            expected_px, expected_scores = predictor.ground(ours, TEXTS)
            np.testing.assert_allclose(boxes_px, expected_px, atol=1e-2)
            np.testing.assert_allclose(scores, expected_scores, atol=1e-3)
    np.testing.assert_allclose(model.embed_texts(TEXTS), texts, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "prompter"),
    [
        pytest.param(family, prompter, marks=[] if (family, prompter) in QUICK else pytest.mark.slow)
        for family in FAMILIES
        for prompter in PROMPTERS
    ],
)
def test_an_export_gives_what_torch_gives(
    make: Callable[..., Predictor], tmp_path: Path, family: str, prompter: str
) -> None:
    predictor = make(family, prompter)
    folder = export_onnx(predictor.model, predictor.processor, tmp_path / "export")
    assert (folder / "box_head.onnx").exists() == (predictor.model.box_head is not None)
    check_equal(predictor, folder)


@pytest.mark.slow
def test_the_published_box_head_is_exported_too(make: Callable[..., Predictor], tmp_path: Path) -> None:
    predictor = make("clip", "cross", box_head="mlp")
    check_equal(predictor, export_onnx(predictor.model, predictor.processor, tmp_path / "export"))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model by the command line."""
    folder = tmp_path_factory.mktemp("onnx") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping_config, "jaxtyping_disable", True)
        assert main(["export", "--model", "tiny", "--format", "onnx", "--out", str(folder)]) == 0
    return folder


def test_the_graphs_take_batches(export: Path) -> None:
    model = Model(export, threads=1)
    pixels = np.random.default_rng(0).normal(size=(3, 3, 64, 64)).astype(np.float32)
    together = model._run("image_encoder", pixel_values=pixels)
    alone = model._run("image_encoder", pixel_values=pixels[1:2])
    for name, value in together.items():
        np.testing.assert_allclose(value[1:2], alone[name], atol=1e-4)
    prompts = np.tile(np.array([0.1, 0.2, 0.5, 0.6], np.float32), (3, 5, 1))
    regions = model._run("prompter", tokens=together["tokens"], prompts=prompts)["region_embedding"]
    one = model._run("prompter", tokens=alone["tokens"], prompts=prompts[:1, :1])["region_embedding"]
    np.testing.assert_allclose(regions[1:2, :1], one, atol=1e-4)


def test_the_copied_example_runs_where_importing_torch_fails(export: Path, tmp_path: Path) -> None:
    photo(200, 120).save(tmp_path / "photo.png")
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'opencloc', 'onnx'): sys.modules[name] = None\n"  # importing raises
        f"sys.path.insert(0, {str(export)!r}); sys.argv[1:] = {[str(export), str(tmp_path / 'photo.png')]!r} + "
        "['--names', 'pizza', 'hammer', '--box', '10', '20', '100', '110']\n"
        "import runpy; runpy.run_path(sys.path[0] + '/opencloc_onnx.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    named, *found = done.stdout.splitlines()
    assert named.startswith("[10, 20, 100, 110] is ")
    assert [line.split(" at ")[0] for line in found] == ["pizza", "hammer"]


def test_the_example_opens_images_as_the_package_does(tmp_path: Path) -> None:
    from opencloc.images import letterbox_array, open_image
    from opencloc.model.opencloc_onnx import letterbox, upright_rgb

    turned = Image.Exif()
    turned[0x0112] = 6
    photo(40, 20).save(tmp_path / "turned.jpg", exif=turned)
    photo(33, 70).convert("L").save(tmp_path / "gray.png")
    Image.new("RGBA", (9, 5), (255, 0, 0, 40)).save(tmp_path / "clear.png")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(tmp_path / "deep.png")
    photo(50, 31).quantize(8).save(tmp_path / "palette.gif")
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(np.asarray(upright_rgb(path)), np.asarray(open_image(path)), path.name)
        np.testing.assert_array_equal(letterbox(upright_rgb(path), 24), letterbox_array(open_image(path), 24))


def test_nothing_in_and_nonsense_in(export: Path, tmp_path: Path) -> None:
    model = Model(export, threads=1)
    image = model.encode(photo())
    assert model.embed(image).shape == (0, 128)
    assert model.embed_texts([]).shape == (0, 128)
    assert [part.shape for part in model.ground(image, [])] == [(0, 4), (0,)]
    assert model.classify(image, [], ["dog"])[1].shape == (0, 1)
    assert model.heatmap(image, []).shape[0] == 0
    for bad in ([[5, 5, 5, 9]], [[0, 0, 80, 20]], [[0, 0, float("nan"), 2]], [[1, 2, 3]], [[0, 0, 0.5, 0.5]]):
        with pytest.raises(ValueError, match=r"box|rows"):
            model.embed(image, bad)
    with pytest.raises(ValueError, match="point"):
        model.embed(image, points_px=[[-1, 5]])
    with pytest.raises(ValueError, match="empty"):
        model.embed_texts([" "])
    with pytest.raises(FileNotFoundError, match="holds no export"):
        Model(tmp_path)


def test_int8_is_smaller_and_near(export: Path, tmp_path: Path) -> None:
    assert main(["export", "--model", "tiny", "--format", "onnx", "--int8", "--out", str(tmp_path / "int8")]) == 0
    size = {
        folder: sum(file.stat().st_size for file in folder.glob("*.onnx")) for folder in (export, tmp_path / "int8")
    }
    assert size[tmp_path / "int8"] < 0.6 * size[export]
    full, small = Model(export, threads=1), Model(tmp_path / "int8", threads=1)
    cosines = (full.embed(full.encode(photo()), BOXES) * small.embed(small.encode(photo()), BOXES)).sum(-1)
    assert cosines.min() > 0.9
    assert small.settings["precision"] == "int8"


@pytest.mark.slow
def test_a_clip_without_prompter_is_exported_with_its_own_pooling(
    tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    AutoModel.from_config(tower_config("clip")).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    assert main(["export", "--model", str(tmp_path / "clip"), "--format", "onnx", "--out", str(tmp_path / "out")]) == 0
    check_equal(Predictor.from_pretrained(tmp_path / "clip"), tmp_path / "out")
    with pytest.raises(ValueError, match="pool"):
        Model(tmp_path / "out").ground(Model(tmp_path / "out").encode(photo()), ["a dog"])


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    make: Callable[..., Predictor], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert main(["export", "--model", "tiny", "--format", "onnx", "--out", str(tmp_path / "mine")]) == 1
    assert "not replaced" in capsys.readouterr().err
    assert main(["export", "--model", "tiny", "--int8", "--out", str(tmp_path / "new")]) == 1
    assert "--format onnx" in capsys.readouterr().err
    untrained = make("clip", "cross", regions_trained=False)
    with pytest.raises(ValueError, match="never trained"):
        export_onnx(untrained.model, untrained.processor, tmp_path / "new")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", "--model", "tiny", "--format", "onnx", "--out", str(tmp_path / "new")]) == 1
    assert "opencloc[onnx]" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_example_in_the_repository_is_the_one_that_is_exported(export: Path) -> None:
    root = Path(__file__).parents[2]
    assert (root / "examples" / "opencloc_onnx.py").read_bytes() == (export / "opencloc_onnx.py").read_bytes()
    settings = json.loads((export / "opencloc_onnx.json").read_text())
    assert settings["opset"] == 18
