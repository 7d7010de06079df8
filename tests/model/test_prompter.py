"""Prompters and box head against their definitions, written out prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from opencloc.model.prompter import CrossPrompter, DenseBoxHead, EncoderPrompter, Memory
from opencloc.model.prompts import Box, Point, PromptBatch, PromptEncoder, Text, patch_centres

WIDTH, EMBED, GRID = 32, 16, (3, 4)
NUM_PATCHES = GRID[0] * GRID[1]


def prompts(copies: int) -> PromptBatch:
    """Two images with prompts of one to three tokens, some of them padding; `copies` of each."""
    torch.manual_seed(1)
    encoder = PromptEncoder(WIDTH, EMBED, GRID)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter)
    first = [Box(0.1, 0.2, 0.4, 0.9), Point(0.3, 0.3), Text(torch.randn(EMBED))]
    second = [(Point(0.1, 0.1), Box(0.2, 0.2, 0.9, 0.8)), Point(0.3, 0.8), Box(0.0, 0.0, 0.3, 0.3)]
    batch = encoder([first * copies, second * copies])
    return replace(batch, tokens=batch.tokens.detach(), penalty=batch.penalty.detach())


def spread(module: nn.Module) -> nn.Module:
    """The module with parameters all of which matter."""
    torch.manual_seed(2)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def cross_reference(p: CrossPrompter, image: torch.Tensor, tokens: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """z of one prompt on one image: keys and values of every image token, every token of the prompt on its own."""
    content, memory = (x[0] for x in p.memory(image[None]))
    assert p.log_slope is not None
    heads = []
    q, k, v = p.query(p.norm_query(tokens)), p.key(memory), p.value(content)
    size = WIDTH // p.num_heads
    for h in range(p.num_heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[:, part] @ k[:, part].T / size**0.5 - p.log_slope[h].exp() * penalty
        heads.append(scores.softmax(-1) @ v[:, part])
    x = p.out(torch.cat(heads, -1)).mean(0)
    x = x + p.mlp(p.norm_mlp(x))
    return p.projection(p.norm_out(x))


def encoder_reference(p: EncoderPrompter, image: torch.Tensor, tokens: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """z of one prompt on one image: a whole encoder layer over the prompt's tokens and the image's."""
    x = torch.cat([tokens, p.memory(image[None])[1][0]])
    q, k, v = p.attention_in(p.norm_attention(x)).chunk(3, dim=-1)
    x = x + p.attention_out((q @ k.T / WIDTH**0.5).softmax(-1) @ v)
    x = x + p.mlp(p.norm_mlp(x))
    return p.projection(p.norm_out(x.mean(0)))


@pytest.mark.parametrize("copies", [1, 5])  # few prompts and many take two roads in `cross`
@pytest.mark.parametrize("shared_positions", [True, False])
@pytest.mark.parametrize("form", ["cross", "encoder"])
def test_prompter_equals_its_definition_prompt_by_prompt(form: str, shared_positions: bool, copies: int) -> None:
    reference: Callable[..., torch.Tensor]
    if form == "cross":
        prompter, reference = (
            CrossPrompter(WIDTH, EMBED, GRID, prompter_heads=4, prior_slope=0.0, shared_positions=shared_positions),
            cross_reference,
        )
    else:
        prompter, reference = EncoderPrompter(WIDTH, EMBED, GRID, shared_positions=shared_positions), encoder_reference
    spread(prompter)
    batch, image = prompts(copies), torch.randn(2, NUM_PATCHES, WIDTH)
    weight = torch.randn(2, batch.tokens.shape[1], EMBED)
    fast = prompter(image, batch)
    (fast * weight).sum().backward()
    gradients = {name: p.grad for name, p in prompter.named_parameters()}
    prompter.zero_grad()
    slow = torch.stack(
        [
            torch.stack(
                [
                    reference(prompter, image[b], batch.tokens[b, i][valid], batch.penalty[b, i][valid])
                    for i, valid in enumerate(batch.valid[b])
                ]
            )
            for b in range(2)
        ]
    )
    (slow * weight).sum().backward()
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    for name, parameter in prompter.named_parameters():
        assert parameter.grad is not None
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4 * (1 + largest), rtol=1e-3, msg=name)


def test_a_heat_map_alone_says_where_a_text_looks() -> None:
    """A text prompt's attention is the softmax of its logits, whatever the slopes and queries."""
    prompter = spread(CrossPrompter(WIDTH, EMBED, GRID, prompter_heads=4, prior_slope=0.0, shared_positions=True))
    assert isinstance(prompter, CrossPrompter)
    image, logits = torch.randn(1, NUM_PATCHES, WIDTH), torch.randn(1, 2, NUM_PATCHES)
    content, _ = prompter.memory(image)
    x = prompter.out(logits.softmax(-1) @ prompter.value(content))
    x = prompter.projection(prompter.norm_out(x + prompter.mlp(prompter.norm_mlp(x))))
    batch = PromptEncoder(WIDTH, EMBED, GRID).heat(logits)
    torch.testing.assert_close(prompter(image, batch), x, atol=1e-4, rtol=1e-4)


def test_dense_head_equals_its_definition() -> None:
    head = spread(DenseBoxHead(WIDTH, GRID))
    assert isinstance(head, DenseBoxHead)
    memory = torch.randn(2, NUM_PATCHES, WIDTH)
    texts, patches = (F.normalize(torch.randn(2, count, EMBED), dim=-1) for count in (3, NUM_PATCHES))
    boxes = head(head.heat(texts, patches), memory)
    for b in range(2):
        for i in range(3):
            weight = (head.log_scale.exp() * patches[b] @ texts[b, i]).softmax(0)
            box = torch.zeros(4)
            for n, centre in enumerate(patch_centres(GRID)):
                left, top, right, bottom = F.softplus(head.mlp(memory[b, n]) - 2)
                box += weight[n] * (centre.repeat(2) + torch.stack([-left, -top, right, bottom]))
            torch.testing.assert_close(boxes[b, i], box, atol=1e-4, rtol=1e-4)


def test_a_patch_embedding_is_the_region_of_that_patch_where_the_mlp_is_silent() -> None:
    prompter = spread(CrossPrompter(WIDTH, EMBED, GRID, prompter_heads=4, prior_slope=8.0, shared_positions=True))
    assert isinstance(prompter, CrossPrompter)
    for parameter in prompter.mlp[2].parameters():
        nn.init.zeros_(parameter)
    image = torch.randn(1, NUM_PATCHES, WIDTH)
    half = torch.tensor([0.5 / GRID[1], 0.5 / GRID[0]])
    boxes = torch.cat([patch_centres(GRID) - half, patch_centres(GRID) + half], -1)[None]
    with torch.no_grad():
        assert prompter.log_slope is not None
        prompter.log_slope.fill_(8.0)
        regions = F.normalize(prompter(image, PromptEncoder(WIDTH, EMBED, GRID).boxes(boxes)), dim=-1)
        torch.testing.assert_close(prompter.patch_embeddings(image), regions, atol=1e-4, rtol=1e-4)


def test_image_tokens_carry_the_basis_of_the_prompts_if_shared() -> None:
    tokens = torch.randn(1, NUM_PATCHES, WIDTH)
    content, memory = Memory(WIDTH, GRID, True)(tokens)
    encoder = PromptEncoder(WIDTH, EMBED, GRID)
    torch.testing.assert_close((memory - content)[0], encoder.basis(patch_centres(GRID)))
    assert torch.equal(*Memory(WIDTH, GRID, False)(tokens))
