"""The Prompter: prompts and image tokens -> region embeddings (paper section 3.2), and the box heads (section 3.4).

Every form is a `Prompter` and stands in `PROMPTERS`; what it can do is said by its class attributes.

Symbols: B images, P prompts per image, K tokens per prompt, N patches, D width of the vision tower, E width of the
joint embedding, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from opencloc.model import towers
from opencloc.model.prompts import PromptBatch, patch_centres, sinusoidal

OFFSET_SCALE = 0.1  # of the centre's correction, in sides of the square: starts small beside the attention's mean
SAMPLES_PER_BIN = 2  # of RoIAlign: sampling points per bin and axis
FAR = 1e4  # penalty of what is not there, in patches


@dataclass(frozen=True, kw_only=True)
class PrompterOutput:
    """`embedding`: z, not yet normalised.  `memory`: what the box head may look at (keys of the image tokens)."""

    embedding: Float[Tensor, "B P E"]
    memory: Float[Tensor, "B N D"]
    kept: Int[Tensor, "B N"] | None = None  # the patches they are of; None: all


class Prompter(nn.Module):
    """Base of all forms: `prompter(tokens, prompts, kept) -> PrompterOutput`.

    `kept` says which patches the tokens are of, None that all are there.  A form is constructed with the width of the
    vision tower, the width of the joint embedding, the grid of patches and its `options`.
    """

    options: ClassVar[tuple[str, ...]] = ()  # fields of `ClocConfig` that its constructor takes; `clip`: the towers
    has_text_prompts: ClassVar[bool] = True  # and so can ground
    allows_patch_dropout: ClassVar[bool] = True
    is_tower_pooling: ClassVar[bool] = False  # no weights of its own: reads `towers.pool_input`, keeps CLIP's scale


class Mlp(nn.Sequential):
    """Two-layer GELU MLP."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


class Memory(nn.Module):
    """Image tokens, normalised: (as they are, with the position basis that prompts share added)."""

    def __init__(self, width: int, grid: tuple[int, int], shared_positions: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.width, self.grid, self.shared_positions = width, grid, shared_positions

    def forward(
        self, tokens: Float[Tensor, "B N D"], kept: Int[Tensor, "B N"] | None = None
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N D"]]:
        content = self.norm(tokens)
        if not self.shared_positions:
            return content, content
        basis = sinusoidal(patch_centres(self.grid, tokens.device), self.width, max(self.grid) / 2).to(content.dtype)
        return content, content + (basis if kept is None else basis[kept])


class CrossPrompter(Prompter):
    """The default: attention from prompt tokens to image tokens, biased by the spatial prior; mean, MLP, projection.

    Differs from the paper, which runs a whole encoder layer per prompt: here the prompt tokens are the only queries, so
    the cost per prompt does not grow with another pass over the image.  The spatial prior is an attention bias with a
    learnable slope per head.  The position basis is shared by patches and prompts but stays out of the values, and
    nothing of a prompt token itself goes on (no residual): a region embedding can only say what was attended to.
    Values start as the image tokens themselves, which with the prior makes the start a mean over the box.
    """

    options = ("prompter_heads", "prior_slope", "shared_positions")

    def __init__(
        self,
        width: int,
        embed_dim: int,
        grid: tuple[int, int],
        *,
        prompter_heads: int,
        prior_slope: float | None,
        shared_positions: bool,
    ) -> None:
        super().__init__()
        if prompter_heads < 1 or width % prompter_heads:
            raise ValueError(f"prompter_heads must divide the width {width} of the vision tower, got {prompter_heads}")
        self.num_heads = prompter_heads
        self.memory = Memory(width, grid, shared_positions)
        self.norm_query = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        # attention bias = -exp(log_slope) * penalty: positive whatever is learned, one slope per head
        self.log_slope = nn.Parameter(torch.full((prompter_heads,), prior_slope)) if prior_slope is not None else None
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, width)
        self.norm_out = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)

    def forward(
        self, tokens: Float[Tensor, "B N D"], prompts: PromptBatch, kept: Int[Tensor, "B N"] | None = None
    ) -> PrompterOutput:
        content, memory = self.memory(tokens, kept)
        attention = self._attention(memory, prompts)
        x = self.out(self._values(attention, content))
        x = x + self.mlp(self.norm_mlp(x))
        return PrompterOutput(embedding=self.projection(self.norm_out(x)), memory=memory, kept=kept)

    def _attention(self, memory: Float[Tensor, "B N D"], prompts: PromptBatch) -> Float[Tensor, "B H P N"]:
        """Where each prompt looks: the mean over its tokens, since all that follows is linear up to the pooling."""
        count, num_tokens = prompts.tokens.shape[1:3]
        query = self._heads(self.query(self.norm_query(prompts.tokens.flatten(1, 2))))
        if _few(query, memory):  # q . (W m + b) = (q W) . m + q . b
            weight, bias = (x.unflatten(0, (self.num_heads, -1)) for x in (self.key.weight, self.key.bias))
            scores = ((query @ weight).flatten(1, 2) @ memory.transpose(1, 2)).unflatten(1, (self.num_heads, -1))
            scores = scores + query @ bias[..., None]
        else:
            scores = query @ self._heads(self.key(memory)).transpose(-1, -2)
        scores = scores.float() * query.shape[-1] ** -0.5
        if self.log_slope is not None:
            scores = scores - self.log_slope.exp()[:, None, None] * prompts.penalty.flatten(1, 2)[:, None]
        attention = scores.softmax(-1).unflatten(2, (count, num_tokens))
        return masked_mean(attention, prompts.valid[:, None]).to(memory.dtype)

    def _values(self, attention: Float[Tensor, "B H P N"], content: Float[Tensor, "B N D"]) -> Float[Tensor, "B P D"]:
        """Values of the image tokens under the attention, heads side by side."""
        if _few(attention, content):  # sum_n a_n (W c_n + b) = W sum_n a_n c_n + b, the weights summing to one
            seen = (attention.flatten(1, 2) @ content).unflatten(1, (self.num_heads, -1))
            weight = self.value.weight.unflatten(0, (self.num_heads, -1)).transpose(-1, -2)
            return (seen @ weight).transpose(1, 2).flatten(2) + self.value.bias
        return (attention @ self._heads(self.value(content))).transpose(1, 2).flatten(2)

    def _heads(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B H S d"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class EncoderPrompter(Prompter):
    """The published form: prompt tokens before the image tokens, a single-head encoder layer, mean, projection."""

    options = ("shared_positions",)

    def __init__(self, width: int, embed_dim: int, grid: tuple[int, int], *, shared_positions: bool) -> None:
        super().__init__()
        self.memory = Memory(width, grid, shared_positions)
        self.norm_attention = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, width)
        self.norm_out = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)

    def forward(
        self, tokens: Float[Tensor, "B N D"], prompts: PromptBatch, kept: Int[Tensor, "B N"] | None = None
    ) -> PrompterOutput:
        _, memory = self.memory(tokens, kept)
        image = memory[:, None].expand(-1, prompts.tokens.shape[1], -1, -1)
        x = torch.cat([prompts.tokens.to(memory.dtype), image], dim=2)  # (B, P, K + N, D)
        valid = F.pad(prompts.valid, (0, memory.shape[1]), value=True)
        query, key, value = self.attention_in(self.norm_attention(x)).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=valid[:, :, None])
        x = x + self.attention_out(attended)
        x = x + self.mlp(self.norm_mlp(x))
        z = self.projection(self.norm_out(masked_mean(x, valid)))
        return PrompterOutput(embedding=z, memory=memory, kept=kept)


class RoiPrompter(Prompter):
    """The published baseline (table 2, row 9): RoIAlign over the image tokens, mean over the bins, MLP, projection.

    Points and masks count as their extent.
    """

    options = ("roi_size",)
    has_text_prompts = False
    allows_patch_dropout = False  # it needs the whole grid

    def __init__(self, width: int, embed_dim: int, grid: tuple[int, int], *, roi_size: int) -> None:
        super().__init__()
        self.grid, self.roi_size = grid, roi_size
        self.memory = Memory(width, grid, shared_positions=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, width)
        self.norm_out = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)

    def forward(
        self, tokens: Float[Tensor, "B N D"], prompts: PromptBatch, kept: Int[Tensor, "B N"] | None = None
    ) -> PrompterOutput:
        memory, _ = self.memory(tokens)
        feature_map = memory.transpose(1, 2).unflatten(-1, self.grid)
        x = roi_align(feature_map, prompts.boxes, self.roi_size).mean((-1, -2))
        x = x + self.mlp(self.norm_mlp(x))
        return PrompterOutput(embedding=self.projection(self.norm_out(x)), memory=memory)


class PoolPrompter(Prompter):
    """The tower's own pooling, its attention drawn to the region by the spatial prior: no weights, no training needed.

    As TextRegion (Xiao et al. 2025, arXiv 2505.23769) does with masks.  The whole square gives the image embedding.
    """

    options = ("clip", "prior_slope")
    has_text_prompts = False
    is_tower_pooling = True

    def __init__(
        self, width: int, embed_dim: int, grid: tuple[int, int], *, clip: Any, prior_slope: float | None
    ) -> None:
        super().__init__()
        if prior_slope is None:
            raise ValueError("the pool Prompter needs a prior_slope: without one every region is the whole image")
        self.slope = math.exp(prior_slope)
        self._clip = (clip,)  # in a tuple: the towers are the model's, not a part of the Prompter

    def forward(
        self, tokens: Float[Tensor, "B L D"], prompts: PromptBatch, kept: Int[Tensor, "B N"] | None = None
    ) -> PrompterOutput:
        penalty = prompts.penalty.masked_fill(~prompts.valid[..., None], FAR).amin(2)  # of the nearest part
        embedding = towers.pool(self._clip[0], tokens, -self.slope * penalty)
        return PrompterOutput(embedding=embedding, memory=tokens[:, -penalty.shape[-1] :], kept=kept)


PROMPTERS: dict[str, type[Prompter]] = {
    "cross": CrossPrompter,
    "encoder": EncoderPrompter,
    "roi": RoiPrompter,
    "pool": PoolPrompter,
}


class MlpBoxHead(nn.Module):
    """The published head: a 2-layer GELU MLP from the text-prompted z to (x0, y0, x1, y1) (section 3.4).

    As published the four numbers are free: nothing orders the corners.
    """

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.mlp = Mlp(embed_dim, hidden, 4)

    def forward(self, output: PrompterOutput) -> Float[Tensor, "B P 4"]:
        return self.mlp(F.normalize(output.embedding, dim=-1) * output.embedding.shape[-1] ** 0.5).float()


class AnchoredBoxHead(nn.Module):
    """A box read off an attention map: its centre is the mean position under the map, corrected by an MLP.

    z asks the image tokens where it is.  A 2-layer GELU MLP on z and on what was attended to adds a small offset to the
    centre and gives width and height by a sigmoid.  Differs from the paper's head, which has to regress the place from
    z alone.
    """

    def __init__(self, width: int, embed_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.query = nn.Linear(embed_dim, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.mlp = Mlp(embed_dim + width, width, 4)

    def forward(self, output: PrompterOutput) -> Float[Tensor, "B P 4"]:
        z = F.normalize(output.embedding, dim=-1) * output.embedding.shape[-1] ** 0.5
        query = self.query(z)
        # the projections of keys and values are carried to the side of the prompts, which are fewer than the patches
        scores = (query @ self.key.weight) @ output.memory.transpose(-1, -2) + query @ self.key.bias[:, None]
        attention = (scores.float() * query.shape[-1] ** -0.5).softmax(-1)  # (B, P, N)
        attended = self.value(attention.to(output.memory.dtype) @ output.memory)
        offset, size = self.mlp(torch.cat([z, attended], -1)).float().chunk(2, dim=-1)
        centres = patch_centres(self.grid, attention.device)
        centre = attention @ (centres if output.kept is None else centres[output.kept]) + OFFSET_SCALE * offset
        half = (size - 1).sigmoid() / 2  # a quarter of the side at the start
        return torch.cat([centre - half, centre + half], -1)


def roi_align(
    feature_map: Float[Tensor, "B C H W"], boxes: Float[Tensor, "B P 4"], output_size: int
) -> Float[Tensor, "B P C S S"]:
    """RoIAlign (He et al. 2017): bilinear features of every box on an S x S grid of bins.

    Each bin is the mean of 2 x 2 samples.
    Boxes are normalised to the map; pixel centres lie at half-integers (`aligned=True` in torchvision); samples
    outside the centres of the outermost pixels repeat the border.
    """
    batch, count = boxes.shape[:2]
    channels = feature_map.shape[1]
    points = output_size * SAMPLES_PER_BIN
    t = (torch.arange(points, device=boxes.device, dtype=boxes.dtype) + 0.5) / points
    x = boxes[..., 0:1] + t * (boxes[..., 2:3] - boxes[..., 0:1])  # (B, P, points)
    y = boxes[..., 1:2] + t * (boxes[..., 3:4] - boxes[..., 1:2])
    grid = torch.stack(torch.broadcast_tensors(x[..., None, :], y[..., :, None]), dim=-1) * 2 - 1
    grid = grid.reshape(batch, count * points, points, 2).to(feature_map.dtype)
    sampled = F.grid_sample(feature_map, grid, mode="bilinear", padding_mode="border", align_corners=False)
    sampled = sampled.reshape(batch, channels, count, points, points).transpose(1, 2)
    return F.avg_pool2d(sampled.flatten(0, 1), SAMPLES_PER_BIN).unflatten(0, (batch, count))


def masked_mean(x: Float[Tensor, "*S K D"], valid: Tensor) -> Float[Tensor, "*S D"]:
    """Mean over the valid tokens; zeros where none is."""
    weight = valid.to(x.dtype)
    return (x * weight[..., None]).sum(-2) / weight.sum(-1, keepdim=True).clamp_min(1)


def _few(rows: Float[Tensor, "B H Q X"], memory: Float[Tensor, "B N D"]) -> bool:
    """Whether projecting the rows on the prompts' side costs less than projecting every image token."""
    return 2 * rows.shape[2] <= memory.shape[1]
