"""Encoders: boxes reach the place they name, whatever the shape of the image, and every kind of checkpoint loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, CLIPImageProcessor

from opencloc.eval.encoders import (
    ENCODERS,
    ClocEncoder,
    CropEncoder,
    Encoder,
    MaskClipEncoder,
    RoiEncoder,
    centre_square,
    coverage,
    load_encoder,
    natural_way,
)
from opencloc.images import crop
from opencloc.model import towers
from opencloc.model.cloc import ClocConfig, ClocModel, ImageFeatures
from opencloc.model.processor import ClocProcessor

SIZES = [(60, 60), (90, 40), (31, 77)]  # width, height: square, wide, tall
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


@pytest.fixture(scope="module")
def cloc(tower_config: Callable[[str], Any], tokenizer: Any) -> tuple[ClocModel, ClocProcessor]:
    torch.manual_seed(0)
    clip = tower_config("clip")
    return ClocModel(ClocConfig(clip_config=clip)).eval(), ClocProcessor.for_towers(clip, tokenizer)


@pytest.fixture
def checkpoint(tower_config: Callable[[str], Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Path]:
    """Family -> folder with a random checkpoint of it as plain transformers files."""

    def save(family: str, dtype: torch.dtype = torch.float32) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / f"my {family}"
        AutoModel.from_config(tower_config(family)).to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        CLIPImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        return folder

    return save


def picture(size: tuple[int, int], boxes_px: Sequence[tuple[int, int, int, int]]) -> tuple[Image.Image, np.ndarray]:
    """A black image with one box in each colour, and the boxes normalised."""
    image = Image.new("RGB", size)
    for box, colour in zip(boxes_px, COLOURS, strict=False):
        x0, y0, x1, y1 = box
        ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), fill=colour)
    return image, (np.array(boxes_px) / np.array([*size, *size])).astype(np.float32).reshape(-1, 4)


def boxes_in(size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Three separate boxes: near the left edge, in the middle of the top, in the lower right corner."""
    w, h = size
    return [(1, h // 3, w // 3, h - 2), (w // 2, 0, w // 2 + w // 4, h // 3), (3 * w // 4, h // 2, w, h)]


# -- boxes in the frame of the square ----------------------------------------------------------------------------------


class ColourOracle(ClocModel):
    """Stands for a `ClocModel`: sees the pixels of the square, and answers with colours and their places.

    A region is the mean colour of its pixels; a text embedding is a colour and is grounded where that colour is.
    """

    has_text_prompts = True  # pyright: ignore[reportAssignmentType]
    clip, config = None, ClocConfig()

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        colour = F.normalize(pixels.flatten(2).mean(2), dim=-1)
        grid = (pixels.shape[2], pixels.shape[3])
        tokens = pixels.flatten(2).transpose(1, 2)
        return ImageFeatures(embedding=colour, tokens=tokens, grid=grid, pool_input=tokens)

    def dense_embedding(self, features: ImageFeatures) -> Tensor:
        return features.tokens

    def encode_regions(self, features: ImageFeatures, prompts: Any) -> Any:
        side = features.grid[0]
        regions = []
        for pixels, rows in zip(features.tokens.unflatten(1, features.grid), prompts, strict=True):
            if isinstance(rows, list):
                masks = [F.interpolate(one.mask[None, None].float(), features.grid)[0, 0, :, :, None] for one in rows]
                regions.append(torch.stack([(pixels * mask).sum((0, 1)) for mask in masks]))
                continue
            inner = (rows * side + torch.tensor([1.0, 1.0, -1.0, -1.0])).round().int().tolist()  # away from the edges
            regions.append(torch.stack([pixels[y0:y1, x0:x1].mean((0, 1)) for x0, y0, x1, y1 in inner]))
        return [F.normalize(r, dim=-1) for r in regions]

    def ground(self, features: ImageFeatures, texts: Tensor) -> Tensor:
        side = features.grid[0]
        found = torch.zeros(*texts.shape[:2], 4)
        for i, j in np.ndindex(*texts.shape[:2]):
            alike = (features.tokens[i] @ texts[i, j]).unflatten(0, features.grid) > 0.5
            y, x = torch.nonzero(alike, as_tuple=True)
            if len(x):
                found[i, j] = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]) / side
        return found


@pytest.fixture
def oracle(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ClocProcessor]:
    monkeypatch.setattr(towers, "patch_embeddings", lambda _clip, tokens: tokens)
    # Pixels stay in [0, 1].
    return ColourOracle(), ClocProcessor(tokenizer, image_size=240, image_mean=(0, 0, 0), image_std=(1, 1, 1))


@pytest.mark.parametrize("way", [ClocEncoder, CropEncoder, RoiEncoder, MaskClipEncoder])
def test_a_box_reaches_its_pixels_whatever_the_shape_of_the_image(way: type, oracle: tuple[Any, ClocProcessor]) -> None:
    encoder: Encoder = way(*oracle, name="oracle")
    images, boxes = zip(*(picture(size, boxes_in(size)) for size in SIZES), strict=True)
    for regions in encoder.encode_regions(encoder.encode_images(images), boxes):
        assert regions.argmax(1).tolist() == [0, 1, 2]
        if way is not CropEncoder:  # the bars of a crop are part of what is seen
            torch.testing.assert_close(regions, torch.eye(3), atol=0.02, rtol=0)


def test_a_grounded_box_comes_back_in_the_frame_of_the_image(oracle: tuple[Any, ClocProcessor]) -> None:
    encoder = ClocEncoder(*oracle, name="oracle")
    images, boxes = zip(*(picture(size, boxes_in(size)) for size in SIZES), strict=True)
    colours = torch.eye(3)
    asked = [colours, colours[[2, 0]], colours[:0]]
    found = encoder.ground(encoder.encode_images(images), asked)
    assert found is not None
    pixel = 1 / 40  # the short side of the narrowest image has about 31 / 77 * 240 pixels of the square
    torch.testing.assert_close(found[0], torch.from_numpy(boxes[0]), atol=pixel, rtol=0)
    torch.testing.assert_close(found[1], torch.from_numpy(boxes[1][[2, 0]]), atol=pixel, rtol=0)
    assert found[2].shape == (0, 4)


@pytest.mark.parametrize("view", ["letterbox", "squash"])
@pytest.mark.parametrize("way", [ClocEncoder, MaskClipEncoder])
def test_a_mask_reaches_its_pixels_whatever_the_shape_of_the_image(
    way: type, view: str, oracle: tuple[Any, ClocProcessor]
) -> None:
    encoder: Encoder = way(*oracle, name="oracle", view=view)
    images, _ = zip(*(picture(size, boxes_in(size)) for size in SIZES), strict=True)
    masks = [[np.asarray(image)[:, :, i] > 0 for i in range(3)] for image in images]
    found = encoder.encode_masks(encoder.encode_images(images), masks)
    assert found is not None
    for regions in found:
        torch.testing.assert_close(F.normalize(regions, dim=1), torch.eye(3), atol=0.05, rtol=0)


@pytest.mark.parametrize("way", [ClocEncoder, RoiEncoder, MaskClipEncoder])
def test_a_box_reaches_its_pixels_in_a_squashed_image(way: type, oracle: tuple[Any, ClocProcessor]) -> None:
    encoder: Encoder = way(*oracle, name="oracle", view="squash")
    images, boxes = zip(*(picture(size, boxes_in(size)) for size in SIZES), strict=True)
    for regions in encoder.encode_regions(encoder.encode_images(images), boxes):
        torch.testing.assert_close(regions, torch.eye(3), atol=0.02, rtol=0)


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (64, 64), (33, 31), (8, 500)])
def test_the_centre_square_is_clips_own_preprocessing(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(256, size=(size[1], size[0], 3), dtype=np.uint8))
    clip: Any = CLIPImageProcessor(do_normalize=False, do_rescale=False, size={"shortest_edge": 32}, crop_size=32)
    want = np.asarray(clip(image)["pixel_values"][0]).transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(centre_square(image, 32)), want)


# -- crops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0.0, 0.0, 1.0, 1.0), (100, 40)),
        ((0.25, 0.5, 0.75, 1.0), (50, 20)),  # 100 x 40 pixels
        ((0.104, 0.0, 0.296, 0.5), (20, 20)),  # 10.4 to 29.6 pixels: nearest whole pixels 10 to 30
        ((0.501, 0.501, 0.502, 0.502), (1, 1)),  # less than a pixel
        ((0.9999, 0.9999, 1.0, 1.0), (1, 1)),  # less than a pixel, at the corner
        ((0.0, 0.0, 1.0001, 1.0001), (100, 40)),  # a hair outside, as a sample may be
    ],
)
def test_a_crop_has_whole_pixels_and_at_least_one(box: tuple[float, ...], size: tuple[int, int]) -> None:
    assert crop(Image.new("RGB", (100, 40)), np.array(box, dtype=np.float32)).size == size


def test_a_region_by_crop_is_the_embedding_of_the_crop_as_an_image(cloc: tuple[ClocModel, ClocProcessor]) -> None:
    encoder = CropEncoder(*cloc, name="crop")
    image, boxes = picture((90, 40), [(3, 4, 80, 11), (50, 2, 60, 39)])  # far from square
    with torch.inference_mode():
        regions = encoder.encode_regions(encoder.encode_images([image]), [boxes])[0]
        alone = encoder.encode_images([image.crop((3, 4, 80, 11)), image.crop((50, 2, 60, 39))]).embedding
    torch.testing.assert_close(regions, alone)


# -- real models -------------------------------------------------------------------------------------------------------


def test_every_way_gives_unit_embeddings_that_do_not_depend_on_the_batch(
    cloc: tuple[ClocModel, ClocProcessor], tmp_path: Path
) -> None:
    for part in cloc:
        part.save_pretrained(tmp_path)
    images, boxes = zip(*(picture(size, boxes_in(size)[: i + 1]) for i, size in enumerate(SIZES)), strict=True)
    boxes = [*boxes[:2], np.zeros((0, 4), dtype=np.float32)]
    masks = [[np.eye(*image.size[::-1]) > 0] * len(rows) for image, rows in zip(images, boxes, strict=True)]
    for way, kind in ENCODERS.items():
        encoder = load_encoder(tmp_path, way)  # pyright: ignore[reportArgumentType]
        assert (type(encoder), encoder.name) == (kind, f"{tmp_path.name}, {way}")
        with torch.inference_mode():
            encoded = encoder.encode_images(images)
            alone = [encoder.encode_images([image]) for image in images]
            for encode, prompts in ((encoder.encode_regions, boxes), (encoder.encode_masks, masks)):
                together = encode(encoded, prompts)  # pyright: ignore[reportArgumentType]
                if together is None:
                    assert way in ("crop", "roi")
                    continue
                assert [tuple(r.shape) for r in together] == [(1, 24), (2, 24), (0, 24)]
                for one, rows, regions in zip(alone, prompts, together, strict=True):
                    (again,) = encode(one, [rows])  # pyright: ignore
                    torch.testing.assert_close(again, regions, atol=1e-5, rtol=1e-4)
                    torch.testing.assert_close(regions.norm(dim=1), torch.ones(len(rows)))
            texts = encoder.encode_texts(["a red dog", "cat"])
            torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
            found = encoder.ground(encoded, [texts, texts[:1], texts[:0]])
            if way == "prompter":  # what was saved is what is scored
                saved = ClocEncoder(*cloc, name="x").encode_regions(encoded, boxes)
                assert all(map(torch.equal, saved, encoder.encode_regions(encoded, boxes)))
        assert (found is None) == (way != "prompter")
        assert found is None or [tuple(f.shape) for f in found] == [(2, 4), (1, 4), (0, 4)]


def test_each_way_keeps_to_its_own_definition(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("clip")
    image, whole = picture((32, 32), [(0, 0, 32, 32)])
    crop_, maskclip, pool = (load_encoder(folder, way) for way in ("crop", "maskclip", "pool"))
    with torch.inference_mode():
        encoded = pool.encode_images([image])
        torch.testing.assert_close(pool.encode_regions(encoded, [whole])[0], encoded.embedding, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(crop_.encode_images([image]).embedding, encoded.embedding)
        patches = maskclip.encode_images([image]).state[0][0]  # 4 x 4 of 8 pixels
        _, boxes = picture((32, 32), [(8, 0, 16, 16), (4, 0, 8, 8), (0, 0, 12, 8)])
        found = maskclip.encode_regions(maskclip.encode_images([image]), [boxes])[0]
    want = torch.stack([patches[1] + patches[5], patches[0], 2 * patches[0] + patches[1]])
    torch.testing.assert_close(found, F.normalize(want, dim=1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_coverage_counts_pixels(grid: tuple[int, int]) -> None:
    rows, columns = grid
    boxes_px = [(3, 7, 41, 52), (0, 0, 60, 60), (59, 59, 60, 60)]  # of 60 x 60
    for box, share in zip(boxes_px, coverage(torch.tensor(boxes_px) / 60, grid), strict=True):
        pixels = torch.zeros(60, 60)
        pixels[box[1] : box[3], box[0] : box[2]] = 1
        counted = pixels.reshape(rows, 60 // rows, columns, 60 // columns).mean((1, 3)).flatten()
        torch.testing.assert_close(share, counted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"prompter": "roi"}, {"grounding_trained": False}])
def test_a_model_without_text_prompts_or_a_trained_box_head_cannot_ground(
    options: dict[str, Any], tower_config: Callable[[str], Any], tokenizer: Any
) -> None:
    clip = tower_config("clip")
    model = ClocModel(ClocConfig(clip_config=clip, **options)).eval()
    encoder = ClocEncoder(model, ClocProcessor.for_towers(clip, tokenizer), name="x")
    encoded = encoder.encode_images([Image.new("RGB", (8, 8))])
    assert encoder.ground(encoded, [encoder.encode_texts(["a dog"])]) is None


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_a_plain_checkpoint_gives_what_transformers_gives(family: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(family)
    plain: Any = AutoModel.from_pretrained(folder).eval()
    image, boxes = picture((40, 40), boxes_in((40, 40)))
    for regions in ("crop", "roi", "maskclip", "pool"):
        encoder = load_encoder(folder, regions, name="N")
        assert encoder.name == "N"
        with torch.inference_mode():
            encoded = encoder.encode_images([image])
            assert encoder.encode_regions(encoded, [boxes])[0].shape == (3, encoded.embedding.shape[1])
            if family != "siglip2":  # its own image processor makes patches; the model's tests compare those
                pixels, _ = ClocProcessor.from_clip(folder).letterbox([image])
                want = plain.get_image_features(pixel_values=pixels).pooler_output
                torch.testing.assert_close(encoded.embedding, F.normalize(want, dim=-1), atol=1e-5, rtol=1e-4)


def test_weights_in_half_precision_are_evaluated_in_single(checkpoint: Callable[..., Path]) -> None:
    encoder = load_encoder(checkpoint("clip", torch.float16), "crop")
    assert encoder.encode_images([Image.new("RGB", (8, 8))]).embedding.dtype == torch.float32


def test_a_plain_checkpoint_has_no_prompter(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(
        ValueError,
        match=r"my siglip holds a 'siglip' model, which has no Prompter: .* prompter, crop, roi, maskclip, pool",
    ):
        load_encoder(checkpoint("siglip"), "prompter")


def test_what_is_no_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder"):
        load_encoder(tmp_path / "nowhere", "crop")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"towers must be one of clip, siglip, siglip2; got a 'bert' config"):
        load_encoder(tmp_path, "crop")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # types are checked in tests only
    with pytest.raises(ValueError, match=r"regions is 'box', must be one of prompter, crop, roi, maskclip, pool"):
        load_encoder(tmp_path, "box")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"view='centre' hides .* regions must be 'crop', not 'roi'"):
        load_encoder(tmp_path, "roi", view="centre")


def test_a_prompter_that_was_never_trained_is_not_scored(cloc: tuple[ClocModel, ClocProcessor], tmp_path: Path) -> None:
    model, processor = cloc
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert natural_way(tmp_path) == "prompter"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"regions_trained": False}))
    assert natural_way(tmp_path) == "crop"
    assert load_encoder(tmp_path, "roi").name.endswith("roi")
    with pytest.raises(ValueError, match=r"its Prompter was never trained \(region weight 0\): choose another way"):
        load_encoder(tmp_path, "prompter")


@pytest.mark.parametrize(
    ("remove", "message"),
    [("prompter", r"missing weights: prompter\."), ("clip.visual_projection", r"missing weights: clip\.visual")],
)
def test_weights_that_are_missing_are_never_drawn_at_random(
    remove: str, message: str, cloc: tuple[ClocModel, ClocProcessor], tmp_path: Path
) -> None:
    model, processor = cloc
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith(remove)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_encoder(tmp_path, "crop")
