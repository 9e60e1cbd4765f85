"""Every method against a naive oracle: plain loops over images and tokens, written from the papers' formulas."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

import winnow
from winnow import Below, Downsample, EViT, Exactly, Grid, Keep, NormThreshold, Padded, Pool, Random, Remove, ToMe, TopK
from winnow._noise import content_key, uniform
from winnow._parse import parse_way
from winnow.attention import attend, log_sizes, received, rows
from winnow.methods.grid import bayer
from winnow.reducer import Signals
from winnow.tokens import Ledger, Tokens

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


def fresh(x, grid=None):
    return Tokens(x, Ledger.start(*x.shape[:2]), grid)


def members(ledger):
    """For each image, the sorted patches of each token."""
    return [[(row == t).nonzero().flatten().tolist() for t in range(ledger.n)] for row in ledger.owner]


# ---- ToMe


def tome_oracle(tokens, sizes, keys, prefix, r):
    """One step for one image: lists of (features, size, patches) in the paper's order, prefix apart.

    The paper's sequence is [prefix, patches]; even places are A, odd places B; prefix tokens take no part.
    """
    n, metric = len(tokens), [keys[:, i].mean(0) for i in range(len(tokens))]
    metric = [m / m.norm() for m in metric]
    a = [i for i in range(n) if (i + prefix) % 2 == 0]
    b = [i for i in range(n) if (i + prefix) % 2 == 1]
    r = min(r, n // 2)
    if r <= 0:
        return tokens, sizes, [[i] for i in range(n)]
    best = {}
    for i in a:
        scores = [float(metric[i] @ metric[j]) for j in b]
        best[i] = (max(scores), b[scores.index(max(scores))])
    ranked = sorted(a, key=lambda i: -best[i][0])
    sources, rest = ranked[:r], ranked[r:]
    if prefix:
        rest = sorted(rest)
    groups = {i: [i] for i in (*rest, *b)}
    for i in sources:
        groups[best[i][1]].append(i)
    out, out_sizes = [], []
    for group in groups.values():
        weight = sum(sizes[i] for i in group)
        out.append(sum(sizes[i] * tokens[i] for i in group) / weight)
        out_sizes.append(weight)
    return out, out_sizes, list(groups.values())


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("n", [17, 24])
def test_tome_matches_and_merges(prefix, n):
    torch.manual_seed(n + prefix)
    r, depth, b = (5, 4, 3, 9), 4, 3
    x = torch.randn(b, n, 6, dtype=torch.float64)
    reducer = ToMe(r=r).build(depth, 6, 2, n, prefix)
    tokens = fresh(x)
    oracle = [([*image], [1] * n, [[i] for i in range(n)]) for image in x]
    for layer in range(depth):
        keys = torch.randn(b, 2, n, 4, dtype=torch.float64)  # one per original patch: each token's is its first patch's
        first = tokens.ledger.first()
        k = keys.gather(2, first[:, None, :, None].expand(-1, 2, -1, 4))
        tokens = reducer(tokens, Signals(k=k), layer)
        for image in range(b):
            features, sizes, patches = oracle[image]
            mine = torch.stack([keys[image, :, min(p)] for p in patches], 1)
            features, sizes, groups = tome_oracle(features, sizes, mine, prefix, r[layer])
            patches = [sorted(p for i in group for p in patches[i]) for group in groups]
            oracle[image] = features, sizes, patches

            emitted = tokens.order[image].tolist()
            held = members(tokens.ledger)[image]
            assert [held[i] for i in emitted] == patches, "the same groups in the paper's order"
            assert held == sorted(patches), "stored in raster order"
            assert [tokens.ledger.size()[image, i].item() for i in emitted] == sizes
            torch.testing.assert_close(tokens.x[image, emitted], torch.stack(features), atol=1e-6, rtol=0)
            for i in range(tokens.n):  # the features are the mean of the patches held
                mean = x[image, held[i]].mean(0)
                torch.testing.assert_close(tokens.x[image, i], mean, atol=1e-6, rtol=0)
    assert tokens.ledger.size().max() > 2, "a test of sizes needs sizes"


def test_tome_merges_at_most_half():
    reducer = ToMe(r=50).build(1, 4, 1, 200, 0)
    for n in (1, 2, 3, 10, 11):
        out = reducer(fresh(torch.randn(2, n, 4)), Signals(k=torch.randn(2, 1, n, 4)), 0)
        assert out.n == n - n // 2


@pytest.mark.parametrize(
    ("method", "depth", "wanted"),
    [
        (ToMe(r=16, inflect=-1.0), 12, [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]),
        (ToMe(r=13, inflect=1.0), 24, None),
        (ToMe(r=(7, 5)), 4, [7, 5, 0, 0]),
        (ToMe(r=3), 3, [3, 3, 3]),
    ],
    ids=repr,
)
def test_tome_amounts(method, depth, wanted):
    amounts = list(method.amounts(depth))
    assert len(amounts) == depth
    if wanted is None:
        assert (amounts[0], amounts[-1]) == (0, 25), "float truncation is part of the reference"
    else:
        assert amounts == wanted


@pytest.mark.parametrize("bad", [-1, True, 1.5, (), (2, -1), "8", (1, True)])
def test_tome_refuses_amounts(bad):
    with pytest.raises(ValueError, match="r is a whole number >= 0"):
        ToMe(r=bad)


def test_tome_refuses_inflect():
    with pytest.raises(ValueError, match="from -1 to 1"):
        ToMe(r=3, inflect=2)
    with pytest.raises(ValueError, match="either a tuple r or inflect"):
        ToMe(r=(3, 2), inflect=0.5)
    with pytest.raises(ValueError, match="needs the depth"):
        ToMe(r=3, inflect=0.5).count(10, 0)
    assert ToMe(r=[3, 2]) == ToMe(r=(3, 2))


# ---- EViT and TopK


def by_attention(tokens, cls_row, kept, fuse):
    """One image: (features, patches per token), kept tokens in raster order, the fused one where the first dropped was."""
    n, score = len(tokens), [float(cls_row[:, i].mean()) for i in range(len(tokens))]
    keep = sorted(sorted(range(n), key=lambda i: -score[i])[:kept])
    drop = [i for i in range(n) if i not in keep]
    parts = [(i, tokens[i], [i]) for i in keep]
    if fuse and drop:
        parts.append((drop[0], sum(score[i] * tokens[i] for i in drop), drop))
    parts.sort(key=lambda part: part[0])
    return torch.stack([part[1] for part in parts]), [part[2] for part in parts]


@pytest.mark.parametrize("fuse", [True, False, None], ids=["fuse", "drop", "topk"])
@pytest.mark.parametrize("keep", [Keep(0.7), Exactly(3), Remove(1), Keep(0.3, of="input")], ids=repr)
@pytest.mark.parametrize("attention", ["cls", "received"])
def test_attention_selection(fuse, keep, attention):
    b, n = 3, 20
    x, cls_row = torch.randn(b, n, 5, dtype=torch.float64), torch.rand(b, 2, n, dtype=torch.float64)
    if fuse is None:
        method = TopK(keep=keep, layers=(1,), attention=attention)
    else:
        method = EViT(keep=keep, layers=(1,), fuse=fuse, attention=attention)
    signals = Signals(cls_row=cls_row) if attention == "cls" else Signals(received=cls_row.mean(1))
    out = method.build(3, 5, 2, n, 1)(fresh(x), signals, 1)
    kept = keep.count(n, n)
    assert out.n == method.count(n, 1, n) == kept + int(bool(fuse) and kept < n)
    for image in range(b):
        features, patches = by_attention([*x[image]], cls_row[image], kept, bool(fuse))
        assert members(out.ledger)[image] == patches
        torch.testing.assert_close(out.x[image], features, atol=1e-12, rtol=0)


def test_evit_counts_of_the_paper():
    """64 patches at 0.7: 45, 32 dropped; 46, 34 with the fused token, which competes at the next site."""
    for fuse, wanted in ((False, [64, 64, 45, 32]), (True, [64, 64, 46, 34])):
        method = EViT(layers=(1, 2), fuse=fuse)
        n = [64]
        for layer in range(3):
            n.append(method.count(n[-1], layer, 64))
        assert n == wanted


def test_evit_keeping_all_fuses_nothing():
    tokens = fresh(torch.randn(2, 9, 4))
    for keep in (Keep(1.0), Exactly(9), Remove(0), Keep(0.95)):
        out = EViT(keep=keep, layers=(0,)).build(1, 4, 1, 9, 1)(tokens, Signals(cls_row=torch.rand(2, 1, 9)), 0)
        assert out is tokens


def test_scores_are_for_those_who_watch():
    for method in (EViT(layers=(0,)), EViT(layers=(0,), fuse=False), TopK(layers=(0,)), ToMe(r=2), Grid(layers=(0,))):
        tokens, row = fresh(torch.randn(2, 9, 4), (3, 3)), torch.rand(2, 1, 9)
        for watched in (True, False):
            signals = Signals(cls_row=row, k=torch.randn(2, 1, 9, 4), watched=watched)
            out = method.build(1, 4, 1, 9, 1)(tokens, signals, 0)
            assert (out.score is not None) == watched
            if watched:
                assert out.score.shape == (2, 9)
                if "cls_attention" in method.facts.needs:
                    torch.testing.assert_close(out.score, row[:, 0])


# ---- NormThreshold


def test_norm_threshold():
    x = torch.randn(4, 30, 7) * torch.tensor([0.5, 1.0, 2.0, 4.0]).view(4, 1, 1)
    valid = torch.ones(4, 30, dtype=torch.bool)
    valid[:, 25:] = False
    valid[1, :10] = False
    start = Ledger.start(4, 30)
    owner = start.owner.masked_fill(~valid, -1)
    for below in (Below(2.5), Below(1.1, of="mean"), Below(100.0), Below(0.0)):
        out = NormThreshold(below=below, before=(0,)).build(1, 7, 1, 30, 0)(
            Tokens(x, Ledger(owner, 30, valid)), Signals(), 0
        )
        for image in range(4):
            real = [i for i in range(30) if valid[image, i]]
            norms = {i: math.sqrt(sum(float(v) ** 2 for v in x[image, i])) for i in real}
            limit = below.limit if below.of == "value" else below.limit * sum(norms.values()) / len(norms)
            kept = [i for i in real if norms[i] > limit] or [max(real, key=lambda i: norms[i])]
            assert out.ledger.valid[image].nonzero().flatten().tolist() == kept
            assert [p for p in range(30) if out.ledger.owner[image, p] >= 0] == kept
            assert out.ledger.owner[image, kept].tolist() == kept
        assert torch.equal(out.x, x) and out.n == 30


def small_vit(**words):
    words = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 3, **words}
    torch.manual_seed(words.pop("seed", 0))
    model = VisionTransformer(**words)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model.eval()


def test_quantiles_are_calibrated_site_by_site():
    model, method = (
        small_vit(),
        NormThreshold(below=(Below(0.25, of="quantile"), Below(0.5, of="quantile")), before=(1, 3)),
    )
    batches = [torch.randn(8, 3, 32, 32) for _ in range(3)]
    winnow.reduce(model, method)
    with pytest.raises(ValueError, match=r"run winnow.calibrate\(model, batches\) first"):
        model(batches[0])
    assert winnow.calibrate(model.train(), iter(batches)) is model and model.training
    model.eval()
    counts = []
    for batch in batches:
        with torch.no_grad(), winnow.watch(model) as run:
            model(batch)
        counts.append(run.valid_counts)
    total = torch.cat(counts).sum(0)  # entering, after block 0, 1, 2, 3
    assert total[0] == 24 * 16
    assert total[1] == total[2] == 24 * 16 * 3 // 4, "a quarter of all tokens is at or below the limit"
    assert total[3] == total[4] == total[1] // 2
    assert all(torch.isfinite(limit) for limit in winnow.reducer_of(model).limits)
    assert "reducer.limits" in model.state_dict()


def test_calibrate_refuses():
    model = small_vit()
    with pytest.raises(ValueError, match="is not reduced"):
        winnow.calibrate(model, [torch.randn(1, 3, 32, 32)])
    winnow.reduce(model, NormThreshold(before=(1,)))
    with pytest.raises(ValueError, match="nothing to calibrate"):
        winnow.calibrate(model, [torch.randn(1, 3, 32, 32)])
    winnow.restore(model)
    winnow.reduce(model, NormThreshold(below=Below(0.5, of="quantile"), before=(1,)))
    with pytest.raises(ValueError, match="at least one batch"):
        winnow.calibrate(model, [])


# ---- Random


def kept_by_random(images, m, seed=0, n=64):
    method = Random(keep=Exactly(m), layers=(0,), seed=seed)
    noise = uniform(content_key(images), 0 + 64 * method.seed * 1_000_003, n)
    return method.build(1, 4, 1, n, 1)(fresh(torch.zeros(len(images), n, 4)), Signals(noise=noise), 0).ledger.owner >= 0


def test_random_is_uniform():
    images = torch.randn(4000, 3, 8, 8)
    kept = kept_by_random(images, 16).float()
    assert bool((kept.sum(1) == 16).all())
    rate, sd = kept.mean(0), math.sqrt(0.25 * 0.75 / 4000)
    assert float((rate - 0.25).abs().max()) < 4.5 * sd, "each patch is kept about equally often"
    both = (kept.T @ kept / 4000).fill_diagonal_(16 * 15 / (64 * 63))
    assert float((both - 16 * 15 / (64 * 63)).abs().max()) < 5.5 * math.sqrt(0.0595 * 0.94 / 4000), "no pair is tied"


def test_random_hangs_on_the_image_the_seed_and_the_layer():
    model, images = small_vit(depth=3), torch.randn(4, 3, 32, 32)

    def owners(method, batch):
        with torch.no_grad(), winnow.reduced(model, method), winnow.watch(model) as run:
            model(batch)
        return run

    method = Random(keep=Keep(0.5), layers=(0, 1))
    first = owners(method, images).ledger.owner
    assert torch.equal(first, owners(method, images).ledger.owner)
    assert torch.equal(first.flip(0), owners(method, images.flip(0)).ledger.owner)
    assert torch.equal(first[2:3], owners(method, images[2:3]).ledger.owner)
    assert len({tuple(row.tolist()) for row in first}) == 4, "other images, other draws"
    assert not torch.equal(first, owners(Random(keep=Keep(0.5), layers=(0, 1), seed=1), images).ledger.owner)
    once = owners(Random(keep=Exactly(8), layers=(0,)), images).ledger.owner
    later = owners(Random(keep=Exactly(8), layers=(1,)), images).ledger.owner
    assert not torch.equal(once, later), "another site, another draw"


def test_random_draws_anew_at_each_training_step():
    model, images = small_vit(), torch.randn(2, 3, 32, 32)
    winnow.reduce(model.train(), Random(keep=Keep(0.5), layers=(1,)))
    owners = []
    for step in (0, 0, 1):
        winnow.reducer_of(model).step = step
        with winnow.watch(model) as run:
            model(images)
        owners.append(run.ledger.owner)
    assert torch.equal(owners[0], owners[1]) and not torch.equal(owners[0], owners[2])


def test_noise_is_uniform_between_0_and_1():
    noise = uniform(torch.arange(100), 7, 1000)
    assert float(noise.min()) >= 0 and float(noise.max()) < 1
    assert abs(float(noise.mean()) - 0.5) < 0.005
    assert float(torch.histc(noise, 10, 0, 1).sub(10_000).abs().max()) < 450
    assert not torch.equal(uniform(torch.arange(2), 7, 8), uniform(torch.arange(2), 8, 8))


# ---- Grid


def kept_by_grid(h, w, m):
    reducer = Grid(keep=Exactly(m), layers=(0,)).build(1, 4, 1, h * w, 1)
    out = reducer(fresh(torch.zeros(1, h * w, 4), (h, w)), Signals(), 0)
    return (out.ledger.owner[0] >= 0).view(h, w)


@pytest.mark.parametrize(("h", "w"), [(8, 8), (14, 14), (16, 8), (6, 10)])
def test_a_quarter_is_every_second_in_each_direction(h, w):
    kept = kept_by_grid(h, w, math.ceil(h / 2) * math.ceil(w / 2))
    assert kept[::2, ::2].all() and kept.sum() == len(kept[::2, ::2].flatten())


@pytest.mark.parametrize("m", [1, 2, 3, 5, 9, 16, 21, 32, 33, 47, 63])
def test_grid_is_evenly_spread(m):
    kept = kept_by_grid(8, 8, m).int()
    assert kept.sum() == m
    for cells in (2, 4):
        counts = kept.unflatten(0, (cells, -1)).unflatten(2, (cells, -1)).sum((1, 3))
        assert int(counts.max() - counts.min()) <= 1, f"{m} on {cells} x {cells}: {counts.tolist()}"
    assert bool((kept_by_grid(8, 8, max(1, m - 1)).int() <= kept).all()), "nested"


@pytest.mark.parametrize("m", [1, 20, 49, 98, 131, 190])
def test_grid_on_a_grid_that_is_no_power_of_two(m):
    kept = kept_by_grid(14, 14, m)
    assert kept.sum() == m
    counts = kept.int().unflatten(0, (7, 2)).unflatten(2, (7, 2)).sum((1, 3))
    assert int(counts.max() - counts.min()) <= 1, counts.tolist()
    quarters = kept.int().unflatten(0, (2, 7)).unflatten(2, (2, 7)).sum((1, 3))
    assert float((quarters - m / 4).abs().max()) <= 4, quarters.tolist()  # rows 0, 2, .. 12: four above, three below


def test_bayer_is_a_permutation_on_a_square_power_of_two():
    assert sorted(bayer(8, 8).tolist()) == list(range(64))
    assert len(set(bayer(5, 9).tolist())) == 45


# ---- Pool


@pytest.mark.parametrize(
    ("h", "w", "out"), [(8, 8, (4, 4)), (8, 8, (2, 2)), (6, 12, (3, 6)), (12, 4, (6, 2)), (9, 9, (3, 3))]
)
def test_pool_is_adaptive_average_pooling(h, w, out):
    x = torch.randn(2, h * w, 5)
    m = out[0] * out[1]
    got = Pool(keep=Exactly(m), layers=(0,)).build(1, 5, 1, h * w, 1)(fresh(x, (h, w)), Signals(), 0)
    wanted = F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, (h, w)), out).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got.x, wanted, atol=1e-6, rtol=0)
    assert bool((got.ledger.size() == h * w // m).all())


@settings(max_examples=150)
@given(st.integers(1, 15), st.integers(1, 15), st.data())
def test_pool_meets_every_count(h, w, data):
    m = data.draw(st.integers(1, h * w))
    x = torch.arange(h * w, dtype=torch.float64).view(1, -1, 1)
    out = Pool(keep=Exactly(m), layers=(0,)).build(1, 1, 1, h * w, 1)(fresh(x, (h, w)), Signals(), 0)
    assert out.n == m and int(out.ledger.size().min()) >= 1 and int(out.ledger.owner.min()) >= 0
    for patches, value in zip(members(out.ledger)[0], out.x[0, :, 0]):
        assert float(value) == pytest.approx(sum(patches) / len(patches))
        rows_, columns = {p // w for p in patches}, {p % w for p in patches}
        assert len(patches) == len(rows_) * len(columns), "a cell is a rectangle"
        assert max(rows_) - min(rows_) == len(rows_) - 1 and max(columns) - min(columns) == len(columns) - 1


def test_pool_over_several_sites_weighs_by_size():
    x = torch.randn(1, 64, 3, dtype=torch.float64)
    reducer = Pool(keep=(Exactly(16), Exactly(4)), layers=(0, 1)).build(2, 3, 1, 64, 1)
    out = reducer(reducer(fresh(x, (8, 8)), Signals(), 0), Signals(), 1)
    wanted = F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, (8, 8)), (2, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(out.x, wanted)
    odd = Pool(keep=(Exactly(33), Exactly(7)), layers=(0, 1)).build(2, 3, 1, 64, 1)
    out = odd(odd(fresh(x, (8, 8)), Signals(), 0), Signals(), 1)
    for patches, value in zip(members(out.ledger)[0], out.x[0]):
        torch.testing.assert_close(value, x[0, patches].mean(0))


# ---- Downsample


@pytest.mark.parametrize(("grid", "size", "small"), [((4, 4), 24, (3, 3)), ((4, 4), 8, (1, 1)), ((4, 6), 16, (2, 3))])
def test_downsample_owner_is_the_cell_that_covers_the_centre(grid, size, small):
    method = Downsample(size)
    assert method.grid(grid, (8, 8)) == small
    ledger = method.build(1, 4, 1, 16, 1).ledger(2, grid, small, torch.device("cpu"))
    for p, owner in enumerate(ledger.owner[0].tolist()):
        y, x = (p // grid[1] + 0.5) / grid[0], (p % grid[1] + 0.5) / grid[1]
        assert owner == int(y * small[0]) * small[1] + int(x * small[1])
    assert ledger.n == small[0] * small[1] and ledger.owner.shape == (2, grid[0] * grid[1])


@pytest.mark.parametrize("size", [8, 16, 24])
def test_downsample_equals_a_model_made_for_the_smaller_image(size):
    model, images = small_vit(), torch.randn(2, 3, 32, 32)
    small = copy.deepcopy(model)
    small.set_input_size(img_size=size)
    resized = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)
    with torch.no_grad(), winnow.reduced(model, Downsample(size)), winnow.watch(model) as run:
        torch.testing.assert_close(model(images), small(resized), atol=1e-5, rtol=1e-5)
    assert run.counts == [(size // 8) ** 2] * 5
    assert run.ledger.dense(torch.arange(run.ledger.n).float().expand(2, -1)).shape == (2, 16)


def test_downsample_to_its_own_size_changes_nothing():
    model, images = small_vit(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images)
        with winnow.reduced(model, Downsample(32)):
            assert torch.equal(model(images), plain)


def test_downsample_refuses():
    for bad in (0, -8, True, 1.5, "16"):
        with pytest.raises(ValueError, match="whole number from 1"):
            Downsample(bad)
    with pytest.raises(ValueError, match=r"multiple of the patch size 8, e\.g\. 16 or 24"):
        winnow.reduce(small_vit(), Downsample(20))
    with pytest.raises(ValueError, match="this batch is empty"):
        winnow.reduce(small_vit(), Downsample(16))(torch.zeros(0, 3, 32, 32))
    with pytest.raises(ValueError, match="own input is 32 pixels"):
        winnow.reduce(small_vit(), Downsample(40))


# ---- attention


def some(b=2, h=3, n=7, d=5):
    return (torch.randn(b, h, n, d, dtype=torch.float64) for _ in range(3))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_token_of_size_s_counts_as_s_keys(scale):
    q, k, v = some()
    sizes = torch.tensor([[1, 2, 1, 5, 1, 3, 1], [4, 1, 1, 1, 1, 2, 9]])
    bias = sizes.float().log()
    wanted = []
    for image in range(2):
        times = sizes[image]
        more_k, more_v = (t[image].repeat_interleave(times, dim=1) for t in (k, v))
        wanted.append(F.scaled_dot_product_attention(q[image], more_k, more_v, scale=scale))
    for path in ("mask", "channel", "math", "auto"):
        got = attend(q, k, v, bias, scale=scale, path=path)
        torch.testing.assert_close(got, torch.stack(wanted), atol=1e-6, rtol=1e-6, msg=path)


@pytest.mark.parametrize("path", ["mask", "math", "auto"])
def test_padding_is_not_attended_to(path):
    q, k, v = some()
    bias = torch.zeros(2, 7)
    bias[0, 5:] = -math.inf
    got = attend(q, k, v, bias, path=path)
    torch.testing.assert_close(got[:1], attend(q[:1], k[:1, :, :5], v[:1, :, :5]))
    torch.testing.assert_close(got[1:], attend(q[1:], k[1:], v[1:]))


def test_without_bias_it_is_the_hosts_own_call():
    q, k, v = some()
    assert torch.equal(attend(q, k, v, scale=0.2), F.scaled_dot_product_attention(q, k, v, scale=0.2))
    torch.testing.assert_close(attend(q, k, v, path="math"), attend(q, k, v))


def test_values_of_another_width_in_the_channel():
    q, k, _ = some()
    v, bias = torch.randn(2, 3, 7, 4, dtype=torch.float64), torch.rand(2, 7)
    torch.testing.assert_close(
        attend(q, k, v, bias, path="channel"), attend(q, k, v, bias, path="math"), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("n", [3, 64, 65, 150])
def test_received_attention_in_chunks(n):
    q, k, _ = some(n=n)
    bias = torch.rand(2, n)
    bias[0, n // 2 :] = -math.inf
    logits = q * 5**-0.5 @ k.transpose(2, 3) + bias[:, None, None]
    real = bias > -math.inf
    wanted = torch.stack([logits[i].softmax(-1).mean(0)[real[i]].mean(0) for i in range(2)])
    torch.testing.assert_close(received(q, k, bias), wanted.float(), atol=1e-6, rtol=1e-5)
    plain = (q * 0.4 @ k.transpose(2, 3)).softmax(-1).mean((1, 2))
    torch.testing.assert_close(received(q, k, None, 0.4), plain.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(received(q, k, bias).sum(1), torch.ones(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows(q[:, :, :1], k, bias), logits.softmax(-1)[:, :, :1].float(), atol=1e-6, rtol=1e-5)


def test_log_sizes():
    owner = torch.tensor([[0, 0, 1, 2, 2, 2], [0, 1, 1, 1, -1, 2]])
    ledger = Ledger(owner, 3)
    wanted = torch.tensor([[0.0, 2, 1, 3], [0, 1, 3, 1]])
    wanted[:, 1:] = wanted[:, 1:].log()
    torch.testing.assert_close(log_sizes(ledger, 1, True), wanted)
    assert log_sizes(ledger, 1, False) is None
    assert log_sizes(Ledger.start(2, 6), 1, True) is None, "all sizes are 1"
    valid = torch.tensor([[True, True, True], [True, False, True]])
    inf = -math.inf
    assert log_sizes(Ledger(owner, 3, valid), 2, False).tolist() == [[0] * 5, [0, 0, 0, inf, 0]]
    sized = log_sizes(Ledger(owner.masked_fill((owner == 1) & ~valid[:, 1:2], -1), 3, valid), 0, True)
    torch.testing.assert_close(sized, torch.tensor([[2.0, 1, 3], [1, 0, 1]]).log())


# ---- amounts


share = st.floats(1e-6, 1)
amounts = st.one_of(
    st.builds(Keep, share),
    st.builds(Keep, share, st.just("input")),
    st.builds(Remove, st.integers(0, 300)),
    st.builds(Exactly, st.integers(1, 300)),
)


@given(amounts, st.integers(1, 300), st.integers(1, 600))
def test_amounts_leave_at_least_one_and_never_more(amount, n, patches):
    m = amount.count(n, patches)
    assert isinstance(m, int) and 1 <= m <= n
    assert amount.count(n + 1, patches) >= m, "monotone"


@given(share, st.integers(1, 2000))
def test_keep_rounds_up(part, n):
    m = Keep(part).count(n)
    assert m >= part * n - 1e-6 and m < part * n + 1
    assert Keep(part, of="input").count(n, n) == m


@pytest.mark.parametrize(
    ("part", "n", "wanted"),
    [
        (0.07, 100, 7),
        (0.55, 100, 55),
        (0.28, 25, 7),
        (0.7, 10, 7),
        (0.7, 64, 45),
        (0.29, 100, 29),
        (1.0, 5, 5),
        (1e-6, 5, 1),
    ],
)
def test_keep_is_not_fooled_by_floats(part, n, wanted):
    assert Keep(part).count(n) == wanted


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Keep(0), "Keep(0): a number from 1e-09 to 1 is needed"),
        (lambda: Keep(1.5), "a number"),
        (lambda: Keep(True), "a number"),
        (lambda: Keep(float("nan")), "a number"),
        (lambda: Keep("0.5"), "a number"),
        (lambda: Keep(0.5, of="depth"), 'of must be "site" or "input"'),
        (lambda: Remove(-1), "a whole number from 0 is needed"),
        (lambda: Remove(2.0), "a whole number"),
        (lambda: Remove(True), "a whole number"),
        (lambda: Exactly(0), "a whole number from 1 is needed"),
        (lambda: Below(-1.0), "a number from 0 is needed"),
        (lambda: Below(1.5, of="quantile"), "a number from 0 to 1"),
        (lambda: Below(1.5, of="median"), 'of must be "value", "mean" or "quantile"'),
        (lambda: Padded(0), "a whole number from 1"),
        (lambda: Padded(True), "a whole number from 1"),
        (lambda: EViT(keep=(Keep(0.5), Keep(0.5)), layers=(1, 2, 3)), "2 values of keep for 3 sites (1, 2, 3)"),
        (lambda: EViT(layers=()), "a tuple of block numbers is needed"),
        (lambda: EViT(layers=(3, 1)), "distinct, ascending"),
        (lambda: EViT(layers=(1, 1)), "distinct, ascending"),
        (lambda: EViT(layers=(-1, 1)), "not negative"),
        (lambda: TopK(layers=True), "a tuple of block numbers"),
        (lambda: TopK(attention="keys"), 'attention must be "cls" or "received"'),
        (lambda: Grid(at="start"), 'at must be "block", "input" or "tower"'),
        (lambda: Grid(at="input", layers=(1,)), "acts once; layers=(1,) goes with"),
        (lambda: NormThreshold(below=(Below(1.0),), before=(1, 2)), "1 values of below for 2 sites"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: EViT(keep=0.7),
        lambda: TopK(keep=(Keep(0.5), 0.7, Keep(0.1))),
        lambda: NormThreshold(below=0.5),
        lambda: Pool(keep=Below(1.0)),
    ],
)
def test_bare_numbers_are_no_amounts(call):
    with pytest.raises(TypeError, match=r"is needed, e\.g\. (keep=Keep|below=Below)"):
        call()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Grid(keep=Exactly(17), layers=(0,)), "Exactly(17) is impossible where 16 tokens enter: at most Exactly(16)"),
        (Grid(keep=Remove(16), layers=(0,)), "Remove(16) is impossible where 16 tokens enter: at most Remove(15)"),
        (ToMe(r=9), "at most half of them find a partner, r <= 8"),
        (ToMe(r=(1, 1, 1, 1, 1)), "gives r for 5 blocks, the model has 4"),
        (TopK(layers=(1, 4)), "names layer 4, the model has blocks 0 to 3"),
    ],
    ids=repr,
)
def test_amounts_impossible_at_the_first_site_are_refused(method, message):
    with pytest.raises(ValueError) as caught:
        winnow.reduce(small_vit(), method)
    assert message in str(caught.value)


def test_later_sites_and_other_inputs_clamp():
    model = small_vit(dynamic_img_size=True)
    winnow.reduce(model, Grid(keep=(Exactly(12), Exactly(14), Remove(100)), layers=(0, 1, 2)))
    for side, wanted in ((32, [16, 12, 12, 1, 1]), (24, [9, 9, 9, 1, 1])):
        with torch.no_grad(), winnow.watch(model) as run:
            model(torch.randn(1, 3, side, side))
        assert run.counts == wanted


# ---- spellings


@st.composite
def methods(draw):
    layers = tuple(sorted(draw(st.sets(st.integers(0, 11), min_size=1, max_size=4))))
    keep = draw(st.one_of(amounts, st.tuples(*[amounts] * len(layers))))
    at = draw(st.sampled_from(["block", "input"]))
    place = {"keep": keep, "layers": layers} if at == "block" else {"keep": draw(amounts), "at": "input"}
    limits = st.one_of(
        st.builds(Below, st.floats(0, 50), st.sampled_from(["value", "mean"])),
        st.builds(Below, share, st.just("quantile")),
    )
    return draw(
        st.sampled_from(
            [
                ToMe(r=draw(st.integers(0, 30)), inflect=draw(st.floats(-1, 1)), proportional=draw(st.booleans())),
                ToMe(r=tuple(draw(st.lists(st.integers(0, 30), min_size=1, max_size=5)))),
                EViT(
                    keep=keep,
                    layers=layers,
                    fuse=draw(st.booleans()),
                    attention=draw(st.sampled_from(["cls", "received"])),
                ),
                TopK(keep=keep, layers=layers, attention=draw(st.sampled_from(["cls", "received"]))),
                NormThreshold(below=draw(st.one_of(limits, st.tuples(*[limits] * len(layers)))), before=layers),
                Random(**place, seed=draw(st.integers(0, 10**6))),
                Grid(**place),
                Pool(**place, proportional=draw(st.booleans())),
                Downsample(size=draw(st.integers(1, 1000))),
            ]
        )
    )


@settings(max_examples=300)
@given(methods())
def test_spellings_round_trip(method):
    text = repr(method)
    again = winnow.parse(text)
    assert again == method and hash(again) == hash(method) and repr(again) == text
    assert type(again) is type(method)
    spaced = winnow.parse(f"  {text.replace('(', '( ').replace('=', ' = ')} ")
    assert spaced == method


@pytest.mark.parametrize(
    ("whole", "real"), [(np.int64, np.float32), (np.array, np.array), (torch.tensor, torch.tensor)]
)
def test_other_libraries_numbers_are_pythons(whole, real):
    """In lists, too, which become tuples: settings are hashed and spelled."""
    half, eight, one = real(0.5), whole(8), whole(1)
    spelled = {
        ToMe(r=eight, inflect=half): "ToMe(inflect=0.5)",
        ToMe(r=[eight, one], proportional=np.bool_(False)): "ToMe(r=(8, 1), proportional=False)",
        TopK(keep=[Keep(half), Keep(0.25)], layers=[one, 2]): "TopK(keep=(Keep(0.5), Keep(0.25)), layers=(1, 2))",
        winnow.DRIP(rate=(half,), after=(one,)): "DRIP(rate=(0.5,), after=(1,))",
        EViT(keep=Exactly(eight)): "EViT(keep=Exactly(8))",
        Downsample(size=eight): "Downsample(size=8)",
    }
    for method, text in spelled.items():
        assert repr(method) == text and winnow.parse(text) == method and hash(winnow.parse(text)) == hash(method)
    assert Padded(eight) == Padded(8)


@given(methods())
def test_repr_omits_exactly_the_defaults(method):
    default = type(method)()
    for field in dataclasses.fields(method):
        said = f"{field.name}=" in repr(method).split("(", 1)[1]
        differs = getattr(method, field.name) != getattr(default, field.name)
        nested = field.name == "of"
        assert said == differs or nested


def test_positional_and_bare_spellings():
    assert winnow.parse("ToMe") == winnow.parse("ToMe()") == ToMe() and repr(ToMe()) == "ToMe()"
    assert winnow.parse("ToMe(13)") == ToMe(r=13)
    assert winnow.parse("EViT(Keep(0.5), (1, 2))") == EViT(keep=Keep(0.5), layers=(1, 2))
    assert winnow.parse("EViT(keep=[Keep(0.5), Exactly(3)], layers=[1, 2])") == EViT(
        keep=(Keep(0.5), Exactly(3)), layers=(1, 2)
    )
    assert winnow.parse("Grid(layers=4)") == Grid(layers=(4,))
    assert winnow.parse("ToMe(8, -1.0)") == ToMe(r=8, inflect=-1.0)
    for way in ("auto", "masked", "static", Padded(16)):
        assert parse_way(str(way)) == way


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ToMee(r=8)", "did you mean ToMe?"),
        ("Foo(r=8)", "known: ToMe, PiToMe, EViT"),
        ("ToMe(q=8)", "ToMe has no field 'q'; fields: r, inflect, proportional"),
        ("ToMe(8, r=8)", "ToMe: r is given twice"),
        ("ToMe(r=8, r=9)", "ToMe: r is given twice"),
        ("ToMe(1, 0.0, True, 4)", "at most 3 values: r, inflect, proportional"),
        ("ToMe(r=8", "a method is written like ToMe(r=8)"),
        ("", "a method is written like ToMe(r=8)"),
        ("Keep(0.7)", "is not a method; methods: ToMe, PiToMe, EViT"),
        ("8", "is not a method"),
        ("EViT(keep=0.7)", "Keep or Remove or Exactly is needed, e.g. keep=Keep(0.7)"),
        ("EViT(keep=Keep())", "missing 1 required positional argument"),
        ("ToMe(r=__import__('os').getpid())", "only plain names may be called"),
        ("ToMe(r=open('x'))", "unknown name 'open'"),
        ("ToMe(r=4 * 2)", "numbers, strings, tuples and amounts only"),
        ("ToMe(r=[i for i in (1, 2)])", "numbers, strings, tuples and amounts only"),
        ("ToMe(*[8])", "no * or ** here"),
        ("ToMe(**{'r': 8})", "no * or ** here"),
        ("ToMe(r=-8)", "r is a whole number >= 0"),
    ],
)  # fmt: skip
def test_wrong_spellings_say_what_would_work(text, message):
    with pytest.raises(ValueError) as caught:
        winnow.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
