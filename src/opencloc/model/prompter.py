"""The Prompter: prompts and image tokens -> region embeddings (paper section 3.2), and the box heads (section 3.4).

Every form is a `Prompter` and stands in `PROMPTERS`; what it can do is said by its class attributes.

Symbols: B images, P prompts per image, K tokens per prompt, N patches, D width of the vision tower, E width of the
joint embedding, H heads.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from opencloc.model import towers
from opencloc.model.prompts import PromptBatch, patch_centres, sinusoidal

INITIAL_LOG_SCALE = 2.6592  # of logits: ln(1 / 0.07), CLIP's
SAMPLES_PER_BIN = 2  # of RoIAlign: sampling points per bin and axis
FAR = 1e4  # penalty of what is not there, in patches


class Prompter(nn.Module):
    """Base of all forms: `prompter(tokens, prompts, kept) -> z`, (B, P, E), not yet normalised.

    `kept` says which patches the tokens are of, None that all are there.  A form is constructed with the width of the
    vision tower, the width of the joint embedding, the grid of patches and its `options`.
    """

    options: ClassVar[tuple[str, ...]] = ()  # fields of `ClocConfig` that its constructor takes; `clip`: the towers
    has_text_prompts: ClassVar[bool] = True  # and so can ground
    has_patch_embeddings: ClassVar[bool] = True  # and so heat maps, which stand for its text prompts
    allows_patch_dropout: ClassVar[bool] = True
    reads_pool_input: ClassVar[bool] = False  # besides the tokens it takes what `towers.pool` does, as `pool_input`
    is_trained: ClassVar[bool] = True  # False: no weights of its own, and CLIP's scale

    def patch_embeddings(
        self, tokens: Float[Tensor, "B N D"], pool_input: Float[Tensor, "B L D"] | None = None
    ) -> Float[Tensor, "B N E"]:
        """Every patch on its own in the joint space, L2-normalised: its cosine with a text is the text's heat map."""
        raise NotImplementedError


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
        self.max_cycles = max(grid) / 2

    def forward(
        self, tokens: Float[Tensor, "B N D"], kept: Int[Tensor, "B N"] | None = None
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N D"]]:
        content = self.norm(tokens)
        if not self.shared_positions:
            return content, content
        basis = sinusoidal(patch_centres(self.grid, tokens.device), self.width, self.max_cycles).to(content.dtype)
        return content, content + (basis if kept is None else basis[kept])


class CrossPrompter(Prompter):
    """The default: attention from prompt tokens to image tokens, biased by the spatial prior; mean, MLP, projection.

    Differs from the paper, which runs a whole encoder layer per prompt: here the prompt tokens are the only queries, so
    the cost per prompt does not grow with another pass over the image.  The spatial prior is an attention bias with a
    learnable slope per head.  The position basis is shared by patches and prompts but stays out of the values, and
    nothing of a prompt token itself goes on (no residual): a region embedding can only say what was attended to.
    Values start as the image tokens themselves, which with the prior makes the start nearly the mean over the box.
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
    ) -> Float[Tensor, "B P E"]:
        content, memory = self.memory(tokens, kept)
        attention = self._attention(memory, prompts)
        x = self.out(self._values(attention, content))
        x = x + self.mlp(self.norm_mlp(x))
        return self.projection(self.norm_out(x))

    def patch_embeddings(
        self, tokens: Float[Tensor, "B N D"], pool_input: Float[Tensor, "B L D"] | None = None
    ) -> Float[Tensor, "B N E"]:
        """As `Prompter` says: the path of the values without the MLP, which is for what many patches say together."""
        return F.normalize(self._of_each_patch(tokens).float(), dim=-1)

    def _of_each_patch(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N E"]:
        return self.projection(self.norm_out(self.out(self.value(self.memory.norm(tokens)))))

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
        asks, penalty = prompts.asks.flatten(1, 2)[:, None, :, None], prompts.penalty.flatten(1, 2)[:, None]
        slope = 0.0 if self.log_slope is None else self.log_slope.exp()[:, None, None]
        scores = scores.float() * query.shape[-1] ** -0.5 * asks - torch.where(asks, slope, 1.0) * penalty
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
    has_patch_embeddings = False  # a patch means something only beside a prompt

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
    ) -> Float[Tensor, "B P E"]:
        _, memory = self.memory(tokens, kept)
        image = memory[:, None].expand(-1, prompts.tokens.shape[1], -1, -1)
        x = torch.cat([prompts.tokens.to(memory.dtype), image], dim=2)  # (B, P, K + N, D)
        valid = F.pad(prompts.valid, (0, memory.shape[1]), value=True)
        query, key, value = self.attention_in(self.norm_attention(x)).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=valid[:, :, None])
        x = x + self.attention_out(attended)
        x = x + self.mlp(self.norm_mlp(x))
        return self.projection(self.norm_out(masked_mean(x, valid)))


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
    ) -> Float[Tensor, "B P E"]:
        feature_map = self.memory(tokens)[0].transpose(1, 2).unflatten(-1, self.grid)
        return self._project(roi_align(feature_map, prompts.boxes, self.roi_size).mean((-1, -2)))

    def patch_embeddings(
        self, tokens: Float[Tensor, "B N D"], pool_input: Float[Tensor, "B L D"] | None = None
    ) -> Float[Tensor, "B N E"]:
        return F.normalize(self._project(self.memory.norm(tokens)).float(), dim=-1)

    def _project(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S E"]:
        return self.projection(self.norm_out(x + self.mlp(self.norm_mlp(x))))


class PoolPrompter(Prompter):
    """The tower's own pooling, its attention drawn to the region by the spatial prior: no weights, no training needed.

    As TextRegion (Xiao et al. 2025, arXiv 2505.23769) does with masks.  The whole square gives the image embedding.
    """

    options = ("clip", "prior_slope")
    has_text_prompts = False
    reads_pool_input = True
    is_trained = False

    def __init__(
        self, width: int, embed_dim: int, grid: tuple[int, int], *, clip: Any, prior_slope: float | None
    ) -> None:
        super().__init__()
        if prior_slope is None:
            raise ValueError("the pool Prompter needs a prior_slope: without one every region is the whole image")
        self.slope = math.exp(prior_slope)
        self._clip = (clip,)  # in a tuple: the towers are the model's, not a part of the Prompter

    def forward(
        self,
        tokens: Float[Tensor, "B N D"],
        prompts: PromptBatch,
        kept: Int[Tensor, "B N"] | None = None,
        pool_input: Float[Tensor, "B L D"] | None = None,
    ) -> Float[Tensor, "B P E"]:
        assert pool_input is not None
        penalty = torch.where(prompts.asks[..., None], self.slope, 1.0) * prompts.penalty
        penalty = penalty.masked_fill(~prompts.valid[..., None], FAR).amin(2)  # of the nearest part
        return towers.pool(self._clip[0], pool_input, -penalty)

    def patch_embeddings(
        self, tokens: Float[Tensor, "B N D"], pool_input: Float[Tensor, "B L D"] | None = None
    ) -> Float[Tensor, "B N E"]:
        assert pool_input is not None
        return F.normalize(towers.patch_embeddings(self._clip[0], pool_input).float(), dim=-1)


class PoolCrossPrompter(Prompter):
    """`pool` and, beside it, a `cross` whose last projection starts at zero.

    On the first day it is `pool`, whatever the checkpoint; training adds what the tower's pooling does not say.
    """

    options = ("clip", "prompter_heads", "prior_slope", "shared_positions")
    reads_pool_input = True

    def __init__(
        self,
        width: int,
        embed_dim: int,
        grid: tuple[int, int],
        *,
        clip: Any,
        prompter_heads: int,
        prior_slope: float | None,
        shared_positions: bool,
    ) -> None:
        super().__init__()
        self.pool = PoolPrompter(width, embed_dim, grid, clip=clip, prior_slope=prior_slope)
        self.cross = CrossPrompter(
            width,
            embed_dim,
            grid,
            prompter_heads=prompter_heads,
            prior_slope=prior_slope,
            shared_positions=shared_positions,
        )

    @property
    def memory(self) -> Memory:
        return self.cross.memory

    def forward(
        self,
        tokens: Float[Tensor, "B N D"],
        prompts: PromptBatch,
        kept: Int[Tensor, "B N"] | None = None,
        pool_input: Float[Tensor, "B L D"] | None = None,
    ) -> Float[Tensor, "B P E"]:
        pooled = F.normalize(self.pool(tokens, prompts, kept, pool_input).float(), dim=-1)
        return pooled + self.cross(tokens, prompts, kept)

    def patch_embeddings(
        self, tokens: Float[Tensor, "B N D"], pool_input: Float[Tensor, "B L D"] | None = None
    ) -> Float[Tensor, "B N E"]:
        pooled = self.pool.patch_embeddings(tokens, pool_input)
        return F.normalize(pooled + self.cross._of_each_patch(tokens).float(), dim=-1)


PROMPTERS: dict[str, type[Prompter]] = {
    "cross": CrossPrompter,
    "encoder": EncoderPrompter,
    "roi": RoiPrompter,
    "pool": PoolPrompter,
    "pool_cross": PoolCrossPrompter,
}


class MlpBoxHead(nn.Module):
    """The published head: a 2-layer GELU MLP from the text-prompted z to (x0, y0, x1, y1) (section 3.4).

    As published the four numbers are free: nothing orders the corners.
    """

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.mlp = Mlp(embed_dim, hidden, 4)

    def forward(self, z: Float[Tensor, "B P E"]) -> Float[Tensor, "B P 4"]:
        return self.mlp(F.normalize(z, dim=-1) * z.shape[-1] ** 0.5).float()


class DenseBoxHead(nn.Module):
    """A box for every patch, and the text says which patches count.

    Every patch says how far the thing that it belongs to reaches to the left, top, right and bottom of its centre: a
    2-layer GELU MLP with softplus, in sides of the square.  A text y gives every patch the weight
    softmax_n(s * f_T(y) . e_n), with e_n the patch's embedding in the joint space (`CrossPrompter.patch_embeddings`)
    and s learned; its box is the weighted mean of the patches' boxes.  So finding and naming train one alignment.
    Differs from the paper's head, which has to regress the place from one vector.
    """

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.mlp = Mlp(width, width, 4)
        self.log_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))

    def heat(self, texts: Float[Tensor, "B P E"], patches: Float[Tensor, "B N E"]) -> Float[Tensor, "B P N"]:
        """Logits of each text's heat map over the patches; both L2-normalised."""
        return self.log_scale.exp() * (texts.float() @ patches.float().transpose(1, 2))

    def forward(
        self, heat: Float[Tensor, "B P N"], memory: Float[Tensor, "B N D"], kept: Int[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B P 4"]:
        """The box of each text, from the logits of its heat map and the image tokens (with positions)."""
        centres = patch_centres(self.grid, heat.device)
        centres = centres if kept is None else centres[kept]
        near, far = F.softplus(self.mlp(memory).float() - 2).chunk(2, dim=-1)  # an eighth of the side at the start
        return heat.softmax(-1) @ torch.cat([centres - near, centres + far], -1)


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
    """Whether projecting the rows on the prompts' side costs less than projecting every image token.

    An exported graph takes any number of prompts and cannot choose.
    """
    return not torch.compiler.is_exporting() and 2 * rows.shape[2] <= memory.shape[1]
