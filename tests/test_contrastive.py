"""InfoNCE in tiles against the whole matrix written out, which is what it must equal, values and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from opencloc.contrastive import info_nce, similarity_threshold


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Inputs of the loss.  Equal hashes have equal keys, as texts that are encoded once per batch have."""

    query: torch.Tensor
    key: torch.Tensor
    scale: torch.Tensor
    valid: torch.Tensor | None
    text_hash: torch.Tensor | None

    def leaves(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.key, self.scale


def rows(
    num_rows: int,
    *,
    width: int = 6,
    texts: int = 0,
    invalid: float = 0.0,
    spread: float = 1.0,
    scale: float = 10.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Rows:
    """`texts` distinct texts (0: no hashes) around a common direction, a share `invalid` of rows without one."""
    generator = torch.Generator().manual_seed(seed)

    def unit(count: int, spread: float) -> torch.Tensor:
        centre = torch.randn(1, width, dtype=torch.float64, generator=generator)
        return F.normalize(
            centre + spread * torch.randn(count, width, dtype=torch.float64, generator=generator), dim=-1
        )

    which = torch.randint(max(1, texts), (num_rows,), generator=generator)
    keys = unit(texts, spread)[which] if texts else unit(num_rows, spread)
    return Rows(
        query=unit(num_rows, 1.0).to(dtype).requires_grad_(),
        key=keys.to(dtype).requires_grad_(),
        scale=torch.tensor(scale, dtype=torch.float32 if dtype == torch.bfloat16 else dtype).requires_grad_(),
        valid=torch.rand(num_rows, generator=generator) >= invalid if invalid else None,
        text_hash=which.mul(-7_919).add(3) if texts else None,
    )


def dense_threshold(
    key: torch.Tensor, text_hash: torch.Tensor, valid: torch.Tensor | None, above: float
) -> torch.Tensor:
    """The threshold from the cosine of every pair."""
    valid = torch.ones(len(key), dtype=torch.bool) if valid is None else valid
    distinct = valid[:, None] & valid & (text_hash[:, None] != text_hash)
    cosines = (key @ key.T)[distinct]
    if not len(cosines):
        return key.new_tensor(above)
    return (cosines.mean() + 3 * cosines.std(correction=0)).clamp_min(above)


def dense_info_nce(batch: Rows, similar_above: float | None, gce_q: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The formulas with the whole matrix; the loss and the share of pairs that the filter left out."""
    count = len(batch.query)
    valid = torch.ones(count, dtype=torch.bool) if batch.valid is None else batch.valid
    pairs = valid[:, None] & valid & ~torch.eye(count, dtype=torch.bool)
    negatives = pairs
    if batch.text_hash is not None:
        negatives = pairs & (batch.text_hash[:, None] != batch.text_hash)
        if similar_above is not None:
            key = batch.key.detach()
            threshold = dense_threshold(key, batch.text_hash, valid, similar_above)
            negatives = negatives & (key @ key.T <= threshold + 1e-14)
    logits = (batch.scale * batch.query @ batch.key.T).masked_fill(
        ~(negatives | torch.eye(count, dtype=torch.bool)), float("-inf")
    )
    both = logits.logsumexp(0) + logits.logsumexp(1) - 2 * logits.diagonal()
    weight = torch.where(valid, (-gce_q / 2 * both.detach()).exp(), 0)
    loss = (weight * both).sum() / (2 * weight.sum().clamp_min(1e-300))
    return loss, 1 - negatives.sum() / pairs.sum().clamp_min(1) if pairs.any() else torch.zeros(())


def tiled(
    batch: Rows, similar_above: float | None, tile: int | None, gce_q: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    return info_nce(
        batch.query,
        batch.key,
        batch.scale,
        valid=batch.valid,
        text_hash=batch.text_hash,
        similar_above=similar_above,
        gce_q=gce_q,
        tile=tile,
    )


def assert_equal_to_dense(
    batch: Rows, similar_above: float | None, tile: int | None, gce_q: float = 0.0, tolerance: float = 1e-10
) -> None:
    loss, share = tiled(batch, similar_above, tile, gce_q)
    expected, expected_share = dense_info_nce(batch, similar_above, gce_q)
    torch.testing.assert_close(loss, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(share.double(), expected_share.double(), atol=1e-6, rtol=0)
    got = torch.autograd.grad(3 * loss, batch.leaves())
    for ours, theirs in zip(got, torch.autograd.grad(3 * expected, batch.leaves()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@given(
    num_rows=st.integers(1, 16),
    tile=st.integers(1, 20),
    texts=st.integers(0, 16),
    invalid=st.sampled_from([0.0, 0.3, 0.9, 1.1]),
    spread=st.sampled_from([0.02, 0.3, 3.0]),
    scale=st.sampled_from([1.0, 20.0, 100.0]),
    similar_above=st.sampled_from([None, 0.2, 0.9, 0.99]),
    gce_q=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100)
def test_tiled_loss_equals_the_dense_one(
    num_rows: int,
    tile: int,
    texts: int,
    invalid: float,
    spread: float,
    scale: float,
    similar_above: float | None,
    gce_q: float,
    seed: int,
) -> None:
    """Any tile size, ragged tiles, masked rows up to all of them, with and without each part of the filter, weights."""
    batch = rows(num_rows, texts=texts, invalid=invalid, spread=spread, scale=scale, seed=seed)
    assert_equal_to_dense(batch, similar_above, tile, gce_q)


def test_weighted_pairs_have_the_gradients_of_generalized_cross_entropy() -> None:
    """The gradient of sum (1 - p^q) / q, p the geometric mean of both directions, but for its size."""
    batch = rows(12, texts=9, invalid=0.3, spread=0.5, seed=3)
    assert batch.valid is not None
    valid, q = batch.valid, 0.7
    ours = torch.autograd.grad(tiled(batch, None, 5, q)[0], batch.leaves())
    assert batch.text_hash is not None
    same = batch.text_hash[:, None] == batch.text_hash
    out = (same | ~valid | ~valid[:, None]) & ~torch.eye(12, dtype=torch.bool)
    logits = (batch.scale * batch.query @ batch.key.T).masked_fill(out, float("-inf"))
    p = ((2 * logits.diagonal() - logits.logsumexp(0) - logits.logsumexp(1)) / 2)[valid].exp()
    theirs = torch.autograd.grad(((1 - p**q) / q).sum(), batch.leaves())
    size = (p**q).sum()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b / size, atol=1e-10, rtol=1e-10)


def test_gradients_are_those_of_finite_differences() -> None:
    batch = rows(5, width=3, texts=4, invalid=0.2, spread=0.5)

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        query, key, scale = leaves
        kind = info_nce(query, key, scale, valid=batch.valid, text_hash=batch.text_hash, tile=3)
        return kind[0]

    assert torch.autograd.gradcheck(loss, batch.leaves())


def test_more_rows_than_a_default_tile() -> None:
    batch = rows(1050, width=8, texts=700, invalid=0.1, spread=0.4)
    assert_equal_to_dense(batch, 0.9, None)


def test_float32_survives_the_largest_scale_and_opposite_embeddings() -> None:
    """exp(-200) is no float32 number: sums must be kept as logarithms."""
    query = F.normalize(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), dim=-1).requires_grad_()
    key = (-query.detach()).requires_grad_()
    scale = torch.tensor(100.0, requires_grad=True)
    loss, _ = info_nce(query, key, scale, tile=10)
    batch = Rows(query=query.double(), key=key.double(), scale=scale.double(), valid=None, text_hash=None)
    expected, _ = dense_info_nce(batch, None)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for grad in torch.autograd.grad(loss, (query, key, scale)):
        assert torch.isfinite(grad).all()


def test_bf16_embeddings_give_the_loss_of_their_values() -> None:
    """Rounded embeddings are no reason for rounded sums: only the gradients come back in bf16."""
    batch = rows(50, texts=30, invalid=0.2, spread=0.5, dtype=torch.bfloat16)
    exact = Rows(
        query=batch.query.double(),
        key=batch.key.double(),
        scale=batch.scale.double(),
        valid=batch.valid,
        text_hash=batch.text_hash,
    )
    loss, expected = tiled(batch, 0.9, 16)[0], dense_info_nce(exact, 0.9)[0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(loss, batch.leaves()), torch.autograd.grad(expected, batch.leaves()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-6)


def test_autocast_around_the_loss_changes_nothing() -> None:
    batch = rows(20, texts=10, spread=0.5, dtype=torch.float32)
    loss, _ = tiled(batch, 0.9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = tiled(batch, 0.9, 8)
        grads = torch.autograd.grad(inside, batch.leaves())
    assert inside == loss
    for inside_grad, grad in zip(grads, torch.autograd.grad(loss, batch.leaves()), strict=True):
        assert torch.equal(inside_grad, grad)


@given(
    num_rows=st.integers(2, 60),
    texts=st.integers(2, 60),
    invalid=st.sampled_from([0.0, 0.4]),
    spread=st.sampled_from([1e-4, 0.01, 0.3, 3.0]),
    seed=st.integers(0, 1000),
)
def test_threshold_from_sums_equals_the_one_from_all_pairs(
    num_rows: int, texts: int, invalid: float, spread: float, seed: int
) -> None:
    batch = rows(num_rows, texts=texts, invalid=invalid, spread=spread, seed=seed)
    assert batch.text_hash is not None
    key = batch.key.detach()
    expected = dense_threshold(key, batch.text_hash, batch.valid, -1.0)
    assume(expected > -1)  # there are two distinct texts at all
    torch.testing.assert_close(
        similarity_threshold(key, batch.text_hash, batch.valid, -1.0), expected, atol=1e-7, rtol=0
    )


def test_threshold_of_nearly_equal_texts_does_not_drown_in_float32() -> None:
    """sd = 2e-5 at a mean of 0.9999: the mean of squares minus the square of the mean would be noise."""
    batch = rows(500, width=64, texts=500, spread=0.003, dtype=torch.float32)
    assert batch.text_hash is not None
    got = similarity_threshold(batch.key.detach(), batch.text_hash, None, 0.9).double()
    key = batch.key.detach().double()
    expected = dense_threshold(key, batch.text_hash, None, 0.9)
    mean = dense_threshold(key, batch.text_hash, None, -1.0) - (key @ key.T).mean()
    assert abs(got - expected) < 0.05 * mean + 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.05, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("clusters", [1, 2, 7])
def test_filter_never_leaves_out_more_than_a_tenth_of_the_pairs(spread: float, clusters: int) -> None:
    """An untrained text tower finds everything similar: the published rule alone would leave out all."""
    centres = rows(clusters, width=16, spread=10.0, seed=1).key.detach()[torch.arange(120) % clusters]
    text = F.normalize(centres + spread * rows(120, width=16, spread=10.0, seed=2).key.detach(), dim=-1)
    scale = torch.tensor(10.0, dtype=torch.float64)
    _, share = info_nce(text, text, scale, text_hash=torch.arange(120), similar_above=0.9)
    assert share <= 0.1


def test_published_threshold_rules_once_texts_have_spread_out() -> None:
    text = rows(200, width=64, spread=10.0).key.detach()
    text[1] = F.normalize(text[0] + 0.05 * text[2], dim=-1)
    assert similarity_threshold(text, torch.arange(200), None, 0.9) == pytest.approx(0.9)
    _, share = info_nce(text, text, torch.tensor(10.0).double(), text_hash=torch.arange(200), similar_above=0.9)
    assert share.item() == pytest.approx(2 / (200 * 199))


def test_memory_does_not_grow_with_the_square_of_the_rows() -> None:
    """Saved for the backward pass: embeddings and vectors, never a matrix of rows by rows."""
    sizes = {}
    for count in (64, 256):
        batch, saved = rows(count, texts=count, invalid=0.1), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            tiled(batch, 0.9, 16)
        sizes[count] = sum(saved)
    assert sizes[256] <= 4 * sizes[64]
