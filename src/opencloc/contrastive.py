"""Symmetric InfoNCE over any number of rows, exact, in tiles (paper sections 2 and 3.3).

    loss = 1 / (2 n) * sum over valid i of  (lse_j s_ij - s_ii) + (lse_j s_ji - s_ii),     s_ij = scale * <q_i, k_j>

with q queries (images, regions), k keys (their captions, their texts) and n valid rows; an lse runs over the pair's own
s_ii and the negatives.  The R x R matrix s never exists: the forward pass goes once over its tiles and keeps the
log-sums of rows and of columns, the backward pass computes every tile again, turns it into the gradient of s and
multiplies it out at once.  Memory is that of the embeddings and a few tiles.

Conflict filter (section 3.3): identical texts are never negatives of each other, and similar ones neither if their
cosine is above `similar_above`, the published threshold, AND more than three standard deviations above the batch's mean
cosine.  The second condition is ours: an untrained text tower finds everything similar and the published rule alone
would erase all negatives.  By Cantelli's inequality at most a tenth of the pairs can ever be erased by it, and once
texts have spread out (mean + 3 sd < threshold) the rule is the published one.

Noisy labels: with `gce_q` > 0 a pair counts by p^q, p being the probability that the model gives it (the geometric mean
of both directions), and the weights add up to one.  These are the gradients of generalized cross entropy (Zhang and
Sabuncu 2018), kept at the size of InfoNCE's: at the start all pairs count alike, and a wrong text counts the less the
better the others are learned.  Not in the paper.

Across ranks each one has its own rows and the keys of all: keys, text hashes and valid flags are gathered, the log-sums
of columns combined, and the gradient of the keys is summed back to their owners.  Queries never travel.

What goes into it, and its weight, is in `opencloc.loss`.

Symbols: R rows of this rank, N rows of all ranks (N = R in a single process), E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from opencloc import collectives
from opencloc.collectives import Group, gather_rows, scatter_sum, sum_log_ranks, sum_ranks

CPU_TILE = 1024  # side of a tile where none is asked for: a few tiles fit into the caches of a CPU
DEVICE_TILE = 8192  # on other devices: few launches, and still only 256 MB a tile in float32


def info_nce(
    query: Float[Tensor, "R E"],
    key: Float[Tensor, "R E"],
    logit_scale: Float[Tensor, ""],
    *,
    valid: Bool[Tensor, " R"] | None = None,
    text_hash: Int[Tensor, " R"] | None = None,
    similar_above: float | None = None,
    gce_q: float = 0.0,
    group: Group = None,
    tile: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The loss, 0 if no row is valid; and the share of pairs (a, b), a != b, of valid rows that the filter left out.

    `query` and `key` are L2-normalised; products and sums are float32 at least, whatever they come in.
    `text_hash`: equal where two keys are embeddings of the same text (None: no filter).  `similar_above` filters
    similar texts too.  `gce_q` weighs the pairs, and the loss is their weighted mean; the weights carry no gradient.
    `tile`: rows and columns of a tile; it changes memory and time, not the result.

    `group`: the ranks that share the batch, with equally many rows each.  The loss is the whole batch's on every rank,
    and its gradients are those of the whole batch's loss with respect to this rank's rows.  That of `logit_scale`,
    which all ranks hold, is a world-size-th of the whole gradient: summed over ranks, all gradients are right.
    """
    mode = _Mode(
        similar_above=similar_above if text_hash is not None else None,
        gce_q=gce_q,
        group=group,
        tile=tile or (CPU_TILE if query.device.type == "cpu" else DEVICE_TILE),
    )
    return _InfoNce.apply(query, key, logit_scale, valid, text_hash, mode)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def similarity_threshold(
    text: Float[Tensor, "N E"],
    text_hash: Int[Tensor, " N"],
    valid: Bool[Tensor, " N"] | None,
    similar_above: float,
) -> Float[Tensor, ""]:
    """max(similar_above, mean + 3 sd), over the cosines of all pairs of distinct valid texts, without forming one.

    With c_ab = <x_a, x_b> - |mu|^2 = u_a + u_b + <d_a, d_b>, d = x - mu, u = <mu, d>, all cross terms of sum c_ab^2
    vanish: it is 2 n sum u^2 + |d^T d|^2, E x E in place of N x N, and free of cancellation where texts are alike.
    Pairs of equal texts are then taken out: a text that occurs m times has m^2 of them, each with c = 2 u + |d|^2.
    """
    if valid is None:
        valid = torch.ones_like(text_hash, dtype=torch.bool)
    count = valid.sum().to(text.dtype)
    # rows with the same text; an invalid row counts nowhere
    hashes = torch.where(valid, text_hash, torch.iinfo(torch.int64).max)
    ordered = hashes.sort().values
    same = torch.searchsorted(ordered, hashes, right=True) - torch.searchsorted(ordered, hashes)
    same = torch.where(valid, same, 0).to(text.dtype)
    pairs = (count * count - same.sum()).clamp_min(1)
    mean = torch.where(valid[:, None], text, 0).sum(0) / count.clamp_min(1)
    d = torch.where(valid[:, None], text - mean, 0)
    u = d @ mean
    equal = 2 * u + d.square().sum(1)
    squares = 2 * count * u.square().sum() + (d.T @ d).square().sum() - (same * equal.square()).sum()
    centred_mean = -(same * equal).sum() / pairs
    deviation = (squares / pairs - centred_mean.square()).clamp_min(0).sqrt()
    rounding = 32 * torch.finfo(text.dtype).eps  # equal cosines must not fall on both sides
    return (mean.square().sum() + centred_mean + 3 * deviation).clamp_min(similar_above) + rounding


@dataclass(frozen=True, kw_only=True)
class _Mode:
    """How, not what: the settings of a call that carry no gradient."""

    similar_above: float | None
    gce_q: float
    group: Group
    tile: int


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """This rank's rows of the matrix s, as tiles that are computed when asked for."""

    query: Float[Tensor, "R E"]  # times the scale
    key: Float[Tensor, "N E"]
    valid: Bool[Tensor, " N"] | None
    text_hash: Int[Tensor, " N"] | None
    threshold: Float[Tensor, ""] | None
    first: int  # column of this rank's first row
    tile: int

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of every tile."""
        for r in range(0, len(self.query), self.tile):
            for c in range(0, len(self.key), self.tile):
                yield slice(r, min(r + self.tile, len(self.query))), slice(c, min(c + self.tile, len(self.key)))

    def compute(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """s of one tile, -inf where a pair is left out, and which those are (None: none)."""
        scores = self.query[rows] @ self.key[columns].T
        mine = slice(rows.start + self.first, rows.stop + self.first)
        out = None
        if self.text_hash is not None:
            out = self.text_hash[mine, None] == self.text_hash[None, columns]
            if self.threshold is not None:
                out |= self.key[mine] @ self.key[columns].T > self.threshold
        if self.valid is not None:
            invalid = ~self.valid
            either = invalid[mine, None] | invalid[None, columns]
            out = either if out is None else out.logical_or_(either)
        if out is not None:
            self.own(out, rows, columns)[1].fill_(False)  # the positive is never left out
            scores.masked_fill_(out, float("-inf"))
        return scores, out

    def own(self, tile: Tensor, rows: slice, columns: slice) -> tuple[slice, Tensor]:
        """The rows whose own pair lies in the tile, and a view of these entries."""
        low = max(rows.start + self.first, columns.start)
        high = max(low, min(rows.stop + self.first, columns.stop))
        own = slice(low - self.first, high - self.first)
        block = tile[own.start - rows.start : own.stop - rows.start, low - columns.start : high - columns.start]
        return own, block.diagonal()


def _no_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method with autocast switched off for the device of its first tensor."""

    @wraps(method)
    def run(ctx: Any, tensor: Tensor, *others: Any) -> Any:
        with torch.autocast(tensor.device.type, enabled=False):
            return method(ctx, tensor, *others)

    return run


class _InfoNce(torch.autograd.Function):
    @staticmethod
    @_no_autocast
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        logit_scale: Tensor,
        valid: Tensor | None,
        text_hash: Tensor | None,
        mode: _Mode,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(query.dtype, torch.float32)
        ctx.mode, ctx.dtypes = mode, (query.dtype, key.dtype, logit_scale.dtype)
        query, key, logit_scale = query.to(dtype), gather_rows(key.to(dtype), mode.group), logit_scale.to(dtype)
        valid = None if valid is None else gather_rows(valid, mode.group)
        text_hash = None if text_hash is None else gather_rows(text_hash, mode.group)
        threshold = None
        if text_hash is not None and mode.similar_above is not None:
            threshold = similarity_threshold(key, text_hash, valid, mode.similar_above)
        scores = _scores(query, key, logit_scale, valid, text_hash, threshold, mode)

        row_sums = torch.full((len(query),), float("-inf"), dtype=dtype, device=query.device)
        column_sums = row_sums.new_full((len(key),), float("-inf"))
        positive = torch.empty_like(row_sums)
        left_out = torch.zeros((), dtype=torch.float64, device=query.device)
        for rows, columns in scores.tiles():
            tile, out = scores.compute(rows, columns)
            own, diagonal = scores.own(tile, rows, columns)
            positive[own] = diagonal
            row_sums[rows] = torch.logaddexp(row_sums[rows], tile.logsumexp(1))
            column_sums[columns] = torch.logaddexp(column_sums[columns], tile.logsumexp(0))
            if out is not None:
                left_out += out.sum()
        column_sums = sum_log_ranks(column_sums, mode.group)

        count = key.new_full((), len(key)) if valid is None else valid.sum().to(dtype)
        weight = (torch.ones_like(column_sums) if valid is None else valid.to(dtype)) / (2 * count.clamp_min(1))
        mine = slice(scores.first, scores.first + len(query))
        losses = row_sums + column_sums[mine] - 2 * positive
        if mode.gce_q:  # weights p^q, log p being half a pair's two losses
            log_weight = gather_rows(-mode.gce_q / 2 * losses, mode.group)
            log_weight = log_weight if valid is None else log_weight.masked_fill(~valid, float("-inf"))
            weight = log_weight.softmax(0).nan_to_num(0) / 2  # NaN: no row is valid
        loss = (losses * weight[mine]).sum()
        total, left_out = sum_ranks(torch.stack([loss.double(), left_out]), mode.group)
        ctx.save_for_backward(query, key, logit_scale, valid, text_hash, threshold, weight, row_sums, column_sums)
        pairs = count.double() * (count.double() - 1)
        if valid is not None:  # pairs with an invalid row were left out too, but by nobody's filter
            left_out = left_out - (float(len(key)) * (len(key) - 1) - pairs)
        share = (left_out / pairs.clamp_min(1)).to(dtype)
        ctx.mark_non_differentiable(share)
        return total.to(dtype), share

    @staticmethod
    @once_differentiable
    @_no_autocast
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, logit_scale, valid, text_hash, threshold, weight, row_sums, column_sums = ctx.saved_tensors
        scores = _scores(query, key, logit_scale, valid, text_hash, threshold, ctx.mode)
        mine = slice(scores.first, scores.first + len(query))
        # weight * exp(s - lse) as one exponential; rows of no weight get exp(-inf)
        row_shift, column_shift = row_sums - weight[mine].log(), column_sums - weight.log()
        query_grad, key_grad = torch.zeros_like(query), torch.zeros_like(key)
        for rows, columns in scores.tiles():
            tile = scores.compute(rows, columns)[0]
            tile_grad = (tile - row_shift[rows, None]).exp_()
            tile_grad += tile.sub_(column_shift[None, columns]).exp_()
            own, diagonal = scores.own(tile_grad, rows, columns)
            diagonal -= 2 * weight[mine][own]
            query_grad[rows] += tile_grad @ key[columns]
            key_grad[columns] += tile_grad.T @ scores.query[rows]
        query_grad *= grad
        key_grad *= grad
        scale_grad = torch.dot(query_grad.flatten(), query.flatten())
        scale_grad = sum_ranks(scale_grad, ctx.mode.group) / collectives.size(ctx.mode.group)
        query_grad *= logit_scale
        gradients = query_grad, scatter_sum(key_grad, ctx.mode.group), scale_grad
        return *(g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)), None, None, None


def _scores(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    valid: Tensor | None,
    text_hash: Tensor | None,
    threshold: Tensor | None,
    mode: _Mode,
) -> _Scores:
    return _Scores(
        query=query * logit_scale,
        key=key,
        valid=valid,
        text_hash=text_hash,
        threshold=threshold,
        first=collectives.rank(mode.group) * len(query),
        tile=mode.tile,
    )
