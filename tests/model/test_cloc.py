"""The model: families of towers, checkpoints, exports, prompts of all kinds."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    Siglip2ImageProcessorPil,
)

from opencloc.config import LossConfig, ModelConfig
from opencloc.loss import cloc_loss
from opencloc.model.cloc import ClocConfig, ClocModel, ImageFeatures
from opencloc.model.packing import pack
from opencloc.model.prompter import PROMPTERS, CrossPrompter, PoolCrossPrompter
from opencloc.model.prompts import Box, Mask, Point, Text
from opencloc.model.towers import patchify, vision_forward

FAMILIES = ("clip", "siglip", "siglip2")
TEXT_PROMPTERS = [name for name, kind in PROMPTERS.items() if kind.has_text_prompts]
BOXES = torch.tensor([[[0.1, 0.2, 0.6, 0.9], [0.5, 0.0, 1.0, 0.4]], [[0.0, 0.0, 0.3, 0.3], [0.2, 0.2, 0.9, 0.5]]])

MakeModel = Callable[..., ClocModel]


@pytest.fixture
def make_model(tower_config: Callable[[str], Any]) -> MakeModel:
    def make(family: str = "clip", **options: Any) -> ClocModel:
        torch.manual_seed(0)
        return ClocModel(ClocConfig(clip_config=tower_config(family), **options)).eval()

    return make


def pixels(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def texts(model: ClocModel, count: int = 3) -> torch.Tensor:
    length = 16 if model.clip.config.model_type != "clip" else 5
    ids = torch.randint(3, 200, (count, length), generator=torch.Generator().manual_seed(2))
    ids[:, -1] = 1  # end of text
    return ids


@pytest.mark.parametrize("prompter", PROMPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_with_every_prompter(make_model: MakeModel, family: str, prompter: str) -> None:
    model = make_model(family, prompter=prompter).train()
    ids = texts(model)
    out = model(pixels(), ids[:2], BOXES, ids, torch.tensor([[0, 1], [2, 0]]))
    assert out.region is not None
    terms = [out.image @ out.caption.T, out.region.flatten(0, 1) @ out.region_text.flatten(0, 1).T]
    terms += [out.ground_boxes] if out.ground_boxes is not None else []
    torch.stack([term.square().sum() for term in terms]).sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    unused = {"prompt_encoder.point_kind", "clip.logit_scale", "clip.logit_bias", "region_logit_scale"}
    if not PROMPTERS[prompter].has_text_prompts:
        unused |= {name for name, _ in model.named_parameters() if name.startswith("prompt_encoder.corner")}
    assert idle <= unused
    for embedding in (out.image, out.caption, out.region, out.region_text):
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(embedding.shape[:-1]))


@pytest.mark.parametrize("prompter", PROMPTERS)
def test_saved_model_loads_equal(make_model: MakeModel, tmp_path: Path, prompter: str) -> None:
    model = make_model(prompter=prompter)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, ClocModel)
    assert loaded.config.prompter == prompter
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(model.encode_image(pixels()).embedding, loaded.encode_image(pixels()).embedding)


def test_patches_of_siglip2_are_those_of_its_image_processor() -> None:
    square = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    theirs = processor(images=Image.fromarray(square), return_tensors="pt")
    ours = patchify(torch.from_numpy(square).permute(2, 0, 1)[None].float() / 127.5 - 1, 8)
    torch.testing.assert_close(theirs["pixel_values"], ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prompter", PROMPTERS)
def test_prompts_do_not_see_each_other(make_model: MakeModel, prompter: str) -> None:
    model = make_model(prompter=prompter)
    features = model.encode_image(pixels())
    together = model.encode_regions(features, BOXES)
    for p in range(2):
        torch.testing.assert_close(model.encode_regions(features, BOXES[:, p : p + 1])[:, 0], together[:, p])
    ragged = model.encode_regions(features, [BOXES[0], BOXES[1, :1]])
    torch.testing.assert_close(ragged[0], together[0])
    torch.testing.assert_close(ragged[1], together[1, :1])


@pytest.mark.parametrize("prompter", TEXT_PROMPTERS)
def test_kinds_of_prompts_mix_and_padding_changes_nothing(make_model: MakeModel, prompter: str) -> None:
    model = make_model(prompter=prompter)
    features = model.encode_image(pixels())
    text = model.encode_text(texts(model))[0]
    kinds = [Box(0.1, 0.2, 0.6, 0.9), Point(0.3, 0.3), Mask(torch.eye(9)), Text(text), (Point(0.3, 0.3), Text(text))]
    mixed, nothing = model.encode_regions(features, [kinds, []])
    assert nothing.shape == (0, 24)
    for i, kind in enumerate(kinds):
        alone = model.encode_regions(features, [[kind], []])[0][0]
        torch.testing.assert_close(mixed[i], alone)
    torch.testing.assert_close(mixed[0], model.encode_regions(features, BOXES)[0, 0])
    assert torch.pdist(mixed).min() > 1e-4


@pytest.mark.parametrize("prompter", TEXT_PROMPTERS)
def test_distinct_texts_encoded_once_equal_the_plain_way(make_model: MakeModel, prompter: str) -> None:
    model = make_model(prompter=prompter)
    ids = texts(model)
    index = torch.tensor([[0, 1], [1, 0]])
    once = model(pixels(), ids[:2], BOXES, ids, index)
    plain = model(pixels(), ids[:2], BOXES, ids[index.flatten()], torch.arange(4).reshape(2, 2))
    for name in ("region", "region_text", "ground_boxes"):
        torch.testing.assert_close(getattr(once, name), getattr(plain, name))


def test_packed_texts_give_the_output_of_padded_ones(make_model: MakeModel) -> None:
    model = make_model()
    ids, index = texts(model), torch.tensor([[0, 1], [2, 0]])
    packed = [pack(rows.tolist(), max_length=16, pad_id=0) for rows in (ids[:2], ids)]
    plain, together = model(pixels(), ids[:2], BOXES, ids, index), model(pixels(), packed[0], BOXES, packed[1], index)
    for name, value in vars(plain).items():
        torch.testing.assert_close(getattr(together, name), value, msg=name)
    torch.testing.assert_close(model(pixels(), packed[0]).caption, plain.caption)


def test_training_forward_equals_encode_and_prompt(make_model: MakeModel) -> None:
    model = make_model()
    ids = texts(model)
    index = torch.tensor([[0, 1], [2, 0]])
    out = model(pixels(), ids[:2], BOXES, ids, index)
    features = model.encode_image(pixels())
    torch.testing.assert_close(out.region, model.encode_regions(features, BOXES))
    grounded = model.ground(features, model.encode_text(ids)[index])
    torch.testing.assert_close(out.ground_boxes.clamp(0, 1), grounded)


def training_output(model: ClocModel, image: torch.Tensor, kept: torch.Tensor | None) -> dict[str, torch.Tensor]:
    ids = texts(model)
    output = model(image, ids[:2], BOXES, ids, torch.tensor([[0, 1], [2, 0]]), kept)
    return {name: value for name, value in vars(output).items() if value is not None}


@pytest.mark.parametrize("prompter", [name for name, kind in PROMPTERS.items() if kind.allows_patch_dropout])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_patches_kept_in_any_order_change_nothing(make_model: MakeModel, family: str, prompter: str) -> None:
    model = make_model(family, prompter=prompter)
    generator = torch.Generator().manual_seed(4)
    kept = torch.stack([torch.randperm(model.grid[0] * model.grid[1], generator=generator) for _ in range(2)])
    expected = training_output(model, pixels(), None)
    for name, value in training_output(model, pixels(), kept).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("prompter", [name for name, kind in PROMPTERS.items() if kind.allows_patch_dropout])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_seen_of_the_patches_left_out(make_model: MakeModel, family: str, prompter: str) -> None:
    model = make_model(family, prompter=prompter)
    rows, columns = model.grid
    kept = torch.stack([torch.arange(0, rows * columns, 2), torch.arange(1, rows * columns, 2)])
    shown = torch.zeros(2, rows * columns).scatter_(1, kept, 1.0).reshape(2, 1, rows, columns)
    side = 32 // rows
    shown = shown.repeat_interleave(side, 2).repeat_interleave(side, 3)
    expected, other = training_output(model, pixels(), kept), training_output(model, pixels() * shown, kept)
    whole = training_output(model, pixels(), None)
    for name in {"image", "region", "ground_boxes"} & set(whole):
        torch.testing.assert_close(other[name], expected[name])
        assert not torch.allclose(whole[name], expected[name], atol=1e-4)


@pytest.mark.parametrize("prompter", [name for name, kind in PROMPTERS.items() if not kind.allows_patch_dropout])
def test_a_prompter_that_needs_all_patches_refuses_to_leave_some_out(make_model: MakeModel, prompter: str) -> None:
    with pytest.raises(ValueError, match=r"needs all patches: data\.patch_dropout must be 0"):
        training_output(make_model(prompter=prompter), pixels(), torch.zeros(2, 1, dtype=torch.long))


def test_padding_behind_a_text_changes_nothing(make_model: MakeModel) -> None:
    model = make_model()
    ids = texts(model)
    torch.testing.assert_close(model.encode_text(ids), model.encode_text(torch.nn.functional.pad(ids, (0, 7))))


def test_a_steep_prior_sees_nothing_outside_the_box(make_model: MakeModel) -> None:
    model = make_model(prior_slope=6.0)
    features = model.encode_image(pixels())
    box = torch.tensor([0.0, 0.0, 0.5, 0.5]).expand(2, 1, 4)
    tokens = features.tokens.clone().unflatten(1, (4, 4))
    tokens[:, 2:] = 0
    tokens[:, :, 2:] = 0
    cut = type(features)(embedding=features.embedding, tokens=tokens.flatten(1, 2), grid=features.grid)
    torch.testing.assert_close(model.encode_regions(features, box), model.encode_regions(cut, box), atol=1e-4, rtol=0)
    flat = make_model(prior_slope=None)
    assert (flat.encode_regions(features, box) - flat.encode_regions(cut, box)).abs().max() > 1e-2


@pytest.mark.parametrize("box_head", ["dense", "mlp"])
def test_grounded_boxes_are_ordered_and_inside(make_model: MakeModel, box_head: str) -> None:
    model = make_model(box_head=box_head)
    features = model.encode_image(10 * pixels())
    boxes = model.ground(features, torch.nn.functional.normalize(torch.randn(2, 5, 24), dim=-1))
    assert boxes.shape == (2, 5, 4)
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()
    assert (boxes[..., 2:] >= boxes[..., :2]).all()


@pytest.mark.parametrize("prompter", sorted(set(PROMPTERS) - set(TEXT_PROMPTERS)))
def test_a_prompter_without_text_prompts_says_which_have_them(make_model: MakeModel, prompter: str) -> None:
    model = make_model(prompter=prompter)
    features = model.encode_image(pixels())
    with pytest.raises(ValueError, match=r"no text prompts.*use prompter='cross' or 'encoder' or 'pool_cross'"):
        model.ground(features, torch.zeros(2, 1, 24))
    with pytest.raises(ValueError, match="no text prompts"):
        model.encode_regions(features, [[Text(torch.zeros(24))], []])


def test_pixel_boxes_and_wrong_counts_are_refused(make_model: MakeModel) -> None:
    model = make_model()
    features = model.encode_image(pixels())
    with pytest.raises(ValueError, match="not pixels"):
        model.encode_regions(features, 32 * BOXES)
    with pytest.raises(ValueError, match="2 images but prompts for 1"):
        model.encode_regions(features, BOXES[:1])


def test_vit_positions_start_from_the_basis_of_the_prompts(make_model: MakeModel) -> None:
    with_basis, without = make_model(), make_model(shared_positions=False)
    table = with_basis.clip.vision_model.embeddings.position_embedding.weight[1:]
    from opencloc.model.prompts import patch_centres

    basis = with_basis.prompt_encoder.basis(patch_centres((4, 4)))
    assert torch.corrcoef(torch.stack([table.flatten(), basis.flatten()]))[0, 1] > 0.999
    other = without.clip.vision_model.embeddings.position_embedding.weight[1:]
    assert torch.corrcoef(torch.stack([other.flatten(), basis.flatten()]))[0, 1].abs() < 0.2


def test_the_cross_prompter_starts_with_the_image_tokens_as_values(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    assert isinstance(model.prompter, CrossPrompter)
    x = torch.randn(3, model.prompter.value.in_features)
    assert torch.equal(model.prompter.out(model.prompter.value(x)), x)
    torch.nn.init.normal_(model.prompter.value.weight)
    model.save_pretrained(tmp_path)
    loaded = ClocModel.from_pretrained(tmp_path).prompter
    assert isinstance(loaded, CrossPrompter)
    assert torch.equal(loaded.value.weight, model.prompter.value.weight)  # a start only, not kept


# -- the list of Prompters -----------------------------------------------------------------------------------------


def test_configurations_offer_exactly_the_prompters_there_are() -> None:
    for config in (ClocConfig, ModelConfig):
        assert re.findall(r"""["'](\w+)["']""", str(config.__annotations__["prompter"])) == list(PROMPTERS)


@pytest.mark.parametrize("prompter", PROMPTERS)
def test_boxes_that_are_padding_may_hold_nan(make_model: MakeModel, prompter: str) -> None:
    model = make_model(prompter=prompter).train()
    ids, valid = texts(model), torch.tensor([[True, True], [True, False]])
    gradients = []
    for padding in (0.5, float("nan")):
        boxes = BOXES.clone()
        boxes[1, 1] = padding
        model.zero_grad()
        output = model(pixels(), ids[:2], boxes, ids, torch.tensor([[0, 1], [2, 0]]))
        cloc_loss(output, boxes, valid, torch.tensor([[0, 1], [2, 0]]), LossConfig()).total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def test_an_untrained_prompter_refuses_to_answer(make_model: MakeModel) -> None:
    model = make_model(regions_trained=False)
    features = model.encode_image(pixels())
    for ask in (lambda: model.encode_regions(features, BOXES), lambda: model.ground(features, torch.ones(2, 1, 24))):
        with pytest.raises(ValueError, match="never trained"):
            ask()


# -- pool ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pooling_over_the_whole_square_gives_the_image_embedding(
    make_model: MakeModel, family: str, attention: str
) -> None:
    model = make_model(family, prompter="pool")
    model.set_attn_implementation(attention)
    features = model.encode_image(pixels())
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 1, 4)
    torch.testing.assert_close(model.encode_regions(features, whole)[:, 0], features.embedding)
    torch.testing.assert_close(
        torch.stack(model.encode_regions(features, [[Mask(torch.ones(3, 5))], [Box(0.0, 0.0, 1.0, 1.0)]]))[:, 0],
        features.embedding,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pooled_region_reads_its_own_patches(make_model: MakeModel, family: str) -> None:
    model = make_model(family, prompter="pool", prior_slope=6.0)
    features = model.encode_image(pixels())
    assert features.pool_input is not None
    before = features.pool_input.shape[1] - 16
    other = features.pool_input.clone()
    other[:, before + 8 :] = torch.randn(8, 32)  # the lower half
    changed = replace(features, pool_input=other)

    def pooled(features: ImageFeatures, y0: float) -> torch.Tensor:
        return torch.cat(model.encode_regions(features, [[Box(0.0, y0, 1.0, y0 + 0.5)]] * 2))

    torch.testing.assert_close(pooled(features, 0.0), pooled(changed, 0.0))
    assert not torch.allclose(pooled(features, 0.5), pooled(changed, 0.5), atol=1e-2)


def test_the_pool_prompter_has_no_weights_and_keeps_the_scale_of_clip(make_model: MakeModel) -> None:
    model = make_model(prompter="pool")
    assert not model.prompter.state_dict()
    assert model.scale("region") == model.clip.logit_scale.exp()
    assert torch.equal(model.encode_image(pixels()).tokens, vision_forward(model.clip, pixels())[1])
    copied = copy.deepcopy(model)
    torch.nn.init.zeros_(copied.clip.visual_projection.weight)  # a copy pools with its own towers
    assert not copied.encode_regions(copied.encode_image(pixels()), BOXES).any()
    with pytest.raises(ValueError, match="needs a prior_slope"):
        make_model(prompter="pool", prior_slope=None)


@pytest.mark.parametrize("family", FAMILIES)
def test_pool_cross_starts_as_pool_and_can_learn(make_model: MakeModel, family: str) -> None:
    pool, both = (make_model(family, prompter=prompter) for prompter in ("pool", "pool_cross"))
    both.clip.load_state_dict(pool.clip.state_dict())
    features = [model.encode_image(pixels()) for model in (pool, both)]
    regions = [model.encode_regions(seen, BOXES) for model, seen in zip((pool, both), features, strict=True)]
    torch.testing.assert_close(*regions)
    texts = torch.nn.functional.normalize(torch.randn(2, 3, 24 if family == "clip" else 32), dim=-1)
    maps = [model.heatmap(seen, texts) for model, seen in zip((pool, both), features, strict=True)]
    torch.testing.assert_close(*maps)
    both.encode_regions(features[1], BOXES).square().sum().backward()
    assert isinstance(both.prompter, PoolCrossPrompter)
    assert both.prompter.cross.projection.weight.grad is not None


def test_pool_cross_of_a_checkpoint_answers_at_once_with_the_scale_of_clip(
    make_model: MakeModel, tmp_path: Path
) -> None:
    clip = make_model().clip
    clip.logit_scale.data.fill_(3.0)
    clip.save_pretrained(tmp_path)
    model = ClocModel.from_clip(tmp_path, prompter="pool_cross").eval()
    torch.testing.assert_close(model.scale("region"), model.scale("image"))
    features = model.encode_image(pixels())
    assert model.encode_regions(features, BOXES).shape == (2, 2, 24)
    with pytest.raises(ValueError, match="box head was never trained"):
        model.ground(features, torch.randn(2, 1, 24))


@pytest.mark.parametrize("prompter", [name for name, kind in PROMPTERS.items() if kind.has_patch_embeddings])
def test_a_heat_map_is_highest_where_the_patch_is_the_text(make_model: MakeModel, prompter: str) -> None:
    model = make_model(prompter=prompter)
    features = model.encode_image(pixels())
    patches = model.prompter.patch_embeddings(features.tokens, features.pool_input)
    heat = model.heatmap(features, patches[:, [5, 11]])
    assert heat.shape == (2, 2, 16)
    assert heat.argmax(-1).tolist() == [[5, 11]] * 2
    torch.testing.assert_close(heat.amax(-1), torch.ones(2, 2))


def test_a_prompter_without_patch_embeddings_has_no_heat_maps(make_model: MakeModel) -> None:
    model = make_model(prompter="encoder")
    with pytest.raises(ValueError, match="the encoder Prompter has no heat maps"):
        model.heatmap(model.encode_image(pixels()), torch.zeros(2, 1, 24))


@pytest.mark.parametrize("prompter", PROMPTERS)
def test_towers_that_are_given_keep_every_weight(make_model: MakeModel, prompter: str) -> None:
    trained = make_model().clip
    torch.nn.init.normal_(trained.vision_model.embeddings.position_embedding.weight)
    before = copy.deepcopy(trained.state_dict())
    model = ClocModel(ClocConfig(clip_config=trained.config, prompter=prompter), towers_model=trained)
    for name, weight in model.clip.state_dict().items():
        assert torch.equal(weight, before[name]), name
