"""Ledger and ways against a naive oracle: dictionaries from token to set of patches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.parts.combine import drop, mask, merge, places, take, total
from winnow.reducer import Facts
from winnow.tokens import Ledger, Tokens
from winnow.ways import Padded, check_way, compact, gather_signal, pad, resolve, spread

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


class Naive:
    """One image: who holds what, as a dictionary."""

    def __init__(self, patches):
        self.patches = patches
        self.held = {t: {t} for t in range(patches)}

    def step(self, move):
        held = {}
        for token, place in enumerate(move):
            if place >= 0:
                held.setdefault(place, set()).update(self.held.get(token, set()))
        self.held = held

    def owner(self):
        owner = [-1] * self.patches
        for token, patches in self.held.items():
            for patch in patches:
                owner[patch] = token
        return owner


@st.composite
def histories(draw):
    """(batch, patches, [(moves [B, N], next n)]): any maps at all, onto or not, dropping or merging."""
    batch, patches = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    steps, n = [], patches
    for _ in range(draw(st.integers(1, 5))):
        m = draw(st.integers(1, n))
        place = st.integers(-1, m - 1)
        steps.append(([draw(st.lists(place, min_size=n, max_size=n)) for _ in range(batch)], m))
        n = m
    return batch, patches, steps


@settings(max_examples=200)
@given(histories(), st.data())
def test_steps_compose(history, data):
    batch, patches, steps = history
    ledger, naive = Ledger.start(batch, patches), [Naive(patches) for _ in range(batch)]
    for moves, n in steps:
        ledger = ledger.step(torch.tensor(moves), n)
        for image, move in zip(naive, moves):
            image.step(move)
        assert ledger.n == n and ledger.owner.dtype == torch.long
        assert ledger.owner.tolist() == [image.owner() for image in naive]
        sizes = [[len(image.held.get(t, ())) for t in range(n)] for image in naive]
        assert ledger.size().tolist() == sizes and ledger.size().dtype == torch.long
        firsts = [[min(image.held.get(t) or {patches}) for t in range(n)] for image in naive]
        assert ledger.first().tolist() == firsts
        assert ledger.counts().tolist() == [n] * batch
    fill = data.draw(st.sampled_from([0.0, -7.0, 2.5]))
    for shape in ((batch, ledger.n), (batch, ledger.n, 3)):
        x = torch.randn(shape)
        dense = ledger.dense(x, fill)
        assert dense.shape == (batch, patches, *shape[2:])
        for b, image in enumerate(naive):
            for p, owner in enumerate(image.owner()):
                wanted = x[b, owner] if owner >= 0 else torch.full_like(dense[b, p], fill)
                assert torch.equal(dense[b, p], wanted)


@given(histories(), st.integers(0, 5))
def test_composition_is_associative(history, cut):
    """Two ledgers one after the other are one ledger: the first's places are the second's patches."""
    batch, patches, steps = history
    whole, first = Ledger.start(batch, patches), Ledger.start(batch, patches)
    for moves, n in steps:
        whole = whole.step(torch.tensor(moves), n)
    cut = min(cut, len(steps))
    for moves, n in steps[:cut]:
        first = first.step(torch.tensor(moves), n)
    second = Ledger.start(batch, first.n)
    for moves, n in steps[cut:]:
        second = second.step(torch.tensor(moves), n)
    assert torch.equal(first.step(second.owner, second.n).owner, whole.owner)


def test_start():
    ledger = Ledger.start(2, 5)
    assert ledger.owner.tolist() == [[0, 1, 2, 3, 4]] * 2 and (ledger.n, ledger.valid) == (5, None)
    assert ledger.size().tolist() == [[1] * 5] * 2 and ledger.first().tolist() == ledger.owner.tolist()


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (2, 4, 3), (5,)])
def test_dense_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"needs one value per token, \[2, 5, ...\]; got"):
        Ledger.start(2, 5).dense(torch.zeros(shape) if len(shape) > 1 else torch.zeros(shape).unsqueeze(0))


def test_all_tokens_may_go():
    """Nothing is left, and nothing is left of nothing."""
    ledger = Ledger.start(2, 3).step(torch.full((2, 3), -1), 0)
    assert (ledger.owner.tolist(), ledger.size().shape) == ([[-1] * 3] * 2, (2, 0))
    assert ledger.step(torch.empty(2, 0, dtype=torch.long), 0).owner.tolist() == ledger.owner.tolist()
    assert ledger.dense(torch.empty(2, 0, 4), fill=7.0).tolist() == torch.full((2, 3, 4), 7.0).tolist()


def test_dense_is_differentiable():
    x = torch.randn(1, 2, 3, requires_grad=True)
    Ledger(torch.tensor([[0, 0, 1, -1, 1, 1]]), 2).dense(x).sum().backward()
    assert x.grad.tolist() == [[[2.0] * 3, [3.0] * 3]]


# ---- masking, padding, compacting, spreading


@st.composite
def masked(draw):
    """Tokens some of which were masked away once or twice, at least one real per image; and what each is worth."""
    batch, n = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    tokens = Tokens(torch.randn(batch, n, 2, generator=torch.Generator().manual_seed(n)), Ledger.start(batch, n))
    for _ in range(draw(st.integers(1, 2))):
        keep = torch.tensor([draw(st.lists(st.booleans(), min_size=n, max_size=n)) for _ in range(batch)])
        keep &= tokens.ledger.valid if tokens.ledger.valid is not None else True
        alive = tokens.ledger.valid if tokens.ledger.valid is not None else torch.ones_like(keep)
        keep |= (alive.int().cumsum(1) == 1) & alive & ~keep.any(1, keepdim=True)
        tokens = mask(tokens, keep)
    return tokens


def on_patches(tokens):
    """What every surviving patch carries."""
    return tokens.ledger.dense(tokens.x, float("nan"))


def same(a, b):
    return torch.equal(on_patches(a).nan_to_num(9e9), on_patches(b).nan_to_num(9e9))


@settings(max_examples=150)
@given(masked(), st.integers(1, 5))
def test_compact_keeps_the_real_ones_in_order(tokens, multiple):
    valid = tokens.ledger.valid
    assert tokens.ledger.counts().tolist() == valid.sum(1).tolist()
    assert ((tokens.ledger.size() > 0) == valid).all()
    n = -(-int(valid.sum(1).max()) // multiple) * multiple
    out = compact(tokens, n)
    assert out.n == n == out.x.shape[1] and same(out, tokens)
    assert out.ledger.counts().tolist() == valid.sum(1).tolist()
    assert ((out.ledger.size() > 0) == out.ledger.valid).all()
    for b in range(len(valid)):
        real = valid[b].nonzero().flatten()
        assert torch.equal(out.x[b, : len(real)], tokens.x[b, real])
        assert out.ledger.valid[b].tolist() == [i < len(real) for i in range(n)]
        first = out.ledger.first()[b, : len(real)]
        assert bool((first.diff() > 0).all())


@settings(max_examples=150)
@given(masked(), st.integers(1, 5))
def test_spread_is_compact_backwards(tokens, multiple):
    """Masked tokens, compacted to a common number and spread again, are where they were."""
    valid = tokens.ledger.valid
    n = int(valid.sum(1).min())
    keep = valid & (valid.cumsum(1) <= n)  # a common number per image, as static methods have
    common = mask(tokens, keep)
    small = compact(common, n)
    assert small.ledger.valid.all()
    wide = spread(replace(small, ledger=replace(small.ledger, valid=None)))
    assert torch.equal(wide.ledger.owner, common.ledger.owner) and torch.equal(wide.ledger.valid, keep)
    assert torch.equal(wide.x, common.x.masked_fill(~keep.unsqueeze(-1), 0))
    assert same(wide, small) and compact(wide, n).x.equal(small.x)


@given(st.integers(1, 20), st.integers(1, 9))
def test_pad(n, multiple):
    tokens = Tokens(torch.randn(2, n, 3), Ledger.start(2, n))
    out = pad(tokens, multiple)
    assert out.n % multiple == 0 and n <= out.n < n + multiple
    assert same(out, tokens) and torch.equal(out.x[:, :n], tokens.x)
    if out.n == n:
        assert out is tokens
    else:
        assert out.ledger.valid.tolist() == [[i < n for i in range(out.n)]] * 2
        assert out.ledger.counts().tolist() == [n, n] and not out.x[:, n:].any()
        assert compact(out, n).x.equal(tokens.x)


@given(masked())
def test_signals_follow_their_tokens(tokens):
    valid = tokens.ledger.valid
    n = int(valid.sum(1).min())
    here = torch.arange(tokens.n).expand_as(valid)
    wanted = torch.stack([row.nonzero().flatten()[:n] for row in valid])
    assert torch.equal(gather_signal(here, valid, n, 1), wanted)
    keys = here[:, None, :, None].expand(-1, 2, -1, 3)
    assert torch.equal(gather_signal(keys, valid, n, 2), wanted[:, None, :, None].expand(-1, 2, -1, 3))
    assert gather_signal(keys, None, n, 2) is keys


# ---- combining


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 10), st.data())
def test_merge_is_the_mean_of_the_patches(batch, n, data):
    x = torch.randn(batch, n, 2, dtype=torch.float64)
    tokens = Tokens(x, Ledger.start(batch, n))
    for _ in range(2):
        m = data.draw(st.integers(1, tokens.n))
        groups, moves = [], []
        for _ in range(batch):
            cell = data.draw(
                st.permutations([*range(m), *(data.draw(st.integers(0, m - 1)) for _ in range(tokens.n - m))])
            )
            names = {c: data.draw(st.sampled_from([i for i in range(tokens.n) if cell[i] == c])) for c in range(m)}
            groups.append([names[c] for c in cell])
            order = sorted(range(m), key=cell.index)
            moves.append([order.index(c) for c in cell])
        assert places(torch.tensor(groups)).tolist() == moves, "raster order of first members"
        tokens = merge(tokens, torch.tensor(groups), m)
    for b in range(batch):
        for t in range(tokens.n):
            held = (tokens.ledger.owner[b] == t).nonzero().flatten()
            torch.testing.assert_close(tokens.x[b, t], x[b, held].mean(0), atol=1e-6, rtol=0)


def test_half_precision_never_holds_a_large_sum():
    x = torch.full((1, 64, 1), 6e4, dtype=torch.float16)
    out = merge(Tokens(x, Ledger.start(1, 64)), torch.zeros(1, 64, dtype=torch.long), 1)
    assert out.x.item() == pytest.approx(6e4, rel=2e-3) and out.x.dtype == torch.float16


def test_take_drop_total():
    x = torch.randn(2, 5, 3)
    index = torch.tensor([[0, 4], [2, 3]])
    assert torch.equal(take(x, index), torch.stack([x[0, [0, 4]], x[1, [2, 3]]]))
    out = drop(Tokens(x, Ledger.start(2, 5)), index)
    assert out.ledger.owner.tolist() == [[0, -1, -1, -1, 1], [-1, -1, 0, 1, -1]]
    weight, move = torch.rand(2, 5), torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    wanted = [[sum(weight[b, i] * x[b, i] for i in range(5) if move[b, i] == m) for m in range(2)] for b in range(2)]
    torch.testing.assert_close(total(x, weight, move, 2), torch.stack([torch.stack(w) for w in wanted]))


def test_a_step_forgets_what_belonged_to_the_old_tokens():
    tokens = Tokens(torch.randn(1, 3, 2), Ledger.start(1, 3), (1, 3), torch.tensor([[2, 0, 1]]), torch.rand(1, 3))
    out = drop(tokens, torch.tensor([[0, 2]]))
    assert out.order is None and out.score is None and out.grid == (1, 3) and out.n == 2


# ---- which way


def test_ways():
    static, adaptive = Facts(), Facts(static=False)
    for way in ("auto", "masked", Padded(16)):
        assert check_way(way, static, "M") == check_way(way, adaptive, "M") == way
    assert check_way("static", static, "M") == "static"
    with pytest.raises(ValueError, match=r'M decides per image .* use way="masked" or way=Padded\(16\)'):
        check_way("static", adaptive, "M")
    with pytest.raises(ValueError, match='"packed" is not built yet'):
        check_way("packed", static, "M")
    for bad in ("fast", None, 16):
        with pytest.raises(ValueError, match='ways are "auto", "static", "masked" and'):
            check_way(bad, static, "M")
    assert resolve("auto", static, True) == resolve("auto", static, False) == "static"
    assert resolve("auto", adaptive, True) == "masked" and resolve("auto", adaptive, False) == Padded(16)
    assert resolve("masked", static, False) == "masked" and repr(Padded(16)) == "Padded(16)"
